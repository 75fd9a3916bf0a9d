"""Conversations in which calls were made, and answered: taken in each form that clients send, or refused."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.api_server import MODEL, TALK, Served, client, nothing_left  # noqa: F401
from tests.serving.test_tool_calls import TOOLS, WILD, chat, site  # noqa: F401


def test_a_conversation_goes_on_behind_a_call(site: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": TOOLS, **WILD}
    first = client.chat.completions.create(messages=TALK, tool_choice="required", **asked)
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "warm"} for call in message.tool_calls or []
    ]
    second = client.chat.completions.create(messages=[*TALK, message, *results], **asked)
    assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens


def call(arguments: Any = "{}", name: Any = "now", **more: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}} | more


def said(*calls: Any, **more: Any) -> list[Any]:
    result = {"role": "tool", "tool_call_id": "1", "content": "x"}
    return [*TALK, {"role": "assistant", "tool_calls": list(calls)} | more, result]


@pytest.mark.parametrize(
    "messages",
    [
        said(call()),
        said(call(""), content="I call"),
        said(call(' {"a": [1, "né"]} '), call(index=1), content=None),
        said(call(parsed_arguments={}, provider_specific_fields=None), parsed=None),
        said(call(), content=[{"type": "text", "text": "a"}]),
        said(call(), call())[:2],
        [*TALK, {"role": "assistant", "content": "a", "tool_calls": []}, {"role": "tool", "content": "x"}],
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_of_a_conversation_are_taken(site: Served, messages: list[Any], tools: Any) -> None:
    answer = chat(site, messages=messages, tools=tools, max_tokens=2)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (said(call("{")), "arguments must be the JSON of an object"),
        (said(call("[1]")), "arguments must be the JSON of an object"),
        (said(call("[" * 100_000)), "arguments must be the JSON of an object"),
        (said(call({})), "arguments"),
        (said(call(name=7)), "name"),
        (said(call(wibble=1)), "wibble in tool_calls is not supported here"),
        (said(call(type="custom")), "type"),
        (said({}), "function"),
        (
            [{"role": "user", "content": "a", "tool_calls": [call()]}],
            "must be in a message of role",
        ),
        ([{"role": "user", "content": "a", "tool_call_id": "1"}], "must be in a message of role tool"),
        ([{"role": "tool", "content": 7}], "content"),
    ],
)
def test_calls_of_a_conversation_that_are_none_are_refused(
    site: Served, messages: list[Any], words: str
) -> None:
    answer = chat(site, messages=messages)
    error = answer.json()["error"]
    assert answer.status_code in (400, 422) and error["param"] == "messages", error
    assert words in error["message"]
