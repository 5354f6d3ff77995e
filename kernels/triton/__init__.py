"""GPU kernels in Triton, imported only when they are chosen (Triton is absent on plain CPU machines)."""
