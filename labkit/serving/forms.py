"""The forms that a call asks for: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.sampling_params import Structured
from labkit.serving.errors import RequestError

_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")


def of_response_format(given: Mapping[str, Any]) -> Structured | None:
    """The form that `response_format` asks for; None for plain text. Raises `RequestError` (400)."""
    kind, known = given.get("type"), {"type"}
    if kind == "json_schema":
        known.add("json_schema")
        inner = given.get("json_schema")
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name", ""), str):
            raise _wrong("response_format", "json_schema must be an object with a name and a schema")
        _refuse_others("response_format: json_schema", inner, {"name", "description", "schema", "strict"})
    _refuse_others("response_format", given, known)
    if kind == "text":
        return None
    if kind == "json_object":
        return Structured.of("json")
    if kind != "json_schema":
        raise _wrong("response_format", f"type must be text, json_object or json_schema, not {kind!r}")
    schema = given["json_schema"].get("schema")  # it always holds, with `strict` or without
    return Structured.of("json" if schema is None else {"json": schema})


def of_structured_outputs(given: Mapping[str, Any]) -> Structured | None:
    """The form that `structured_outputs` asks for; None if for none. Raises `RequestError` (400)."""
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    _refuse_others("structured_outputs", asked, set(_OUTPUTS))
    if len(asked) > 1:
        raise _wrong("structured_outputs", f"one of {', '.join(_OUTPUTS)} is allowed, not {', '.join(asked)}")
    if not asked:
        return None
    return Structured.of("json" if "json_object" in asked else asked)


def _refuse_others(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given.keys() - known:
        raise _wrong(name, f"{key} is not supported here")


def _wrong(name: str, what: str) -> RequestError:
    return RequestError(400, f"{name}: {what}", param=name.partition(":")[0])
