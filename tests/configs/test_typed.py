"""Typed configuration: what fits is built exactly, what does not is refused with field, value, rule and fix."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout import ConfigError
from turnout.configs.typed import build, check, digest, parse_literal, to_dict
from turnout.moe.config import MoEConfig
from turnout.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    kind: Literal["a", "bee"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    name: str = "x"
    on: bool = False
    limit: int | None = None
    resume: bool | str = False
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=lambda: Inner(size=1))
    other: Inner | None = None


def test_a_mapping_becomes_the_dataclass_and_back():
    config = build(Outer, {"rate": 1, "sizes": [1, 2], "inner": {"size": 3, "kind": "bee"}, "resume": "there"})
    assert config == Outer(rate=1.0, sizes=(1, 2), inner=Inner(size=3, kind="bee"), resume="there")
    assert isinstance(config.rate, float)
    assert build(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "rate is missing"),
        ({"rate": 1, "raet": 2}, "raet is not a setting: did you mean rate?"),
        ({"rate": "1"}, "rate ('1') must be a number"),
        ({"rate": True}, "rate (True) must be a number"),
        ({"rate": 1, "limit": 2.0}, "limit (2.0) must be a whole number or null"),
        ({"rate": 1, "limit": True}, "limit (True) must be a whole number or null"),
        ({"rate": 1, "on": 1}, "on (1) must be true or false"),
        ({"rate": 1, "name": 3}, "name (3) must be text"),
        ({"rate": 1, "resume": 3}, "resume (3) must be true or false or text"),
        ({"rate": 1, "sizes": [1, "2"]}, "sizes[1] ('2') must be a whole number"),
        ({"rate": 1, "sizes": "12"}, "sizes ('12') must be a list, each a whole number"),
        ({"rate": 1, "inner": 3}, "inner (3) must be a group of settings"),
        ({"rate": 1, "inner": {"size": 1, "kind": "be"}}, "inner.kind ('be') must be one of a, bee: did you mean bee?"),
        ({"rate": 1, "inner": {}}, "inner.size is missing: give it a value (a whole number)"),
        ({"rate": 1, "other": {"size": 1, "sise": 2}}, "other.sise is not a setting: did you mean other.size?"),
        ([1], "Outer ([1]) must be a group of settings"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(data, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, data)
    assert message in str(caught.value)


def test_check_gives_field_value_rule_and_fix():
    check(True, "a", 1, "never", "shown")
    with pytest.raises(ConfigError, match=r"^moe\.top_k \(9\) must be small: use 1$"):
        check(False, "moe.top_k", 9, "must be small", "use 1")


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_the_digest_tells_configurations_apart_and_nothing_else(a, b):
    one, two = Outer(rate=float(a)), build(Outer, {"inner": {"kind": "a", "size": 1}, "rate": b})
    assert (digest(one) == digest(two)) == (a == b)
    assert digest(one) == digest(to_dict(one))


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "7", 7),
        (float, "1e-3", 1e-3),
        (int | None, "null", None),
        (str, "a=b, c", "a=b, c"),
        (str | None, "none", None),
        (bool, "True", True),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, ...], "1,2", (1, 2)),
        (int | None, "3", 3),
    ],
    ids=str,
)
def test_a_word_is_read_as_its_type(annotation, text, value):
    assert parse_literal(annotation, text, "key") == value


@pytest.mark.parametrize(
    ("annotation", "text"), [(int, "7.5"), (float, "x"), (bool, "1"), (Literal["a"], "b"), (int, "")], ids=str
)
def test_a_word_of_another_type_is_refused(annotation, text):
    with pytest.raises(ConfigError, match="key"):
        parse_literal(annotation, text, "key")


@pytest.mark.parametrize(
    ("cls", "key", "values"),
    [(MoEConfig, "moe.drop_order", {"width": 8, "expert_width": 8}), (ParallelConfig, "parallel.schedule", {})],
)
def test_python_callers_can_not_name_a_choice_that_does_not_exist(cls, key, values):
    with pytest.raises(ConfigError, match=rf"{key} \('score'\) must be one of"):
        cls(**values, **{key.partition(".")[2]: "score"})
