"""Runs the model on a step plan: the very `Decoder` that training built, with a paged context.

R rows whose logits are wanted, V vocabulary, S tokens of an encoder, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.cpp.build import library
from ...kernels.registry import compiles, using
from ...moe.models.context import VarlenContext
from ...moe.models.decoder import Decoder
from ...moe.routing.record import RouteContext
from ...moe.routing.stats import RoutingSnapshot, RoutingStats
from ..config import MoECapacity
from ..core.step import StepPlan
from .batch import Batch, Memory, build_batch
from .context import PagedContext
from .executor import StepResult
from .experts import ExpertPages
from .graphs import GraphBuckets, fill_up
from .kv import KVCache, KVPlan
from .prompt import PromptLogprobs, asks, prompt_logprobs
from .recorded import RecordedSteps
from .sampler import sample


class ModelRunner:
    """Model, KV cache and routing statistics of one rank. One thread uses it.

    Args:
        model: in evaluation mode, on its device.
        plan: the KV cache to allocate.
        moe_capacity: as `EngineConfig` has it.
        buckets: the shapes of decode steps; None = as they come.
        form: what `kernels.using` is to prefer.

    Attributes:
        pages: where every cached token went.
        routing: what the routers did since start, recomputed tokens included.
        records: decode steps may be recorded.
        sent_bytes: what all ranks have sent one another for experts, as of the last `totals`.
    """

    def __init__(
        self,
        model: Decoder,
        plan: KVPlan,
        moe_capacity: MoECapacity = "dropless",
        buckets: GraphBuckets | None = None,
        form: str | None = None,
    ) -> None:
        assert not model.training, "serving runs the model in evaluation mode"
        self.model = model
        self.device = model.device
        self.cache = KVCache(plan, self.device)
        self._buckets = buckets or GraphBuckets((), 0, self.device)
        experts = model.cfg.moe.num_experts if model.cfg.moe else 0
        self._newest: dict[str, int] = {}
        """The tokens that the last step sampled, by request."""
        self.form = form
        compile_kernels(self.device, form)
        self.dropless = moe_capacity == "dropless"
        self.pages = ExpertPages(model.cfg, plan.num_blocks, plan.block_size, self.device, counted=not self.dropless)
        self._prompts: dict[str, PromptLogprobs] = {}
        """What the last step told of prompts, by request."""
        self.routing = RoutingStats(model.cfg.moe_layers, experts, self.device)
        width = -(-model.cfg.max_seq_len // plan.block_size)
        self._recorded = RecordedSteps(model, min(width, plan.num_blocks), self.routing.tensor)
        half = model.dtype == torch.bfloat16 or form in ("cpp", "invariant")
        self.sent_bytes = 0
        self.records = self.device.type == "cpu" and half

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: forward, then sample."""
        with using(self.form):
            batch, logits_RV = self.forward(plan)
        ids = [item.request.id for item in batch.sampling]
        sampled = dict(zip(ids, sample(logits_RV, batch.sampling), strict=True))
        self._newest = {name: result.token or 0 for name, result in sampled.items()}
        return StepResult(sampled=sampled, routed=self.pages.report(plan.scheduled), prompts=self._prompts)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """The model's part of a step.

        Returns:
            the batch, and float32 logits_RV of the next token of `batch.sampling`.
        """
        self.cache.copy(plan.copies)
        self.pages.copy(plan.copies)
        encoder = self.model.encoder is not None
        batch = build_batch(plan, self.cache.plan.block_size, self.device, encoder, self._newest)
        memory_SD = None if batch.memory is None else self.encode(batch.memory)
        wanted, batch = batch.logit_rows_R.numel(), self._fill(batch)
        taken_BLE = self.pages.taken_before(plan.scheduled)
        filled_NLE = fill_up(taken_BLE, batch)
        self._prompts = {}
        asked = any(asks(item) for item in plan.scheduled)
        if self.records and taken_BLE is None and not asked and self._recorded.fits(batch):
            return batch, self._recorded.run(batch, self._decode)
        context = self._surround(batch, memory_SD, self.pages.by_layer(filled_NLE))
        if asked:
            x_TD = self.model.hidden(context.tokens_T, batch.positions_T, context)
            self._prompts = prompt_logprobs(self.model, x_TD, context, plan.scheduled)
            logits_RV = self.model.logits(x_TD, context)
        else:
            logits_RV = self.model(context.tokens_T, batch.positions_T, context)
        self.pages.store(plan.scheduled, batch.slots_T, context.decisions(), taken_BLE)
        self.routing.add(context.routings, context.route.valid_T)
        return batch, logits_RV[:wanted].float()

    def _decode(self, batch: Batch) -> Tensor:
        """Logits of every row of a step in which each request has one, and the notes of where they went."""
        context = self._surround(batch, None, None)
        context.logit_rows = None
        logits_RV = self.model(context.tokens_T, batch.positions_T, context)
        self.pages.store((), batch.slots_T, context.decisions(), None)
        self.routing.add(context.routings)
        return logits_RV

    def totals(self, *, idle: bool) -> RoutingSnapshot:
        """What the routers did on all ranks; `idle`: no request is left, so that there is time to ask."""
        return self.routing.snapshot()

    def forget(self) -> None:
        """Count what the routers do from now on."""
        self.routing.clear()

    @torch.inference_mode()
    def encode(self, memory: Memory) -> Tensor:
        """The encoder's hidden states [S, D] of a step's new inputs, each of which sees nothing of the others."""
        if not memory.tokens_S.numel():
            return self.model.norm.weight.new_empty(0, self.model.cfg.width)
        route = RouteContext(
            cu_groups=memory.cu_N1, token_ids_T=memory.tokens_S, dropless=self.dropless, propagate_nan=True
        )
        context = VarlenContext(memory.cu_N1, route)
        memory_SD = self.model.encode(memory.tokens_S, memory.positions_S, context)
        self.routing.add(context.routings)
        return memory_SD

    def _fill(self, batch: Batch) -> Batch:
        """The batch with as many rows as the step is to have."""
        return self._buckets.pad(batch)

    def _surround(self, batch: Batch, memory_SD: Tensor | None, taken: Mapping[int, Tensor] | None) -> PagedContext:
        """What the model asks."""
        return PagedContext(batch, self.cache, memory_SD, taken)


def compile_kernels(device: torch.device, form: str | None) -> None:
    """Have a CPU's kernels compiled, if they are not, while nobody waits for a token."""
    if device.type == "cpu" and compiles(form):
        library()
