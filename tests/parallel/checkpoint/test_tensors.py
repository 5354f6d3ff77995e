"""Our safetensors stream is the library's format."""

import pytest
import torch
from safetensors.torch import load

from turnout.parallel.checkpoint.tensors import DTYPES, header, stream


def example(dtype):
    if dtype == torch.bool:
        return torch.tensor([[True, False, True]])
    return torch.arange(6).to(dtype).view(2, 3)


def test_every_type_and_shape_comes_back_through_the_library():
    tensors = {name: example(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        'a "quoted" ü': torch.ones(1),
    }
    raw = b"".join(bytes(part) for part in stream(tensors, header(tensors)))
    back = load(raw)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    assert int.from_bytes(raw[:8], "little") % 8 == 0


@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(3)}])
def test_nothing_is_added(tensors):
    raw = b"".join(bytes(part) for part in stream(tensors, header(tensors)))
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + 12 * len(tensors)
