"""The one source of random numbers: Philox4x32-10 (Salmon et al. 2011), a function of its key and counter alone.

A draw is named by (seed, step, layer, purpose, global token index), so any layout, batch order, resumption or
recomputation draws the same number. T tokens.
"""

import math

import torch
from torch import Tensor

# purposes: two draws of different purpose never share a counter
ROUTE_SECOND = 1
JITTER = 2
DROPOUT = 3
SAMPLE = 4
INIT = 5
ROUTE_NOISE = 6
DROP_ORDER = 7
ROUND = 8
SPANS = 9

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = 4  # words a counter gives


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words (int64 tensors below 2³²) → four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap to the right 64 bits; the mask after the arithmetic shift makes the high half unsigned
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(
    seed: int | Tensor, index_T: Tensor, *, step: int | Tensor, layer: int, purpose: int, count: int = 1
) -> Tensor:
    """Random numbers of each token.

    The counter's words are: index's low half; its high half (index < 2⁴⁸, the upper 16 bits number draw blocks past
    255); step; layer · 2¹⁶ + purpose · 2⁸ + draw block modulo 256. The key is the 64-bit seed. A block gives 4 draws.

    Args:
        seed, step: one for all tokens, or int64 [T].
        index_T: int64, the token's global index.
        layer: below 2¹⁶.
        purpose: one of this module's constants.
        count: draws a token.

    Returns:
        float32 [T, count] in [0, 1), multiples of 2⁻²⁴.
    """
    device = index_T.device
    block = torch.arange(-(-count // _BLOCK), device=device)
    index, seed_T, step_T = (
        t[..., None] if t.dim() else t for t in (index_T, _int64(seed, device), _int64(step, device))
    )
    counter = (
        index & _MASK,
        (index >> 32) ^ (block >> 8 << 16),
        step_T & _MASK,
        (layer << 16 | purpose << 8) + (block & 0xFF),
    )
    words = philox(counter, (seed_T & _MASK, seed_T >> 32 & _MASK))
    draws = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[:, :count]
    return (draws >> 8).float() * 2.0**-24


def normal(
    seed: int | Tensor, index_T: Tensor, *, step: int | Tensor, layer: int, purpose: int, count: int = 1
) -> Tensor:
    """Standard normal float32 [T, count], each from two uniform numbers (Box & Muller 1958); keyed as `uniform`."""
    draws = uniform(seed, index_T, step=step, layer=layer, purpose=purpose, count=2 * count)
    radius, angle = draws.unflatten(-1, (count, 2)).unbind(-1)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _int64(value: int | Tensor, device: torch.device) -> Tensor:
    """`value` as an int64 tensor, 64-bit patterns above 2⁶³ wrapped."""
    if isinstance(value, Tensor):
        return value
    value &= (1 << 64) - 1
    return torch.tensor(value - (1 << 64) if value >> 63 else value, dtype=torch.int64, device=device)
