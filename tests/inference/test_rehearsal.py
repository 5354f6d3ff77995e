"""What is computed before the first request is nobody's: it counts nowhere and changes nothing."""

import pytest

from turnout import SamplingParams
from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.moe import MoEConfig

from .conftest import build_model

TIGHT = MoEConfig(
    width=32,
    expert_width=32,
    num_experts=4,
    eval_capacity_factor=0.35,
    min_capacity=1,
    capacity_tokens=24,
    init_scale=3.0,
)

SETTINGS = [
    {},
    {"max_num_batched_tokens": 512, "num_blocks": 3},
    {"num_blocks": 2, "block_size": 4, "max_model_len": 3},
    {"kv_layout": "contiguous", "max_model_len": 64},
    {"moe_capacity": "trained"},
    {"graph_buckets": (2, 4)},
    {"kv_dtype": "int8", "batching": "static"},
    {"overlap": True},
]


QUICK, *MORE = SETTINGS


@pytest.mark.parametrize("settings", [QUICK, *(pytest.param(more, marks=pytest.mark.full) for more in MORE)], ids=str)
def test_it_changes_no_output_and_no_number(byte_level, settings):
    model = build_model(moe=TIGHT)
    config = EngineConfig(**({"num_blocks": 32, "max_num_seqs": 4, "max_num_batched_tokens": 32} | settings))
    told = []
    for warm in (False, True):
        engine = Engine(model, byte_level, config)
        if warm:
            engine.warm_up()
        before = engine.stats()
        assert (before.steps, before.computed_tokens, before.usage, sum(before.step_tokens.counts)) == (0, 0, 0, 0)
        assert not any(map(sum, before.routing.counts()))
        params = SamplingParams(max_tokens=2, logprobs=1, ignore_eos=True)
        engine.add_request("a", [5], params)
        while engine.has_unfinished:
            outputs = engine.step()
        last = outputs[0]
        told.append((last.outputs[0].token_ids, last.outputs[0].logprobs, engine.stats().routing.counts()))
        engine.close()
    assert told[0] == told[1]
