"""Which form of an operation runs: the table, the probe and the override.

An operation `f` has forms of one signature: `reference` (plain PyTorch, the documentation), `torch` (made of library
calls), `triton` (a GPU kernel), `cpp` (a batch-invariant CPU kernel, compiled at first use) and `rows` (batch-invariant
in plain PyTorch, slow). A form with limits has a predicate `f_fits` of the same signature beside it, and one of ours
that is to run unasked has `f_pays`: whether it is the faster one for these arguments. Without an override the first
form runs that pays and fits; `torch` and `reference` always pay.

`invariant` is no form but a promise: a row's result is the same bits whatever other rows there are, and packed rows and
pages give the same. What has neither a `cpp` nor a `rows` form keeps it as it is.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

from .. import ConfigError

DEFAULT = ("torch", "reference")
PREFERENCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "reference": ("reference",),
        "torch": DEFAULT,
        "triton": ("triton", *DEFAULT),
        "cpp": ("cpp", *DEFAULT),
        "rows": ("rows", *DEFAULT),
        "invariant": ("cpp", "rows", *DEFAULT),
    }
)
FORMS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "linear": {
            "reference": "reference.dense",
            "torch": "torch_ops.linear",
            "cpp": "cpp.products",
            "rows": "rows.products",
        },
        "head_gemm": {
            "reference": "reference.dense",
            "torch": "torch_ops.linear",
            "cpp": "cpp.products",
            "rows": "rows.products",
        },
        "pointwise": {
            "reference": "reference.dense",
            "torch": "torch_ops.linear",
            "rows": "rows.elements",
        },
        "grouped_gemm": {
            "reference": "reference.grouped_gemm",
            "torch": "torch_ops.grouped_gemm",
            "triton": "triton.grouped_gemm",
            "cpp": "cpp.products",
            "rows": "rows.products",
        },
        "moe_mlp": {
            "reference": "reference.experts",
            "torch": "torch_ops.experts",
            "triton": "triton.experts",
            "cpp": "cpp.moe",
        },
        "expert_rows": {
            "reference": "reference.experts",
            "torch": "torch_ops.experts",
            "triton": "triton.experts",
        },
        "quantized_linear": {
            "reference": "reference.quantized",
            "triton": "triton.quantized",
            "cpp": "cpp.quantized",
            "rows": "rows.quantized",
        },
        "quantized_moe_mlp": {
            "reference": "reference.quantized",
            "triton": "triton.quantized",
            "cpp": "cpp.quantized",
            "rows": "rows.quantized",
        },
        "sort_by_expert": {
            "reference": "reference.routing",
            "torch": "torch_ops.routing",
            "triton": "triton.route",
        },
        "permute": {
            "reference": "reference.routing",
            "torch": "torch_ops.routing",
            "triton": "triton.combine",
        },
        "combine": {
            "reference": "reference.routing",
            "torch": "torch_ops.routing",
            "triton": "triton.combine",
        },
        "rms_norm": {
            "reference": "reference.dense",
            "torch": "torch_ops.elements",
            "triton": "triton.norm",
            "cpp": "cpp.rowwise",
            "rows": "rows.elements",
        },
        "add_rms_norm": {
            "reference": "reference.dense",
            "torch": "torch_ops.layers",
            "triton": "triton.norm",
            "cpp": "cpp.rowwise",
        },
        "rope": {
            "reference": "reference.dense",
            "torch": "torch_ops.elements",
            "triton": "triton.norm",
            "rows": "rows.elements",
        },
        "rotate": {
            "reference": "reference.dense",
            "triton": "triton.norm",
            "cpp": "cpp.rowwise",
        },
        "heads": {
            "reference": "reference.dense",
            "torch": "torch_ops.layers",
            "cpp": "cpp.heads",
        },
        "top_k_gates": {
            "reference": "reference.gates",
            "triton": "triton.gates",
            "cpp": "cpp.gates",
        },
        "sample_rows": {
            "reference": "reference.sampling",
            "triton": "triton.sample",
        },
        "swiglu": {
            "reference": "reference.dense",
            "triton": "triton.norm",
            "cpp": "cpp.rowwise",
            "rows": "rows.elements",
        },
        "cross_entropy": {
            "reference": "reference.dense",
            "torch": "torch_ops.loss",
            "triton": "triton.heads",
        },
        "linear_cross_entropy": {
            "reference": "reference.dense",
            "torch": "torch_ops.loss",
            "triton": "triton.heads",
        },
        "square_sum": {
            "reference": "reference.dense",
            "triton": "triton.squares",
            "cpp": "cpp.squares",
        },
        "adamw_step": {
            "reference": "reference.adamw",
            "cpp": "cpp.adamw",
        },
        "varlen_attention": {
            "reference": "reference.attention",
            "torch": "torch_ops.attention",
            "triton": "triton.varlen",
            "cpp": "cpp.attention",
            "rows": "rows.attention",
        },
        "store_kv": {
            "reference": "reference.attention",
            "triton": "triton.store",
            "cpp": "cpp.store",
        },
        "copy_blocks": {
            "reference": "reference.attention",
        },
        "paged_attention": {
            "reference": "reference.attention",
            "torch": "torch_ops.attention",
            "triton": "triton.attention",
            "cpp": "cpp.attention",
            "rows": "rows.attention",
        },
        "tally_routes": {
            "reference": "reference.routes",
            "cpp": "cpp.routes",
        },
        "store_routes": {
            "reference": "reference.routes",
            "cpp": "cpp.routes",
        },
    }
)
Predicate = Callable[..., bool] | None
_loaded: dict[tuple[str, str], tuple[Callable[..., Any], Predicate, Predicate]] = {}
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def using(form: str | None) -> Iterator[None]:
    """Prefer `form` within this block (and this thread): a key of `PREFERENCES`; None changes nothing.

    `reference` is strict. The others fall back for operations that have no such form or whose arguments it does not
    fit; `table` tells which. Code that torch.compile made keeps the default.

    Raises:
        ConfigError: no such form.
    """
    if form is not None and form not in PREFERENCES:
        raise ConfigError(f"kernels.using ({form!r}) must be a form: use one of {', '.join(PREFERENCES)}")
    token = _forced.set(form or _forced.get())
    try:
        yield
    finally:
        _forced.reset(token)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run the chosen form of `op`."""
    return _load(op, choose(op, *args, **kwargs))[0](*args, **kwargs)


def choose(op: str, *args: Any, **kwargs: Any) -> str:
    """The name of the form of `op` that runs for these arguments."""
    forms = FORMS[op]
    if len(forms) == 1:
        return "reference"
    order, asked = _order()
    for form in order:
        if form in forms:
            _, fits, pays = _load(op, form)
            unasked = asked or form in DEFAULT or (pays is not None and pays(*args, **kwargs))
            if unasked and (fits is None or fits(*args, **kwargs)):
                return form
    return "reference"


def table() -> dict[str, dict[str, str]]:
    """Operation → the forms it has, in the order in which they are tried now, with the module of each."""
    order, _ = _order()
    return {op: {form: forms[form] for form in order if form in forms} for op, forms in FORMS.items()}


def asked() -> str | None:
    """The form that `using` prefers here; None = the fastest."""
    return _forced.get()


def compiles(form: str | None) -> bool:
    """Whether operations on a CPU may take compiled kernels under `using(form)`."""
    return form is None or "cpp" in PREFERENCES[form]


def invariant() -> bool:
    """Whether batch-invariant forms are wanted here."""
    return not torch.compiler.is_compiling() and _forced.get() in ("invariant", "rows")


def _order() -> tuple[tuple[str, ...], bool]:
    """The forms in the order in which they are tried, and whether somebody asked for that order."""
    if torch.compiler.is_compiling():  # it can not read a context variable
        return DEFAULT, True
    forced = _forced.get()
    return (_unasked(), False) if forced is None else (PREFERENCES[forced], True)


@functools.cache
def _unasked() -> tuple[str, ...]:
    """Triton is imported only where there is a GPU."""
    return ("triton" if torch.cuda.is_available() else "cpp", *DEFAULT)


def _load(op: str, form: str) -> tuple[Callable[..., Any], Predicate, Predicate]:
    """The form, its `fits` and its `pays`."""
    if (op, form) not in _loaded:  # a dictionary, because torch.compile does not read functools.cache
        module = importlib.import_module(f".{FORMS[op][form]}", __package__)
        _loaded[op, form] = (
            getattr(module, op),
            getattr(module, f"{op}_fits", None),
            getattr(module, f"{op}_pays", None),
        )
    return _loaded[op, form]
