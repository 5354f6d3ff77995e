"""Top-k of a softmax, renormalised (Mixtral 2401.04088, Qwen3-MoE) or not (Qwen2-MoE, OLMoE 2409.02060)."""

from .router import Router


class TopKSoftmaxRouter(Router):
    """To be written."""
