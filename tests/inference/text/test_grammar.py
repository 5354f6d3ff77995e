"""Grammars over a real vocabulary: masks against a plain oracle, and what a hostile grammar costs."""
# ruff: noqa: N802 (O10 is the name of a rule)

import json
import random
import re
import signal
import time

import pytest

from turnout.inference.core.structured import StructuredOutputs
from turnout.inference.text import grammar as grammar_module
from turnout.inference.text.grammar import GrammarCompiler, GrammarError, GrammarMatcher, GrammarTimeoutError
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.tests.helpers.waiting import eventually

VOCABULARY = 330  # some more than the tokenizer knows
ENDLESS = {"json": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}}


@pytest.fixture(scope="module")
def compiler(byte_level: TextTokenizer) -> GrammarCompiler:
    return GrammarCompiler(byte_level, VOCABULARY, seconds=20.0)


@pytest.fixture
def impatient(byte_level: TextTokenizer) -> GrammarCompiler:
    return GrammarCompiler(byte_level, VOCABULARY, seconds=1.0)


def compiled(compiler: GrammarCompiler, **wanted) -> GrammarMatcher:
    return compiler.compile(StructuredOutputs(**wanted)).result(30).matcher()


def allowed(matcher: GrammarMatcher) -> list[int]:
    return [token for token in range(8 * len(matcher.mask)) if matcher.mask[token >> 3] >> (token & 7) & 1]


def test_O10_masks_are_the_tokens_that_some_text_of_the_grammar_goes_on_with(compiler, byte_level):
    choices = ["import", "import os", "ïmport", "in", "日本", "日本語", "👍🏽", "a\nb", 'say "no"\\', "the the", "/*"]
    ends = [choice.encode() for choice in choices]
    pieces = [b"" if byte_level.is_special(t) else byte_level.token_bytes(t) for t in range(VOCABULARY)]
    assert sum(not piece for piece in pieces) > 5, "some tokens are no text"
    for seed in range(20):
        matcher, text, rng = compiled(compiler, choice=choices), b"", random.Random(seed)
        while tokens := allowed(matcher):
            assert tokens == [t for t, p in enumerate(pieces) if p and any(e.startswith(text + p) for e in ends)]
            assert matcher.accepts == (text in ends)
            token = rng.choice(tokens)
            text += pieces[token]
            whole = matcher.accept(token)
            assert whole == (text in ends and not any(e.startswith(text) and e != text for e in ends))
        assert text in ends
        assert matcher.accepts


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        (r"[a-c]{2,4}(-\d+)?", ["ab", "abca", "cc-12"], ["a", "abcab", "cc-"]),
        (r"^x/y\\z$", [r"x/y\z"], [r"x/y\zz"]),
        ("l1\nl2|é+", ["l1\nl2", "ééé"], ["l1", "e"]),
        (r"(?i)yes|no", ["YES", "yEs", "No"], ["y"]),
    ],
)
def test_O10_a_regex_is_for_the_whole_text(compiler, byte_level, pattern, texts, others):
    for text in texts + others:
        assert bool(re.fullmatch(pattern, text)) == (text in texts), "the oracle"
        matcher = compiled(compiler, regex=pattern)
        for token in byte_level.encode(text, add_special_tokens=False):
            matcher.accept(token)
        assert matcher.accepts == (text in texts)


@pytest.mark.parametrize("syntax", ['start: "a" start "b" | "c"', 'root ::= "a" root "b" | "c"'])
def test_O10_grammars_count_brackets_in_lark_and_gbnf(compiler, byte_level, syntax):
    for text, fits in {"c": True, "aacbb": True, "aacb": False, "acbb": False}.items():
        matcher = compiled(compiler, grammar=syntax)
        for token in byte_level.encode(text, add_special_tokens=False):
            matcher.accept(token)
        assert matcher.accepts == fits


def test_O10_a_token_that_does_not_fit_is_a_dead_end_with_a_reason(compiler, byte_level):
    matcher = compiled(compiler, choice=["ab"])
    assert not matcher.error
    (wrong,) = byte_level.encode("z", add_special_tokens=False)
    assert not matcher.accept(wrong)
    assert (allowed(matcher), matcher.accepts) == ([], False)
    assert matcher.error


def test_matchers_of_one_grammar_are_independent(compiler, byte_level):
    grammar = compiler.compile(StructuredOutputs(choice=["ab", "cd"])).result(30)
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(allowed(one)[0])
    assert one.mask != other.mask == grammar.matcher().mask


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a{0}"}, "empty"),
        ({"regex": r"[^\s\S]"}, "no text"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "#"}}, "no text"),
        ({"json": {"$ref": "http://example.org/x"}}, "compile"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "incompatible"),
        ({"grammar": "((("}, "convert"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: a\na: a"}, "no text"),
    ],
)
def test_O9_what_can_not_be_compiled_is_an_error_in_one_line(compiler, wanted, said):
    with pytest.raises(GrammarError, match=said) as caught:
        compiled(compiler, **wanted)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_O9_hostile_grammars_end_in_time_and_the_next_one_compiles(impatient):
    """Some are cheap after all; none may take longer than the time-out, and every process is replaced or well."""
    hostile = [
        {"json": {"type": "integer", "multipleOf": 99999937, "minimum": 1, "maximum": 10**15}},
        {"regex": "(((((((((a{1,50}){1,50}){1,50}){1,50}){1,50}){1,50}){1,50}){1,50}){1,50}){1,50}b"},
        {"regex": "a{1,2000000000}"},
        {"regex": "(a|b|cd)*x(a|b|cd){5000}"},
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"regex": "|".join(str(i * 7919) for i in range(6000))},
        {"json": {"type": "array", "minItems": 10**8}},
        {"json": {"allOf": [{"anyOf": [{"const": j} for j in range(40)]} for _ in range(12)]}},
        {"json": {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}},
        {"grammar": "start: " + "(" * 20_000 + '"x"' + ")" * 20_000},
        {"choice": [f"{i:04}" for i in range(8000)]},
    ]
    begin = time.monotonic()
    endless = impatient.compile(StructuredOutputs(**ENDLESS))
    futures = [impatient.compile(StructuredOutputs(**wanted)) for wanted in hostile]
    ends = [future.exception(60) for future in futures]
    assert all(isinstance(end, GrammarError) or end is None for end in ends)
    assert isinstance(endless.exception(30), GrammarTimeoutError)
    assert "1.0 s" in str(endless.exception())
    assert time.monotonic() - begin < 2.5 * (len(hostile) + 1), "every one within the time-out"
    assert compiled(impatient, choice=["ok"]).accept


def test_O9_an_endless_grammar_holds_up_no_other_and_leaves_no_process(impatient):
    endless = impatient.compile(StructuredOutputs(**ENDLESS))
    assert compiled(impatient, regex="quick")
    assert not endless.done()
    assert isinstance(endless.exception(30), GrammarTimeoutError)
    assert None in [process._child for process in impatient._processes], "the one that it ran in has ended"
    again = impatient.compile(StructuredOutputs(**ENDLESS))
    assert again is not endless, "another time it may be in time"
    compiled(impatient, regex="busy meanwhile")
    assert eventually(lambda: None not in [process._child for process in impatient._processes]), "the other one opens"
    children = [process._child for process in impatient._processes]
    impatient._end()
    assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 2
    assert eventually(lambda: all(child.stdin.closed and child.stdout.closed for child in children))


def test_a_process_that_was_killed_is_replaced(impatient):
    assert compiled(impatient, regex="a")
    for process in impatient._processes:
        if process._child is not None:
            process._child.kill()
            process._child.wait()
    assert compiled(impatient, regex="b")


def test_equal_grammars_are_compiled_once_and_the_oldest_are_forgotten(compiler, monkeypatch):
    first = compiler.compile(StructuredOutputs(json={"type": "null"}))
    assert compiler.compile(StructuredOutputs(json=json.dumps({"type": "null"}), param="response_format")) is first
    monkeypatch.setattr(grammar_module, "CACHED", 2)
    for text in ("a", "b", "c"):
        compiler.compile(StructuredOutputs(regex=text)).result(30)
    assert compiler.compile(StructuredOutputs(regex="c")).done()
    assert compiler.compile(StructuredOutputs(json={"type": "null"})) is not first


def test_nothing_runs_before_the_first_grammar(byte_level):
    idle = GrammarCompiler(byte_level, VOCABULARY, 1.0)
    assert [process._child for process in idle._processes] == [None] * grammar_module.WORKERS
