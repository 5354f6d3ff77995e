"""Beam search finds what transformers' `generate` finds: the same sequences with the same scores."""

import json
import math
import shutil

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from turnout import LLM, NonFiniteError, RequestError, SamplingParams
from turnout.inference import BeamSearchParams
from turnout.inference.beam import BeamSearch
from turnout.tests.helpers import foreign

PROMPT = [0, 41, 77, 102, 9, 30, 5, 214, 88, 17, 60, 61, 62, 63, 64, 65, 66, 67]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose end-of-sequence tokens come up in beams of different lengths."""
    folder = tmp_path_factory.mktemp("theirs") / "mixtral"
    foreign.make(folder, MixtralForCausalLM, MixtralConfig, num_local_experts=4)
    (output,) = LLM(folder, kv_memory_mb=8).generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, logprobs=3))
    tops = [list(row) for row in output.outputs[0].logprobs]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, tops[2][1], tops[4][2]]}))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, kv_memory_mb=8, max_num_seqs=16, block_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    return MixtralForCausalLM.from_pretrained(folder)


def search(theirs, ids: list[int], **options) -> list[tuple[list[int], float]]:
    """transformers' sequences without their padding, and their scores."""
    row, width = torch.tensor([ids]), options["num_beams"]
    found = theirs.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, num_return_sequences=width,
        return_dict_in_generate=True, output_scores=True, pad_token_id=319, **options,
    )  # fmt: skip
    if width == 1:
        return [(found.sequences[0].tolist(), math.nan)]
    rows = [[token for token in sequence if token != 319] for sequence in found.sequences.tolist()]
    return list(zip(rows, found.sequences_scores.tolist(), strict=True))


def close(wanted: list[tuple[list[int], float]]):
    return pytest.approx([score for _, score in wanted], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_sequences_and_scores_are_those_of_transformers(llm, theirs, width, tokens):
    wanted = search(theirs, PROMPT, num_beams=width, max_new_tokens=tokens)
    (output,) = llm.beam_search([PROMPT], BeamSearchParams(beam_width=width, max_tokens=tokens))
    assert [list(beam.tokens) for beam in output.sequences] == [row for row, _ in wanted]
    if width > 1:
        assert [beam.score for beam in output.sequences] == pytest.approx(
            [score for _, score in wanted], rel=1e-6, abs=1e-5
        )


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("stopping", [False, True, "never"])
def test_length_penalty_and_early_stopping_are_those_of_transformers(llm, theirs, penalty, stopping):
    wanted = search(theirs, PROMPT, num_beams=4, max_new_tokens=10, length_penalty=penalty, early_stopping=stopping)
    params = BeamSearchParams(beam_width=4, max_tokens=10, length_penalty=penalty, early_stopping=stopping)
    (output,) = llm.beam_search([PROMPT], params)
    assert [list(beam.tokens) for beam in output.sequences] == [row for row, _ in wanted]
    assert [beam.score for beam in output.sequences] == pytest.approx(
        [score for _, score in wanted], rel=1e-6, abs=1e-5
    )


def test_prompts_are_searched_together_as_alone_and_prefixes_are_shared(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    prompts = ["The import statement", PROMPT, "naïve café"]
    before = llm.engine.stats()
    together = llm.beam_search(prompts, params)
    after = llm.engine.stats()
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.beam_search(prompt, params)
        assert [beam.tokens for beam in alone.sequences] == [beam.tokens for beam in output.sequences]
    reasons = {beam.finish_reason for output in together for beam in output.sequences}
    assert reasons == {"stop", "length"}, "both ends are seen"
    assert after.prefix_hits > before.prefix_hits
    assert (after.running, after.waiting, after.usage) == (0, 0, 0)
    best = together[0].sequences[0]
    assert best.text == llm.engine.tokenizer.decode(best.tokens)
    assert best.text.startswith("The import statement")


def test_end_of_sequence_can_be_ignored(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True)
    (output,) = llm.beam_search([PROMPT], params)
    assert [len(beam.tokens) - len(PROMPT) for beam in output.sequences] == [10] * 4
    assert {beam.finish_reason for beam in output.sequences} == {"length"}


def test_the_search_is_exhaustive_when_the_beam_is_wide_enough():
    """Three tokens, the last ends a text: all sequences of at most 3 tokens against a plain enumeration."""

    def logprobs(ids: tuple[int, ...]) -> dict[int, float]:
        scores = torch.randn(3, generator=torch.Generator().manual_seed(sum(3**i * (t + 1) for i, t in enumerate(ids))))
        best = sorted(enumerate(scores.log_softmax(0).tolist()), key=lambda pair: -pair[1])
        return dict(best)

    def spell(ids: tuple[int, ...], total: float) -> list[tuple[float, tuple[int, ...]]]:
        if len(ids) == 4 or (ids[-1] == 2 and len(ids) > 1):
            return [(total / (len(ids) - 1), ids)]
        return [end for token, logprob in logprobs(ids).items() for end in spell((*ids, token), total + logprob)]

    wanted = sorted(spell((1,), 0.0), reverse=True)[:15]
    search = BeamSearch([1], BeamSearchParams(beam_width=15, max_tokens=3, early_stopping="never"), frozenset([2]))
    while search.running:
        search.advance([logprobs(beam.tokens) for beam in search.running])
    assert [beam.tokens for beam in search.finished] == [ids for _, ids in wanted]
    assert [beam.score for beam in search.finished] == pytest.approx([score for score, _ in wanted])


def test_never_goes_on_as_long_as_the_greatest_length_could_win():
    for stopping, goes_on in ((False, False), (True, False), ("never", True)):
        params = BeamSearchParams(beam_width=1, max_tokens=10, early_stopping=stopping)
        search = BeamSearch([1], params, frozenset([9]))
        search.advance([{9: -1.0, 2: -1.1}])
        assert [beam.score for beam in search.finished] == [-1.0]
        assert bool(search.running) == goes_on, stopping


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0),
        ("beam_width", 21),
        ("max_tokens", 0),
        ("length_penalty", math.nan),
        ("length_penalty", 11),
        ("ignore_eos", 1),
        ("early_stopping", "always"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field) as caught:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | {field: value}))
    assert caught.value.param == field


def test_what_can_not_be_searched_is_refused_before_anything_runs(llm, t5_dir):
    steps = llm.engine.stats().steps
    with pytest.raises(RequestError, match=r"beam_width \(19\).*3 end-of-sequence tokens"):
        llm.beam_search([PROMPT], BeamSearchParams(beam_width=19, max_tokens=2))
    with pytest.raises(
        RequestError, match=r"prompt \(18\) \+ max_tokens \(111\) must not exceed max_model_len \(128\)"
    ):
        llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=111))
    with pytest.raises(RequestError, match=r"prompt \(320\) must hold token ids"):
        llm.beam_search([[320]], BeamSearchParams(beam_width=2, max_tokens=2))
    assert llm.engine.stats().steps == steps
    with pytest.raises(RequestError, match="encoder"):
        LLM(t5_dir, kv_memory_mb=8).beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2))


def test_logits_that_are_not_finite_end_the_search_by_name(folder, tmp_path):
    llm = LLM(shutil.copytree(folder, tmp_path / "copy"), kv_memory_mb=8)
    with torch.no_grad():
        llm.engine.runner.model.embed.weight[300] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        llm.beam_search([[5, 300]], BeamSearchParams(beam_width=2, max_tokens=2))
    assert not llm.engine.has_unfinished
