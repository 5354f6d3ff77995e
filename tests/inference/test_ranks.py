"""Several ranks serve as one does: experts and heads divided, replicas side by side, some of them without work."""
# ruff: noqa: N802 (M3 is the name of a rule)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout import SamplingParams
from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.inference.ranks import Ranks
from turnout.moe import Decoder, save_model
from turnout.parallel import ParallelConfig, build_mesh
from turnout.tests.helpers.ranks import run_ranks

SIZES = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 24, "block_size": 4}
LENGTHS = (1, 3, 4, 9, 17, 30, 5, 2)


def prompts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 320, (n,), generator=generator).tolist() for n in LENGTHS[:count]]


def finish(engine: Engine, asked: list[list[int]], **params: Any) -> list[list[int]]:
    """The tokens of every choice of every request, all of which come at once."""
    options = SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params})
    for i, prompt in enumerate(asked):
        engine.add_request(str(i), prompt, options)
    found = {}
    while engine.has_unfinished:
        found |= {output.request_id: output for output in engine.step() if output.finished}
    return [list(choice.token_ids) for i in range(len(asked)) for choice in found[str(i)].outputs]


def report(engine: Engine, tokens: list[list[int]]) -> dict[str, Any]:
    stats = engine.stats()
    return {
        "tokens": tokens,
        "counts": stats.routing.counts(),
        "computed": stats.computed_tokens,
        "left": (stats.running, stats.waiting, stats.usage),
        "replicas": [s.stats().prefix_queries for s in getattr(engine.scheduler, "schedulers", ())],
    }


def serve(path: str, sizes: dict[str, int], options: dict[str, Any], asked: list[list[int]], params: dict) -> Any:
    """On every rank; what rank 0 has to say."""
    config = EngineConfig(**(SIZES | options))
    ranks = Ranks(build_mesh(ParallelConfig(**sizes)), config)
    engine = Engine.from_path(path, config, ranks=ranks)
    if not ranks.leads:
        ranks.follow()
        return None
    told = report(engine, finish(engine, asked, **params))
    ranks.end()
    return told


def alone(path: str, options: dict[str, Any], asked: list[list[int]], params: dict) -> dict[str, Any]:
    engine = Engine.from_path(path, EngineConfig(**(SIZES | options)))
    return report(engine, finish(engine, asked, **params))


@pytest.fixture(scope="module")
def saved(make_model: Callable[..., Decoder], byte_level, tmp_path_factory) -> Callable[..., str]:
    """Directories of small models, by what they are."""
    found: dict[str, Path] = {}

    def save(**changes: Any) -> str:
        name = str(sorted(changes.items(), key=str))
        if name not in found:
            folder = tmp_path_factory.mktemp("model")
            byte_level._tokenizer.save(str(folder / "tokenizer.json"))
            model = make_model(**changes)
            found[name] = save_model(folder / "model", model.cfg, model.state_dict(), folder)
        return str(found[name])

    return save


def assert_serves_like_one(
    path: str, world: int, sizes: dict[str, int], asked: list[list[int]] | None = None, params: dict | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    asked, params = asked or prompts(), params or {}
    told, *_ = run_ranks(serve, world, path, sizes, options, asked, params)
    expected = alone(path, options, asked, params)
    assert told["tokens"] == expected["tokens"]
    assert told["left"] == (0, 0, 0)
    assert told["counts"] == expected["counts"] or told["computed"] != expected["computed"]
    return told


def test_M3_ep_2_serves_what_one_rank_serves(saved):
    told = assert_serves_like_one(saved(router="gshard"), 2, {"ep": 2})
    assert all(told["replicas"]), "both replicas had requests"


def test_M4_a_replica_without_requests_takes_part_in_every_step(saved):
    told = assert_serves_like_one(saved(router="gshard"), 2, {"ep": 2}, asked=prompts(6)[5:])
    assert told["replicas"] == [30, 0]


def test_tp_2_serves_what_one_rank_serves(saved):
    assert_serves_like_one(saved(router="gshard"), 2, {"tp": 2})
