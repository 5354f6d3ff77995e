"""A pool far too small for what is asked: nobody waits longer than those before them take, and no token is lost.

The oldest request moves in every step, since only later ones lose their blocks. So a request's steps from its arrival
to its end are at most the sum, over it and all before it, of what each takes with the pool to itself.
"""

import random

import pytest

from turnout.inference.core.sampling import SamplingParams
from turnout.tests.helpers.oracle import Oracle

REQUESTS, BUDGET, LONGEST = 24, 64, 250  # the most tokens of a step and of a request; the pool has 256


@pytest.mark.parametrize(("overlap", "cached"), [(False, True), (True, False)])
def test_everyone_ends_within_the_bound_and_says_what_it_must(make_engine, make_model, overlap, cached):
    model = make_model(layers=1, moe=None, eos_token_id=0)
    sizes = {"num_blocks": 17, "max_num_batched_tokens": BUDGET, "overlap": overlap, "enable_prefix_caching": cached}
    engine = make_engine(model, **sizes)
    oracle, rng = Oracle(engine), random.Random(cached)
    asked, said, bounds, sum_of_all, steps = {}, {}, {}, 0, 0
    while engine.has_unfinished or len(asked) < REQUESTS:
        if len(asked) < REQUESTS and rng.random() < 0.3:
            name, prompt = str(len(asked)), rng.choices(oracle.ids[1:], k=rng.randint(1, 150))
            asked[name] = (prompt, rng.randint(1, LONGEST - len(prompt)))
            params = SamplingParams(temperature=0, max_tokens=asked[name][1], ignore_eos=True)
            engine.add_request(name, prompt, params)
            # Chunks of the prompt, or of all of it again; its tokens; an overlapped step begins and ends one later.
            sum_of_all += -(-LONGEST // BUDGET) + asked[name][1] + 2 * overlap
            bounds[name] = steps + sum_of_all
        if not engine.has_unfinished:
            continue
        steps += 1
        for output in engine.step():
            (choice,) = output.outputs
            before = said.get(output.request_id, [])
            assert choice.token_ids[: len(before)] == before, "no token is taken back"
            said[output.request_id] = choice.token_ids
            if output.finished:
                assert steps <= bounds.pop(output.request_id)
        assert all(steps < bound for bound in bounds.values())
    assert not bounds
    for name, (prompt, count) in asked.items():
        assert said[name] == oracle.answer(prompt, count, endless=True)
    assert engine.stats().preemptions > 10
