"""Where each of a foreign checkpoint's tensors lies in one of ours.

A `Place` says it as a view: the part of our tensor whose elements, in order, are theirs. Reading a checkpoint copies
every foreign tensor into its view, writing one copies the views out, so the two can not disagree, and nothing is held
twice. A family's places cover every element of our tensors exactly once (`check_cover`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

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
    """

    theirs: str
    ours: str
    view: View | None = None
    shape: tuple[int, ...] | None = None

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
        view.copy_(theirs.reshape(view.shape))

    def take(self, ours: Tensor) -> Tensor:
        """Their tensor, contiguous."""
        return self.of(ours).detach().reshape(self.their_shape(ours)).contiguous()


def rows(start: int, count: int) -> View:
    """The output features `start` to `start + count`."""
    return lambda tensor: tensor.narrow(0, start, count)


def expert(index: int, then: View | None = None) -> View:
    """One expert's matrix of a stack, seen through `then`."""
    return lambda tensor: tensor[index] if then is None else then(tensor[index])


def transposed(tensor: Tensor) -> Tensor:
    """[out, in] of [in, out]; of a stack its matrices."""
    return tensor.transpose(-2, -1)


def paired(heads: int, size: int, turning: int) -> View:
    """Output features of `heads` heads of `size` numbers, of which the last `turning` are rotary.

    Ours turn in halves, (x_i, x_{i + turning/2}); theirs in neighbours, (x_2i, x_2i+1), as DeepSeek's do. The features
    before the rotary ones, if any, are another Place's: see `unpaired`.
    """

    def view(tensor: Tensor) -> Tensor:
        by_head = tensor.unflatten(0, (heads, size)).narrow(1, size - turning, turning)
        return by_head.unflatten(1, (2, turning // 2)).transpose(1, 2)

    return view


def check_cover(places: Iterable[Place], tensors: Mapping[str, Tensor]) -> None:
    """Assert that the places cover every element of `tensors` exactly once, under different names."""
    counts = {name: torch.zeros(tensor.shape, dtype=torch.int8) for name, tensor in tensors.items()}
    names: set[str] = set()
    for place in places:
        assert place.theirs not in names, f"{place.theirs} has two places"
        names.add(place.theirs)
        place.of(counts[place.ours]).add_(1)
    wrong = [name for name, count in counts.items() if not bool((count == 1).all())]
    assert not wrong, f"not covered exactly once: {wrong}"
