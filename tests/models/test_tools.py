"""What a model is told of functions and calls: by its template, or in words where that knows of none."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from labkit.models.chat import as_chat
from labkit.models.load import load_model
from labkit.models.tools import for_template, knows_calls, written_call

TELLS = "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }};{% endfor %}{% endif %}"
SAYS = "[{{ m.role }}]{{ m.content }}"
HERMES = (
    TELLS + "{% for m in messages %}" + SAYS + "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %};{% endfor %}"
)
OTHER_CALLS = (  # the same words round a call that is written in another way
    TELLS + "{% for m in messages %}" + SAYS + "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "<function={{ c.function.name }}>{{ c.function.arguments | tojson }}</function>\n</tool_call>"
    "{% endfor %};{% endfor %}"
)
PLAIN = "{% for m in messages %}" + SAYS + ";{% endfor %}"
IN_TURN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}" + SAYS + ";{% endfor %}"
)
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "when?"}
TALK = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [call("now", '{"zone": "né"}'), call("now", "{}")]},
    {"role": "tool", "tool_call_id": "1", "content": "noon"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "one"}]},
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("tiny-random")


def written(loaded: Any, template: str | None, messages: list[Any], tools: list[Any]) -> str:
    """What the model is told. The messages that are given stay as they are."""
    tokenizer, before = copy.copy(loaded.tokenizer), copy.deepcopy(messages)
    tokenizer.chat_template = template
    prepared, variables = for_template(tokenizer, messages, tools)
    assert messages == before
    prompt = as_chat(tokenizer, prepared, variables=variables)
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


@pytest.mark.parametrize(
    ("template", "knows"),
    [(HERMES, True), (OTHER_CALLS, False), (PLAIN, False), (IN_TURN, False), (None, False)],
)
def test_a_template_knows_calls_if_it_writes_them_as_they_are_read(
    loaded: Any, template: str | None, knows: bool
) -> None:
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.chat_template = template
    assert knows_calls(tokenizer) == knows


def test_a_template_that_knows_calls_gets_them_as_they_are(loaded: Any) -> None:
    text = written(loaded, HERMES, TALK, [NOW])
    calls = written_call("now", '{"zone": "né"}') + written_call("now", "{}")
    assert text == f"[tools]{json.dumps(NOW)};[user]when?;[assistant]{calls};[tool]noon;[tool]one;"


@pytest.mark.parametrize("template", [PLAIN, OTHER_CALLS, IN_TURN])
def test_any_other_is_told_in_words(loaded: Any, template: str) -> None:
    text = written(loaded, template, TALK, [])
    calls = "\n".join([written_call("now", '{"zone": "né"}'), written_call("now", "{}")])
    results = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\none\n</tool_response>"
    assert text == f"[user]when?;[assistant]{calls};[user]{results};"


def test_functions_in_words_are_a_part_of_the_system_message(loaded: Any) -> None:
    alone = written(loaded, PLAIN, [USER], [NOW])
    assert alone.startswith("[system]You can call functions.") and alone.endswith(";[user]when?;")
    assert json.dumps(NOW["function"]) in alone and written_call("NAME", "{}") in alone
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    both = written(loaded, PLAIN, [system, USER], [NOW])
    assert both == alone.replace("[system]", "[system]be brief\n\n")


@pytest.mark.parametrize("template", [HERMES, PLAIN, None])
def test_a_conversation_without_functions_stays_as_it_is(loaded: Any, template: str | None) -> None:
    messages = [USER, {"role": "assistant", "content": "noon"}]
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.chat_template = template
    assert for_template(tokenizer, messages, []) == (messages, {})


def test_a_model_without_a_template_is_told_in_paragraphs(loaded: Any) -> None:
    text = written(loaded, None, TALK, [NOW])
    assert text.startswith("You can call functions.") and written_call("now", "{}") in text
