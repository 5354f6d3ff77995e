"""DeepSeek-V2 (2405.04434): softmax scores, top-k within the groups whose best expert scores highest."""

from .router import Router


class DeepSeekV2Router(Router):
    """To be written."""
