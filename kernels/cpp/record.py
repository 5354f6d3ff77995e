"""A forward pass as a list of kernel calls that one call runs again, on the memory that they ran on.

What CUDA graphs are for a GPU. While a pass is recorded every tensor that it makes is kept, so that addresses stay
true. Between the kernels there are operations of the library: some have a kernel in their place (`stand_ins`), the
others are called again from Python and their results are put where the recorded ones lie. What reads a number, draws
one or lets a shape depend on one can not be run again, and makes the recording void.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tag, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .build import library
from .call import NOTE
from .stand_ins import Stand, move, stand_in

WHOLE = 12
LINE, BLOCK = 64, 1 << 20
"""Bytes between which tensors begin, and that the arena asks for at once."""
CHECKED = ("turnout_store", "turnout_store_routes", "turnout_move")
"""Kernels that tell whether they could do it."""
UNREPEATABLE = {Tag.data_dependent_output, Tag.dynamic_output_shape, Tag.nondeterministic_seeded}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""They look at numbers without an operation."""


class Call(ctypes.Structure):
    """`Call` of record.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("whole", ctypes.c_int64 * WHOLE),
        ("real", ctypes.c_float),
        ("checked", ctypes.c_int32),
    )


class Arena:
    """Memory of recordings, of which one plays at a time: each begins anew."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = self._used = 0

    @property
    def bytes(self) -> int:
        return sum(block.numel() for block in self._blocks)

    def clear(self) -> None:
        """What is taken next may lie where something else lies."""
        self._block = self._used = 0

    def take(self, like: Tensor) -> Tensor:
        """A tensor of no numbers yet, with sizes and strides of one that nobody has filled."""
        size = -(-like.untyped_storage().nbytes() // LINE) * LINE
        while self._block < len(self._blocks) and self._used + size > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(torch.empty(max(size, BLOCK), dtype=torch.uint8))
        block = self._blocks[self._block]
        first = block.storage_offset() + self._used
        self._used += size
        whole = block.untyped_storage()
        return torch.empty(0, dtype=like.dtype).set_(whole, first // like.element_size(), like.shape, like.stride())


class Recording:
    """What a pass did; its inputs and results lie where they lay.

    Attributes:
        void: why it can not be played; None = it can.
    """

    def __init__(self) -> None:
        self.void: str | None = None
        self._steps: list[Callable[[], object]] = []
        self._calls: list[Call] = []
        self._kept: list[Any] = []

    def play(self) -> None:
        """Do it again.

        Raises:
            IndexError: a slot or a token lies outside of its table.
        """
        for step in self._steps:
            step()

    @property
    def repeated(self) -> int:
        """Operations that are called again from Python."""
        return sum(step.func is not _play for step in self._steps if isinstance(step, partial))

    def keep(self, *things: Any) -> None:
        """They live as long as the recording."""
        self._kept += things

    def note(self, function: Any, arguments: Sequence[Any]) -> None:
        """A call of a kernel."""
        whole: list[int] = []
        call = Call(kernel=ctypes.cast(function, ctypes.c_void_p), checked=function.__name__ in CHECKED)
        for argument in arguments:
            if isinstance(argument, float):
                call.real = argument
            else:
                whole.append(_whole(argument))
        call.whole[: len(whole)] = whole
        self.keep(*arguments)
        self._calls.append(call)

    def again(self, step: Callable[[], object]) -> None:
        """A call of something else."""
        self.close()
        self._steps.append(step)

    def close(self) -> None:
        """What has been noted becomes one call."""
        kernels = library()
        if self._calls and kernels is not None:
            calls = (Call * len(self._calls))(*self._calls)
            self._steps.append(partial(_play, kernels.turnout_play, calls, ctypes.c_int64(len(calls))))
            self._calls = []


def _whole(argument: Any) -> int:
    """A number or an address."""
    if isinstance(argument, bytes):
        return ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
    if hasattr(argument, "_obj"):  # of `ctypes.byref`
        return ctypes.addressof(argument._obj)
    return int(getattr(argument, "value", argument) or 0)


def _play(run: Any, calls: Any, count: ctypes.c_int64) -> None:
    if run(calls, count) != count.value:
        raise IndexError("slots must lie within the pages, and token ids within the vocabulary")


class Recorder(TorchDispatchMode):
    """Within this block (and this thread) a pass is recorded.

        with Recorder() as recorder:
            y = model(x)                 # as ever
        recorder.recording.play()        # writes y, from what now is in x

    Parameters and inputs must stay where they are; whoever plays sees to that.

    Args:
        arena: where the pass finds its memory; what other recordings have left there is lost.
    """

    def __init__(self, arena: "Arena | None" = None) -> None:
        super().__init__()
        self.recording = Recording()
        self._arena = arena or Arena()
        self._constants: set[int] = set()
        """Memory of what no input reaches."""
        self._reads = _Reads(self.recording)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: without this a first step would import the compiler."""
        return False

    def __enter__(self) -> Self:
        self._arena.clear()
        self._token = NOTE.set(self.recording.note)
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)
        NOTE.reset(self._token)
        self.recording.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mutable = func._schema.is_mutable
        if mutable:
            self._restore(args, func)
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not _repeatable(func, args) or (inputs and not outputs):
            self.recording.void = self.recording.void or str(func)
        elif func._schema.name.removeprefix("aten::") in EMPTY:
            out = self._arena.take(out)
        elif mutable or not {_place(t) for t in outputs if t.numel()} <= {_place(t) for t in inputs}:
            out = self._compute(func, args, kwargs, inputs, out)
        self.recording.keep(*tree_leaves(out))
        return out

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[Tensor], out: Any
    ) -> Any:
        """What an operation gave, in the arena if it is one tensor; and how to give it again."""
        mutable = func._schema.is_mutable
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not mutable and all(_place(t) in self._constants for t in inputs):
            self._constants |= {_place(t) for t in outputs}
            return out
        if not mutable and isinstance(out, Tensor):
            out = self._arena.take(out).copy_(out)
        found = stand_in(func, args, out) if isinstance(out, Tensor) else None
        if found is not None:
            self._stand(found)
        elif mutable:
            self.recording.again(partial(func, *args, **kwargs))
        else:
            self.recording.again(_into(func, args, kwargs, [out] if isinstance(out, Tensor) else outputs))
        return out

    def _stand(self, found: Stand) -> None:
        kernels = library()
        for name, arguments in found:
            self.recording.note(getattr(kernels, f"turnout_{name}"), (*arguments, torch.get_num_threads()))

    def _restore(self, args: tuple[Any, ...], func: Any) -> None:
        """A constant that is about to change is one no more: each time it begins as it was."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and _place(value) in self._constants:
                self._constants.discard(_place(value))
                self.recording.keep(value, first := value.clone())
                self._stand(move(first, value) or [])


class _Reads(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READS:
            self._recording.void = self._recording.void or func.__name__
        return func(*args, **(kwargs or {}))


def _repeatable(func: Any, args: Sequence[Any]) -> bool:
    """Indices that are numbers choose equally many each time, masks do not."""
    if func is torch.ops.aten.index.Tensor:
        return all(index is None or index.dtype != torch.bool for index in args[1])
    return func.namespace == "aten" and not UNREPEATABLE & set(func.tags)


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _into(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> partial[Any]:
    """The operation, its results where they were: at once, where it can write them."""
    packet = func.overloadpacket
    if len(outputs) == 1 and "out" in packet.overloads():
        inputs, known = ([(a.name, str(a.type)) for a in f._schema.arguments] for f in (func, packet.out))
        if known == [*inputs, ("out", "Tensor")]:
            return partial(packet.out, *args, **kwargs, out=outputs[0])
    return partial(_repeat, func, args, kwargs, outputs)


def _repeat(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
    """Results to where they were."""
    found = (t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor))
    for old, new in zip(outputs, found, strict=True):
        old.copy_(new)
