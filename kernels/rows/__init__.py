"""Batch-invariant forms in plain PyTorch: every row alone, in shapes that its companions do not change. Slow.

They are the fallback of `cpp` where there is no compiler, and for float64. Nothing here calls a matrix library, whose
order of additions is its own affair: products are multiplied out and summed.
"""
