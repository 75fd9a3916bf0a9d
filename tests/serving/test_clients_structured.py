"""Forms and calls as the clients that people have ask for them, against a running server.

`openai` is needed for the tests anyway; the others are tried where they are installed (`test_clients` says
why). What they send is here as plain bodies too, as langchain-openai 1.7, instructor 1.17 and litellm 1.110
wrote them.
"""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.serving.api_server import MODEL, TALK, Served, client, nothing_left, post, served  # noqa: F401


class City(BaseModel):
    """A city and how it is there."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Rome", "Oslo"]
    warm: bool


WILD = {"temperature": 1.0, "seed": 3, "max_tokens": 120}
ASKED: dict[str, Any] = {"model": MODEL, "messages": TALK, **WILD}
TOOL = openai.pydantic_function_tool(City, name="tell")
ONE = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(max_model_len=1000, num_blocks=1024) as site:
        yield site


# -- openai ---------------------------------------------------------------------------------------


def test_openai_parses_a_format(client: openai.OpenAI) -> None:
    message = client.chat.completions.parse(response_format=City, **ASKED).choices[0].message
    assert isinstance(message.parsed, City) and message.refusal is None
    with client.chat.completions.stream(response_format=City, **ASKED) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == message.parsed
    assert kinds == {"chunk", "content.delta", "content.done"}


def test_openai_parses_calls_and_goes_on(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.parse(**ONE, **ASKED).choices
    (call,) = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City) and choice.finish_reason == "tool_calls"
    with client.chat.completions.stream(**ONE, **ASKED) as stream:
        kinds = [event.type for event in stream]
        (again,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert again.function.parsed_arguments == call.function.parsed_arguments
    assert kinds.count("tool_calls.function.arguments.done") == 1
    result = {"role": "tool", "tool_call_id": call.id, "content": "warm"}
    fields = ASKED | ONE | {"messages": [*TALK, choice.message, result], "tool_choice": "auto"}
    message = client.chat.completions.parse(response_format=City, **fields).choices[0].message
    assert message.parsed or message.tool_calls


def test_openai_gets_a_clear_error(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wibble"}}}
    with pytest.raises(openai.BadRequestError, match="response_format: json: Invalid type: wibble") as raised:
        client.chat.completions.create(response_format=schema, **ASKED)
    assert raised.value.param == "response_format"


# -- the others, where they are installed ---------------------------------------------------------


@pytest.fixture
def langchain(site: Served) -> Any:
    kind = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed").ChatOpenAI
    return kind(model=MODEL, base_url=site.url + "/v1", api_key="none", max_retries=0, **WILD)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_has_structured_output(langchain: Any, method: str) -> None:
    model = langchain.with_structured_output(City, method=method)
    answer = model.invoke("hi")
    assert isinstance(answer, City)
    assert list(model.stream("hi"))[-1] == answer


@pytest.mark.parametrize("choice", ["any", "tell", "auto"])
def test_langchain_binds_tools(langchain: Any, choice: str) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    model = langchain.bind_tools([TOOL], tool_choice=choice, parallel_tool_calls=False)
    answer = model.invoke("hi")
    whole = None
    for part in model.stream("hi"):
        whole = part if whole is None else whole + part
    assert [call["args"] for call in whole.tool_calls] == [call["args"] for call in answer.tool_calls]
    if choice == "auto":
        return
    (call,) = answer.tool_calls
    assert City(**call["args"])
    talk = [messages.HumanMessage("hi"), answer, messages.ToolMessage("warm", tool_call_id=call["id"])]
    assert langchain.bind_tools([TOOL]).invoke(talk).response_metadata["finish_reason"]


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(site: Served, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    own = openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0)
    create = instructor.from_openai(own, mode=instructor.Mode[mode]).chat.completions
    assert isinstance(create.create(response_model=City, max_retries=0, **ASKED), City)
    assert list(create.create_partial(response_model=City, max_retries=0, **ASKED))[-1].name


def test_litellm(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    litellm.suppress_debug_info = True

    def ask(**fields: Any) -> Any:
        asked = ASKED | {"model": f"openai/{MODEL}"} | fields
        return litellm.completion(api_base=site.url + "/v1", api_key="none", max_retries=0, **asked)

    assert City.model_validate_json(ask(response_format=City).choices[0].message.content)
    message = ask(**ONE).choices[0].message
    built = litellm.stream_chunk_builder(list(ask(**ONE, stream=True)))
    (call,), (again,) = message.tool_calls, built.choices[0].message.tool_calls
    assert City.model_validate_json(call.function.arguments)
    assert again.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "name": "tell", "content": "warm"}
    assert ask(messages=[*TALK, message, result], tools=[TOOL]).choices[0].finish_reason


# -- what they send -------------------------------------------------------------------------------

SCHEMA = City.model_json_schema()
NAMED = {"type": "function", "function": {"name": "City"}}
PLAIN_TOOL = {"type": "function", "function": {"name": "City", "description": "", "parameters": SCHEMA}}
STRICT_TOOL = {"type": "function", "function": {"name": "City", "parameters": SCHEMA, "strict": True}}


def content(message: dict[str, Any]) -> str:
    return message["content"]


def arguments(message: dict[str, Any]) -> str:
    return message["tool_calls"][0]["function"]["arguments"]


BODIES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str]]] = {
    "openai, a format": (
        {
            "stream": False,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": SCHEMA, "name": "City", "strict": True},
            },
        },
        content,
    ),
    "openai, a tool": (
        {"stream": False, "tools": [STRICT_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        arguments,
    ),
    "langchain, a tool": (
        {
            "max_tokens": None,
            "max_completion_tokens": 120,
            "stream": False,
            "tools": [PLAIN_TOOL],
            "tool_choice": NAMED,
            "parallel_tool_calls": False,
        },
        arguments,
    ),
    "instructor, a tool": ({"tools": [PLAIN_TOOL], "tool_choice": NAMED}, arguments),
    "instructor, a format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "City", "schema": SCHEMA}}},
        content,
    ),
    "litellm, behind a call": (
        {
            "messages": [
                *TALK,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "City", "arguments": '{"name": "Rome", "warm": true}'},
                        }
                    ],
                    "function_call": None,
                    "provider_specific_fields": None,
                },
                {"role": "tool", "content": "warm", "name": "City", "tool_call_id": "call_1"},
            ],
            "tools": [PLAIN_TOOL],
            "tool_choice": NAMED,
        },
        arguments,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_clients_send_is_answered_in_its_form(site: Served, name: str) -> None:
    fields, answer_of = BODIES[name]
    answer = post(site, ASKED | fields, "chat/completions")
    assert answer.status_code == 200, answer.text
    assert City(**json.loads(answer_of(answer.json()["choices"][0]["message"])))
