"""Command lines become typed options, or one error that says what to write instead."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

from turnout import ConfigError
from turnout.launch.cli import Options, parse, write_json


@dataclass(frozen=True, kw_only=True)
class Engine:
    block_size: int = 16
    dtype: Literal["auto", "float32"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Generate(Options):
    prompt: str = ""
    temperature: float = 1.0
    seed: int | None = None
    stream: bool = False
    engine: Engine | None = None


def test_words_come_first_and_settings_are_typed():
    words, options = parse(Generate, ["runs/x", "temperature=0.5", "seed=3", "stream=true", "json=out.json"])
    assert words == ["runs/x"]
    assert options == Generate(temperature=0.5, seed=3, stream=True, json="out.json")


def test_a_setting_splits_at_its_first_equals_sign_and_is_literal():
    _, options = parse(Generate, ['prompt=Hello, [world]: a=b {"x": 1}'])
    assert options.prompt == 'Hello, [world]: a=b {"x": 1}'


def test_null_is_none_where_none_is_allowed():
    assert parse(Generate, ["seed=null"])[1].seed is None
    assert parse(Generate, ["prompt=null"])[1].prompt == "null"


def test_a_dotted_key_reaches_a_nested_group():
    assert parse(Generate, ["engine.block_size=32", "engine.dtype=float32"])[1].engine == Engine(
        block_size=32, dtype="float32"
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["temprature=1"], "temprature is not a setting: did you mean temperature?"),
        (["nonsense=1"], "nonsense is not a setting: use one of engine, json, prompt"),
        (["engine.blocksize=1"], "did you mean engine.block_size?"),
        (["prompt.x=1"], "prompt is no group of settings"),
        (["seed=1.5"], "seed ('1.5') must be a whole number or null"),
        (["stream=yes"], "stream ('yes') must be true or false"),
        (["engine.dtype=float23"], "did you mean float32?"),
        (["seed=1", "seed=2"], "seed (2) is given twice"),
        (["seed=1", "runs/x"], "'runs/x' has no '='"),
        (["--seed", "1"], "--seed is not an option: write settings as key=value"),
    ],
)
def test_a_bad_command_line_names_the_setting_and_the_fix(args, says):
    with pytest.raises(ConfigError) as error:
        parse(Generate, args)
    assert says in str(error.value)


@pytest.mark.parametrize("args", [[], ["a", "b"]])
def test_a_missing_or_extra_word_is_refused(args):
    with pytest.raises(ConfigError, match="must be CKPT"):
        parse(Generate, args, words=["ckpt"])


def test_a_verb_without_words_refuses_them():
    with pytest.raises(ConfigError, match=r"\(here\) must be none"):
        parse(Generate, ["here"], words=())


def test_results_are_written_as_json_where_asked(tmp_path):
    write_json(None, {"a": 1})
    write_json(tmp_path / "new" / "out.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"a": 1}


def test_json_has_null_where_a_number_is_none(tmp_path):
    write_json(tmp_path / "out.json", {"a": float("inf"), "b": [1.5, float("nan")], "c": ({"d": -float("inf")},)})
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, None], "c": [{"d": None}]}
