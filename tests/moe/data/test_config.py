"""The data settings: validated at birth, without torch."""

import subprocess
import sys

import pytest

from turnout import ConfigError
from turnout.configs.typed import build, to_dict
from turnout.moe.data.config import DataConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, r"data\.vocab_size \(256\) must lie in 257"),
        ({"vocab_size": 2**20 + 1}, r"data\.vocab_size \(1048577\)"),
        ({"path": ""}, r"data\.path \(''\) must not be empty"),
        ({"cache": ""}, r"data\.cache"),
        ({"tuning": 0.0}, r"data\.tuning \(0\.0\) must lie between 0 and 1: use 0\.05, or null"),
        ({"tuning": 1.0}, r"data\.tuning \(1\.0\) must lie between 0 and 1"),
        ({"vocabsize": 5000}, r"data\.vocabsize is not a setting: did you mean data\.vocab_size\?"),
        ({"vocab_size": "many"}, r"data\.vocab_size \('many'\) must be a whole number"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, settings, "data")


def test_settings_survive_plain_json():
    config = DataConfig(path="a.jsonl", validation="b.txt", vocab_size=500, tokenizer="t", cache="c")
    assert build(DataConfig, to_dict(config)) == config


def test_only_rows_need_torch():
    code = (
        "import sys, turnout.moe.data.config, turnout.moe.data.stream, turnout.parallel.checkpoint.manifest;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
