"""Bodies that ask for a form or for calls, mangled anywhere: an answer, or a refusal that names a field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from labkit.serving.schema import ChatBody
from tests.serving.api_server import MODEL, Served, served
from tests.serving.test_server_fuzz import hostile, judge, send

SCHEMA = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "kind": {"enum": ["a", 1, None, {"b": []}]},
        "size": {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": 9},
        "list": {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1, "maxItems": 2},
        "either": {"anyOf": [{"const": "x"}, {"type": "number", "multipleOf": 0.5}]},
        "when": {"type": "string", "format": "date"},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FUNCTION = {"name": "a", "description": "d", "parameters": SCHEMA, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "b"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "b", "arguments": "{}"}}
USER = {"role": "user", "content": "a"}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "a", "description": "d", "schema": SCHEMA, "strict": True},
}
BODIES: list[dict[str, Any]] = [
    {"response_format": FORM},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
    {"structured_outputs": {"choice": ["yes", "no"], "regex": None}},
    {"structured_outputs": {"regex": r"(a|b)[^x]{1,3}\d+"}},
    {"structured_outputs": {"grammar": 'start: "a" item*\nitem: /[0-9]+/ | "b"'}},
    {"tools": TOOLS, "parallel_tool_calls": True},
    {"tools": TOOLS, "tool_choice": "required", "response_format": FORM},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "a"}}},
    {"tools": TOOLS, "tool_choice": ALLOWED},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        "tools": TOOLS,
    },
]
# Words that stand in such bodies, for places where they should not.
words = st.sampled_from(
    [
        "#",
        "#/$defs/node",
        "(",
        "a{9}{9}",
        "[",
        "\\",
        "object",
        "type",
        "function",
        "$ref",
        "name",
        "start: start",
    ]
)
pieces = hostile | words | st.sampled_from([TOOLS[0], SCHEMA, FUNCTION, CALL, FORM])


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(Options(limits=Limits(answer_tokens=64)), max_model_len=1000, num_blocks=1024) as site:
        yield site


@pytest.fixture(scope="module")
def web(site: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url + "/v1/", timeout=60) as client:
        yield client


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def mangle(body: dict[str, Any], data: st.DataObject) -> None:
    """Replace, drop or add something anywhere."""
    *way, last = data.draw(st.sampled_from(list(places(body))), label="place")
    for key in way:
        body = body[key]
    what = data.draw(st.sampled_from(["replace", "replace", "drop", "add"]), label="what")
    if what == "replace":
        body[last] = copy.deepcopy(data.draw(pieces, label="piece"))
    elif what == "drop":
        del body[last]
    elif isinstance(body, dict):
        body[data.draw(words)] = copy.deepcopy(data.draw(pieces))
    else:
        body.insert(last, copy.deepcopy(data.draw(pieces)))


@given(data=st.data(), base=st.sampled_from(BODIES), stream=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_body_that_is_mangled_is_answered_or_refused_by_a_field(
    site: Served, web: httpx.Client, data: st.DataObject, base: dict[str, Any], stream: bool
) -> None:
    asked = json.loads(json.dumps(base))  # no part of it stands in two places
    for _ in range(data.draw(st.integers(1, 3))):
        if asked:
            mangle(asked, data)
    body = {"model": MODEL, "messages": [USER], "max_tokens": 64, "temperature": 1} | asked
    answer = send(web, "chat/completions", body | {"stream": stream})
    if answer.headers["content-type"].startswith("text/event-stream") and '{"error":' in answer.text:
        assert '"server_error"' not in answer.text  # a form that becomes too large on the way
        return
    complaint = judge(answer)
    if answer.status_code != 200:
        assert answer.status_code in (400, 422)
        # A name of a field that holds half a surrogate pair is shown in another way.
        assert complaint in {*ChatBody.model_fields, *body} or not complaint or "\\" in complaint, complaint
        assert complaint is not None or "surrogate" in answer.text


@pytest.mark.parametrize("levels", [100, 400, 900, 980, 990, 2000, 20_000])
@pytest.mark.parametrize(
    "body",
    [
        '{"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}}',
        '{"structured_outputs": {"json": %s}}',
        '{"tools": [{"type": "function", "function": {"name": "a", "parameters": %s}}]}',
        '{"tool_choice": {"type": %s}}',
        '{"messages": [{"role": "assistant", "tool_calls": %s}]}',
    ],
)
def test_what_is_too_deep_is_refused(site: Served, web: httpx.Client, body: str, levels: int) -> None:
    deep = body % ('{"items": ' * levels + "{}" + "}" * levels)
    usual = json.dumps({"model": MODEL, "messages": [USER], "max_tokens": 4})
    content = usual[:-1] + ", " + deep[1:]
    answer = web.post(
        "chat/completions", content=content.encode(), headers={"Content-Type": "application/json"}
    )
    judge(answer)
    assert answer.status_code in (400, 422) or levels == 100
    assert site.live.failure is None


def test_nothing_is_left_over(site: Served) -> None:
    site.until_quiet()
    assert site.live.failure is None
