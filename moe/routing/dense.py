"""Dense mixture (Jacobs et al. 1991): every token goes to every expert, weighted by softmax(x · W)."""

from .router import Router


class DenseRouter(Router):
    """To be written."""
