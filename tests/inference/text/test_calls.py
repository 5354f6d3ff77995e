"""Calls are found in every form and in pieces of every size; what is no call is text, to the character."""

import random

import pytest

from turnout.inference.text.calls import CallArguments, CallParser, CallStart

F = '{"name": "f", "arguments": {"a": "}\\" {[", "b": [1, {"c": "\\\\"}]}}'
G = '{"parameters": {"x": 1}, "name": "g"}'
CALL_F, CALL_G = ("f", '{"a": "}\\" {[", "b": [1, {"c": "\\\\"}]}'), ("g", '{"x": 1}')


def parse(pieces: list[str], **options) -> tuple[str, list[tuple[str, str]]]:
    """What is said, and (name, arguments) of every call."""
    parser = CallParser({"f", "g"}, **options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif not isinstance(event, str):
            calls[event.index] = (calls[event.index][0], calls[event.index][1] + event.piece)
    assert parser.called == bool(calls)
    return "".join(event for event in events if isinstance(event, str)), calls


def pieces(text: str, sizes: list[int]) -> list[str]:
    found = []
    while text:
        size = sizes[len(found) % len(sizes)]
        found.append(text[:size])
        text = text[size:]
    return found


FORMS = {
    "alone": (F, "", [CALL_F]),
    "arguments before the name": (G, "", [CALL_G]),
    "blanks around": (f" \n{F}\n ", "", [CALL_F]),
    "a list": (f"[{F}, {G}]", "", [CALL_F, CALL_G]),
    "one behind the other": (f"{F}\n{G}", "", [CALL_F, CALL_G]),
    "a tag": (f"<tool_call>\n{F}\n</tool_call>", "", [CALL_F]),
    "tags behind a text": (
        f"Sure. \n<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>",
        "Sure.",
        [CALL_F, CALL_G],
    ),
    "two in a tag": (f"<tool_call>{F}\n{G}</tool_call>", "", [CALL_F, CALL_G]),
    "a tag that is not closed": (f"<tool_call>{F}", "", [CALL_F]),
    "a fence": (f"Ok:\n```json\n[{F},{G}]\n```", "Ok:", [CALL_F, CALL_G]),
    "a text behind": (f"<tool_call>{F}</tool_call> and so on", "and so on", [CALL_F]),
    "other fields": ('{"id": 5, "x": [{}], "s": "{", "name": "f", "arguments": {}, "y": null}', "", [("f", "{}")]),
    "a list that goes wrong": (f"[{F}, 5]", ", 5]", [CALL_F]),
    "cut in the arguments": (F[:40], "", [("f", F[27:40])]),
    "cut behind them": (F[:-1], "", [CALL_F]),
    "cut in the second": (f'[{F}, {{"name": "g', "", [CALL_F]),
}


@pytest.mark.parametrize(("text", "said", "calls"), FORMS.values(), ids=FORMS.keys())
def test_a_call_is_found_in_every_form_and_cut(text, said, calls):
    for sizes in ([len(text)], [1], [2], [3], [7], [5, 1, 1]):
        assert parse(pieces(text, sizes)) == (said, calls), sizes


TEXTS = [
    "", " ", "{", "plain { text }", '  {"a": 1} \n', '{"name": "h", "arguments": {}}', '{"name": "f"}', "[]", "[5]",
    '{"name": "f", "arguments": "x"}', "{name: f}", "<tool_call>nothing</tool_call> x", "a < b <tool", "<tool_call>",
    '```json\n{"x": 1}\n``` ', "```", "```js", f"First {F}", '{"name": "f", "argumen', '{"name": 5, "arguments": {}}',
    '{"name": "f\x01", "arguments": {}}', '{"arguments": {"a": 1}}', '{"' + "x" * 5000,
    '{"arguments": {"a": ' + "[" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_what_is_no_call_is_text_to_the_character(text):
    for sizes in ([max(1, len(text))], [1 + len(text) // 5000], [3]):
        assert parse(pieces(text, sizes)) == (text, []), sizes


def test_any_soup_of_marks_is_the_same_in_any_pieces():
    random_ = random.Random(0)
    marks = [F, G, "<tool_call>", "</tool_call>", "```json", "```", "{", "}", "[", "]", '"', ",", ":", "\\", " ", "\n"]
    marks += ['"name"', '"f"', '"arguments"', "{}", "text", "5"]
    for _ in range(400):
        text = "".join(random_.choices(marks, k=random_.randint(1, 12)))
        whole = parse([text])
        sizes = [random_.randint(1, 5) for _ in range(7)]
        assert parse(pieces(text, sizes)) == whole, (text, sizes)
        if not whole[1]:
            assert whole[0] == text


def test_arguments_are_told_as_they_come():
    parser = CallParser({"f"})
    assert parser.push('{"name": "f", "arguments": {"a"') == [CallStart(0, "f"), CallArguments(0, '{"a"')]
    assert parser.push(': "b') == [CallArguments(0, ': "b')]
    assert parser.push('"}') == [CallArguments(0, '"}')]
    assert parser.push("}") == parser.finish() == []


def test_a_forced_function_gets_the_text_as_its_arguments():
    for text in ("", '{"a": 1}', "{"):
        for sizes in ([9], [1]):
            assert parse(pieces(text, sizes), forced="g") == ("", [("g", text)])


def test_further_calls_than_wanted_are_left_out():
    assert parse([f"[{F}, {G}]"], most=1) == ("", [CALL_F])
