"""Writes keys and values into their pages, of any strides.

T tokens, G key/value heads, d head dim.
"""

from struct import Struct

from torch import Tensor

from .build import library
from .call import INT8, TYPES, call, pointer

STORE = Struct("4P10q")  # `Store` of store.cpp


def store_kv_fits(
    k_TGd: Tensor, v_TGd: Tensor | None, cache_k: Tensor, cache_v: Tensor | None, slots_T: Tensor,
    scales_k: Tensor | None = None, scales_v: Tensor | None = None,
) -> bool:  # fmt: skip
    known = scales_k is not None or cache_k.dtype in TYPES
    return known and k_TGd.dtype in TYPES and k_TGd.is_cpu and library() is not None


def store_kv_pays(
    k_TGd: Tensor, v_TGd: Tensor | None, cache_k: Tensor, cache_v: Tensor | None, slots_T: Tensor,
    scales_k: Tensor | None = None, scales_v: Tensor | None = None,
) -> bool:  # fmt: skip
    return k_TGd.is_cpu


def store_kv(
    k_TGd: Tensor, v_TGd: Tensor | None, cache_k: Tensor, cache_v: Tensor | None, slots_T: Tensor,
    scales_k: Tensor | None = None, scales_v: Tensor | None = None,
) -> None:  # fmt: skip
    slots_T = slots_T.contiguous()
    k_TGd, parts = _part(k_TGd, cache_k, slots_T, scales_k)
    if v_TGd is not None and cache_v is not None:
        v_TGd, more = _part(v_TGd, cache_v, slots_T, scales_v)
        parts += more
    if not call("store", TYPES[k_TGd.dtype], TYPES.get(cache_k.dtype, INT8), parts, len(parts) // STORE.size):
        raise IndexError(f"slots must lie within the {cache_k.shape[0]} blocks of {cache_k.shape[1]} tokens")


def _part(x_TGd: Tensor, pages: Tensor, slots_T: Tensor, scales: Tensor | None) -> tuple[Tensor, bytes]:
    """Rows of neighbours, which must live until they are stored, and their `Store`."""
    x_TGd = x_TGd if x_TGd.stride(2) == 1 or x_TGd.shape[2] == 1 else x_TGd.contiguous()
    places = x_TGd.data_ptr(), pages.data_ptr(), pointer(scales) or 0, slots_T.data_ptr()
    return x_TGd, STORE.pack(*places, *x_TGd.shape, *x_TGd.stride()[:2], *pages.shape[:2], *pages.stride()[:3])
