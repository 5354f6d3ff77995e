"""deterministic=true on several ranks: experts divided, the bits of one rank; heads divided, a request's own bits."""

# ruff: noqa: N802 (S0 is the name of a rule)

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

LENGTHS = (1, 3, 4, 9, 17, 30, 5, 2)
Said = list[tuple[Any, ...]]


def config(deterministic: bool) -> EngineConfig:
    sizes = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 24, "block_size": 4}
    return EngineConfig(**sizes, deterministic=deterministic, kernels="auto" if deterministic else "reference")


def say(engine: Engine, at_once: bool) -> Said:
    """Tokens and log-probabilities of requests at temperature 1, together or one after another."""
    generator, found = torch.Generator().manual_seed(5), {}
    for i, length in enumerate(LENGTHS):
        prompt = torch.randint(1, 320, (length,), generator=generator).tolist()
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=6, ignore_eos=True, logprobs=3)
        engine.add_request(str(i), prompt, params)
        while engine.has_unfinished and (not at_once or i == len(LENGTHS) - 1):
            found |= {output.request_id: output for output in engine.step() if output.finished}
    return [(c.token_ids, c.logprobs) for i in range(len(LENGTHS)) for c in found[str(i)].outputs]


def serve(path: str, sizes: dict[str, int], deterministic: bool) -> tuple[Said, Said] | None:
    """On every rank; rank 0 says what came together and what came alone."""
    ranks = Ranks(build_mesh(ParallelConfig(**sizes)), config(deterministic))
    engine = Engine.from_path(path, config(deterministic), ranks=ranks)
    assert not engine.runner.records
    if not ranks.leads:
        ranks.follow()
        return None
    told = say(engine, at_once=True), say(engine, at_once=False)
    ranks.end()
    return told


@pytest.fixture(scope="module")
def path(make_model: Callable[..., Decoder], byte_level, tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("model"), make_model(router="gshard")
    byte_level._tokenizer.save(str(folder / "tokenizer.json"))
    return save_model(folder / "model", model.cfg, model.state_dict(), folder)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_S0_ep_gives_the_bits_of_one_rank(path, world):
    (together, alone), *_ = run_ranks(serve, world, path, {"ep": world}, True)
    assert together == alone == say(Engine.from_path(path, config(True)), at_once=False)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
def test_S0_under_tp_a_request_does_not_feel_its_mates(path, world):
    (together, alone), *_ = run_ranks(serve, world, path, {"tp": world}, True)
    assert together == alone
    one = say(Engine.from_path(path, config(True)), at_once=False)
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in one]


def test_S0_the_references_do_not_keep_it_over_ranks(path):
    """The mutant of the tests above."""
    (together, alone), *_ = run_ranks(serve, 2, path, {"ep": 2}, False)
    assert together != alone
