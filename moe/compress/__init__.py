"""Smaller models of trained ones: rounded, pruned, with fewer experts; measured on text."""
