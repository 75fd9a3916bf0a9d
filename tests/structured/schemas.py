"""Sixty JSON schemas, in the form of those that public suites collect: calls of functions, records, trees.

Each is small enough that a tiny model can answer it, and together they use every keyword that we promise.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "maxLength": 24}
WORD = {"type": "string", "pattern": "^[a-z]{2,8}$"}
NAME = {"type": "string", "minLength": 1, "maxLength": 12}
WHOLE = {"type": "integer", "minimum": 0, "maximum": 999}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
FLAG = {"type": "boolean"}


def record(optional: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others; all but the optional ones are required."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def some(items: Any, low: int = 1, high: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def one_of(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


SCHEMAS: dict[str, dict[str, Any]] = {
    # Calls of functions
    "weather": record(city=NAME, unit=one_of("celsius", "fahrenheit")),
    "transfer": record(sender=NAME, receiver=NAME, amount={"type": "number", "minimum": 0, "maximum": 5000}),
    "search": record(("limit",), query=TEXT, limit={"type": "integer", "minimum": 1, "maximum": 50}),
    "reminder": record(title=TEXT, date={"type": "string", "format": "date"}, urgent=FLAG),
    "translate": record(text=TEXT, source=one_of("en", "de", "fr"), target=one_of("en", "de", "fr")),
    "convert": record(value={"type": "number", "minimum": -99, "maximum": 99}, unit={"const": "kelvin"}),
    "no_arguments": record(),
    "call": record(name=one_of("add", "sub"), arguments=record(a=WHOLE, b=WHOLE)),
    "calls": some(record(name={"const": "ping"}, arguments=record(host=WORD)), 1, 2),
    "mail": record(("cc",), to=some(WORD), cc=some(WORD, 0, 2), subject=TEXT),
    # Records
    "person": record(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 130}),
    "address": record(street=NAME, number=WHOLE, city=NAME, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    "book": record(title=TEXT, authors=some(NAME, 1, 2), year={"type": "integer", "minimum": 1450}),
    "film": record(title=TEXT, score=SHARE, genres=some(one_of("drama", "comedy", "crime"), 1, 2)),
    "invoice": record(lines=some(record(item=NAME, price=WHOLE), 1, 2), paid=FLAG),
    "login": record(user=WORD, roles=some(one_of("admin", "reader"), 0, 2), active=FLAG),
    "event": record(at={"type": "string", "format": "date-time"}, kind=one_of("start", "stop")),
    "reading": record(sensor=WORD, values=some({"type": "number", "minimum": 0, "maximum": 9}, 2, 4)),
    "colour": record(hex={"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    "version": record(version={"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"}),
    "point": record(
        x={"type": "integer", "minimum": -9, "maximum": 9}, y={"type": "integer", "exclusiveMinimum": 0}
    ),
    "uuid": record(id={"type": "string", "format": "uuid"}),
    "server": record(
        host={"type": "string", "format": "ipv4"}, port={"type": "integer", "maximum": 65535, "minimum": 1}
    ),
    "long_keys": record(
        **{
            "the_name_of_the_customer_as_printed": NAME,
            "the_number_of_parcels_in_the_delivery": WHOLE,
            "whether_the_delivery_has_been_confirmed": FLAG,
        }
    ),
    "optional": record(("b", "c", "d"), a=WHOLE, b=WHOLE, c=FLAG, d=WORD),
    "all_optional": record(("a", "b"), a=WHOLE, b=FLAG),
    "nothing": record(value={"type": "null"}),
    "perhaps": record(value={"type": ["integer", "null"], "minimum": 0, "maximum": 99}),
    "perhaps_text": record(value={"anyOf": [WORD, {"type": "null"}]}),
    "unicode": record(**{"größe": WHOLE, "名": one_of("一", "二")}),
    "quoted": record(**{'a "b"': FLAG, "c\\d": FLAG, "e/f": one_of('say "no"', "line\nbreak")}),
    # Bare values
    "answer": FLAG,
    "digit": {"type": "integer", "minimum": 0, "maximum": 9},
    "label": one_of("positive", "negative", "neutral"),
    "mixed": one_of("yes", 1, None, True, [1, 2], {"a": 1}),
    "constant": {"const": {"fixed": [1, "two", None]}},
    "short_text": {"type": "string", "minLength": 3, "maxLength": 9},
    "float": {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    "exactly": some(FLAG, 3, 3),
    "even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 98},
    "empty_list": some(WHOLE, 0, 0),
    # Choices
    "shape": {
        "anyOf": [
            record(kind={"const": "circle"}, radius=WHOLE),
            record(kind={"const": "box"}, width=WHOLE, height=WHOLE),
        ]
    },
    "result": {"anyOf": [record(ok={"const": True}, value=WHOLE), record(ok={"const": False}, error=WORD)]},
    "id": {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": 99},
            {"type": "string", "pattern": "^[A-Z]{3}$"},
        ]
    },
    "nested_choice": record(item={"anyOf": [some(FLAG), record(flag=FLAG)]}),
    "all_of": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    # Places for others, and trees
    "ref": {"$defs": {"word": WORD}, **record(a={"$ref": "#/$defs/word"}, b={"$ref": "#/$defs/word"})},
    "tree": {
        "$defs": {"node": record(("left",), value=WHOLE, left={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    "team": {
        "$defs": {"person": record(name=NAME)},
        **record(lead={"$ref": "#/$defs/person"}, members=some({"$ref": "#/$defs/person"}, 1, 2)),
    },
    "definitions": {"definitions": {"n": WHOLE}, **record(n={"$ref": "#/definitions/n"})},
    "map": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 2},
    "patterns": {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,4}$": FLAG},
        "additionalProperties": False,
    },
    "open": {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
    "tuple": {"type": "array", "prefixItems": [WORD, WHOLE, FLAG], "items": False, "minItems": 3},
    "matrix": some(some({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 2),
    "deep": record(a=record(b=record(c=record(d=FLAG)))),
    "config": record(
        debug=FLAG,
        level=one_of("info", "warn", "error"),
        limits=record(cpu=SHARE, memory=WHOLE),
        tags=some(WORD, 0, 2),
    ),
    "quiz": record(
        question=TEXT, options=some(NAME, 2, 3), correct={"type": "integer", "minimum": 0, "maximum": 2}
    ),
    "described": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Order",
        "description": "What somebody orders.",
        **record(
            dish={**WORD, "description": "Its name.", "examples": ["soup"]}, count={**WHOLE, "default": 1}
        ),
    },
    "steps": record(steps=some(record(explanation=TEXT, output=TEXT), 1, 2), final_answer=TEXT),
}
