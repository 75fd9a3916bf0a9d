"""Calls of functions over the API: what may be called, what an answer says, and how both are written."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.models.tools import CALL, written_call
from labkit.outputs import RequestMetrics, RequestOutput
from labkit.sampling_params import Structured
from labkit.serving.answer import Piece
from labkit.serving.errors import RequestError
from labkit.serving.schema import ChatBody, refusal
from labkit.serving.stream import ChatFormat
from labkit.serving.tool_calls import CallReader, Offer, Tool
from tests.serving.api_server import MODEL, TALK, Served, nothing_left, post, served  # noqa: F401

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "maxProperties": 0}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
SCHEMAS = {"weather": CITY, "now": EMPTY}
WILD = {"temperature": 1.0, "seed": 3, "max_tokens": 200}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def site() -> Any:
    with served(max_model_len=1000, num_blocks=1024) as site:
        yield site


def chat(site: Served, **fields: Any) -> Any:
    return post(site, {"model": MODEL, "messages": TALK, "tools": TOOLS} | WILD | fields, "chat/completions")


def check(calls: list[dict[str, Any]], *, cut: bool = False) -> None:
    """Check that calls are whole, and have their functions' arguments; the last may be cut."""
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls[: len(calls) - cut]:
        assert set(call) - {"index"} == {"id", "type", "function"} and call["type"] == "function"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def streamed(text: str) -> tuple[str, list[dict[str, Any]], str]:
    """The content, the calls and the reason of a stream, put together as clients do."""
    content, reason, calls = "", "", []
    for line in text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        content += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for part in choice["delta"].get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                calls.append({**part, "function": dict(part["function"])})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                assert part["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls, reason


# -- what an answer may call ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "names", "most", "reason"),
    [
        ({"tool_choice": "required"}, {"weather", "now"}, 99, "tool_calls"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "now"}, 1, "tool_calls"),
        ({"tool_choice": named("weather")}, {"weather"}, 1, "stop"),
        ({"tool_choice": named("now")}, {"now"}, 1, "stop"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}},
            {"now"},
            99,
            "tool_calls",
        ),
    ],
)
def test_calls_that_must_be(
    site: Served, fields: dict[str, Any], names: set[str], most: int, reason: str, stream: bool
) -> None:
    for seed in range(4):
        answer = chat(site, stream=stream, seed=seed, **fields)
        assert answer.status_code == 200, answer.text
        if stream:
            content, calls, ended = streamed(answer.text)
        else:
            (choice,) = answer.json()["choices"]
            content, calls, ended = choice["message"]["content"], choice["message"]["tool_calls"], ""
            ended = choice["finish_reason"]
        assert not content and ended in (reason, "length")
        check(calls, cut=ended == "length")
        assert {call["function"]["name"] for call in calls} <= names and 1 <= len(calls) <= most


def test_a_stream_says_what_the_whole_answer_says(site: Served) -> None:
    whole = chat(site, tool_choice="required").json()["choices"][0]
    _, calls, reason = streamed(chat(site, tool_choice="required", stream=True).text)
    asked = [call["function"] for call in calls]
    assert asked == [call["function"] for call in whole["message"]["tool_calls"]]
    assert reason == whole["finish_reason"]


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}])
def test_calls_that_may_be_leave_any_text(site: Served, fields: dict[str, Any]) -> None:
    (choice,) = chat(site, **fields, max_tokens=10).json()["choices"]
    assert choice["message"]["content"] and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "length"


def test_no_tool_is_told_of_where_none_may_be_called(site: Served) -> None:
    plain = chat(site, tools=None, max_tokens=5).json()
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": [], "tool_choice": "auto"}):
        answer = chat(site, **fields, max_tokens=5).json()
        assert (answer["choices"], answer["usage"]["prompt_tokens"]) == (
            plain["choices"],
            plain["usage"]["prompt_tokens"],
        )


def test_a_format_holds_for_an_answer_that_calls_nothing(site: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["b"]}}}
    messages = [
        chat(site, response_format=form, seed=seed).json()["choices"][0]["message"] for seed in range(8)
    ]
    for message in messages:
        assert message["content"] == '"b"' or message["tool_calls"]
    forced = chat(site, response_format=form, tool_choice=named("now")).json()["choices"][0]
    assert forced["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


def test_a_format_beside_tools_is_refused_by_its_own_name(site: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wibble"}}}
    error = chat(site, response_format=form).json()["error"]
    assert (error["param"], error["message"]) == ("response_format", "response_format: Invalid type: wibble")


def test_several_answers_call_each_on_its_own(site: Served) -> None:
    choices = chat(site, n=3, tool_choice=named("weather")).json()["choices"]
    for choice in choices:
        check(choice["message"]["tool_calls"])


def test_log_probabilities_are_told_once_whatever_is_called(site: Served) -> None:
    fields = {"tool_choice": named("now"), "logprobs": True}
    whole = chat(site, **fields).json()
    count = whole["usage"]["completion_tokens"]
    assert len(whole["choices"][0]["logprobs"]["content"]) == count
    chunks = [
        json.loads(line.removeprefix("data: "))["choices"][0]
        for line in chat(site, **fields, stream=True).text.split("\n\n")
        if line.startswith("data: {")
    ]
    assert sum(len(chunk["logprobs"]["content"]) for chunk in chunks if chunk["logprobs"]) == count


def test_a_stop_string_inside_of_a_call_makes_no_call_of_it(site: Served) -> None:
    (choice,) = chat(site, tool_choice=named("weather"), stop=['"city"']).json()["choices"]
    assert choice["finish_reason"] == "stop"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": "{"}
    (choice,) = chat(site, tool_choice="required", stop=['", "arg']).json()["choices"]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]


# -- what is refused ------------------------------------------------------------------------------


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a"} | function}


def allowed(**fields: Any) -> dict[str, Any]:
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": fields}}


REFUSED = [
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, 400, "only tools of type function"),
    ({"tools": [{"type": "function"}]}, 400, "a tool must have a function"),
    ({"tools": [{"type": "function", "function": {"name": "a"}, "wibble": 1}]}, 400, "wibble is not"),
    ({"tools": [tool(wibble=1)]}, 400, "wibble is not supported here"),
    ({"tools": [NOW, NOW]}, 400, "two functions have the name 'now'"),
    ({"tools": [tool(parameters={"type": "array"})]}, 400, "the parameters of 'a' must be of type object"),
    ({"tools": [NOW, tool(parameters={"properties": {"b": {"type": "x"}}})]}, 400,
     "tools: the parameters of 'a': Invalid type: x"),
    ({"tools": [tool(parameters={"$ref": "#"})]}, 400, "tools: "),
    ({"tools": [tool(name=f"a{i}") for i in range(129)]}, 422, "at most 128 items"),
    ({"tools": [tool(name="two words")]}, 422, "tools.0.function.name: string should match pattern"),
    ({"tools": [tool(name="a\n")]}, 422, "tools.0.function.name"),
    ({"tools": [tool(name="x" * 65)]}, 422, "tools.0.function.name"),
    ({"tools": [tool(name=7)]}, 422, "tools.0.function.name: input should be a valid string, not 7"),
    ({"tools": [tool(parameters=7)]}, 422, "tools.0.function.parameters"),
    ({"tools": [tool(strict="yes")]}, 422, "tools.0.function.strict"),
    ({"tools": [tool(description=7)]}, 422, "tools.0.function.description"),
    ({"tools": [7]}, 422, "tools.0"),
    ({"tools": "now"}, 422, "tools"),
    ({"tool_choice": "wibble"}, 400, "it must be \"none\", \"auto\", \"required\""),
    ({"tool_choice": named("nowhere")}, 400, "there is no tool 'nowhere'"),
    ({"tool_choice": {"type": "function", "name": "now"}}, 400, "it must be"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "now"}}}, 400, "it must be"),
    ({"tool_choice": {"type": "function", "function": "now"}}, 400, "it must be"),
    ({"tool_choice": {}}, 400, "it must be"),
    ({"tool_choice": 7}, 422, "tool_choice"),
    (allowed(mode="wibble", tools=[NOW]), 400, "allowed_tools needs tools"),
    (allowed(mode="auto", tools=[]), 400, "must name at least one tool"),
    (allowed(mode="auto", tools=7), 400, "must name at least one tool"),
    (allowed(mode="auto", tools=[named("nowhere")]), 400, "there is no tool 'nowhere'"),
    ({"parallel_tool_calls": "no"}, 422, "parallel_tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED)
def test_tools_that_cannot_be_are_refused_by_the_name_of_their_field(
    site: Served, fields: dict[str, Any], status: int, words: str
) -> None:
    (name,) = fields
    answer = chat(site, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, name), error
    assert words in error["message"]


@pytest.mark.parametrize("choice", ["required", named("now")])
def test_a_call_without_tools_cannot_be(site: Served, choice: Any) -> None:
    for tools in (None, []):
        answer = chat(site, tools=tools, tool_choice=choice)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


def test_tools_do_not_stand_beside_a_form_that_is_not_json(site: Served) -> None:
    answer = chat(site, structured_outputs={"choice": ["a"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "structured_outputs")


def test_tools_count_as_a_part_of_the_prompt(site: Served) -> None:
    answer = chat(site, tools=[tool(description="x" * 20_000)])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert error["code"] == "context_length_exceeded"


def test_a_tool_stays_as_it_came() -> None:
    came = tool(parameters={"properties": {"a": {"const": None}}}, description="d", strict=True)
    assert Tool(**came).plain() == came
    assert Tool(**tool(description=None)).plain() == tool()


def test_a_hint_to_a_cache_is_let_pass(site: Served) -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    tools = [NOW | hint, tool(**hint, strict=None, parameters=None)]
    assert chat(site, tools=tools, max_tokens=1).status_code == 200


def test_tools_have_a_size_that_they_may_have() -> None:
    body = ChatBody(model=MODEL, messages=TALK, tools=[tool(parameters={"description": "x" * 70_000})])
    with pytest.raises(ValueError, match="at most 65,536 characters") as raised:
        body.form()
    error = refusal(body, raised.value, "prompt")
    assert error.param == "tools" and error.message.startswith("tools: must have at most")
    assert refusal(body, ValueError("structured: it grew"), "prompt").message == "tools: it grew"


# -- the grammar, and the reader of what it lets through ------------------------------------------


def offer(choice: Any = None, *, several: bool = True) -> Offer:
    return Offer.of([Tool(**one) for one in TOOLS], choice, several=several)


ROME = written_call("weather", '{"city": "Rome"}')
TIME = written_call("now", "{}")


@pytest.mark.parametrize(
    ("choice", "several", "text", "fits"),
    [
        ("auto", True, "", True),
        ("auto", True, "just a text, with < and <tool and }", True),
        ("auto", True, ROME, True),
        ("auto", True, f"I ask.\n{ROME}\n{TIME}", True),
        ("auto", True, f"I ask.\n{ROME} and then {TIME} that is it", True),
        ("auto", True, f"{CALL} is how a call begins", False),
        ("auto", True, written_call("weather", '{"city": "Bonn"}'), False),
        ("auto", True, written_call("nowhere", "{}"), False),
        ("auto", True, ROME[:-1], False),
        ("auto", False, f"I ask.\n{ROME}", True),
        ("auto", False, "no call", True),
        ("auto", False, f"{ROME}\n{TIME}", False),
        ("required", True, ROME, True),
        ("required", True, f"{ROME}\n{TIME}\n{ROME}", True),
        ("required", True, "", False),
        ("required", True, f"text {ROME}", False),
        ("required", False, f"{ROME}\n{TIME}", False),
        (named("now"), True, TIME, True),
        (named("now"), True, ROME, False),
        (named("now"), True, f"{TIME}\n{TIME}", False),
    ],
)
def test_the_grammar_of_calls(site: Served, choice: Any, several: bool, text: str, fits: bool) -> None:
    engine = site.live.engine
    matcher = engine.forms.compile(offer(choice, several=several).form(None)).start()
    taken = all(matcher.advance(token) for token in engine.model.tokenizer.encode(text))
    assert (taken and matcher.may_end) == fits


def test_the_grammar_beside_a_format(site: Served) -> None:
    engine = site.live.engine
    form = offer("auto").form(Structured.of({"json": {"enum": ["b"]}}))
    for text, fits in ((ROME, True), (f"{ROME}\n{TIME}", True), ('"b"', True), ("b", False), ("", False)):
        matcher = engine.forms.compile(form).start()
        taken = all(matcher.advance(token) for token in engine.model.tokenizer.encode(text))
        assert (taken and matcher.may_end) == fits


plain_texts = st.text('ab <>/\n{}_tolca"é', max_size=12).filter(lambda text: CALL not in text)
values = st.recursive(
    st.integers() | st.booleans() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3).map(json.dumps)
calls = st.tuples(st.sampled_from(["weather", "now", "a.b-c_d"]), arguments)


@settings(max_examples=300, deadline=None)
@given(st.lists(plain_texts | calls, max_size=5), st.data())
def test_pieces_cut_anywhere_give_the_same_calls(parts: list[Any], data: st.DataObject) -> None:
    text = "".join(part if isinstance(part, str) else written_call(*part) for part in parts)
    end = data.draw(st.integers(0, len(text))) if data.draw(st.booleans()) else len(text)
    text = text[:end]  # an answer may be cut
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, reader = CallReader(), CallReader()
    expected = whole.push(text, final=True)
    deltas = [delta for piece in pieces for delta in reader.push(piece)]
    deltas += reader.push("", final=True)

    functions = [call["function"] for call in reader.calls]
    assert functions == [call["function"] for call in whole.calls]
    assert told(deltas) == told(expected) == (told(expected)[0], functions)
    assert reader.is_inside == whole.is_inside
    if end == sum(len(p) if isinstance(p, str) else len(written_call(*p)) for p in parts):
        asked = [part for part in parts if not isinstance(part, str)]
        assert [(function["name"], function["arguments"]) for function in functions] == asked


def told(deltas: list[dict[str, Any]]) -> tuple[str, list[dict[str, str]]]:
    """The content and the functions that deltas add up to."""
    content = "".join(delta.get("content", "") for delta in deltas)
    functions: list[dict[str, str]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", [])):
        if part["index"] == len(functions):
            functions.append({"name": part["function"]["name"], "arguments": ""})
        functions[part["index"]]["arguments"] += part["function"]["arguments"]
    return content, functions


def test_text_and_calls_in_turn() -> None:
    reader = CallReader()
    deltas = reader.push(f"First.\n{ROME}\n{TIME}\n Then more.\n", final=True)
    assert told(deltas)[0] == "First.\nThen more.\n"
    assert [call["function"]["name"] for call in reader.calls] == ["weather", "now"]


@pytest.mark.parametrize(
    ("calls", "text", "ended", "reason"),
    [
        ("auto", ROME, "stop", "tool_calls"),
        ("auto", "a text", "stop", "stop"),
        ("auto", ROME[:-3], "length", "length"),
        ("auto", ROME, "length", "length"),
        ("required", f"{ROME}\n{TIME}", "stop", "tool_calls"),
        ("required", ROME[:-3], "stop", "stop"),
        ("named", TIME, "stop", "stop"),
    ],
)
def test_why_an_answer_ended(calls: str, text: str, ended: Any, reason: str) -> None:
    """A call that the client has named ends with "stop", as it does at OpenAI and in vLLM."""
    written = ChatFormat({}, calls=calls)
    output = RequestOutput("a", [1], [], text, ended, RequestMetrics(0.0))
    assert written.choice(0, "", output)["finish_reason"] == reason
    pieces = [Piece(letter, [], [], None, None) for letter in text]
    pieces[-1] = pieces[-1]._replace(finish_reason=ended)
    chunks = [chunk for piece in pieces for chunk in written.growth(0, "", piece)]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [reason]


def test_an_offer_that_is_none() -> None:
    assert offer("none") == Offer.of([], None, several=True) == Offer()
    with pytest.raises(RequestError, match="there is no tool"):
        offer(named("nowhere"))
