"""Attention of one query row at a time to the keys that it sees.

T tokens, H query heads, G key/value heads, d head dim, L keys that a query sees, B sequences.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.attention import dequantised, nothing, own_keys
from ..reference.precision import wide

Keys = Callable[[int, int, int], tuple[Tensor, Tensor]]  # sequence, first and last key → k_LGd and v_LGd


def varlen_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    cu_k_B1: Tensor | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
) -> Tensor:
    borders = own_keys(cu_seqlens_B1, cu_k_B1).tolist()
    lengths = [end - start for start, end in itertools.pairwise(borders)]

    def keys(b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        return k_TGd[borders[b] + first : borders[b] + last], v_TGd[borders[b] + first : borders[b] + last]

    rest = (scale, causal, window, sinks_H, bias_HR)
    empty_0Hd = nothing(q_THd, k_TGd, v_TGd)
    return _attend(q_THd, keys, empty_0Hd, cu_seqlens_B1.tolist(), lengths, *rest)


def paged_attention(
    q_THd: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables_BM: Tensor,
    context_lens_B: Tensor,
    cu_q_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> Tensor:
    size = cache_k.shape[1]

    def keys(b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        at_L = torch.arange(first, last, device=cache_k.device)
        slots_L = block_tables_BM[b].long()[at_L // size] * size + at_L % size
        own_k, own_v = (None if scales is None else scales.flatten(0, 1)[slots_L] for scales in (scales_k, scales_v))
        k_LGd, v_LGd = cache_k.flatten(0, 1)[slots_L], cache_v.flatten(0, 1)[slots_L]
        return dequantised(k_LGd, own_k), dequantised(v_LGd, own_v)

    rest = (scale, causal, window, sinks_H, bias_HR)
    empty_0Hd = q_THd.new_zeros(0, q_THd.shape[1], cache_v.shape[3])
    return _attend(q_THd, keys, empty_0Hd, cu_q_B1.tolist(), context_lens_B.tolist(), *rest)


def _attend(
    q_THd: Tensor, keys: Keys, empty_0Hd: Tensor, starts: list[int], lengths: list[int],
    scale: float, causal: bool, window: int | None, sinks_H: Tensor | None, bias_HR: Tensor | None,
) -> Tensor:  # fmt: skip
    outputs = [empty_0Hd]
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        for row in range(start, end):
            at = lengths[b] - (end - row)
            first = 0 if window is None else max(at - window + 1, 0)
            last = at + 1 if causal else lengths[b] if window is None else min(at + window, lengths[b])
            k_LGd, v_LGd = keys(b, first, max(last, first))
            bias_LH = None if bias_HR is None else _bias(bias_HR, torch.arange(first, last) - at)
            outputs.append(_one(q_THd[row], k_LGd, v_LGd, scale, sinks_H, bias_LH)[None].to(q_THd.dtype))
    return torch.cat(outputs)


def _one(
    q_Hd: Tensor, k_LGd: Tensor, v_LGd: Tensor, scale: float, sinks_H: Tensor | None, bias_LH: Tensor | None
) -> Tensor:
    """One query's output [H, d of v]; nothing where it sees no key."""
    if not len(k_LGd):
        return wide(q_Hd).new_zeros(len(q_Hd), v_LGd.shape[2])
    group = len(q_Hd) // k_LGd.shape[1]
    k_LHd, v_LHd = (wide(t).repeat_interleave(group, dim=1) for t in (k_LGd, v_LGd))
    scores_LH = (wide(q_Hd) * k_LHd).sum(-1) * scale
    scores_LH = scores_LH if bias_LH is None else scores_LH + bias_LH
    most_H = scores_LH.amax(0) if sinks_H is None else torch.maximum(scores_LH.amax(0), sinks_H)
    share_LH = (scores_LH - most_H).exp()
    total_H = share_LH.sum(0)
    total_H = total_H if sinks_H is None else total_H + (sinks_H - most_H).exp()
    return (share_LH[:, :, None] * v_LHd).sum(0) / total_H[:, None]


def _bias(bias_HR: Tensor, ahead_L: Tensor) -> Tensor:
    longest = bias_HR.shape[1] // 2
    return bias_HR[:, ahead_L.clamp(-longest, longest) + longest].T
