"""Library forms: the same operations made of the fastest PyTorch calls, on any device."""
