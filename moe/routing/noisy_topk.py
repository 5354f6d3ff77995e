"""Noisy top-k gating (Shazeer et al. 1701.06538 eq. 3-5)."""

from .router import Router


class NoisyTopKRouter(Router):
    """To be written."""
