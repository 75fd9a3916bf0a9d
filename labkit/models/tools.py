"""Functions that a model may call: how it is told of them, and how it writes a call.

A call is written as the Hermes and Qwen models do. A chat template that writes calls so gets the functions
and the calls of a conversation as they are. For any other they become text: a paragraph of the system
message, the calls in the words of the assistant, and results in those of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL = "<tool_call>"  # what a call begins with
NAME = '\n{"name": "'  # then comes the name of the function,
ARGUMENTS = '", "arguments": '  # its arguments as JSON,
END = "}\n</tool_call>"  # and the end
_TOLD = """You can call functions. Each of these lines describes one:
{functions}
To call one, write its name and its arguments like this:
{form}"""


def knows_calls(tokenizer: Any) -> bool:
    """Return whether the model's chat template tells of functions, and writes calls as we read them.

    Templates do not say how they write a call, so it is tried.
    """
    if not getattr(tokenizer, "chat_template", None) or "tools" not in tokenizer.get_chat_template():
        return False
    function = {"name": "probe", "arguments": {"a": 1}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    try:
        written = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, call], tokenize=False)
    except Exception:  # of any kind: templates raise what they like
        return False
    return written_call("probe", '{"a": 1}') in written


def written_call(name: str, arguments: str) -> str:
    """Return a call as text. `arguments` is a JSON object."""
    return f"{CALL}{NAME}{name}{ARGUMENTS}{arguments}{END}"


def for_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Prepare a conversation with functions, calls and results for the model's chat template.

    Args:
        tokenizer: the tokenizer, which has the template.
        messages: messages in OpenAI's form: an assistant's may have "tool_calls", and the role "tool" brings
            the result of one.
        tools: functions in OpenAI's form.

    Returns:
        The messages, and variables for the template.
    """
    if not tools and not any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        return [dict(message) for message in messages], {}
    if knows_calls(tokenizer):
        return [_parsed(message) for message in messages], {"tools": list(tools)} if tools else {}
    plain: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if before and before["role"] == message["role"] == "tool":  # many templates take turns
            plain[-1]["content"] += "\n" + _as_text(message)["content"]
        else:
            plain.append(_as_text(message))
    if tools:
        functions = "\n".join(json.dumps(tool["function"]) for tool in tools)
        told = _TOLD.format(functions=functions, form=written_call("NAME", "{}"))
        if plain and plain[0]["role"] == "system":
            first = plain.pop(0)
            told = f"{_text(first)}\n\n{told}"
        plain.insert(0, {"role": "system", "content": told})
    return plain, {}


def _parsed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have arguments as a dictionary, which templates write as JSON."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    if not (calls := message.get("tool_calls")):
        return dict(message)
    lines = [_text(message)] * bool(message["content"])
    lines += [written_call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return {"role": message["role"], "content": "\n".join(lines)}


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
