"""The forms that a call asks for: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from labkit.sampling_params import Structured
from labkit.serving.errors import RequestError

_FORMATS = ("text", "json_object", "json_schema")
_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")
_OLDER = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def of_response_format(given: Mapping[str, Any]) -> Structured | None:
    """The form that `response_format` asks for; None for plain text.

    A schema always holds, with `strict` or without.

    Raises:
        RequestError: (400) for a format that does not exist, or a field that is not supported.
        ValueError: for a schema that is none.
    """
    kind = given.get("type")
    if kind not in _FORMATS:
        raise _wrong("response_format", f"type must be one of {', '.join(_FORMATS)}, not {_shown(kind)}")
    if kind != "json_schema":
        _refuse_others("response_format", given, {"type"})
        return Structured.of("json") if kind == "json_object" else None
    _refuse_others("response_format", given, {"type", "json_schema"})
    inner, where = given.get("json_schema"), "response_format: json_schema"
    if not isinstance(inner, Mapping):
        raise _wrong(where, f"it must be an object with a name and a schema, not {_shown(inner)}")
    _refuse_others(where, inner, {"name", "description", "schema", "strict"})
    name = inner.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(where, f"name must be 1 to 64 letters, digits, - or _, not {_shown(name)}")
    if not isinstance(inner.get("strict"), bool | None):
        raise _wrong(where, f"strict must be true or false, not {_shown(inner['strict'])}")
    if not isinstance(schema := inner.get("schema"), Mapping | bool | None):
        raise _wrong(where, f"schema must be a JSON schema, not {_shown(schema)}")
    return Structured.of("json" if schema is None else {"json": schema})


def of_structured_outputs(given: Mapping[str, Any]) -> Structured | None:
    """The form that `structured_outputs` asks for; None if for none. Raises as `of_response_format` does."""
    asked = {name: value for name, value in given.items() if value is not False}
    if asked.get("disable_any_whitespace") is True:
        del asked["disable_any_whitespace"]  # none is written but one space behind a comma and a colon
    _refuse_others("structured_outputs", asked, _OUTPUTS)
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise _wrong("structured_outputs", f"one of {', '.join(_OUTPUTS)} is allowed, not {', '.join(asked)}")
    if not asked:
        return None
    if not isinstance(choice := asked.get("choice", []), list):
        raise _wrong("structured_outputs", f"choice must be a list of strings, not {_shown(choice)}")
    if "json_object" not in asked:
        return Structured.of(asked)
    if asked["json_object"] is not True:
        raise _wrong("structured_outputs", f"json_object must be true, not {_shown(asked['json_object'])}")
    return Structured.of("json")


def newer_name(name: str) -> str:
    """How a field that vLLM had until 0.11 is written now, as an addition to a message; "" for any other."""
    return f': write structured_outputs = {{"{_OLDER[name]}": ...}}' if name in _OLDER else ""


def _refuse_others(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in given.items():
        if value is not None and key not in known:
            raise _wrong(where, f"{key} is not supported here")


def _shown(value: Any) -> str:
    """A value as part of a message, which is short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _wrong(where: str, what: str) -> RequestError:
    return RequestError(400, f"{where}: {what}", param=where.partition(":")[0])
