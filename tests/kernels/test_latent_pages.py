"""Attention over pages of latents, whose values are the keys' first numbers."""

import pytest
import torch

from turnout.kernels.reference.attention import paged_attention as reference
from turnout.kernels.torch_ops.attention import paged_attention


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_values_are_the_keys_first_numbers_and_stale_pages_are_not_read(kept):
    generator = torch.Generator().manual_seed(0)
    pages = torch.full((6, 4, 1, 7), float("nan"), dtype=kept)
    tables, lengths, cu = torch.tensor([[2, 4, 0], [5, 1, 3]]), torch.tensor([6, 9]), torch.tensor([0, 3, 4])
    for table, length in zip(tables, lengths, strict=True):
        for at in range(length):
            pages[table[at // 4], at % 4] = torch.randn(1, 7, generator=generator)
    q = torch.randn(4, 3, 7, generator=generator)
    found = paged_attention(q, pages, pages[..., :5], tables, lengths, cu, scale=0.3)
    apart = paged_attention(q, pages, pages[..., :5].clone(), tables, lengths, cu, scale=0.3)
    wanted = reference(q, pages, pages[..., :5], tables, lengths, cu, scale=0.3)
    assert torch.equal(found, apart)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
