"""Requests are as long as asked for, share what they should, are the same for a seed, or as a file has them."""

import json
import math

import numpy as np
import pytest

from turnout import ConfigError, DataError
from turnout.launch.benches.dataset import CHUNK, Source, asks, documents, pieces
from turnout.launch.benches.lengths import Dataset
from turnout.launch.workload import mixed

IDS = Source(range(100_000))


def test_lengths_are_lognormal_unless_said_otherwise():
    found = asks(Dataset(requests=20), IDS)
    usual = mixed(IDS.ids, 20)
    assert [(a.prompt, a.tokens, a.due) for a in found] == [(j.prompt, j.tokens, j.arrival) for j in usual]


def test_lengths_are_fixed_or_uniform():
    fixed = asks(Dataset(requests=9, prompt_tokens=(512,), output_tokens=(64,)), IDS)
    assert {(len(ask.prompt), ask.tokens) for ask in fixed} == {(512, 64)}
    found = asks(Dataset(requests=3000, prompt_tokens=(10, 13), output_tokens=(1, 2)), IDS)
    counts = np.bincount([len(ask.prompt) for ask in found], minlength=15)
    assert counts[10:14].sum() == 3000
    assert (abs(counts[10:14] - 750) < 120).all()
    assert {ask.tokens for ask in found} == {1, 2}
    assert 0.9 < found[-1].due / 3000 < 1.1  # one a second


def test_a_prefix_is_one_of_several_and_the_rest_is_ones_own():
    found = asks(Dataset(requests=200, prompt_tokens=(16,), prefix_tokens=256, prefixes=8), IDS)
    assert {len(ask.prompt) for ask in found} == {272}
    assert len({ask.prompt[:256] for ask in found}) == 8
    assert len({ask.prompt[256:] for ask in found}) > 190
    assert {ask.shared for ask in found} == {256}


def test_a_seed_decides_everything():
    settings = {"requests": 5, "prompt_tokens": (4, 90), "prefix_tokens": 8, "prefixes": 2}
    assert asks(Dataset(**settings), IDS) == asks(Dataset(**settings), IDS) != asks(Dataset(**settings, seed=8), IDS)


def test_a_text_is_cut_into_prompts(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(20_000))
    (tmp_path / "text").write_text(text)
    source = pieces("\n".join(documents(Dataset(text=str(tmp_path / "text")))))
    found = asks(Dataset(requests=5, prompt_tokens=(100,)), source)
    assert all(len(ask.prompt) == 100 * CHUNK and ask.prompt in text + text for ask in found)
    with pytest.raises(ConfigError, match=r"text .* more than 1000 tokens"):
        asks(Dataset(), pieces("short"))
    (tmp_path / "text").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="byte 2"):
        documents(Dataset(text=str(tmp_path / "text")))


def written(tmp_path, *lines, name="trace.jsonl"):
    (tmp_path / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(tmp_path / name)


def test_mooncakes_trace_has_times_lengths_and_shared_blocks(tmp_path):
    path = written(
        tmp_path,
        {"timestamp": 1000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]},
        {"timestamp": 4000, "input_length": 1030, "output_length": 26, "hash_ids": [46, 47, 9]},
        {"timestamp": 2000, "input_length": 600, "output_length": 8, "hash_ids": [1, 2]},
    )
    first, third, second = asks(Dataset(trace=path), IDS, spread=True)
    assert [ask.due for ask in (first, third, second)] == [0.0, 1.0, 3.0]
    assert [(len(a.prompt), a.tokens) for a in (first, second, third)] == [(1100, 52), (1030, 26), (600, 8)]
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1030] != second.prompt[1024:1030]
    assert first.prompt[:512] != third.prompt[:512]
    assert [ask.due for ask in asks(Dataset(trace=path), IDS)] != [0.0, 1.0, 3.0]  # another load has its own times
    assert len(asks(Dataset(trace=path, requests=2), IDS)) == 2


def test_azures_trace_has_dates(tmp_path):
    path = written(
        tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109", name="trace.csv",
    )  # fmt: skip
    first, second = asks(Dataset(trace=path), IDS, spread=True)
    assert (len(first.prompt), first.tokens, len(second.prompt), second.tokens) == (374, 44, 396, 109)
    assert second.due == pytest.approx(4.314579, abs=1e-6)


def test_vidurs_trace_has_seconds(tmp_path):
    lines = ("arrived_at,num_prefill_tokens,num_decode_tokens", "0.5,374,44", "2.0,396,109")
    first, second = asks(Dataset(trace=written(tmp_path, *lines, name="trace.csv")), IDS, spread=True)
    assert (len(first.prompt), first.tokens, len(second.prompt), second.tokens) == (374, 44, 396, 109)
    assert second.due == 1.5


def test_a_trace_may_bring_the_prompts(tmp_path):
    path = written(tmp_path, {"prompt": "Hello", "max_tokens": 3}, "", {"prompt": [1, 2, 3]})
    text, ids = asks(Dataset(trace=path, output_tokens=(7,)), IDS)
    assert (text.prompt, text.tokens, ids.prompt, ids.tokens) == ("Hello", 3, (1, 2, 3), 7)
    with pytest.raises(DataError, match="load=trace needs one in each"):
        asks(Dataset(trace=path), IDS, spread=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: is no JSON object"), ("[1]", "line 2"), ({"timestamp": 1}, "line 2: needs input_length"),
        ({"input_length": 0}, "at least 1"), ({"input_length": 5, "output_length": 0}, "at least 1"),
        ({"prompt": ""}, "line 2"), ({"prompt": ["a"]}, "token ids"), ({"prompt": 5}, "line 2"),
        ({"input_length": "many"}, "line 2"), ({"input_length": 5, "timestamp": "noon"}, "line 2"),
        ({"input_length": 5, "timestamp": math.nan}, "must be finite"),
    ],
)  # fmt: skip
def test_a_line_that_does_not_read_is_named(tmp_path, line, words):
    with pytest.raises(DataError, match=words):
        asks(Dataset(trace=written(tmp_path, {"input_length": 4}, line)), IDS)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("requests", {"requests": 0}), ("seed", {"seed": -1}), ("prompt_tokens", {"prompt_tokens": (5, 4)}),
        ("output_tokens", {"output_tokens": (0,)}), ("prompt_tokens", {"prompt_tokens": (1, 2, 3)}),
        ("prefix_tokens", {"prefix_tokens": -1}), ("prefixes", {"prefixes": 0, "prefix_tokens": 1}),
        ("prefixes", {"prefixes": 2}), ("prompt_tokens", {"prompt_tokens": (5,), "trace": "x"}),
        ("trace", {"trace": "x", "workload": "y"}), ("requests", {"requests": 3, "workload": "y"}),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(field, settings):
    with pytest.raises(ConfigError, match=rf"^{field} \("):
        Dataset(**settings)
