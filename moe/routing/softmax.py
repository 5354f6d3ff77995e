"""Softmax gating (Shazeer et al. 1701.06538 eq. 2), cut to its k largest gates without renormalising."""

from .router import Router


class SoftmaxRouter(Router):
    """To be written."""
