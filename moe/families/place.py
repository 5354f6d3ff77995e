"""Where each of a foreign checkpoint's tensors lies in one of ours.

A `Place` says it as a view: the part of our tensor whose elements, in order, are theirs. Reading a checkpoint copies
every foreign tensor into its view, writing one copies the views out, so the two can not disagree, and nothing is held
twice. A family's places cover every element of our tensors exactly once (`check_cover`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """One foreign tensor.

    Args:
        theirs: its name in their checkpoint.
        ours: the name of the tensor of ours that it is a part of.
        view: from that tensor to the view whose elements, in order, are theirs; None = all of it.
        shape: of theirs, where it is not the view's.
        order: their row i is row order[i] of the view, where rows have another order.
        wide: float32 in their files, whatever the rest has.
    """

    theirs: str
    ours: str
    view: View | None = None
    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    wide: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The view of our `tensor`; writing to it writes to `tensor`."""
        return tensor if self.view is None else self.view(tensor)

    def their_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape that their tensor has, `tensor` being ours."""
        return self.shape or tuple(self.of(tensor).shape)

    @torch.no_grad()
    def put(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy their tensor to its place in ours, in the dtype and on the device of ours."""
        view = self.of(ours)
        rows = theirs.reshape(view.shape)
        if self.order is None and view.ndim == 2 and view.T.is_contiguous():
            view.T.copy_(rows.T)  # tile by tile; the other way round torch walks through memory number by number
        elif self.order is None:
            view.copy_(rows)
        else:
            view[self._rows(view)] = rows.to(view.device, view.dtype)

    def take(self, ours: Tensor) -> Tensor:
        """Their tensor, contiguous."""
        view = self.of(ours).detach()
        rows = view if self.order is None else view[self._rows(view)]
        return rows.reshape(self.their_shape(ours)).contiguous()

    def _rows(self, view: Tensor) -> Tensor:
        return torch.tensor(self.order, device=view.device)


def rows(start: int, count: int) -> View:
    """The output features `start` to `start + count`."""
    return lambda tensor: tensor.narrow(0, start, count)


def expert(index: int, then: View | None = None) -> View:
    """One expert's matrix of a stack, seen through `then`."""
    return lambda tensor: tensor[index] if then is None else then(tensor[index])


def transposed(tensor: Tensor) -> Tensor:
    """[out, in] of [in, out]; of a stack its matrices."""
    return tensor.transpose(-2, -1)


@cache
def paired(heads: int, size: int, turning: int) -> tuple[int, ...]:
    """The order of the output features of `heads` heads of `size` numbers, of which the last `turning` are rotary.

    Ours turn in halves, (x_i, x_{i + turning/2}); theirs in neighbours, (x_2i, x_2i+1), as DeepSeek's do.
    """
    still, half = size - turning, turning // 2
    head = [*range(still), *(still + i + half * second for i in range(half) for second in (0, 1))]
    return tuple(size * h + row for h in range(heads) for row in head)


def check_cover(places: Iterable[Place], tensors: Mapping[str, Tensor]) -> None:
    """Assert that the places cover every element of `tensors` exactly once, under different names."""
    counts = {name: torch.zeros(tensor.shape, dtype=torch.int8) for name, tensor in tensors.items()}
    names: set[str] = set()
    for place in places:
        assert place.theirs not in names, f"{place.theirs} has two places"
        names.add(place.theirs)
        place.of(counts[place.ours]).add_(1)
        assert place.order is None or sorted(place.order) == [*range(len(place.order))], f"{place.theirs} repeats a row"
    wrong = [name for name, count in counts.items() if not bool((count == 1).all())]
    assert not wrong, f"not covered exactly once: {wrong}"
