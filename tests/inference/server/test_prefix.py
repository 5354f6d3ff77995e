"""Marks of prompts, and who had them last."""

import json

import pytest

from turnout.inference.server.prefix import FIRST, LEVELS, PrefixTable, marks


def body(**asked: object) -> bytes:
    return json.dumps(asked).encode()


def shared(a: bytes, b: bytes) -> int:
    """How many marks two requests have in common; they are the first ones."""
    pairs = list(zip(marks(a), marks(b), strict=False))
    common = sum(x == y for x, y in pairs)
    assert all(x == y for x, y in pairs[:common])
    return common


def test_requests_share_the_marks_of_the_beginning_they_share():
    long = "0123456789" * 100
    assert shared(body(prompt=long + "a" * 2000), body(prompt=long + "b" * 2000)) == 4, "64, 128, 256 and 512"
    assert shared(body(prompt=long), body(prompt=long + "b" * 2000)) == len(marks(body(prompt=long))) == 4
    assert shared(body(prompt="x" + long), body(prompt="y" + long)) == 0


@pytest.mark.parametrize("length", range(FIRST - 20, FIRST + 4))
def test_where_a_prompt_ends_is_no_part_of_its_beginning(length):
    said = "x" * length
    assert shared(body(prompt=said), body(prompt=said + "more")) == len(marks(body(prompt=said)))
    talk = [{"role": "user", "content": said}]
    assert shared(body(messages=talk), body(messages=talk * 2)) == len(marks(body(messages=talk)))


def test_a_conversation_that_goes_on_shares_all_marks_of_what_was_said():
    said = [{"role": "user", "content": "tell me " * 40}]
    more = [*said, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why " * 400}]
    assert shared(body(messages=said), body(messages=more)) == len(marks(body(messages=said))) > 0
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert shared(body(messages=said), body(messages=said, tools=tools)) == 0, "the tools come first in a prompt"


def test_token_ids_and_lists_of_prompts_are_marked_too():
    ids = list(range(100, 400))
    assert shared(body(prompt=ids), body(prompt=[*ids, 7, 8, 9])) == len(marks(body(prompt=ids))) > 0
    assert marks(body(prompt=[ids, [1]])) == marks(body(prompt=ids))
    assert marks(body(prompt=["a" * 500, "b"])) == marks(body(prompt="a" * 500))


def test_another_cache_salt_shares_nothing():
    prompt = "a" * 1000
    assert shared(body(prompt=prompt, cache_salt="one"), body(prompt=prompt, cache_salt="two")) == 0
    assert shared(body(prompt=prompt, cache_salt="one"), body(prompt=prompt, cache_salt="one")) > 0


@pytest.mark.parametrize(
    "what",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, body(prompt="short"), body(prompt=None),
        body(prompt=[]), body(messages=7), b'{"prompt": "\\ud800"}',
    ],
)  # fmt: skip
def test_what_has_no_long_prompt_has_no_marks(what):
    assert marks(what) == []


def test_the_number_of_marks_is_bounded():
    assert len(marks(body(prompt="a" * (FIRST << LEVELS) * 2))) == LEVELS
    assert len(marks(b'{"prompt": "' + b"\\ud800" * 100 + b'"}')) > 0, "a lone surrogate is the server's to refuse"


def test_the_longest_beginning_decides():
    table: PrefixTable[str] = PrefixTable(100)
    table.remember(["a", "b"], "one")
    table.remember(["a", "c"], "two")
    assert table.holders(["a", "b", "d"]) == {"one"}
    assert table.holders(["a", "c"]) == {"two"}
    assert table.holders(["a", "x"]) == {"one", "two"}
    assert table.holders(["x"]) == table.holders([]) == set()


def test_the_table_is_bounded_and_forgets_what_was_not_asked_for():
    table: PrefixTable[str] = PrefixTable(4)
    table.remember(["system", "long"], "two")
    for i in range(100):
        table.remember(["system", f"{i}"], "one")
        assert len(table) <= 4
    assert table.holders(["system"]) == {"one", "two"}, "what all share stays"
    assert table.holders(["system", "99"]) == {"one"}
    assert table.holders(["long"]) == set()
    table.remember(list("abcdef"), "three")
    assert table.holders(list("abcdef")) == table.holders(list("abcd")) == {"three"}
    assert table.holders(["e"]) == table.holders(["f"]) == set(), "the shortest stay"


def test_replicas_that_are_gone_are_forgotten():
    table: PrefixTable[str] = PrefixTable(10)
    table.remember(["a"], "one")
    table.remember(["a", "b"], "two")
    table.keep({"one", "three"})
    assert table.holders(["a", "b"]) == {"one"}
    assert len(table) == 1
