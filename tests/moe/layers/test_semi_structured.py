"""Matrices of two numbers in every four: which they are, what torch keeps of them, and that layers compute the same.

The sparse product needs a GPU. On a CPU torch's own conversions pack and unpack, and the product is written out.
"""

import copy
from typing import Any

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from turnout import ConfigError
from turnout.moe import Decoder, ModelConfig, MoEConfig
from turnout.moe.layers.linear import Linear
from turnout.moe.layers.quantized import matrices
from turnout.moe.layers.semi_structured import (
    SemiStructuredLinear,
    check_device,
    padded,
    skip_zeros,
    two_of_four,
)
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.init import init_weights

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BF16 = torch.bfloat16


class Packed(SparseSemiStructuredTensorCUTLASS):
    """As torch packs it for CUTLASS; its product unpacks it."""

    @classmethod
    def of(cls, w_FD: torch.Tensor) -> "Packed":
        packed, meta = sparse_semi_structured_from_dense_cutlass(w_FD)
        return cls(w_FD.shape, packed, meta, None, None, None)

    def _mm(self, B: torch.Tensor, *, bias: Any = None, should_transpose_dense: bool = False, **_: Any) -> torch.Tensor:
        x_TD = B if should_transpose_dense else B.mT
        y_TF = torch.nn.functional.linear(x_TD, self.to_dense(), bias)
        return y_TF if should_transpose_dense else y_TF.mT


def pruned(*shape: int) -> torch.Tensor:
    """Random numbers, two of any four neighbours zero, whichever; some fours hold one number, or none."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    quads = torch.nn.functional.pad(w, (0, -shape[-1] % 4)).unflatten(-1, (-1, 4))
    quads = quads.where(torch.rand(quads.shape).argsort(-1).argsort(-1) < 2, 0.0)
    quads[0, 0], quads[-1, -1, :3] = 0.0, 0.0
    return quads.flatten(-2)[..., : shape[-1]]


def linear(F: int, D: int, bias: bool = False) -> Linear:
    made = Linear(D, F, bias=bias, dtype=BF16).requires_grad_(False)
    made.weight.copy_(pruned(F, D))
    return made


def test_two_of_four_is_counted_from_the_start_of_each_row():
    assert two_of_four(pruned(5, 64))
    assert two_of_four(torch.tensor([[0.0, 0, 1, 2, 3, 4, 0, -0.0]]))
    assert not two_of_four(torch.tensor([[0.0, 1, 2, 3, 4, 0, 0, 0]])), "three in the first four"
    one = pruned(5, 64)
    one[4, 60:] = torch.tensor([1.0, 0.0, 1e-30, torch.nan])
    assert not two_of_four(one)
    assert two_of_four(torch.ones(3, 2)), "what lacks to a four is zero"
    assert not two_of_four(torch.ones(3, 7))


@pytest.mark.parametrize(("F", "D"), [(32, 64), (64, 192), (1, 4), (37, 100), (224, 66)])
def test_what_torch_packs_is_what_it_unpacks_and_the_matrix_lies_in_it(F, D):
    layer = SemiStructuredLinear(whole := linear(F, D), Packed.of)
    dense = layer.stored.to_dense()
    assert torch.equal(dense, padded(whole.weight))
    assert torch.equal(dense[:F, :D], whole.weight)
    assert not dense[F:].any()
    assert not dense[:, D:].any()
    held = sum(part.nbytes for part in layer.state_dict().values())
    assert held == dense.nbytes * 9 // 16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("T", "F", "D"), [(0, 32, 64), (1, 32, 64), (7, 37, 100), (65, 64, 66)])
def test_a_layer_computes_what_the_whole_one_does(T, F, D, bias):
    whole = linear(F, D, bias)
    x_TD = torch.randn(T, D).to(BF16)
    with torch.inference_mode():
        y_TF = SemiStructuredLinear(whole, Packed.of)(x_TD)
        torch.testing.assert_close(y_TF, whole(x_TD))


def model(prune: tuple[str, ...]) -> Decoder:
    """Two blocks, one of them sparse with a shared expert; matrices whose names end so are pruned."""
    moe = MoEConfig(width=64, expert_width=64, num_experts=4, shared_experts=1, shared_gate=True)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_width": 100, "max_seq_len": 64}
    made = Decoder(ModelConfig(vocab_size=97, width=64, layers=2, moe=moe, **sizes))
    init_weights(made, 0)
    made = made.to(BF16).eval().requires_grad_(False)
    for name, each in matrices(made):
        if name.endswith(prune):
            each.weight.copy_(each.weight * (pruned(*each.weight.shape) != 0))
    return made


def logits(of: Decoder) -> torch.Tensor:
    device = of.device
    tokens_T, places_T = torch.arange(24, device=device) * 5 % 97, torch.arange(24, device=device)
    with torch.inference_mode():
        return of(tokens_T, places_T, VarlenContext(torch.tensor([0, 24], device=device))).cpu().float()


@pytest.mark.parametrize("prune", [("",), ("wk", "w_in"), ("wq", "w_out")])
def test_a_model_computes_the_same_whichever_matrices_are_pruned(prune):
    whole = model(prune)
    ours = copy.deepcopy(whole)
    found = skip_zeros(ours, Packed.of)
    assert found == [name for name, _ in matrices(whole) if name.endswith(prune)]
    assert skip_zeros(ours, Packed.of) == found, "nothing is done twice"
    torch.testing.assert_close(logits(ours), logits(whole), rtol=2e-2, atol=2e-2)


def test_a_model_without_such_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"semi_structured \(true\) needs matrices .*: make some: .*pattern=2:4"):
        skip_zeros(model(("none",)), Packed.of)


def test_a_pytorch_without_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"semi_structured \(true\) needs cuSPARSELt"):
        skip_zeros(model(("",)))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "says"),
    [
        (torch.device("cpu"), BF16, (0, 0), "needs a GPU, and the model is on cpu: use semi_structured=false"),
        (CUDA, BF16, (7, 5), r"needs compute capability 8\.0, and that of cuda is 7\.5: use semi_structured=false"),
        (CUDA, torch.float32, (9, 0), r"needs 16 bits a weight, and these are torch\.float32: use dtype=bfloat16"),
    ],
)
def test_what_has_no_such_kernels_is_refused(device, dtype, capability, says):
    with pytest.raises(ConfigError, match=rf"semi_structured \(true\) {says}"):
        check_device(device, dtype, capability)
    check_device(CUDA, torch.float16, (8, 0))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize(("T", "F", "D"), [(0, 32, 64), (1, 32, 64), (7, 37, 100), (257, 512, 1024)])
def test_a_gpu_computes_what_the_whole_layer_does(T, F, D, dtype):
    whole = linear(F, D, bias=T % 2 == 1).to(CUDA, dtype)
    x_TD = torch.randn(T, D, dtype=dtype, device=CUDA)
    with torch.inference_mode():
        torch.testing.assert_close(SemiStructuredLinear(whole)(x_TD), whole(x_TD), rtol=2e-2, atol=2e-2)


@needs_gpu
def test_a_gpus_model_computes_the_same():
    whole = model(("",)).to(CUDA)
    ours = copy.deepcopy(whole)
    assert skip_zeros(ours)
    torch.testing.assert_close(logits(ours), logits(whole), rtol=5e-2, atol=5e-2)
