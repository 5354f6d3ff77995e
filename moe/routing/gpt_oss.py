"""GPT-OSS: a linear map with bias, the k highest logits, a softmax over those k."""

from .router import Router


class GptOssRouter(Router):
    """To be written."""
