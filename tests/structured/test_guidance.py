"""JSON schemas by the library: what it allows, what it forces, and what it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.structured.guidance import GuidedMatcher
from tests.structured.forms import guidance, tokens_of, vocabulary, walk
from tests.structured.schemas import SCHEMAS

JUDGE = jsonschema.Draft202012Validator.FORMAT_CHECKER


def start(schema: Any) -> GuidedMatcher:
    return guidance().compile("json", json.dumps(schema)).start()


def accepts(schema: Any, value: Any) -> bool:
    """Whether a value can be written."""
    matcher = start(schema)
    text = json.dumps(value, ensure_ascii=False).encode()
    return all(map(matcher.advance, vocabulary().encode(text))) and matcher.may_end


def valid(schema: Any, value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema, format_checker=JUDGE).is_valid(value)


@given(st.sampled_from(sorted(SCHEMAS)), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_what_may_end_is_valid(name: str, rng: random.Random) -> None:
    matcher = start(SCHEMAS[name])
    for text, _ in walk(matcher, rng, 40):
        if matcher.may_end:
            assert valid(SCHEMAS[name], json.loads(text)), text


@given(st.sampled_from(sorted(SCHEMAS)), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_forced_tokens_are_allowed_and_a_walk_can_be_taken_back(name: str, rng: random.Random) -> None:
    matcher = start(SCHEMAS[name])
    for _ in range(15):
        before = tokens_of(matcher.mask())
        forced = [] if matcher.may_end else matcher.forced()
        for token in forced:
            assert token in tokens_of(matcher.mask())
            assert matcher.advance(token)
        matcher.rollback(len(forced))
        assert tokens_of(matcher.mask()) == before
        if not before:
            break
        assert not forced or matcher.forced() == forced  # asking twice changes nothing
        assert matcher.advance(forced[0] if forced else rng.choice(sorted(before)))
        if matcher.is_over:
            break


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (
            {"format": "date", "type": "string"},
            ["2024-02-29", "2023-02-29", "1900-02-29", "2000-02-29", "0000-01-01"],
        ),
        (
            {"format": "date", "type": "string"},
            ["2023-02-28", "2023-04-31", "2023-12-31", "0001-01-01", "9999-10-30"],
        ),
        ({"format": "time", "type": "string"}, ["22:17:59Z", "22:17:60Z", "22:17:00z", "22:17:00.5+01:00"]),
        ({"format": "date-time", "type": "string"}, ["2024-02-29T01:02:03Z", "2023-02-29T01:02:03Z"]),
        ({"format": "date-time", "type": "string"}, ["2024-01-01T01:02:60Z", "2024-01-01T01:02:03.25-02:00"]),
        (
            {"anyOf": [{"format": "date", "type": "string"}, {"type": "null"}]},
            [None, "2023-02-29", "2023-02-20"],
        ),
        ({"type": "string", "format": "date", "pattern": "^20"}, ["2023-02-20", "1923-02-20", "2023-02-29"]),
        (
            {"type": "object", "properties": {"format": {"const": "date"}}},
            [{"format": "date"}, {"format": "time"}],
        ),
        ({"enum": ["yes", 1, None]}, ["yes", 1, None, "no", True]),
        (True, [1, "a", None, {"a": []}]),
    ],
)
def test_what_can_be_written_is_what_the_judge_takes(schema: Any, values: list[Any]) -> None:
    assert [accepts(schema, value) for value in values] == [valid(schema, value) for value in values]


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        (False, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum|maximum"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "https://example.com/x.json"}, "example.com|ref"),
        ({"type": "string", "format": "password"}, "password"),
        ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around|pattern|regex"),
    ],
)
def test_what_is_not_supported_is_named(schema: Any, part: str) -> None:
    with pytest.raises(ValueError, match=f"^structured: json: .*({part})"):
        start(schema)


@pytest.mark.parametrize("text", ["begin: /a/", "start: other", "start: /a"])
def test_a_grammar_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^structured: grammar: "):
        guidance().compile("grammar", text)


def test_the_last_token_of_a_vocabulary_without_an_end_is_a_token_as_others() -> None:
    """The library wants a token that ends texts; it must be none of the model's."""
    last = len(vocabulary().tokens) - 1
    matcher = start({"type": "object"})
    (brace,) = vocabulary().encode(b"{")
    (close,) = vocabulary().encode(b"}")
    assert matcher.advance(brace) and matcher.advance(close)
    assert matcher.is_over
    numbers = start({"type": "integer"})  # which may end, and may go on
    assert numbers.advance(vocabulary().encode(b"1")[0]) and numbers.may_end
    assert last not in tokens_of(numbers.mask())


def test_the_choice_and_the_expression_do_without_the_library() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
from labkit import LLM, SamplingParams
llm = LLM("tiny-random")
print(llm.generate("Is it?", SamplingParams(structured={"choice": ["yes", "no"]}))[0].text in ("yes", "no"))
try:
    llm.generate("Is it?", SamplingParams(structured="json"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2] == "True"
    assert "need llguidance: pip install llguidance" in done.stdout.splitlines()[-1]
