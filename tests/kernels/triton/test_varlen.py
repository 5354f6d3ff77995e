"""Attention of packed sequences in Triton, forward and backward, against float64."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry, varlen_attention

BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# heads, groups, width, width of the values
HEADS = [(1, 1, 16, 16), (4, 2, 40, 24), (6, 1, 24, 16), (3, 3, 64, 80)]
# queries and keys of each sequence
LENGTHS = [[], [(1, 1)], [(0, 0), (20, 20), (1, 1)], [(3, 37), (17, 17), (0, 5)], [(65, 65)]]
OPTIONS = {
    "causal": {},
    "window": {"window": 7},
    "both ways": {"causal": False},
    "both ways in a window": {"causal": False, "window": 5},
}


def make(heads, lengths, dtype):
    H, G, D, V = heads
    cu_q, cu_k = (torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in (0, 1))
    shapes = ((int(cu_q[-1]), H, D), (int(cu_k[-1]), G, D), (int(cu_k[-1]), G, V))
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return (q, k, v), {"cu_seqlens_B1": cu_q, "cu_k_B1": cu_k, "scale": D**-0.5}


def check(tensors, options):
    """The result and the gradients of q, k, v and of the sinks, if there are any."""
    dtype, sinks = tensors[0].dtype, options.get("sinks_H")
    leaves = [*tensors, *([] if sinks is None else [sinks])]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with kernels.using("triton"):
        assert registry.choose("varlen_attention", *tensors, **options) == "triton"
        out = varlen_attention(*tensors, **options)
    with kernels.using("reference"):
        wide = options | ({} if sinks is None else {"sinks_H": exact[3]})
        truth = varlen_attention(*exact[:3], **wide)
    grad = torch.randn(out.shape).to(dtype)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    wanted = (truth, *torch.autograd.grad(truth, exact, grad.double(), allow_unused=True, materialize_grads=True))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert not one.isnan().any()
        assert (one.double() - other).norm() <= BOUND[dtype] * other.norm() + 1e-6


def test_results_and_gradients_agree_with_float64():
    tensors, options = make((4, 2, 40, 24), [(3, 19), (0, 2), (9, 9)], torch.bfloat16)
    check(tensors, options | {"sinks_H": torch.randn(4, requires_grad=True), "bias_HR": torch.randn(4, 9)})
    check(tensors, options | {"causal": False, "window": 4})


def test_a_sequence_has_the_same_bits_alone_and_among_others():
    (q, k, v), options = make((2, 1, 16, 16), [(5, 5), (20, 20), (3, 3)], torch.bfloat16)
    alone = [t.detach()[5:25].requires_grad_() for t in (q, k, v)]
    grad, runs = torch.randn(28, 2, 16).bfloat16(), []
    with kernels.using("triton"):
        for tensors, borders, part in (((q, k, v), options["cu_seqlens_B1"], grad), (alone, [0, 20], grad[5:25])):
            out = varlen_attention(*tensors, torch.as_tensor(borders, dtype=torch.int32), scale=0.25)
            runs.append((out, *torch.autograd.grad(out, tensors, part)))
    assert all(torch.equal(one[5:25], other) for one, other in zip(*runs, strict=True))


def test_a_bias_that_learns_is_left_to_another_form():
    tensors, options = make((1, 1, 16, 16), [(2, 2)], torch.float32)
    with kernels.using("triton"):
        bias = torch.randn(1, 3, requires_grad=True)
        assert registry.choose("varlen_attention", *tensors, **options, bias_HR=bias) != "triton"


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(HEADS) * len(LENGTHS)))
def test_grid(number):
    """Every head with every lengths, every dtype and option with each of either."""
    dtypes, names = list(BOUND), list(OPTIONS)
    first, second = divmod(number, len(LENGTHS))
    tensors, options = make(HEADS[first], LENGTHS[second], dtypes[(first + second) % 3])
    check(tensors, options | OPTIONS[names[(first + second) % 4]])
    sinks = torch.randn(HEADS[first][0], requires_grad=True)
    check(tensors, options | OPTIONS[names[(first + second + 2) % 4]] | {"sinks_H": sinks})
