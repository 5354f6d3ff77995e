"""Several ranks serve as one does: experts and heads divided, replicas side by side, some of them without work."""
# ruff: noqa: N802 (M3 is the name of a rule)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout import SamplingParams, TurnoutError
from turnout.inference.config import EngineConfig
from turnout.inference.core.step import StepPlan
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput
from turnout.inference.ranks import Ranks
from turnout.inference.run.batch import Batch
from turnout.moe import Decoder, MoEConfig, save_model
from turnout.moe.config import AttentionConfig, LatentConfig
from turnout.moe.models.store import load_config
from turnout.parallel import ParallelConfig, build_mesh, process
from turnout.tests.helpers.ranks import RankError, run_ranks

SIZES = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 24, "block_size": 4}
LENGTHS = (1, 3, 4, 9, 17, 30, 5, 2)


def prompts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 320, (n,), generator=generator).tolist() for n in LENGTHS[:count]]


def finish(engine: Engine, asked: list[list[int]], **params: Any) -> list[RequestOutput]:
    """What every request gave, all of which come at once."""
    options = SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params})
    for i, prompt in enumerate(asked):
        engine.add_request(str(i), prompt, options)
    found = {}
    while engine.has_unfinished:
        found |= {output.request_id: output for output in engine.step() if output.finished}
    return [found[str(i)] for i in range(len(asked))]


def report(engine: Engine, asked: list[list[int]], params: dict[str, Any]) -> dict[str, Any]:
    """What came out; logits of the steps' rows, in the order in which they were computed."""
    rows, forward = [], engine.runner.forward

    def listen(plan: StepPlan) -> tuple[Batch, torch.Tensor]:
        batch, logits = forward(plan)
        rows.append(logits)
        return batch, logits

    engine.runner.forward = listen
    outputs = finish(engine, asked, **params)
    choices = [choice for output in outputs for choice in output.outputs]
    stats = engine.stats()
    return {
        "tokens": [list(choice.token_ids) for choice in choices],
        "logprobs": [choice.logprobs for choice in choices],
        "routed": [None if c.routed_experts is None else c.routed_experts.tolist() for c in choices],
        "prompts": [output.prompt_logprobs for output in outputs],
        "logits": torch.cat(rows),
        "counts": stats.routing.counts(),
        "computed": stats.computed_tokens,
        "preemptions": stats.preemptions,
        "left": (stats.running, stats.waiting, stats.usage),
        "replicas": [s.stats().prefix_queries for s in getattr(engine.scheduler, "schedulers", ())],
    }


def serve(path: str, sizes: dict[str, int], options: dict[str, Any], asked: list[list[int]], params: dict) -> Any:
    """On every rank; what rank 0 has to say."""
    config = EngineConfig(**(SIZES | options))
    ranks = Ranks(build_mesh(ParallelConfig(timeout=30.0, **sizes)), config)
    engine = Engine.from_path(path, config, ranks=ranks)
    if not ranks.leads:
        ranks.follow()
        return None
    told = report(engine, asked, params)
    ranks.end()
    return told


def alone(path: str, options: dict[str, Any], asked: list[list[int]], params: dict) -> dict[str, Any]:
    return report(Engine.from_path(path, EngineConfig(**(SIZES | options))), asked, params)


def moe_of(router: str, **changes: Any) -> MoEConfig:
    values = {
        "width": 32, "expert_width": 32, "num_experts": 4, "top_k": {"switch": 1, "hash": 1}.get(router, 2),
        "router": router, "init_scale": 3.0,
    }  # fmt: skip
    return MoEConfig(**(values | changes))


@pytest.fixture(scope="module")
def saved(make_model: Callable[..., Decoder], byte_level, tmp_path_factory) -> Callable[..., str]:
    """Directories of small models, by what they are."""
    found: dict[str, Path] = {}

    def save(router: str | None = "topk_softmax", **changes: Any) -> str:
        name = f"{router} {sorted(changes.items(), key=str)}"
        if name not in found:
            folder = tmp_path_factory.mktemp("model")
            byte_level._tokenizer.save(str(folder / "tokenizer.json"))
            model = make_model(**({"moe": router and moe_of(router)} | changes))
            found[name] = save_model(folder / "model", model.cfg, model.state_dict(), folder)
        return str(found[name])

    return save


def both(
    path: str, world: int, sizes: dict[str, int], asked: list[list[int]] | None = None, params: dict | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What the ranks say and what one rank says, once their tokens are the same and nothing is left."""
    asked, params = asked or prompts(), params or {}
    try:
        told, *_ = run_ranks(serve, world, path, sizes, options, asked, params, group_timeout=30.0)
    except RankError as error:
        pytest.fail(str(error))
    expected = alone(path, options, asked, params)
    assert told["tokens"] == expected["tokens"]
    assert told["routed"] == expected["routed"]
    assert told["left"] == (0, 0, 0)
    for counts in told["counts"]:
        assert sum(counts) == told["computed"] * load_config(path).moe.top_k
    return told, expected


def assert_close(told: dict[str, Any], expected: dict[str, Any], bound: float = 1e-5) -> None:
    """Both have computed the same steps."""
    error = (told["logits"] - expected["logits"]).norm(dim=1) / expected["logits"].norm(dim=1)
    assert float(error.max()) <= bound


def test_M3_ep_2_serves_what_one_rank_serves(saved):
    told, _ = both(saved(), 2, {"ep": 2})
    assert all(told["replicas"]), "both replicas had requests"


def test_M4_a_replica_without_requests_takes_part_in_every_step(saved):
    told, _ = both(saved(), 2, {"ep": 2}, asked=prompts(6)[5:])
    assert told["replicas"] == [30, 0]


def test_tp_2_gives_one_ranks_tokens_and_logits(saved):
    assert_close(*both(saved(), 2, {"tp": 2}))


LATENT = AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6, query_rank=20))
MODELS: dict[str, dict[str, Any]] = {
    "switch": {"router": "switch"},
    "deepseek_v3": {"router": "deepseek_v3", "kv_heads": 4, "attention": LATENT},
    "hash": {"router": "hash"},
    "MQA": {"kv_heads": 1},
    "windows": {"attention": AttentionConfig(window=5)},
    "sinks": {"attention": AttentionConfig(sinks=True, qkv_bias=True)},
}
LAYOUTS = [(2, {"ep": 2}), (2, {"tp": 2}), (2, {"tp": 2, "ep": 2}), (4, {"tp": 2, "ep": 4}), (3, {"tp": 1, "ep": 3})]


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_M3_every_layout_serves_what_one_rank_serves(saved, model, world, sizes):
    told, expected = both(saved(**MODELS[model]), world, sizes)
    if world // sizes["tp" if "tp" in sizes else "ep"] == 1 and sizes.get("tp", 1) == world:
        assert_close(told, expected)


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), [(2, {}), (2, {"tp": 2}), (4, {"tp": 2})], ids=str)
def test_dense_models_have_replicas_and_divided_heads(saved, world, sizes):
    both(saved(router=None), world, sizes)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3])
def test_M3_eight_experts_and_all_tokens_to_one_of_them(saved, make_model, byte_level, tmp_path, world):
    moe = moe_of("topk_softmax", num_experts=8)
    both(saved(moe=moe), world, {"ep": world})
    model = make_model(moe=moe)
    for layer in model.cfg.moe_layers:
        model.blocks[layer].ffn.router.weight.zero_()  # all are equal, and the lowest index wins
    byte_level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = save_model(tmp_path / "model", model.cfg, model.state_dict(), tmp_path)
    told, _ = both(str(path), world, {"ep": world})
    assert all(sum(counts[2:]) == 0 for counts in told["counts"])


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), [(2, {"ep": 2}), (2, {"tp": 2}), (4, {"tp": 2, "ep": 2})], ids=str)
@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"num_blocks": 14, "enable_prefix_caching": False}, {"max_tokens": 12}),
        ({"overlap": True}, {"temperature": 1.0, "seed": 3}),
        ({}, {"n": 3, "temperature": 1.0, "seed": 3}),
        ({}, {"routed_experts": True}),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 2}, {"logprobs": 2}),
    ],
    ids=["preempted", "ahead", "forked", "routed", "small"],
)
def test_M3_whatever_the_scheduler_does_the_ranks_follow(saved, world, sizes, options, params):
    told, _ = both(saved(), world, sizes, params=params, **options)
    assert (told["preemptions"] > 0) == ("num_blocks" in options)


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), [(2, {"ep": 2}), (2, {"tp": 2})], ids=str)
def test_M3_drops_are_those_of_one_rank(saved, world, sizes):
    moe = moe_of("switch", capacity_factor=1.0, eval_capacity_factor=1.0, capacity_tokens=8)
    told, _ = both(saved(moe=moe), world, sizes, params={"routed_experts": True}, moe_capacity="trained")
    assert any(expert < 0 for rows in told["routed"] for row in rows for layer in row for expert in layer), "no drops"


@pytest.mark.full
def test_M3_ep_2_gives_one_ranks_bits_in_deterministic_mode(saved):
    told, expected = both(saved(), 2, {"ep": 2}, params={"logprobs": 5}, deterministic=True)
    assert told["logprobs"] == expected["logprobs"]


@pytest.mark.full
def test_prompt_logprobs_come_from_the_rank_that_computes_them(saved):
    told, expected = both(saved(), 2, {"ep": 2}, params={"prompt_logprobs": 0}, deterministic=True)
    assert told["replicas"][1] == 0
    assert told["prompts"] == expected["prompts"]
    assert len(told["prompts"][5]) == LENGTHS[5]


def refused(path: str, sizes: dict[str, int], options: dict[str, Any], params: dict[str, Any]) -> str:
    """Why this rank can not serve, or rank 0 not this request."""
    options = {name: value[process.rank()] if isinstance(value, list) else value for name, value in options.items()}
    try:
        config = EngineConfig(**(SIZES | options))
        ranks = Ranks(build_mesh(ParallelConfig(**sizes)), config)
        engine = Engine.from_path(path, config, ranks=ranks)
        engine.prepare("one", [1, 2], SamplingParams(**params))
    except TurnoutError as error:
        return str(error)
    return "served"


@pytest.mark.parametrize(
    ("sizes", "options", "params", "says"),
    [
        ({}, {"graph_buckets": (1, 2)}, {}, "graph_buckets ((1, 2)) is for one rank"),
        ({}, {"max_num_seqs": [8, 4]}, {}, "the engine's settings (rank 1's) must be rank 0's"),
        ({"tp": 2}, {}, {"prompt_logprobs": 1}, "prompt_logprobs (1) needs all tokens of a prompt on one rank"),
    ],
    ids=str,
)
def test_what_ranks_can_not_do_is_refused_with_the_reason(saved, sizes, options, params, says):
    for told in run_ranks(refused, 2, saved(), sizes, options, params):
        assert says in told


def test_an_encoder_decoder_is_refused_on_several_ranks(t5_dir):
    for told in run_ranks(refused, 2, str(t5_dir), {}, {"max_num_batched_tokens": 300}, {}):
        assert told == "nproc (2) must be 1 for an encoder-decoder: serve it on one rank"
