"""`moe.router` by name, in the order of the papers."""

from ..config import MoEConfig
from .deepseek_v2 import DeepSeekV2Router
from .deepseek_v3 import DeepSeekV3Router
from .dense import DenseRouter
from .expert_choice import ExpertChoiceRouter
from .gpt_oss import GptOssRouter
from .gshard import GShardRouter
from .hash import HashRouter
from .noisy_topk import NoisyTopKRouter
from .router import Router
from .sinkhorn import SinkhornRouter
from .softmax import SoftmaxRouter
from .switch import SwitchRouter
from .topk_softmax import TopKSoftmaxRouter

ROUTERS: dict[str, type[Router]] = {
    "dense": DenseRouter,
    "softmax": SoftmaxRouter,
    "noisy_topk": NoisyTopKRouter,
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "gpt_oss": GptOssRouter,
    "deepseek_v2": DeepSeekV2Router,
    "deepseek_v3": DeepSeekV3Router,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
}


def build_router(cfg: MoEConfig, layer: int = 0) -> Router:
    """The router that `cfg.router` names, for block `layer` (part of its random key)."""
    return ROUTERS[cfg.router](cfg, layer)
