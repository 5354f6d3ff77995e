"""GPU kernels in Triton, imported only when they are chosen (Triton is absent on plain CPU machines).

Python's types can not name what a `@triton.jit` function takes (pointers, numbers and tiles by turns), and Triton reads
annotations as its own: mypy is told there not to ask for them (`no-untyped-def`).
"""
