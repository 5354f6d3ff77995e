"""Runs the model on a step plan: the very `Decoder` that training built, with a paged context.

L MoE layers, E experts, R rows whose logits are wanted, V vocabulary.
"""

import torch
from torch import Tensor

from ...moe.models.decoder import Decoder
from ..core.scheduler import StepPlan
from .batch import Batch, build_batch
from .context import PagedContext
from .kv import KVCache, KVPlan


class ModelRunner:
    """Model, KV cache and expert-load counters of one rank. One thread uses it.

    Args:
        model: in evaluation mode, on its device.
        plan: the KV cache to allocate.

    Attributes:
        expert_load_LE: int64 assignments to each expert of each MoE layer since start; they sum to tokens · k a layer.
    """

    def __init__(self, model: Decoder, plan: KVPlan) -> None:
        assert not model.training, "serving runs the model in evaluation mode"
        self.model = model
        self.device = model.embed.weight.device
        self.cache = KVCache(plan, self.device)
        experts = model.cfg.moe.num_experts if model.cfg.moe else 0
        self.expert_load_LE = torch.zeros(len(model.cfg.moe_layers), experts, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """Compute one step.

        Returns:
            the batch, and float32 logits_RV of the next token of `batch.sampling`'s requests.
        """
        batch = build_batch(plan, self.cache.plan.block_size, self.device)
        context = PagedContext(batch, self.cache)
        logits_RV = self.model(batch.tokens_T, batch.positions_T, context)
        for row, layer in enumerate(self.model.cfg.moe_layers):
            self.expert_load_LE[row] += context.routings[layer].counts_E
        return batch, logits_RV.float()
