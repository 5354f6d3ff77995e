"""Triton's interpreter (TRITON_INTERPRET=1) made right for bfloat16, so that kernels are tested without a GPU.

The stock interpreter keeps bfloat16 as uint16 and computes on the bit patterns: products, sums, comparisons and
reductions are garbage, casts truncate, and nothing raises. `apply` installs a builder that computes in float32 and
rounds every result to nearest even, as the hardware does. bfloat16 atomics stay wrong: do not use them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from ... import ConfigError

_BINARY = ("add", "sub", "mul", "div", "rem")
_EXTREMES = ("minimumf", "maximumf", "minnumf", "maxnumf")
_UNARY = ("fabs", "exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "erf")
_ROUNDED = (*(f"f{name}" for name in _BINARY), *_EXTREMES, "precise_divf", "fma", "clampf", *_UNARY)
_COMPARED = tuple(f"fcmp{order}{name}" for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE"))


def active() -> bool:
    """Are kernels interpreted, and rightly so."""
    return isinstance(interpreter.interpreter_builder, Builder)


def apply() -> None:
    """Install the correction in this process. Idempotent.

    Raises:
        ConfigError: kernels are compiled, not interpreted, in this process.
    """
    if not triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET (off) must be 1 before Triton is imported: set it in the environment")
    if not active():
        interpreter.interpreter_builder = Builder()
        interpreter.interpreter_semantic = type(interpreter.interpreter_semantic)(interpreter.interpreter_builder)
        interpreter._convert_float = _converting(interpreter._convert_float)
        interpreter.ReduceOps = _wide_operation(interpreter.ReduceOps)
        interpreter.ScanOps = _wide_operation(interpreter.ScanOps)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) → float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _wide(value: Any) -> Any:
    return interpreter.TensorHandle(widen(value.data), tl.float32) if _is_bfloat16(value) else value


def _narrow(value: Any) -> Any:
    return interpreter.TensorHandle(narrow(value.data), tl.bfloat16)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with bfloat16 operands computed in float32."""

    def get_bf16(self, value: float) -> Any:
        return interpreter.TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return _narrow(super().cast_impl(_wide(src), tl.float32))
        return super().cast_impl(_wide(src), dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = _wide(a), _wide(b)
        if not a.dtype.is_floating() or a.dtype.primitive_bitwidth < 16:
            return super().create_dot(a, b, d, *options)
        # float64, rounded once: a BLAS product's last bits vary with a row's place in the tile, a tensor core's do not
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _in_float32(method: Callable[..., Any], round_result: bool) -> Callable[..., Any]:
    def compute(self: Any, *operands: Any, **options: Any) -> Any:
        result = method(self, *(_wide(operand) for operand in operands), **options)
        return _narrow(result) if round_result and any(map(_is_bfloat16, operands)) else result

    return compute


for _name in (*_ROUNDED, *_COMPARED):
    _method = getattr(interpreter.InterpreterBuilder, f"create_{_name}")
    setattr(Builder, f"create_{_name}", _in_float32(_method, round_result=_name in _ROUNDED))


def _converting(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16:
            data, source = widen(data), tl.float32
        if target == tl.bfloat16:
            return narrow(data.view(interpreter._get_np_dtype(source)))
        if source == target:
            return data
        return original(data, source, target, rounding)

    return convert


def _wide_operation(operation: type) -> type:
    class WideOperation(operation):
        """A reduction or scan that is computed in float32 when its operands are bfloat16, and rounded once."""

        def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
            if not any(_is_bfloat16(t.handle) for t in inputs):
                return super().apply_impl(inputs)
            results = super().apply_impl(tuple(_retyped(t, _wide(t.handle)) for t in inputs))
            if not isinstance(results, tuple | list):
                return _retyped(results, _narrow(results.handle))
            return tuple(_retyped(t, _narrow(t.handle)) if t.dtype == tl.float32 else t for t in results)

    return WideOperation


def _retyped(tensor: Any, handle: Any) -> Any:
    dtype = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(dtype, tensor.type.shape) if tensor.type.is_block() else dtype)
