"""What is said to be the fewest bytes of JSON is never too many."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.structured.shortest import fewest_bytes
from tests.structured.forms import guidance, tokens_of, vocabulary
from tests.structured.schemas import SCHEMAS

ITSELF = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}}
LIST = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
}
CHAIN = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {
    "d40": {"const": "end"}
}


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        (True, "1"),
        ({}, "1"),
        ({"$id": "x", "$ref": "#"}, "1"),
        ({"type": "string", "minLength": 3}, '"abc"'),
        ({"enum": ["long", None, True]}, "null"),
        ({"const": {"a": [1, "\u00e9"], "b": None}}, '{"a": [1, "\u00e9"], "b": null}'),
        ({"type": ["object", "array"], "required": ["a"], "minItems": 2}, "[1, 1]"),
        (
            {"type": "array", "prefixItems": [{"const": "a"}], "items": {"type": "null"}, "minItems": 2},
            '["a", null]',
        ),
        ({"allOf": [{"type": "string"}, {"type": "string", "minLength": 4}]}, '"abcd"'),
        ({**LIST, "required": ["v", "next"]}, '{"v": 1, "next": null}'),
        ({"$defs": CHAIN, "$ref": "#/$defs/d0"}, '"end"'),
        ({"$defs": {"a/b": {"type": "null"}}, "$ref": "#/$defs/a~1b"}, "null"),
    ],
)
def test_the_shortest_of_plain_schemas(schema: Any, shortest: str) -> None:
    assert fewest_bytes(schema) == len(shortest.encode())


@pytest.mark.parametrize("schema", [{**ITSELF, "$ref": "#/$defs/n"}, False, {"enum": []}, {"$ref": "#"}])
def test_what_never_ends_is_infinite(schema: Any) -> None:
    assert fewest_bytes(schema) == math.inf


def test_a_schema_that_requires_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="structured: json: no answer of this schema ends"):
        guidance().compile("json", json.dumps({**ITSELF, "$ref": "#/$defs/n"}))


@given(st.sampled_from(sorted(SCHEMAS)), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_answer_is_shorter(name: str, rng: random.Random) -> None:
    form = guidance().compile("json", json.dumps(SCHEMAS[name]))
    matcher, text, count = form.start(), b"", 0
    while not matcher.may_end and count < 120:
        allowed = tokens_of(matcher.mask())
        enders = [token for token in allowed if vocabulary().tokens[token] in (b'"', b"}", b"]")]
        token = rng.choice(sorted(enders or allowed))
        assert matcher.advance(token)
        text, count = text + vocabulary().tokens[token], count + 1
    if matcher.may_end:
        assert len(text) >= fewest_bytes(SCHEMAS[name])
        assert count >= form.fewest_tokens
