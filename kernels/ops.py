"""The operations' signatures and promises. What each computes is written out in `reference/`.

T tokens, D width, E experts, K choices, N rows (kept assignments, sorted by expert), M output width, V vocabulary,
H heads, G key/value heads, d head dim, F expert hidden. Every operation takes T = 0. Attention: `paging.py`.
"""

from collections.abc import Callable

from torch import Tensor

from . import registry
from .quantized import QuantizedWeight
from .reference.precision import autocast, exact


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """y = x · wᵀ + bias: a dense projection of rows [..., D]. F is the output width; differentiable in all three.

    The operands have one dtype; under autocast they are cast to its dtype.
    """
    return registry.call("linear", x_TD, w_FD, bias_F)


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    """y[t, h] = x[t, h] @ w[h]: every head its own matrix, of any strides → [T, H, M]. Differentiable in both."""
    return registry.call("head_gemm", x_THK, w_HKM)


def pointwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), where f treats every number alike (`torch.sigmoid`, `F.gelu`) and rounds its result itself.

    A library computes the last few numbers of a tensor by other instructions than the rest, so that a number's last bit
    depends on where it lies; the batch-invariant form has none of that.
    """
    return registry.call("pointwise", f, x)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """y[n] = x[n] @ w[e], rows sorted by expert: expert e owns rows ends[e-1] up to ends[e].

    Args:
        x_NK: rows. float16, bfloat16, float32 or float64, as w; under autocast both are cast to its dtype.
        w_EKM: one matrix an expert, of any strides (`w_EMK.mT` is free).
        ends_E: int32, cumulative row ends; experts without rows are fine; the last one is N.

    Returns:
        y_NM, of the dtype of the operands; differentiable in x and w.
    """
    x_NK, w_EKM = autocast(x_NK, w_EKM)
    with exact(x_NK):
        return registry.call("grouped_gemm", x_NK, w_EKM, ends_E)


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """y[t] = Σ_k weights[t, k] · swiglu(x[t] · w_in[e]ᵀ) · w_out[e] with e = ids[t, k]; k ascending, in float32.

    A whole mixture of experts behind its router, in one operation, so that no permuted copy of the rows need exist.

    Args:
        x_TD: rows, under autocast cast to its dtype; the experts' weights are cast to that of the rows.
        ids_TK: int64 experts.
        weights_TK: float32 (any floating dtype is fine).
        kept_TK: bool; where it is False the choice adds nothing and its id may be anything. None = all are kept.
        w_in_EHD: H = 2F: the gate's rows, then the up projection's.
        w_out_EFD: as `Experts` holds it.

    Returns:
        y_TD in x's dtype (autocast's under autocast), differentiable in x, weights, w_in and w_out.
    """
    if x_TD.device.type == "cpu":  # whose forms cast the weights of one expert at a time
        (x_TD,) = autocast(x_TD)
    else:
        x_TD, w_in_EHD, w_out_EFD = autocast(x_TD, w_in_EHD, w_out_EFD)
    with exact(x_TD):
        return registry.call("moe_mlp", x_TD, ids_TK, weights_TK, kept_TK, w_in_EHD, w_out_EFD)


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    """y = x · wᵀ + bias of eight or four bits, rows [..., D].

    `w.rows` says how rows are taken: `int8`, each rounded to eight bits by its largest number, or `float`, as they are
    (C++: within 2^-15 of a row's largest number). Inference only. The result has x's dtype; it is `reference.quantized`
    to that and float32's rounding, and a row's bits never depend on its companions. A row that is not finite gives
    numbers that are not.
    """
    return registry.call("quantized_linear", x_TD, w, bias_F)


def quantized_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> Tensor:
    """`moe_mlp` of eight or four bits: w_in [E, 2F, D], and w_out [E, D, F] with rows over the hidden width.

    Rows are taken as w_in.rows says, hidden rows as w_out.rows; gate, up and SwiGLU are float32. Inference only.
    """
    return registry.call("quantized_moe_mlp", x_TD, ids_TK, weights_TK, kept_TK, w_in, w_out)


def expert_rows(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> Tensor:
    """y[n] = swiglu(x[n] · w_in[e]ᵀ) · w_out[e], rows sorted by expert: expert e owns rows ends[e-1] up to ends[e].

    What is behind an exchange that has sorted the rows; weights and dtypes as in `moe_mlp`, ends as in `grouped_gemm`.
    """
    (x_ND,) = autocast(x_ND)
    with exact(x_ND):
        return registry.call("expert_rows", x_ND, ends_E, w_in_EHD, w_out_EFD)


def sort_by_expert(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the kept assignments by expert, stably (by token, then choice, within an expert).

    Args:
        ids_TK: int64 expert of each (token, choice); where not kept, any value.
        kept_TK: bool.

    Returns:
        order_N: int64, row → flat index t·K + k.
        slot_TK: int64, (t, k) → its row, or -1 where not kept.
        counts_E: int64, rows of each expert.
    """
    return registry.call("sort_by_expert", ids_TK, kept_TK, num_experts)


def permute(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    """Rows for the experts: out[n] = x[order[n] // K]. The gradient of a token is summed in choice order in float32."""
    return registry.call("permute", x_TD, order_N, slot_TK)


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    """out[t] = sum over k of weights[t, k] · y[slot[t, k]], k ascending, in float32, returned in y's dtype.

    A dropped assignment (slot -1) adds zero. A gather, so the order of additions never varies; differentiable in y
    and weights.
    """
    return registry.call("combine", y_ND, weights_TK, order_N, slot_TK)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) in float32 (float64 stays), returned in x's dtype (Zhang & Sennrich 2019)."""
    return registry.call("rms_norm", x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm: (x + y, rms_norm(x + y)); the sum is rounded to its dtype before."""
    return registry.call("add_rms_norm", x_TD, y_TD, weight_D, eps)


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the rotate-half convention of GPT-NeoX and Hugging Face.

    Args:
        positions_T: int64. Angles are in the dtype of `turns_h`, whatever autocast says.
        turns_h: radians a position, [d / 2], float32 (float64 for float64 x).
        magnitude: factor on the result.
    """
    return registry.call("rope", x_THd, positions_T, turns_h, magnitude)


def rotate(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    """`rope` whose angles are known: (a, b) → (a · cos - b · sin, b · cos + a · sin) of the halves a, b of each head.

    In float32 (float64 stays), returned in x's dtype; differentiable in x.
    """
    return registry.call("rotate", x_THd, cos_Th, sin_Th)


def heads(
    x_TD: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos_Th: Tensor,
    sin_Th: Tensor,
    norm_q: Tensor | None = None,
    norm_k: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention is given: q = rotate(norm(x · w_qᵀ)), k = rotate(norm(x · w_kᵀ)), v = x · w_vᵀ.

    Args:
        w_q: [H · d, D]; w_k, w_v: [G · d, D], of x's dtype; under autocast the products have its.
        cos_Th, sin_Th: of each token's angles, float32 (float64 for float64 x); d = 2h.
        norm_q, norm_k: [d], weights of a root-mean-square norm of each head; None = there is none.

    Returns:
        q_THd, k_TGd, v_TGd; differentiable in all but the angles.
    """
    return registry.call("heads", x_TD, w_q, w_k, w_v, cos_Th, sin_Th, norm_q, norm_k, eps)


def top_k_gates(
    logits_TE: Tensor,
    top_k: int,
    *,
    ids_TK: Tensor | None = None,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    best: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A router's decision: the k highest experts of each token, best first and ties to the lower id, and their weights.

    Experts are ranked by logit, or with `sigmoid` by sigmoid(logit) + bias.

    Args:
        logits_TE: float32 (float64 stays).
        ids_TK: int64, the experts if they are known; None = choose.
        score: weights are `softmax` over all E, `sigmoid` of the logit, or a softmax over the `chosen` k.
        groups, top_groups: choose within the `top_groups` of so many groups of neighbours whose `best` highest ranks
            have the highest sum.
        renormalize: divide the weights by their sum.
        scale: multiplies them.

    Returns:
        ids_TK int64, and weights_TK of the logits' dtype, differentiable. A NaN ranks above all numbers.
    """
    return registry.call(
        "top_k_gates", logits_TE, top_k, ids_TK=ids_TK, score=score, bias_E=bias_E, groups=groups,
        top_groups=top_groups, best=best, renormalize=renormalize, scale=scale,
    )  # fmt: skip


def sample_rows(
    scores_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seeds_R: Tensor,
    choices_R: Tensor,
    positions_R: Tensor,
) -> Tensor:
    """The next token of each of R rows; a row depends on nothing but its own arguments. Ties go to the lower id.

    A token is picked in the order of the vocabulary by one uniform number from softmax(scores / temperature) without
    the tokens below min-p, outside the top k of these and outside the top p of those.

    Args:
        scores_RV: float32. -inf is never chosen; of a row of which nothing is finite, or something is not a number or
            +inf, any token may come.
        temperature_R: float64. Below 1e-5: the highest score.
        top_k_R: int64, 0 or less for all.
        top_p_R: float64, 1 or more for all. At least one token stays.
        min_p_R: a floating dtype. Tokens less probable than min_p times the most probable one are left out.
        seeds_R, choices_R, positions_R: int64, the key of the number: seed, and `step` and index of `random.uniform`.

    Returns:
        ids_R, int64. Masses are added up in float64; where one is within their rounding of what it is compared with,
        two forms may differ.
    """
    return registry.call(
        "sample_rows", scores_RV, temperature_R, top_k_R, top_p_R, min_p_R, seeds_R, choices_R, positions_R
    )


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(first half of the last dimension) · second half (Shazeer 2020) → [N, F]."""
    return registry.call("swiglu", gate_up_N2F)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Nats a token, float32 (float64 stays): logsumexp(logits[t]) - logits[t, target]. A negative target has loss 0."""
    return registry.call("cross_entropy", logits_TV, targets_T)


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """`cross_entropy(linear(x, w), targets)`, whose logits need never exist all at once → [T]. Differentiable in x, w.

    Under autocast x is cast to its dtype; the weight is cast to that of x.
    """
    (x_TD,) = autocast(x_TD)
    with exact(x_TD):
        return registry.call("linear_cross_entropy", x_TD, w_VD, targets_T)


def square_sum(x: Tensor) -> Tensor:
    """Σ x² in float64, a scalar. Not differentiable."""
    return registry.call("square_sum", x)


def adamw_step(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    """AdamW's step number `step` (from 1) of a parameter, in place; a number's depends on nothing beside it.

    Args:
        weight, mean, square: of one shape, type and device.
        grad: of that shape, in any floating type; it is multiplied by `scale` as it is read, and stays as it is.
    """
    settings = {"step": step, "lr": lr, "betas": betas, "eps": eps, "decay": decay, "scale": scale}
    registry.call("adamw_step", weight, grad, mean, square, **settings)
