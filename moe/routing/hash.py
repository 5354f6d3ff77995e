"""Hash layers (Roller et al. 2106.04426): the expert is a fixed hash of the token id."""

from .router import Router


class HashRouter(Router):
    """To be written."""
