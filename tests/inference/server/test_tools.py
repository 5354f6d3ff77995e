"""Tools through the official client: forced, free, in streams, in the history, and refused where they can not be.

A free call is the model's own: here a grammar puts the words into its mouth.
"""

import json
import re

import openai
import pytest

from turnout.inference.text.chat import ChatTemplate

from .conftest import NAME, Running, run_server
from .test_bad_input import check_error

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.n }}){% endfor %}"
    "{% if m.role == 'tool' %} of {{ m.name }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ mood }}{% endif %}"
)
NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or NUMBER}}


TOOLS = [tool("count"), tool("stop_all", EMPTY)]
MESSAGES = [{"role": "user", "content": "Count <b>!"}]
CALL = '{"name": "count", "arguments": {"n": 7}}'
NAMED = {"type": "function", "function": {"name": "count"}}


@pytest.fixture(scope="module")
def tooled(make_model, byte_level):
    """A server whose checkpoint has a template that knows tools."""
    with run_server(make_model(max_seq_len=1024), byte_level, {}, max_num_batched_tokens=512) as running:
        running.server.service.engine.chat = ChatTemplate(byte_level, TEMPLATE)
        yield running
        assert running.idle()


def ask(tooled: Running, **options):
    """The client's answer, of a model that does not like blanks and many calls: a random one knows no end of them."""
    tokenizer = tooled.engine.tokenizer
    blanks = [token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token).strip()]
    bias = dict.fromkeys(map(str, blanks), -100) | {str(tokenizer.encode("]")[0]): 5}
    body = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 150, "seed": 1, "logit_bias": bias}
    body |= options
    return tooled.client().chat.completions.create(**body)


def said(text: str) -> dict:
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def joined(chunks) -> dict[int, dict]:
    """The message of every choice of a stream, put together as clients do it."""
    found: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            message = found.setdefault(choice.index, {"content": None, "calls": [], "reason": None, "pieces": 0})
            if choice.delta.content:
                message["content"] = (message["content"] or "") + choice.delta.content
            for call in choice.delta.tool_calls or ():
                if call.index == len(message["calls"]):
                    assert call.id.startswith("call_")
                    assert (call.type, call.function.arguments) == ("function", "")
                    message["calls"].append([call.function.name, ""])
                else:
                    assert (call.id, call.function.name) == (None, None)
                    message["calls"][call.index][1] += call.function.arguments
                    message["pieces"] += 1
            message["reason"] = choice.finish_reason or message["reason"]
    return found


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_has_the_form_of_its_schema_streamed_or_not(tooled, choice):
    answer = ask(tooled, tool_choice=choice, n=3)
    streamed = joined(ask(tooled, tool_choice=choice, n=3, stream=True))
    ids = set()
    for one in answer.choices:
        assert one.finish_reason == "tool_calls"
        assert one.message.content is None
        calls = one.message.tool_calls
        for call in calls:
            ids.add(call.id)
            wanted = {"n"} if call.function.name == "count" else set()
            assert set(json.loads(call.function.arguments)) == wanted
        assert choice == "required" or [call.function.name for call in calls] == ["count"]
        other = streamed[one.index]
        assert other["calls"] == [[call.function.name, call.function.arguments] for call in calls]
        assert (other["content"], other["reason"]) == (None, "tool_calls")
        assert other["pieces"] > len(calls), "arguments come in pieces"
    assert len(ids) == sum(len(one.message.tool_calls) for one in answer.choices)


def test_one_call_at_most_where_parallel_ones_are_not_wanted(tooled):
    answer = ask(tooled, tool_choice="required", parallel_tool_calls=False, n=3)
    assert [len(one.message.tool_calls) for one in answer.choices] == [1, 1, 1]
    both = said(f"[{CALL}, {CALL}]")
    assert len(ask(tooled, **both).choices[0].message.tool_calls) == 2
    assert len(ask(tooled, parallel_tool_calls=False, **both).choices[0].message.tool_calls) == 1


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, None, 1),
        (f"[{CALL}, {CALL}]", None, 2),
        (f"Well. <tool_call>\n{CALL}\n</tool_call>", "Well.", 1),
        (f"```json\n{CALL.replace('arguments', 'parameters')}\n```", None, 1),
        ("There are <7> {of} them.", "There are <7> {of} them.", 0),
        (CALL.replace("count", "unknown"), CALL.replace("count", "unknown"), 0),
    ],
    ids=["alone", "list", "tag", "fence", "text", "unknown"],
)
def test_a_free_call_is_found_in_the_text_streamed_or_not(tooled, text, content, calls):
    logprobs = "tool_call" in text
    options = said(text) | ({"logprobs": True} if logprobs else {})
    answer = ask(tooled, **options).choices[0]
    assert answer.message.content == content
    wanted = [["count", '{"n": 7}']] * calls
    assert [[c.function.name, c.function.arguments] for c in answer.message.tool_calls or []] == wanted
    assert answer.finish_reason == ("tool_calls" if calls else "stop")
    chunks = list(ask(tooled, stream=True, **options))
    streamed = joined(chunks)[0]
    assert (streamed["content"], streamed["calls"], streamed["reason"]) == (content, wanted, answer.finish_reason)
    if logprobs:
        entries = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content]
        assert entries == answer.logprobs.content


def test_a_call_that_is_cut_ends_by_length(tooled):
    answer = ask(tooled, tool_choice=NAMED, max_tokens=2).choices[0]
    assert answer.finish_reason == "length"
    assert '{"n": 10}'.startswith(answer.message.tool_calls[0].function.arguments[:4])


def test_the_template_shows_tools_and_calls_of_the_history(tooled, byte_level):
    first = ask(tooled, **said(f"Yes. <tool_call>{CALL}</tool_call>")).choices[0].message
    history = [
        *MESSAGES,
        first.model_dump(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "7"},
        {"role": "assistant", "content": None, "tool_calls": [c.model_dump() for c in first.tool_calls]},
    ]
    options = {"add_generation_prompt": False, "tools": TOOLS[:1]}
    found = tooled.http.post("/tokenize", json={"messages": history} | options).json()["tokens"]
    shown = json.dumps(TOOLS[:1], ensure_ascii=False)
    assert byte_level.decode(found) == (
        f"tools: {shown}\nuser: Count <b>!\nassistant: Yes.count(7)\ntool: 7 of count\nassistant: count(7)\n"
    )
    usage = ask(tooled, messages=history, tools=TOOLS[:1], extra_body={"add_generation_prompt": False}, max_tokens=1)
    assert usage.usage.prompt_tokens == len(found)
    silent = ask(tooled, tool_choice="none", max_tokens=1).usage.prompt_tokens
    assert silent == len(byte_level.encode("user: Count <b>!\nassistant:", parse_special_tokens=True))


def test_variables_of_the_template_are_taken(tooled, byte_level):
    body = {"messages": MESSAGES, "chat_template_kwargs": {"mood": " happy"}}
    found = tooled.http.post("/tokenize", json=body).json()["tokens"]
    assert byte_level.decode(found) == "user: Count <b>!\nassistant: happy"
    for name in ("tools", "messages", "colour", "eos_token"):
        body["chat_template_kwargs"] = {name: "x"}
        assert check_error(tooled.http.post("/tokenize", json=body), 400)["param"] == "chat_template_kwargs"


DEFINED = {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"]}
BAD = [
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": NAMED, "tools": None}, "tool_choice"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": [tool("count"), tool("count")]}, "tools"),
    ({"tools": [tool("no good name")]}, "tools[0].function.name"),
    ({"tools": [tool("")]}, "tools[0].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [tool("f", {"type": "strin"})], "tool_choice": "required"}, "tools"),
    ({"tools": [tool("f", {"properties": {"n": {"$ref": "#/properties/m"}}})], "tool_choice": "required"}, "tools"),
    (
        {
            "tools": [
                tool("f", DEFINED | {"$defs": {"N": {"type": "null"}}}),
                tool("g", DEFINED | {"$defs": {"N": {"type": "boolean"}}}),
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"messages": [{"role": "tool", "content": "7"}]}, "tool_call_id"),
    ({"messages": [{"role": "tool", "content": "7", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "7", "tool_call_id": "x"}]}, "tool_call_id"),
]
CALLED = {"id": "x", "type": "function", "function": {"name": "count", "arguments": "{}"}}
WRONG = CALLED | {"function": {"name": "count", "arguments": "[]"}}
BAD += [
    ({"messages": [{"role": "user", "content": "7", "tool_calls": [CALLED]}]}, "tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [WRONG]}]}, "messages[0].tool_calls[0].function.arguments"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:50])
def test_bad_tools_are_refused_naming_the_parameter(tooled, body, param):
    answer = tooled.post("/v1/chat/completions", **{"messages": MESSAGES, "tools": TOOLS, "max_tokens": 50} | body)
    assert check_error(answer, 400)["param"] == param


def test_definitions_of_a_schema_reach_a_required_call(tooled):
    tools = [tool("f", DEFINED | {"$defs": {"N": {"type": "boolean"}}}), tool("count")]
    calls = ask(tooled, tools=tools, tool_choice="required", seed=2).choices[0].message.tool_calls
    for call in calls:
        assert re.fullmatch(r'\{"n": ?(true|false|\d+)[^}]*\}', call.function.arguments), call
    named = {"type": "function", "function": {"name": "f"}}
    (call,) = ask(tooled, tools=tools, tool_choice=named).choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["n"], bool)


def test_a_template_that_knows_no_tools_refuses_them(served: Running):
    with pytest.raises(openai.BadRequestError, match="knows nothing of tools") as refused:
        ask(served)
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    history = [*MESSAGES, {"role": "assistant", "tool_calls": [CALLED]}]
    answer = served.post("/v1/chat/completions", messages=history, max_tokens=1)
    assert check_error(answer, 400)["param"] == "messages"
    for harmless in ({"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        assert served.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **harmless).status_code == 200
