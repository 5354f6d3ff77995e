"""DeepSeek-V3 (2412.19437): sigmoid scores, selection by score + loss-free bias (2408.15664), group-limited."""

from .router import Router


class DeepSeekV3Router(Router):
    """To be written."""
