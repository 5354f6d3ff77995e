"""Expert choice (Zhou et al. 2202.09368): each expert takes its highest-scoring tokens."""

from .router import Router


class ExpertChoiceRouter(Router):
    """To be written."""
