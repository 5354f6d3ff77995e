"""Training: what is optimised, how a run moves, is measured, saved and resumed."""
