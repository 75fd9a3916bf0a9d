"""Calls of functions: what a client offers becomes a grammar, and what an answer says becomes calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.models.tools import ARGUMENTS, CALL, END, NAME
from labkit.serving.errors import RequestError
from labkit.structured.guidance import json_grammar

MOST_TOOLS = 128
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The functions that a client offers. Raises `RequestError` (400), naming the field."""
    if len(tools) > MOST_TOOLS:
        raise _wrong("tools", f"at most {MOST_TOOLS} are allowed, not {len(tools)}")
    checked = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function" or "function" not in tool:
            raise _wrong("tools", f"number {place} must be of type function")
        function = tool["function"]
        known = {"name", "description", "parameters", "strict"}
        if not isinstance(function, dict) or not set(function) <= known or set(tool) > {"type", "function"}:
            raise _wrong("tools", f"the function of number {place} must have no keys but {sorted(known)}")
        name = function.get("name")
        if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
            raise _wrong("tools", f"a name must be 1 to 64 letters, digits, dots, - or _, not {name!r}")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _wrong("tools", f"the parameters of {name!r} must be a JSON schema")
        checked.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise _wrong("tools", "two functions have the same name")
    return checked


def offered(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], str]:
    """Which functions may be called, and how: "none", "auto", "required" or "named".

    Args:
        tools: the functions.
        choice: the client's `tool_choice`.

    Raises:
        RequestError: (400) for a choice that cannot be.
    """
    if choice is None:
        choice = "auto" if tools else "none"
    if choice == "none" or (choice == "auto" and not tools):
        return [], "none"
    if choice in ("auto", "required"):
        if not tools:
            raise _wrong("tool_choice", "required needs tools")
        return tools, choice
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        what = 'must be "none", "auto", "required", or the function of a tool'
        raise _wrong("tool_choice", f"{what}, not {json.dumps(choice)[:200]}")
    return named, "named"


def call_grammar(tools: Sequence[dict[str, Any]], how: str, *, several: bool) -> str:
    """The grammar of an answer that may or must call one of these functions (see `offered`)."""
    bodies = []
    for tool in tools:
        function = tool["function"]
        schema = json.dumps(function.get("parameters") or _NO_ARGUMENTS)
        begin, end = json.dumps(f"{NAME}{function['name']}{ARGUMENTS}"), json.dumps(END)
        bodies.append(f"({begin} {json_grammar(schema)} {end})")
    rules = [f"body: {' | '.join(bodies)}"]
    if how == "auto":  # any text, until a call begins
        rules.append(f'head[lazy]: TEXT "{CALL}"\ntail: TEXT\nTEXT: /(.|\\n)*/')
        start = "(head body)* tail" if several else "tail | head body"
    else:
        rules.append(f'call: "{CALL}" body')
        start = 'call ("\\n" call)*' if several and how == "required" else "call"
    return "\n".join([f"start: {start}", *rules])


@dataclass
class CallReader:
    """Finds the calls in the text of an answer, as it comes.

    Attributes:
        calls: the calls so far, in OpenAI's form.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    _rest: str = ""  # text that is not yet told
    _inside: str = ""  # the part of a call that comes next: "name" or "arguments"

    def push(self, text: str, *, final: bool = False) -> list[dict[str, Any]]:
        """Take more of the text; return what is new as deltas of a message. `final`: no more will come."""
        self._rest += text
        deltas: list[dict[str, Any]] = []
        while self._step(deltas, final):
            pass
        return deltas

    def _step(self, deltas: list[dict[str, Any]], final: bool) -> bool:
        """Tell what can be told of one part; return whether that part is over."""
        mark = {"": CALL + NAME, "name": ARGUMENTS, "arguments": END}[self._inside]
        before, found, after = self._rest.partition(mark)
        if not found:
            held = 0 if final else _head_of(mark, before)
            before, after = before[: len(before) - held], before[len(before) - held :]
        if self._inside == "name":
            if not found:
                return False
            self._begin(before, deltas)
        elif self._inside == "arguments":
            self._go_on(before, deltas)
        else:
            kept = before.lstrip() if self.calls else before  # calls stand on lines of their own
            if kept:
                deltas.append({"content": kept})
        self._rest = after
        if found:
            self._inside = {"": "name", "name": "arguments", "arguments": ""}[self._inside]
        return bool(found)

    def _begin(self, name: str, deltas: list[dict[str, Any]]) -> None:
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        call["function"] = {"name": name, "arguments": ""}
        self.calls.append(call)
        delta = {"index": len(self.calls) - 1, **call, "function": dict(call["function"])}
        deltas.append({"tool_calls": [delta]})

    def _go_on(self, arguments: str, deltas: list[dict[str, Any]]) -> None:
        if arguments:
            self.calls[-1]["function"]["arguments"] += arguments
            part = {"index": len(self.calls) - 1, "function": {"arguments": arguments}}
            deltas.append({"tool_calls": [part]})


def _head_of(mark: str, text: str) -> int:
    """How many of the last characters may turn out to begin a mark."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _wrong(name: str, what: str) -> RequestError:
    return RequestError(400, f"{name}: {what}", param=name)
