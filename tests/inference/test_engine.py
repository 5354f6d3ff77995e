"""The engine: a request's output is its own, whatever else runs, waits, is preempted, aborted or broken beside it."""
# ruff: noqa: N802 (M2 is the name of a rule)

import itertools
import random

import pytest
import torch

from turnout import ConfigError, NonFiniteError, RequestError
from turnout.inference.config import EngineConfig
from turnout.inference.core.request import QueueFullError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.errors import QueueTimeoutError
from turnout.inference.outputs import FailedOutput, RequestOutput
from turnout.moe import MoEConfig, RouteContext, VarlenContext
from turnout.moe.config import AttentionConfig, LatentConfig

Work = list[tuple[list[int], SamplingParams]]


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    """All outputs of every request, in order."""
    seen: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    return seen


def complete(engine: Engine, work: Work) -> list[RequestOutput]:
    for i, (prompt, params) in enumerate(work):
        engine.add_request(str(i), prompt, params)
    seen = run(engine)
    return [seen[str(i)][-1] for i in range(len(work))]


def tokens(output: RequestOutput) -> list[list[int]]:
    return [choice.token_ids for choice in output.outputs]


def mixed(**sampling) -> Work:
    """32 requests of all lengths; every other one begins with one of two common prefixes."""
    rng = random.Random(0)
    common = [[rng.randrange(1, 321) for _ in range(40)] for _ in range(2)]
    work = []
    for i in range(32):
        own = [rng.randrange(1, 321) for _ in range(rng.choice([1, 3, 15, 16, 17, 33, 50]))]
        prompt = common[i // 2 % 2] + own if i % 2 else own
        seeds = {"seed": i} if sampling.get("temperature") else {}
        work.append((prompt, SamplingParams(max_tokens=rng.randrange(4, 28), logprobs=1, **sampling, **seeds)))
    return work


LATENT = {"kv_heads": 4, "attention": AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6))}


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        pytest.param("switch", {}, id="1", marks=pytest.mark.full),
        pytest.param("gshard", {}, id="2"),
        pytest.param("gshard", LATENT, id="MLA", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "seeded"])
def test_M2_P3_32_requests_in_one_batch_give_what_each_gives_alone(make_model, make_engine, router, changes, sampling):
    model, work = make_model(router, **changes), mixed(**sampling)
    together = make_engine(model, num_blocks=20, max_num_seqs=8, max_num_batched_tokens=48)
    alone = make_engine(model, enable_prefix_caching=False)
    outputs = complete(together, work)
    stats = together.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    for request, output in zip(work, outputs, strict=True):
        (expected,) = complete(alone, [request])
        assert tokens(output) == tokens(expected)
        for found, wanted in zip(output.outputs[0].logprobs, expected.outputs[0].logprobs, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)
    assert (alone.stats().preemptions, alone.stats().prefix_hits) == (0, 0)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) >= 16


def test_O2_P3_streamed_outputs_only_grow_and_end_once(make_engine, byte_level):
    engine = make_engine(num_blocks=20, max_num_batched_tokens=32)
    for i, (prompt, params) in enumerate(mixed(temperature=0)):
        engine.add_request(str(i), prompt, params)
    seen = run(engine)
    assert engine.stats().preemptions > 0, "what was shown before a preemption is not shown again"
    for outputs in seen.values():
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        choices = [output.outputs[0] for output in outputs]
        assert [len(choice.token_ids) for choice in choices] == list(range(1, len(choices) + 1))
        for before, after in itertools.pairwise(choices):
            assert after.text.startswith(before.text)
            assert after.token_ids[:-1] == before.token_ids
        last = choices[-1]
        assert last.text == byte_level.decode(last.token_ids)
        assert last.finish_reason == "length"
        assert len(last.logprobs) == len(last.token_ids)
        assert all(token in logprobs for token, logprobs in zip(last.token_ids, last.logprobs, strict=True))


def test_n_choices_are_distinct_reproducible_and_share_the_prompt(make_engine):
    params = SamplingParams(n=4, max_tokens=12, seed=5, temperature=1.0)
    engine = make_engine(max_num_seqs=2)
    first, again = (complete(engine, [(list(range(1, 40)), params)])[0] for _ in range(2))
    assert tokens(first) == tokens(again)
    assert len({tuple(choice) for choice in tokens(first)}) == 4
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    (single,) = complete(engine, [(list(range(1, 40)), SamplingParams(max_tokens=12, seed=5))])
    assert tokens(single)[0] == tokens(first)[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)


def test_without_a_seed_requests_differ_and_equal_engines_repeat(make_engine):
    work = [([1, 2, 3], SamplingParams(max_tokens=16))] * 3
    one, two, other = (complete(make_engine(seed=seed), work) for seed in (0, 0, 1))
    assert [tokens(output) for output in one] == [tokens(output) for output in two]
    assert len({str(tokens(output)) for output in one + other}) == 6


def test_O3_stop_strings_cut_the_text_where_they_complete(make_engine, byte_level):
    engine = make_engine()
    prompt = list(range(5, 25))
    (whole,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=40))])
    text, ids = whole.outputs[0].text, whole.outputs[0].token_ids
    tried = 0
    for start in range(3, len(text) - 6, 8):
        stop = text[start : start + 4]
        at = text.index(stop)
        for include in (False, True):
            params = SamplingParams(
                temperature=0, max_tokens=40, stop=["never there", stop], include_stop_str_in_output=include, logprobs=0
            )
            engine.add_request("x", prompt, params)
            outputs = [output.outputs[0] for output in run(engine)["x"]]
            last = outputs[-1]
            assert last.text == text[: at + 4 if include else at]
            assert last.finish_reason == "stop"
            assert all(last.text.startswith(choice.text) for choice in outputs)
            assert stop in byte_level.decode(last.token_ids)
            assert stop not in byte_level.decode(last.token_ids[:-1]).removesuffix("�")
            assert last.token_ids == ids[: len(last.token_ids)]
            assert len(last.logprobs) == len(last.token_ids)
            tried += 1
    assert tried >= 6


def test_O3_min_tokens_lets_stop_strings_pass(make_engine):
    engine, prompt = make_engine(), list(range(5, 25))
    (whole,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=24))])
    stop = whole.outputs[0].text[2:4]
    (late,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=24, min_tokens=24, stop=stop))])
    assert tokens(late) == tokens(whole)
    assert late.outputs[0].text == whole.outputs[0].text


def test_eos_as_first_token_is_an_empty_text_and_one_finish(make_model, make_engine):
    prompt, greedy = [3, 1, 4], SamplingParams(temperature=0, max_tokens=5)
    (free,) = complete(make_engine(make_model()), [(prompt, greedy)])
    eos = tokens(free)[0][0]
    engine = make_engine(make_model(eos_token_id=eos))
    engine.add_request("x", prompt, greedy)
    (output,) = run(engine)["x"]
    choice = output.outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [eos], "stop")

    ignoring = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert tokens(complete(engine, [(prompt, ignoring)])[0]) == tokens(free)

    (suppressed,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=5, min_tokens=3))])
    assert eos not in tokens(suppressed)[0][:3]
    assert len(tokens(suppressed)[0]) > 3


def test_a_stop_token_ends_the_text_before_itself_unless_included(make_engine, byte_level):
    engine, prompt = make_engine(), list(range(5, 25))
    (whole,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=12))])
    ids = tokens(whole)[0]
    count = next(i for i in range(4, 12) if ids[i] not in ids[:i]) + 1
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=12, stop_token_ids=[ids[count - 1]], include_stop_str_in_output=include
        )
        choice = complete(engine, [(prompt, params)])[0].outputs[0]
        assert (choice.token_ids, choice.finish_reason) == (ids[:count], "stop")
        assert choice.text == byte_level.decode(ids[: count if include else count - 1])


@pytest.mark.parametrize("steps", range(12))
def test_an_abort_at_any_moment_leaks_nothing_and_changes_nobody(make_engine, steps):
    """Waiting, in a prefill chunk, decoding, preempted, with one of n choices finished: whatever 12 steps bring."""
    greedy = {"temperature": 0}
    work = [
        (list(range(1, 60)), SamplingParams(max_tokens=20, **greedy)),
        (list(range(30, 75)), SamplingParams(max_tokens=14, **greedy)),
        (list(range(80, 99)), SamplingParams(max_tokens=9, n=3, stop=["e", "\n", "�"], seed=1)),
        (list(range(2, 61)), SamplingParams(max_tokens=20, **greedy)),
    ]
    sizes = {"num_blocks": 11, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    expected = complete(make_engine(**sizes), work)
    engine, victims = make_engine(**sizes), ("1", "2")
    for i, (prompt, params) in enumerate(work):
        engine.add_request(str(i), prompt, params)
    last = {}
    for _ in range(steps):
        last |= {output.request_id: output for output in engine.step()}
    for victim in victims:
        gone = engine.abort(victim)
        if gone is None:
            assert last[victim].finished
            continue
        assert gone.finished
        assert "abort" in [choice.finish_reason for choice in gone.outputs]
        for choice, whole in zip(gone.outputs, expected[int(victim)].outputs, strict=True):
            assert whole.text.startswith(choice.text) or choice.text.endswith("�")
        assert engine.abort(victim) is None
    last |= {name: outputs[-1] for name, outputs in run(engine).items()}
    assert tokens(last["0"]) == tokens(expected[0])
    assert tokens(last["3"]) == tokens(expected[3])
    assert engine.abort("unknown") is None


def test_logits_that_are_not_finite_fail_that_request_alone(make_model, make_engine):
    model = make_model()
    with torch.no_grad():
        model.embed.weight[300] = torch.nan
    engine = make_engine(model, max_num_batched_tokens=16)
    greedy = SamplingParams(temperature=0, max_tokens=6)
    healthy: Work = [(list(range(1, 20)), greedy), ([7], greedy)]
    expected = complete(engine, healthy)
    engine.add_request("broken", [5, 300, 6], SamplingParams(n=2, max_tokens=6))
    outputs = complete(engine, [*healthy, ([300], greedy)])
    assert [tokens(output) for output in outputs[:2]] == [tokens(output) for output in expected]
    assert isinstance(outputs[2], FailedOutput)
    assert isinstance(outputs[2].error, NonFiniteError)
    assert [(choice.finish_reason, choice.token_ids) for choice in outputs[2].outputs] == [("abort", [])]
    assert [tokens(output) for output in complete(engine, healthy)] == [tokens(output) for output in expected]


def test_a_request_that_waits_too_long_expires_with_its_reason(model, byte_level):
    """Also when one of its choices runs already: the request has one fate."""
    now = [0.0]
    config = EngineConfig(num_blocks=64, max_num_seqs=1, queue_timeout=5)
    engine = Engine(model, byte_level, config, clock=lambda: now[0])
    params = SamplingParams(n=2, max_tokens=9)
    engine.add_request("x", [1, 2], params)
    engine.add_request("y", [3, 4], params)
    assert [output.request_id for output in engine.step()] == ["x"]
    now[0] = 6.0
    outputs = {output.request_id: output for output in engine.step()}
    assert not engine.has_unfinished
    assert engine.stats().usage == 0
    for name, counts in (("x", [1, 0]), ("y", [0, 0])):
        assert isinstance(outputs[name], FailedOutput)
        assert isinstance(outputs[name].error, QueueTimeoutError)
        assert [choice.finish_reason for choice in outputs[name].outputs] == ["abort", "abort"]
        assert [len(choice.token_ids) for choice in outputs[name].outputs] == counts


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ([], {}, "prompt", "at least one token"),
        ([1, 321], {}, "prompt", r"\(321\) must hold token ids from 0 to 320"),
        ([-1], {}, "prompt", r"\(-1\)"),
        ([True], {}, "prompt", r"\(True\)"),
        ([1], {"stop_token_ids": [400]}, "stop_token_ids", r"\(400\)"),
        ([1] * 250, {"max_tokens": 7}, "max_tokens", r"prompt \(250\) \+ max_tokens \(7\)"),
        ([1] * 300, {}, "prompt", r"max_model_len \(256\)"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_leaves_nothing(make_engine, prompt, params, param, message):
    engine = make_engine()
    with pytest.raises(RequestError, match=message) as caught:
        engine.add_request("x", prompt, SamplingParams(**params))
    assert caught.value.param == param


def test_an_id_is_unique_while_it_lives_and_the_queue_is_bounded(make_engine):
    engine = make_engine(max_waiting=3)
    engine.add_request("x", [1], SamplingParams(n=2, max_tokens=2))
    with pytest.raises(RequestError, match="must be new"):
        engine.add_request("x", [1], SamplingParams())
    with pytest.raises(QueueFullError, match="try again later"):
        engine.add_request("y", [1], SamplingParams(n=2))
    run(engine)
    engine.add_request("x", [1], SamplingParams(max_tokens=1))
    run(engine)


def test_a_router_that_looks_at_later_tokens_is_never_served(make_model, make_engine):
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, router="expert_choice", noncausal=True)
    rule = r"moe\.router \(expert_choice\) chooses among tokens that serving has not seen yet.*evaluate this model"
    with pytest.raises(ConfigError, match=rule):
        make_engine(make_model(moe=moe))


def test_a_router_of_nan_fails_requests_and_not_the_engine(make_model, make_engine):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].ffn.router.weight[0, 0] = torch.nan
    (output,) = complete(make_engine(model), [([1, 2], SamplingParams(max_tokens=2))])
    assert isinstance(output, FailedOutput)
    assert isinstance(output.error, NonFiniteError)


@pytest.mark.parametrize("chunk", [1, 64])
def test_hash_routing_is_served_by_the_token_s_id_however_it_is_cut(make_model, make_engine, chunk):
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, router="hash", init_scale=3.0)
    model, prompt = make_model(moe=moe), list(range(3, 30))
    engine = make_engine(model, max_num_batched_tokens=chunk, max_num_seqs=1)
    (output,) = complete(engine, [(prompt, SamplingParams(temperature=0, max_tokens=3))])
    ids = [*prompt, *tokens(output)[0][:-1]]
    ctx = VarlenContext(torch.tensor([0, len(ids)]), route=RouteContext(token_ids_T=torch.tensor(ids), dropless=True))
    logits_TV = model(torch.tensor(ids), torch.arange(len(ids)), ctx)
    assert logits_TV[len(prompt) - 1 :].argmax(-1).tolist() == list(tokens(output)[0])


def test_settings_that_do_not_fit_the_model_are_refused(model, byte_level, make_engine):
    with pytest.raises(ConfigError, match=r"max_model_len \(257\) must not exceed the model's max_seq_len: use 256"):
        make_engine(max_model_len=257)
    assert make_engine().config.max_model_len == 256
