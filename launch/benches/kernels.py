"""`turnout bench kernels`: every operation in every form that runs here, beside what the machine allows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ... import kernels
from ...configs.typed import check
from ...kernels import registry
from .case import Case
from .cases import cases
from .ceilings import device
from .maker import Maker
from .timing import Run, alternate

FORMS = ("reference", "torch", "cpp", "triton")


def check_names(ops: Sequence[str], forms: Sequence[str]) -> None:
    """Refuse operations and forms that there are not."""
    for op in ops:
        check(op in registry.FORMS, "ops", op, "is no operation", f"use {', '.join(registry.FORMS)}")
    for form in forms:
        check(form in FORMS, "forms", form, "is no form that is measured", f"use {', '.join(FORMS)}")


@torch.inference_mode()
def measure(*, ops: Sequence[str], forms: Sequence[str], rounds: int, huge: bool) -> Iterator[dict[str, Any]]:
    """A row for every operation, shape and form: its seconds, and the bytes and FLOPs that it needs at least.

    Args:
        ops: operations; none = all.
        forms: forms; none = all that run here.
        rounds: turns of each form.
        huge: weights and pages lie in huge pages.
    """
    own = device()
    maker = Maker(own, huge=huge)
    for op in ops or registry.FORMS:
        found = cases(op, maker)
        if not found:
            yield {"op": op, "note": "no shape is known: not measured"}
        for case in found:
            yield from _forms(case, forms or FORMS, rounds, own)


def _forms(case: Case, forms: Sequence[str], rounds: int, where: torch.device) -> Iterator[dict[str, Any]]:
    """The forms of one case, in turns; the one that runs unasked is marked."""
    arguments = case.make()
    unasked = registry.choose(case.op, *arguments[0], **case.keywords)
    runs = {}
    for form in forms:
        with registry.using(form):
            if registry.choose(case.op, *arguments[0], **case.keywords) == form:
                runs[form] = _call(case, form, arguments)
    for form, seconds in alternate(runs, rounds, where.type == "cuda").items():
        own = {"op": case.op, "shape": case.shape, "form": form, "unasked": form == unasked}
        yield {**own, "seconds": seconds, "size": case.size, "flops": case.flops}


def _call(case: Case, form: str, arguments: Sequence[tuple[Any, ...]]) -> Run:
    operation = getattr(kernels, case.op)

    def run(i: int) -> object:
        with registry.using(form):
            return operation(*arguments[i % len(arguments)], **case.keywords)

    return run
