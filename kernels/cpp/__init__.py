"""Our own kernels in C++ for a CPU, compiled when they are first used; batch-invariant: see `kernels.h`."""
