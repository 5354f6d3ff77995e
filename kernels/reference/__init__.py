"""Plain PyTorch, float64-able: what each operation means. The other forms are tested against these."""
