"""What a layer does around its matrix products, made of other operations, each in its own form.

T tokens, D width, H heads, G key/value heads, d head dim, h = d / 2.
"""

from torch import Tensor

from ..registry import call


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + y_TD
    return sum_TD, call("rms_norm", sum_TD, weight_D, eps)


def heads(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (-1, 2 * cos_Th.shape[1])
    q_THd, k_TGd, v_TGd = (call("linear", x_TD, w, None).unflatten(-1, shape) for w in (w_q, w_k, w_v))
    q_THd = q_THd if norm_q is None else call("rms_norm", q_THd, norm_q, eps)
    k_TGd = k_TGd if norm_k is None else call("rms_norm", k_TGd, norm_k, eps)
    return call("rotate", q_THd, cos_Th, sin_Th), call("rotate", k_TGd, cos_Th, sin_Th), v_TGd
