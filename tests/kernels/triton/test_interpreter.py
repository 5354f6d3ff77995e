"""The corrected interpreter computes bfloat16 as PyTorch does, bit by bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from turnout.kernels.triton import interpreter

SIZE = 64


@triton.jit
def binary_kernel(a, b, out, NAME: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    if NAME == "add":
        z = x + y
    elif NAME == "subtract":
        z = x - y
    elif NAME == "multiply":
        z = x * y
    elif NAME == "maximum":
        z = tl.maximum(x, y)
    elif NAME == "minimum":
        z = tl.minimum(x, y)
    elif NAME == "less":
        z = tl.where(x < y, x, y)
    elif NAME == "negative":
        z = -x
    elif NAME == "absolute":
        z = tl.abs(x)
    elif NAME == "constant":
        z = x * 0.3
    else:
        z = tl.where(x == y, x, x + 1.0)
    tl.store(out + at, z)


BINARY = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": torch.minimum,
    "negative": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "constant": lambda x, y: x * torch.tensor(0.3).bfloat16(),
    "equal": lambda x, y: torch.where(x == y, x, x + 1),
}


@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_rounds_once(name):
    a, b = (torch.randn(SIZE) * 3).bfloat16(), torch.randn(SIZE).bfloat16()
    b[::4] = a[::4]
    out = torch.empty_like(a)
    binary_kernel[(1,)](a, b, out, name, SIZE)
    assert torch.equal(out, BINARY[name](a, b))


@triton.jit
def cast_kernel(source, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_casts_round_to_nearest_even(source, target):
    x = (torch.randn(SIZE) * 50).to(source)
    out = torch.empty(SIZE, dtype=target)
    cast_kernel[(1,)](x, out, SIZE)
    assert torch.equal(out, x.to(target))


def test_ties_signs_infinities_and_nan_are_cast_like_pytorch():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, -0x80000000], dtype=torch.int64)
    special = torch.tensor([float("inf"), -float("inf"), -1.0, 0.1])
    x = torch.cat((bits.to(torch.int32).view(torch.float32), special))
    x = torch.cat((x, x.new_zeros(SIZE - len(x))))
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))
    assert np.isnan(interpreter.widen(interpreter.narrow(np.float32("nan"))))


@triton.jit
def reduce_kernel(source, out, SIZE: tl.constexpr):
    x = tl.load(source + tl.arange(0, SIZE))
    tl.store(out, tl.sum(x, 0).to(tl.bfloat16))
    tl.store(out + 1, tl.max(x, 0))
    tl.store(out + 2, tl.sum(tl.exp(x.to(tl.float32)), 0).to(tl.bfloat16))


def test_reductions_compute_in_float32():
    x = torch.randn(SIZE).bfloat16()
    out = torch.empty(3, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, SIZE)
    truth = torch.stack((x.double().sum(), x.double().max(), x.double().exp().sum()))
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=0)


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    zero = tl.zeros([SIZE, SIZE], tl.float32)
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), zero, input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_multiplies_values_not_bit_patterns(dtype):
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    out = torch.empty(SIZE, SIZE)
    dot_kernel[(1,)](a, b, out, SIZE)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


def test_applying_twice_changes_nothing():
    builder = triton.runtime.interpreter.interpreter_builder
    interpreter.apply()
    assert triton.runtime.interpreter.interpreter_builder is builder
    assert interpreter.active()
