"""The choice of experts, a token at a time. T tokens, E experts, K choices."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..reference import gates
from .call import fits, inferring, kernel, pointer

SCORES = {"softmax": 0, "sigmoid": 1, "chosen": 2}
MOST = 1024
"""Experts that the kernel has room for."""


class Gates(ctypes.Structure):
    """`Gates` of gates.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "gates", "bias", "given", "ids", "weights")),
        *((name, c_int64) for name in (
            "tokens", "experts", "choices", "groups", "top_groups", "best", "score", "renormalize",
        )),
        ("scale", c_float),
    )  # fmt: skip


def top_k_gates_pays(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> bool:  # fmt: skip
    return inferring(logits_TE)


def top_k_gates_fits(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> bool:  # fmt: skip
    return logits_TE.dtype == torch.float32 and logits_TE.shape[1] <= MOST and fits(logits_TE, bias_E)


def top_k_gates(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = score, bias_E, groups, top_groups, best, renormalize, scale
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        return _TopKGates.apply(logits_TE, top_k, ids_TK, *rule)
    return _run(logits_TE, top_k, ids_TK, *rule)


def _run(
    logits_TE: Tensor, top_k: int, given_TK: Tensor | None, score: str, bias_E: Tensor | None, groups: int,
    top_groups: int, best: int, renormalize: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits_TE = logits_TE.contiguous()
    given_TK = None if given_TK is None else given_TK.contiguous()
    gates_TE = gates.sigmoid(logits_TE).contiguous() if score == "sigmoid" else None
    bias_E = None if bias_E is None else bias_E.contiguous()
    tokens, experts = logits_TE.shape
    weights_TK = torch.empty(tokens, top_k)
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int64) if given_TK is None else given_TK
    it = Gates(
        logits_TE.data_ptr(), pointer(gates_TE), pointer(bias_E), pointer(given_TK), ids_TK.data_ptr(),
        weights_TK.data_ptr(), tokens, experts, top_k, groups, top_groups, best, SCORES[score], renormalize, scale,
    )  # fmt: skip
    kernel("turnout_top_k_gates", (c_void_p, c_int))(ctypes.byref(it), torch.get_num_threads())
    return ids_TK, weights_TK


class _TopKGates(Function):
    """The gradient is the reference's, of the same choice."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, given_TK: Tensor | None, *rule: Any) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = _run(logits_TE.detach(), top_k, given_TK, *rule)
        ids_TK = ids_TK.clone() if ids_TK is given_TK else ids_TK
        ctx.save_for_backward(logits_TE, ids_TK)
        score, _, _, _, _, renormalize, scale = rule
        ctx.rule = {"score": score, "renormalize": renormalize, "scale": scale}
        ctx.mark_non_differentiable(ids_TK)
        return ids_TK, weights_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, ids_TK = ctx.saved_tensors
        logits_TE = logits_TE.detach().requires_grad_()
        with torch.enable_grad():
            _, weights_TK = gates.top_k_gates(logits_TE, ids_TK.shape[1], ids_TK=ids_TK, **ctx.rule)
        return *torch.autograd.grad(weights_TK, logits_TE, grad_TK), *(None,) * 9
