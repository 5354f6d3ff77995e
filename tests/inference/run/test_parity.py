"""Train = serve: the logits of the training forward are those of prefill and decode through paged blocks.

One text goes through `VarlenContext` at once, and through scheduler, blocks, batch and `PagedContext` in pieces: a
prefill in chunks of the step's budget, then one token a step, beside other requests. Every row of logits that serving
computes is compared. L MoE layers, S positions of one text, V vocabulary.
"""
# ruff: noqa: N802 (M7 is the name of a rule)

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from turnout.inference.config import EngineConfig
from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.run.batch import build_batch
from turnout.inference.run.context import PagedContext
from turnout.inference.run.kv import plan_kv
from turnout.inference.run.runner import ModelRunner
from turnout.moe import Decoder, RouteContext, VarlenContext
from turnout.moe.config import AttentionConfig, LatentConfig

BORDERS = (1, 15, 16, 17, 31, 32, 33)
DECODED = 5
BOUND = 1e-5
LATENT = AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6, query_rank=20))
KINDS = {
    "MHA": {"kv_heads": 4}, "GQA": {"kv_heads": 2}, "MQA": {"kv_heads": 1},
    "MLA": {"kv_heads": 4, "attention": LATENT},
}  # fmt: skip


def text_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 321, (length,), generator=generator).tolist()


@torch.inference_mode()
def trained(model: Decoder, text: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [S, V] and each MoE layer's chosen experts [S, K] of the training forward in evaluation mode."""
    length = torch.tensor([0, len(text)])
    context = VarlenContext(length, RouteContext(cu_groups=length, dropless=True))
    logits = model(torch.tensor(text), torch.arange(len(text)), context)
    return logits, {layer: routing.ids_TK for layer, routing in context.routings.items()}


class Server:
    """Scheduler and runner without sampler: the texts are forced, every computed row is kept."""

    def __init__(self, model: Decoder, budget: int, num_blocks: int = 64) -> None:
        config = EngineConfig(max_num_seqs=min(4, budget), max_num_batched_tokens=budget, num_blocks=num_blocks)
        self.model = model
        self.scheduler = Scheduler(config, BlockManager(num_blocks, config.block_size), lambda: 0.0)
        plan = plan_kv(model.cfg, config, model.cfg.max_seq_len, model.embed.weight.dtype, 1 << 30)
        self.runner = ModelRunner(model, plan)
        self.chunks = 0

    @torch.inference_mode()
    def run(self, texts: Sequence[Sequence[int]]) -> list[tuple[dict[int, Tensor], dict[int, dict[int, Tensor]]]]:
        """Serve each text as a prompt and `DECODED` forced tokens.

        Returns, a text: logits by position of the rows that serving wants, and chosen experts by layer and position.
        """
        found = [({}, {layer: {} for layer in self.model.cfg.moe_layers}) for _ in texts]
        for i, text in enumerate(texts):
            prompt = text[:-DECODED]
            params = SamplingParams(max_tokens=DECODED + 1, ignore_eos=True)
            self.scheduler.add(Request(id=str(i), prompt_token_ids=prompt, params=params))
        while self.scheduler.requests:
            plan = self.scheduler.schedule()
            batch = build_batch(plan, self.runner.cache.plan.block_size, self.runner.device)
            context = PagedContext(batch, self.runner.cache)
            logits = self.model(batch.tokens_T, batch.positions_T, context)
            sampled, row, rows = {}, 0, iter(logits)
            for item in plan.scheduled:
                at = int(item.request.id)
                for layer, routing in context.routings.items():
                    for offset in range(item.count):
                        found[at][1][layer][item.start + offset] = routing.ids_TK[row + offset]
                row += item.count
                self.chunks += not item.samples
                if item.samples:
                    position = item.start + item.count - 1
                    found[at][0][position] = next(rows)
                    sampled[item.request.id] = [*texts[at], 0][position + 1]
            self.scheduler.commit(plan, sampled)
        return found


def assert_equal(model: Decoder, text: Sequence[int], served: tuple, first: int) -> None:
    """Every position from the prompt's last on has its logits, within BOUND of their scale; experts are the same."""
    expected, experts = trained(model, text)
    logits, chosen = served
    assert sorted(logits) == list(range(len(text) - DECODED - 1, len(text)))
    for position, row in logits.items():
        error = (row - expected[position]).norm() / expected[position].norm()
        assert error <= BOUND, f"position {position}: {error:.1e}"
    assert set(chosen) == set(model.cfg.moe_layers)
    for layer, by_position in chosen.items():
        assert sorted(by_position) == list(range(first, len(text)))
        for position, ids_K in by_position.items():
            assert ids_K.tolist() == experts[layer][position].tolist()


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 7, 16, 256])
def test_served_logits_are_those_of_the_training_forward(make_model, router, kind, budget):
    model = make_model(router, **KINDS[kind])
    server = Server(model, budget)
    texts = [text_of(length + DECODED, seed=length) for length in BORDERS]
    for text, served in zip(texts, server.run(texts), strict=True):
        assert_equal(model, text, served, first=0)
    assert (server.chunks > 0) == (budget < max(BORDERS)), "only a small budget cuts prompts into chunks"


@pytest.mark.parametrize(("router", "kind"), [("switch", "GQA"), ("gshard", "GQA"), ("switch", "MLA")])
@pytest.mark.parametrize("shared", [16, 31, 32, 48])
def test_a_prefix_cache_hit_changes_no_logits(make_model, router, kind, shared):
    model, text = make_model(router, **KINDS[kind]), text_of(48 + DECODED, seed=1)
    server = Server(model, budget=64)
    server.run([text])
    other = text[:shared] + text_of(48 + DECODED - shared, seed=2)
    (served,) = server.run([other])
    hits = min(shared // 16, 47 // 16) * 16  # whole blocks, at least one token of the prompt is computed
    assert server.scheduler.stats().prefix_hits == hits > 0
    assert_equal(model, other, served, first=hits)


def test_packed_training_sequences_are_served_alone(make_model):
    """The training batch packs two texts; serving each of them alone gives its rows."""
    model, texts = make_model(), [text_of(20 + DECODED, seed=3), text_of(9 + DECODED, seed=4)]
    cu = torch.tensor([0, len(texts[0]), len(texts[0]) + len(texts[1])])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    with torch.inference_mode():
        context = VarlenContext(cu, RouteContext(cu_groups=cu, dropless=True))
        packed = model(torch.tensor(texts[0] + texts[1]), positions, context)
    for start, served in zip(cu.tolist(), Server(model, budget=64).run(texts), strict=False):
        for position, row in served[0].items():
            torch.testing.assert_close(
                row, packed[start + position], rtol=BOUND, atol=BOUND * packed.abs().max().item()
            )


def test_M7_the_server_runs_the_trainers_model_and_router(make_model, model_dir):
    """No second implementation: the classes are the same objects, wherever they are imported from."""
    from turnout.inference.engine import Engine
    from turnout.moe.routing.switch import SwitchRouter

    served = Engine.from_path(model_dir).runner.model
    assert type(served) is type(make_model()) is Decoder
    routers = [served.blocks[layer].ffn.router for layer in served.cfg.moe_layers]
    assert len(routers) == 2
    assert all(type(router) is SwitchRouter for router in routers)
