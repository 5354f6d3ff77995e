"""The runner: routing statistics, and pages that hold another request's remains."""

import pytest
import torch

from turnout.inference.core.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_expert_load_sums_to_tokens_times_choices_in_every_layer(make_model, make_engine, router):
    model = make_model(router)
    engine = make_engine(model, num_blocks=8, max_num_batched_tokens=64)
    for i in range(6):
        engine.add_request(str(i), list(range(1 + 20 * i, 31 + 20 * i)), GREEDY)
    while engine.has_unfinished:
        engine.step()
    stats = engine.stats()
    assert stats.preemptions > 0, "recomputed tokens count as well"
    expected = stats.computed_tokens * model.cfg.moe.top_k
    assert [sum(counts) for counts in stats.routing.counts()] == [expected] * len(model.cfg.moe_layers)
    assert stats.routing.fields()["drop_fraction"] == 0.0, "serving drops nothing"
    assert stats.computed_tokens > 6 * (30 + 5)


def test_what_a_page_held_before_is_never_read(make_engine):
    engine = make_engine(num_blocks=8)

    def complete() -> list[int]:
        engine.add_request("x", list(range(1, 19)), GREEDY)
        outputs = []
        while engine.has_unfinished:
            outputs = engine.step()
        return outputs[0].outputs[0].token_ids

    first = complete()
    engine.runner.cache.keys.fill_(torch.nan)
    engine.runner.cache.values.fill_(torch.nan)
    engine.blocks.prefix.__init__(b"other weights")  # nothing of the first run may be reused
    engine.blocks.free[:] = range(1, 8)
    assert complete() == first
