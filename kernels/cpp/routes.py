"""What is noted of routings, in one pass and without copies. L layers, T tokens, E experts, K choices."""

from array import array
from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from .call import call, fits, inferring, pointer

ROUTES, PAGES = Struct("2P5q"), Struct("2P5q")  # `Routes` and `Pages` of routes.cpp
Tensors = Sequence[Tensor]


def tally_routes_pays(
    sums_LN: Tensor, logits: Tensors, choices: Tensors, wanted: Tensors, kept: Tensors, valid_T: Tensor | None = None,
    shares: Tensors | None = None, sigmoid: bool = False,
) -> bool:  # fmt: skip
    return inferring(sums_LN)


def tally_routes_fits(
    sums_LN: Tensor, logits: Tensors, choices: Tensors, wanted: Tensors, kept: Tensors, valid_T: Tensor | None = None,
    shares: Tensors | None = None, sigmoid: bool = False,
) -> bool:  # fmt: skip
    known = shares is None and sums_LN.dtype == torch.float64 and sums_LN.is_contiguous()
    return known and fits(*logits) and logits[0].dtype == torch.float32 and _plain(*logits, *choices, *wanted, *kept)


def tally_routes(
    sums_LN: Tensor, logits: Tensors, choices: Tensors, wanted: Tensors, kept: Tensors, valid_T: Tensor | None = None,
    shares: Tensors | None = None, sigmoid: bool = False,
) -> None:  # fmt: skip
    valid_T = None if valid_T is None else valid_T.contiguous()
    (tokens, experts), top_k = logits[0].shape, choices[0].shape[1]
    it = ROUTES.pack(sums_LN.data_ptr(), pointer(valid_T) or 0, len(logits), tokens, experts, top_k, sigmoid)
    call("tally_routes", it, *map(_places, (logits, choices, wanted, kept)))


def store_routes_pays(pages_SLK: Tensor, slots_T: Tensor, ids: Tensors, kept: Tensors) -> bool:
    return inferring(pages_SLK)


def store_routes_fits(pages_SLK: Tensor, slots_T: Tensor, ids: Tensors, kept: Tensors) -> bool:
    return pages_SLK.is_contiguous() and fits() and _plain(*ids, *kept)


def store_routes(pages_SLK: Tensor, slots_T: Tensor, ids: Tensors, kept: Tensors) -> None:
    slots_T = slots_T.contiguous()
    slots, layers, top_k = pages_SLK.shape
    size = pages_SLK.element_size()
    it = PAGES.pack(pages_SLK.data_ptr(), slots_T.data_ptr(), slots, layers, len(slots_T), top_k, size)
    if not call("store_routes", it, *map(_places, (ids, kept))):
        raise IndexError(f"slots must lie within the {slots} of the pages")


def _plain(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


def _places(tensors: Tensors) -> bytes:
    return array("q", [t.data_ptr() for t in tensors]).tobytes()
