"""Log-probabilities of prompt tokens are those of the training forward, however the prompt is computed."""

import pytest
import torch

from turnout import LLM, NonFiniteError, RequestError, SamplingParams
from turnout.inference.outputs import FailedOutput
from turnout.inference.run import prompt as run_prompt
from turnout.moe import RouteContext, VarlenContext

from .test_engine import complete, mixed, run, tokens

PROMPT = [(7 * i * i + 3 * i) % 320 + 1 for i in range(75)]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def forward(model):
    """Prompt → the log-probabilities [T, V] that the model's training form gives."""

    def logprobs(ids: list[int]) -> torch.Tensor:
        route = RouteContext(token_ids_T=torch.tensor(ids), dropless=True)
        context = VarlenContext(torch.tensor([0, len(ids)]), route=route)
        return model(torch.tensor(ids), torch.arange(len(ids)), context).float().log_softmax(-1)

    return logprobs


def check(found, ids: list[int], logprobs_TV: torch.Tensor, top: int) -> None:
    assert found is not None, "the whole prompt is scored"
    assert len(found) == len(ids)
    assert found[0] is None
    for position, row in enumerate(found[1:], 1):
        expected_V = logprobs_TV[position - 1]
        assert set(row) == {ids[position], *expected_V.topk(top).indices.tolist()}
        assert next(iter(row)) == ids[position]
        for token, logprob in row.items():
            assert logprob == pytest.approx(expected_V[token].item(), abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
@pytest.mark.parametrize("top", [0, 3])
def test_they_are_those_of_the_training_forward_in_chunks_of_any_size(make_engine, forward, chunk, top):
    engine = make_engine(max_num_batched_tokens=chunk, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=top)
    plain = SamplingParams(temperature=0, max_tokens=4)
    scored, other = complete(engine, [(PROMPT, params), (PROMPT, plain)])
    check(scored.prompt_logprobs, PROMPT, forward(PROMPT), top)
    assert other.prompt_logprobs is None
    assert tokens(scored) == tokens(other)


def test_chunks_of_any_size_give_the_same_bits_when_deterministic(make_engine):
    found = [
        complete(make_engine(deterministic=True, max_num_batched_tokens=chunk, max_num_seqs=1), [(PROMPT, SCORE)])
        for chunk in (5, 512)
    ]
    assert found[0][0].prompt_logprobs == found[1][0].prompt_logprobs


@pytest.mark.parametrize("overlap", [False, True])
def test_O11_a_cached_prefix_changes_nothing(make_engine, forward, overlap):  # noqa: N802
    engine = make_engine(overlap=overlap)
    plain, longer = SamplingParams(temperature=0, max_tokens=4), [*PROMPT, 5, 6]
    (first,) = complete(engine, [(PROMPT, plain)])
    scored, again, later = complete(engine, [(PROMPT, SCORE), (longer, SCORE), (PROMPT, plain)])
    check(scored.prompt_logprobs, PROMPT, forward(PROMPT), 2)
    check(again.prompt_logprobs, longer, forward(longer), 2)
    assert (scored.num_cached_tokens, again.num_cached_tokens, later.num_cached_tokens) == (0, 0, 64)
    assert tokens(later) == tokens(first)


def test_P3_preemption_repeats_and_loses_none(make_engine, forward):  # noqa: N802
    work = [
        (ids, SamplingParams(temperature=0, max_tokens=params.max_tokens, prompt_logprobs=1))
        for ids, params in mixed(temperature=0)
    ]
    engine = make_engine(num_blocks=14, max_num_batched_tokens=24)
    outputs = complete(engine, work)
    assert engine.stats().preemptions > 0
    for (ids, _), output in zip(work, outputs, strict=True):
        check(output.prompt_logprobs, ids, forward(ids), 1)


def test_P8_scoring_generates_nothing_and_ends_by_length(make_engine, forward):  # noqa: N802
    engine = make_engine(max_num_batched_tokens=16)
    engine.add_request("x", PROMPT, SCORE)
    (output,) = run(engine)["x"]
    (choice,) = output.outputs
    assert output.finished
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [], "length")
    check(output.prompt_logprobs, PROMPT, forward(PROMPT), 2)
    (single,) = complete(engine, [([9], SCORE)])
    assert single.prompt_logprobs == [None]
    longest = [i % 320 + 1 for i in range(256)]
    (whole,) = complete(engine, [(longest, SCORE)])
    assert len(whole.prompt_logprobs) == 256, "a prompt may fill the context when nothing is generated"


def test_choices_share_them_and_every_output_has_them_whole(make_engine, forward):
    engine = make_engine(max_num_batched_tokens=20)
    engine.add_request("x", PROMPT, SamplingParams(n=3, max_tokens=5, seed=1, prompt_logprobs=1))
    outputs = run(engine)["x"]
    for output in outputs:
        check(output.prompt_logprobs, PROMPT, forward(PROMPT), 1)
    (plain,) = complete(engine, [(PROMPT, SamplingParams(n=3, max_tokens=5, seed=1))])
    assert tokens(outputs[-1]) == tokens(plain)


def test_an_abort_in_the_middle_of_the_prompt_shows_none(make_engine):
    engine = make_engine(max_num_batched_tokens=16)
    engine.add_request("x", PROMPT, SCORE)
    engine.step()
    assert engine.abort("x").prompt_logprobs is None


def test_a_large_vocabulary_is_scored_in_slices(make_engine, forward, monkeypatch):
    whole, expected = complete(make_engine(), [(PROMPT, SCORE)])[0].prompt_logprobs, forward(PROMPT)
    monkeypatch.setattr(run_prompt, "LOGITS", 5 * 321)
    engine = make_engine()
    rows, logits = [], engine.runner.model.logits

    def watched(x_TD, context):
        rows.append(len(context.logit_rows))
        return logits(x_TD, context)

    monkeypatch.setattr(engine.runner.model, "logits", watched)
    sliced = complete(engine, [(PROMPT, SCORE)])[0].prompt_logprobs
    assert max(rows) == 5, "so many rows are held at once"
    check(sliced, PROMPT, expected, 2)
    assert [set(row or ()) for row in sliced] == [set(row or ()) for row in whole]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_O5_logits_that_are_not_finite_are_no_score(make_model, make_engine, max_tokens):  # noqa: N802
    model = make_model()
    with torch.no_grad():
        model.embed.weight[300] = torch.nan
    engine = make_engine(model, max_num_batched_tokens=8)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0)
    healthy, broken = complete(engine, [(PROMPT, params), ([*PROMPT[:20], 300, *PROMPT], params)])
    assert isinstance(broken, FailedOutput)
    assert isinstance(broken.error, NonFiniteError)
    assert broken.prompt_logprobs is None
    assert len(healthy.prompt_logprobs) == len(PROMPT)
    assert healthy.outputs[0].finish_reason == "length"


def test_what_an_encoder_reads_has_none(t5_dir):
    with pytest.raises(RequestError, match=r"prompt_logprobs \(0\).*encoder") as caught:
        LLM(t5_dir, kv_memory_mb=8).generate("a", SamplingParams(prompt_logprobs=0))
    assert caught.value.param == "prompt_logprobs"
