"""How short JSON of a schema can be: a lower bound, by which what cannot end in time is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_LEAST = {"string": 2, "integer": 1, "number": 1, "boolean": 4, "null": 4, "object": 2, "array": 2}  # bytes
_BETWEEN = 2  # bytes of ", " and of ": "


def fewest_bytes(schema: Any) -> float:
    """Return a number of bytes that no JSON text of a schema is below; infinity if each would go on for ever.

    What a keyword adds that is not known here is taken as nothing. Schemas that refer to each other are
    worked out together, from infinity down, as shortest paths are (Bellman 1958).
    """
    known: dict[str, float] = {}
    while True:
        before = dict(known)
        least = _least(schema, known)
        for pointer in list(known):
            known[pointer] = min(known[pointer], _least(_at(schema, pointer), known))
        if known == before:
            return least


def _least(schema: Any, known: dict[str, float]) -> float:
    """Return the bound of one schema; `known` has those of the schemas that others refer to."""
    if not isinstance(schema, Mapping) or "$id" in schema:  # with a name of its own, references mean others
        return math.inf if schema is False else 1
    bounds: list[float] = [1]  # all of them hold
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        bounds.append(known.setdefault(ref, math.inf))
    if "const" in schema:
        bounds.append(_written(schema["const"]))
    if isinstance(values := schema.get("enum"), list):
        bounds.append(min(map(_written, values), default=math.inf))
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            bounds.append(min([_least(choice, known) for choice in choices], default=math.inf))
    if isinstance(parts := schema.get("allOf"), list):
        bounds += [_least(part, known) for part in parts]
    if kinds := schema.get("type"):
        kinds = kinds if isinstance(kinds, list) else [kinds]
        bounds.append(min(_LEAST.get(kind, 1) + _content(kind, schema, known) for kind in kinds))
    return max(bounds)


def _content(kind: str, schema: Mapping[str, Any], known: dict[str, float]) -> float:
    """Return the fewest bytes between the quotes or brackets of a value of this kind."""
    if kind == "string":
        return schema.get("minLength", 0)
    if kind == "object":
        fields = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        values = [_written(name) + _BETWEEN + _least(fields.get(name), known) for name in needed]
        return sum(values) + _BETWEEN * max(0, len(values) - 1)
    if kind == "array" and (count := schema.get("minItems", 0)):
        first = [_least(each, known) for each in schema.get("prefixItems", ())][:count]
        rest = count - len(first)
        return sum(first) + (rest and rest * _least(schema.get("items"), known)) + _BETWEEN * (count - 1)
    return 0


def _written(value: Any) -> float:
    """Return the fewest bytes of a value; a number may be written in several ways."""
    if isinstance(value, str):
        return 2 + len(value.encode(errors="replace"))
    if isinstance(value, list | dict):
        parts = [_written(each) for each in value]
        parts += [_BETWEEN + _written(each) for each in value.values()] if isinstance(value, dict) else []
        return 2 + sum(parts) + _BETWEEN * max(0, len(value) - 1)
    return 4 if value is None or isinstance(value, bool) else 1


def _at(schema: Any, pointer: str) -> Any:
    """Return the part of a schema that a reference names; True, which allows all, if that is not known."""
    for step in unquote(pointer).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and step in schema:
            schema = schema[step]
        elif isinstance(schema, list) and step.isdigit() and int(step) < len(schema):
            schema = schema[int(step)]
        else:
            return True
    return schema if pointer.startswith("#/") or pointer == "#" else True
