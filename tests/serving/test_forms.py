"""The forms of answers over the API: what is asked for holds, and what cannot hold is refused by its name."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import pytest

from labkit.sampling_params import Structured
from labkit.serving.forms import newer_name, of_response_format, of_structured_outputs
from tests.serving.api_server import MODEL, TALK, Served, ask, nothing_left, post, site  # noqa: F401

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NUMBER = {"type": "integer", "minimum": 10, "maximum": 99}
WILD = {"temperature": 1.5, "seed": 5, "max_tokens": 60}


def chat(site: Served, **fields: Any) -> Any:
    return post(site, {"model": MODEL, "messages": TALK} | WILD | fields, "chat/completions")


def json_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | fields}


@pytest.mark.parametrize("strict", [True, False, None])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_schema_that_response_format_names(
    site: Served, strict: bool | None, stream: bool
) -> None:
    answer = chat(site, response_format=json_format(SCHEMA, strict=strict, description="d"), stream=stream)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n")] if stream else [answer.text]
    choices = [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]
    text = "".join(choice["delta" if stream else "message"].get("content") or "" for choice in choices)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert choices[-1]["finish_reason"] == "stop"


def test_any_json_is_an_object_unless_it_is_cut(site: Served) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        choice = chat(site, **fields, max_tokens=150, n=4).json()["choices"]
        for one in choice:
            assert one["message"]["content"].startswith("{")
            assert one["finish_reason"] == "length" or isinstance(json.loads(one["message"]["content"]), dict)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"choice": ["yes", "no", "né"]}, "yes|no|né"),
        ({"choice": ["yes"], "json": None, "json_object": False}, "yes"),
        ({"regex": r"[a-c]{3}\d"}, r"[a-c]{3}\d"),
        ({"grammar": 'start: "a" start | "b"'}, "a*b"),
        ({"json": NUMBER, "disable_any_whitespace": True}, "[1-9][0-9]"),
        ({"json": json.dumps(NUMBER)}, "[1-9][0-9]"),
    ],
)
def test_vllms_structured_outputs(site: Served, path: str, asked: dict[str, Any], pattern: str) -> None:
    prompt = {"prompt": "hello"} if path == "completions" else {"messages": TALK}
    answer = post(site, {"model": MODEL, "structured_outputs": asked, "n": 5} | prompt | WILD, path)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        text = choice["text"] if path == "completions" else choice["message"]["content"]
        assert choice["finish_reason"] == "length" or re.fullmatch(pattern, text), text


NO_FORM = [
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "text", "json_schema": None}},
    {"structured_outputs": None},
    {"structured_outputs": {}},
    {"structured_outputs": {"json": None, "regex": None, "json_object": False, "structural_tag": None}},
]


@pytest.mark.parametrize("fields", NO_FORM)
def test_what_asks_for_no_form_changes_nothing(site: Served, fields: dict[str, Any]) -> None:
    plain, answer = chat(site, max_tokens=5).json(), chat(site, max_tokens=5, **fields).json()
    assert answer["choices"] == plain["choices"]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def of_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": json_format(schema, **fields)}


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
MANY = {f"key{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i + 1}}}$"} for i in range(600)}
REFUSED = [
    ({"response_format": {}}, "type must be one of text, json_object, json_schema, not None"),
    ({"response_format": {"type": "wibble"}}, "not 'wibble'"),
    ({"response_format": {"type": ["text"]}}, "not ['text']"),
    ({"response_format": {"type": "x" * 5000}}, "type must be one of"),
    ({"response_format": {"type": "structural_tag", "structures": []}}, "not 'structural_tag'"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "schema is not supported here"),
    ({"response_format": {"type": "json_schema"}}, "json_schema: it must be an object with a name"),
    ({"response_format": {"type": "json_schema", "json_schema": [1]}}, "not [1]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "name must be"),
    (of_format({}, name=7), "name must be 1 to 64 letters, digits, - or _, not 7"),
    (of_format({}, name="two words"), "not 'two words'"),
    (of_format({}, name="x" * 65), "name must be"),
    (of_format({}, strict="yes"), "strict must be true or false, not 'yes'"),
    (of_format({}, wibble=1), "json_schema: wibble is not supported here"),
    (of_format([1]), "schema must be a JSON schema, not [1]"),
    (of_format("{}"), "schema must be a JSON schema"),
    (of_format({"type": "wibble"}), "json: Invalid type: wibble"),
    (of_format({"properties": [1]}), "properties must be an object"),
    (of_format({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (of_format({"not": {}}), "not"),
    (of_format(False), "Unsatisfiable"),
    (of_format({"enum": []}), "Unsatisfiable"),
    (of_format({"type": "integer", "minimum": 5, "maximum": 4}), "minimum (5) is greater than maximum (4)"),
    (of_format({"type": "string", "pattern": "("}), "unclosed group"),
    (of_format({"$ref": "http://example.com/schema.json"}), "does not fetch"),
    (of_format({"$ref": "file:///etc/passwd"}), "does not fetch"),
    (of_format({"$ref": "#/nowhere"}), "/nowhere"),
    (of_format({"$ref": "#"}), "requires itself"),
    (of_format(LOOP), "requires itself"),
    (of_format(ENDLESS), "requires itself"),
    (of_format(deep(300)), "recursion limit exceeded"),
    (of_format({"type": "object", "properties": MANY}), "max is 2000"),
    (of_format({"description": "x" * 70_000}), "at most 65,536 characters, not 70,"),
    (outputs(wibble=1), "wibble is not supported here"),
    (outputs(json=SCHEMA, whitespace_pattern=" "), "whitespace_pattern is not supported here"),
    (outputs(json=SCHEMA, disable_additional_properties=True), "disable_additional_properties is not"),
    (outputs(json=SCHEMA, disable_any_whitespace="x"), "disable_any_whitespace is not supported"),
    (outputs(structural_tag="{}"), "structural_tag is not supported here"),
    (outputs(regex="a", choice=["b"]), "one of json, regex, choice, grammar, json_object is allowed"),
    (outputs(json_object=1), "json_object must be true, not 1"),
    (outputs(choice=[]), "choice must have between 1 and 1000 strings, not 0"),
    (outputs(choice=[str(i) for i in range(100_000)]), "between 1 and 1000 strings, not 100000"),
    (outputs(choice=[""]), "choice must be"),
    (outputs(choice=["a", 1]), "choice must be"),
    (outputs(choice={"a": 1}), "choice must be a list of strings"),
    (outputs(choice="yes"), "choice must be a list of strings, not 'yes'"),
    (outputs(choice=["x" * 70_000]), "at most 65,536 characters"),
    (outputs(regex="("), "missing ), unterminated subpattern"),
    (outputs(regex=""), "regex must be a string that is not empty"),
    (outputs(regex=7), "regex must be a string that is not empty, not 7"),
    (outputs(regex=r"(a)\1"), "a backreference is not supported"),
    (outputs(regex="(a|b)*a(a|b){30}"), "more than 10,000 states"),
    (outputs(json='{"type"'), "json is no JSON schema"),
    (outputs(json=7), "json must be a schema"),
    (outputs(grammar='start: a\na = "b"'), "grammar: line 2: "),
    (outputs(grammar="start: start"), "no answer can begin"),
    (outputs(grammar='start: nowhere'), "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_forms_that_cannot_be_are_refused_by_the_name_of_their_field(
    site: Served, fields: dict[str, Any], words: str
) -> None:
    (name,) = fields
    answer = chat(site, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name), error
    assert error["message"].startswith(name) and words in error["message"]
    assert "structured:" not in error["message"], "the engine's own word"


@pytest.mark.parametrize("name", ["json", "regex", "choice", "grammar"])
def test_the_older_names_of_vllm_are_refused_with_the_newer(site: Served, name: str) -> None:
    answer = chat(site, **{f"guided_{name}": "x"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"guided_{name}")
    assert f'write structured_outputs = {{"{name}": ...}}' in error["message"]
    assert newer_name("guided_wibble") == ""


def test_two_forms_are_one_too_many(site: Served) -> None:
    answer = chat(site, response_format=json_format(SCHEMA), structured_outputs={"regex": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "structured_outputs")


def test_a_form_that_max_tokens_cuts_short_is_refused_by_that_name(site: Served) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        fields = {
            "max_tokens": None,
            limit: 3,
            "structured_outputs": {"choice": ["a long answer that is cut"]},
        }
        error = chat(site, **fields).json()["error"]
        assert error["param"] == limit and "must be at least" in error["message"], error


def test_a_schema_that_is_left_out_is_any_object() -> None:
    given = {"type": "json_schema", "json_schema": {"name": "a"}}
    assert of_response_format(given) == of_response_format({"type": "json_object"}) == Structured.of("json")
    assert of_structured_outputs({"json_object": True}) == Structured.of("json")


def test_hostile_forms_do_not_keep_others_from_their_answers(site: Served) -> None:
    """They come all at once, and a plain request in between is answered as ever."""
    expected = post(site, ask(max_tokens=8)).json()["choices"]
    hostile = [chat_body for chat_body, _ in REFUSED if len(json.dumps(chat_body)) > 2000]
    threads = [threading.Thread(target=lambda f=fields: chat(site, **f)) for fields in hostile]
    for thread in threads:
        thread.start()
    assert post(site, ask(max_tokens=8)).json()["choices"] == expected
    for thread in threads:
        thread.join()
    assert site.live.failure is None
