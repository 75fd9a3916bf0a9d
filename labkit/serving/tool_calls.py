"""Calls of functions: what a client offers becomes a grammar, and what an answer says becomes calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from labkit.models.tools import ARGUMENTS, CALL, END, NAME
from labkit.sampling_params import Structured
from labkit.serving.errors import RequestError
from labkit.serving.neutral import first_that_asks
from labkit.structured.guidance import json_grammar

MOST_TOOLS = 128  # OpenAI's limit
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_CHOICES = '"none", "auto", "required", a tool or allowed tools'


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None  # the parameters' schema always holds


class Tool(BaseModel):
    """A function that an answer may call."""

    model_config = ConfigDict(extra="allow")

    type: StrictStr
    function: Function | None = None

    def plain(self) -> dict[str, Any]:
        """The tool as it came. Raises `RequestError` (400) for what is not supported."""
        if self.type != "function":
            raise _wrong("tools", f"only tools of type function are supported, not {self.type!r}")
        if self.function is None:
            raise _wrong("tools", "a tool must have a function")
        for where, extra in (("tool", self.model_extra), ("function", self.function.model_extra)):
            if (name := first_that_asks(where, extra)) is not None:
                raise _wrong("tools", f"{name} is not supported here")
        if (self.function.parameters or {}).get("type", "object") != "object":
            raise _wrong("tools", f"the parameters of {self.function.name!r} must be of type object")
        known = {name: getattr(self.function, name) for name in Function.model_fields}
        said = {name: value for name, value in known.items() if value is not None}
        return {"type": self.type, "function": said}


@dataclass(frozen=True)
class Offer:
    """Which functions an answer may call.

    Attributes:
        tools: the functions; those that may not be called are left out.
        how: whether one is called: "none" is, "auto", at least one is ("required"), or this one ("named").
        several: whether an answer may call more than once.
    """

    tools: tuple[dict[str, Any], ...] = ()
    how: str = "none"
    several: bool = True

    @classmethod
    def of(cls, given: Sequence[Tool], choice: str | Mapping[str, Any] | None, *, several: bool) -> Offer:
        """Return what a client offers.

        Args:
            given: the functions.
            choice: the client's `tool_choice`.
            several: whether an answer may call more than once.

        Raises:
            RequestError: (400) for what cannot be; it names the field.
        """
        tools = {}
        for tool in given:
            plain = tool.plain()
            if tools.setdefault(plain["function"]["name"], plain) is not plain:
                raise _wrong("tools", f"two functions have the name {plain['function']['name']!r}")
        if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools")
            if not isinstance(allowed, Mapping) or allowed.get("mode") not in ("auto", "required"):
                raise _wrong("tool_choice", 'allowed_tools needs tools, and the mode "auto" or "required"')
            listed = allowed.get("tools")
            names = [_named(one, tools) for one in (listed if isinstance(listed, list) else ())]
            tools, choice = {name: tools[name] for name in names}, allowed["mode"]
            if not tools:
                raise _wrong("tool_choice", "allowed_tools must name at least one tool")
        if isinstance(choice, Mapping):
            return cls((tools[_named(choice, tools)],), "named", several=False)
        if choice not in (None, "none", "auto", "required"):
            raise _wrong("tool_choice", f"it must be {_CHOICES}, not {choice[:60]!r}")
        if choice == "required" and not tools:
            raise _wrong("tool_choice", "required needs tools")
        if choice == "none" or not tools:
            return cls()
        return cls(tuple(tools.values()), choice or "auto", several)

    def form(self, otherwise: Structured | None) -> Structured:
        """The form of an answer that calls these functions.

        Args:
            otherwise: the form of an answer that calls none: JSON, or None for any text.
        """
        bodies = []  # each on a line of its own, from the second on: see `in_its_words`
        for number, tool in enumerate(self.tools):
            function = tool["function"]
            schema = json.dumps({"type": "object"} | (function.get("parameters") or _NO_ARGUMENTS))
            begin, end = json.dumps(f"{NAME}{function['name']}{ARGUMENTS}"), json.dumps(END)
            bodies.append(f"function{number}: {begin} {json_grammar(schema)} {end}")
        either = " | ".join(f"function{number}" for number in range(len(bodies)))
        call = f'call: "{CALL}" body'
        start = 'call ("\\n" call)*' if self.several else "call"
        if self.how == "auto" and otherwise:
            start += f" | {json_grammar(str(otherwise.value))}"
        elif self.how == "auto":  # any text, until a call begins
            call = f'head[lazy]: TEXT "{CALL}"\ntail: TEXT\nTEXT: /(.|\\n)*/'
            start = "(head body)* tail" if self.several else "tail | head body"
        rules = [f"start: {start}", *bodies, f"body: {either}", call]
        return Structured.of({"grammar": "\n".join(rules)})

    def in_its_words(self, message: str) -> str:
        """What is wrong in a line of the form's grammar, as a client knows it: in which function."""
        line = re.match(r"line (\d+): ", message)
        if line is None or not 0 <= (number := int(line[1]) - 2) < len(self.tools):
            return message
        return f"the parameters of {self.tools[number]['function']['name']!r}: {message[line.end() :]}"


def _named(choice: Any, tools: Mapping[str, Any]) -> str:
    """The name of a tool that a client chooses."""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise _wrong("tool_choice", f"it must be {_CHOICES}, not {str(choice)[:60]}")
    if name not in tools:
        raise _wrong("tool_choice", f"there is no tool {name[:60]!r}")
    return name


@dataclass
class CallReader:
    """Finds the calls in the text of an answer, as it comes.

    Attributes:
        calls: the calls so far, in OpenAI's form.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    _rest: str = ""  # text that is not yet told
    _inside: str = ""  # the part of a call that comes next: "name" or "arguments"
    _behind_call: bool = False  # the next text stands on a line of its own, and line breaks are no part of it

    @property
    def is_inside(self) -> bool:
        """Whether a call has begun, and not ended."""
        return bool(self._inside)

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
        if not found and self._inside == "name":
            return False
        if not found:  # what may begin the mark waits; of a call that is cut, it is no argument
            held = 0 if final and not self._inside else _head_of(mark, before)
            before, after = before[: len(before) - held], before[len(before) - held :]
        if self._inside == "name":
            self._begin(before, deltas)
        elif self._inside == "arguments":
            self._go_on(before, deltas)
        else:
            self._tell(before, deltas)
        self._rest = after
        if found:
            self._behind_call = self._inside == "arguments"
            self._inside = {"": "name", "name": "arguments", "arguments": ""}[self._inside]
        return bool(found)

    def _tell(self, text: str, deltas: list[dict[str, Any]]) -> None:
        text = text.lstrip() if self._behind_call else text
        if text:
            self._behind_call = False
            deltas.append({"content": text})

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
