"""BASE layers (2103.16716) with Sinkhorn normalisation: a balanced assignment in training, top-k in evaluation."""

from .router import Router


class SinkhornRouter(Router):
    """To be written."""
