"""Kernels that do what an operation of the library did, with the same bits and into the same memory."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .call import TYPES

aten = torch.ops.aten
Stand = list[tuple[str, tuple[Any, ...]]]
"""Kernels by name, and their arguments but the threads."""


class Move(ctypes.Structure):
    """`Move` of record.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("source", "target", "index")),
        *((name, c_int64) for name in (
            "from_type", "to_type", "size", "outer", "inner", "width", "from_outer", "from_inner", "to_outer",
            "to_inner", "rows",
        )),
    )  # fmt: skip


def stand_in(func: Any, args: Sequence[Any], out: Tensor) -> Stand | None:
    """The kernels for `out = func(*args)`, or for an operation that changes `out`; None = there are none."""
    found = _TABLE.get(func)
    return None if found is None or not out.is_cpu else found(args, out)


def move(source: Tensor, target: Tensor, index_N: Tensor | None = None) -> Stand | None:
    """target = source, or source[index_N], perhaps in another type."""
    if source.dtype == target.dtype:
        types = (0, 0)
    elif source.dtype in TYPES and target.dtype in TYPES:
        types = (TYPES[source.dtype], TYPES[target.dtype])
    else:
        return None
    if not target.numel():
        return []
    shape = target.shape
    seen = source if index_N is None else source[:1].expand(shape)
    if seen.shape != shape:
        return None
    found = _rows(
        shape, seen.stride() if index_N is None else source.stride(), target.stride(), keep=index_N is not None
    )
    if found is None:
        return None
    places = source.data_ptr(), target.data_ptr(), 0 if index_N is None else index_N.data_ptr()
    return [("move", (ctypes.byref(Move(*places, *types, target.element_size(), *found, len(source))),))]


def _rows(
    shape: Sequence[int], by: Sequence[int], to: Sequence[int], *, keep: bool
) -> tuple[int, int, int, int, int, int, int] | None:
    """Sizes and strides of [outer, inner, width] with width in one piece on both sides; `keep` the outermost."""
    axes: list[list[int]] = []
    for i, size in enumerate(shape):
        if size == 1 and not (keep and i == 0):
            continue
        last = axes[-1] if axes and not (keep and len(axes) == 1) else None
        if last is not None and last[1] == by[i] * size and last[2] == to[i] * size:
            last[:] = [last[0] * size, by[i], to[i]]
        else:
            axes.append([size, by[i], to[i]])
    if len(axes) == keep or axes[-1][1:] != [1, 1]:
        axes.append([1, 1, 1])
    if len(axes) > 3:
        return None
    width = axes.pop()[0]
    axes = [*axes, *[[1, 0, 0]] * (2 - len(axes))] if keep else [*[[1, 0, 0]] * (2 - len(axes)), *axes]
    (outer, by_outer, to_outer), (inner, by_inner, to_inner) = axes
    return outer, inner, width, by_outer, by_inner, to_outer, to_inner


def _copy(args: Sequence[Any], out: Tensor) -> Stand | None:
    return move(args[0], out)


def _copy_into(args: Sequence[Any], out: Tensor) -> Stand | None:
    return move(args[1].expand(out.shape), out)


def _embed(args: Sequence[Any], out: Tensor) -> Stand | None:
    table, index = args[:2]
    known = index.dtype == torch.int64 and index.is_contiguous() and index.ndim == 1
    return move(table, out, index) if known else None


def _choose(args: Sequence[Any], out: Tensor) -> Stand | None:
    return _embed((args[0], args[1][0]), out) if len(args[1]) == 1 and args[1][0] is not None else None


def _beside(args: Sequence[Any], out: Tensor) -> Stand | None:
    parts, axis, first = args[0], args[1] if len(args) > 1 else 0, 0
    calls: Stand = []
    for part in parts:
        if part.ndim != out.ndim:
            return None
        found = move(part, out.narrow(axis, first, part.shape[axis]))
        if found is None:
            return None
        first += part.shape[axis]
        calls += found
    return calls


def _above(args: Sequence[Any], out: Tensor) -> Stand | None:
    found = [move(part, into) for part, into in zip(args[0], out.unbind(*args[1:]), strict=True)]
    return None if None in found else [call for calls in found for call in calls or ()]


def _add(args: Sequence[Any], out: Tensor) -> Stand | None:
    x, y = args[:2]
    alike = isinstance(y, Tensor) and all(t.dtype == out.dtype and t.shape == out.shape for t in (x, y))
    if not alike or out.dtype not in TYPES or not all(t.is_contiguous() for t in (x, y, out)):
        return None
    places = (c_void_p(t.data_ptr()) for t in (x, y, out))
    return [("add", (TYPES[out.dtype], *places, c_int64(out.numel())))]


_TABLE: dict[Any, Callable[[Sequence[Any], Tensor], Stand | None]] = {
    aten._to_copy.default: _copy,
    aten.to.dtype: _copy,
    aten.contiguous.default: _copy,
    aten.clone.default: _copy,
    aten.copy_.default: _copy_into,
    aten.embedding.default: _embed,
    aten.index.Tensor: _choose,
    aten.cat.default: _beside,
    aten.add.Tensor: _add,
    aten.stack.default: _above,
}
