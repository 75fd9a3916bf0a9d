"""Fields at the value that changes nothing are let pass wherever they stand, and refused at any other."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import json
from typing import Any

import pytest

from labkit.serving.neutral import NEUTRAL, first_that_asks
from tests.serving.api_server import HELLO, MODEL, TALK, Served, ask, nothing_left, post, site, solo  # noqa: F401

# What openai, litellm, langchain-openai, llama-index, lm-evaluation-harness and vLLM's own clients send.
BOTH = [
    {"best_of": 1, "n": 1, "suffix": None},
    {"stop": None, "top_k": None, "user": "me", "store": False, "metadata": {}},
    {"best_of": 2, "n": 2, "temperature": 1},
    {"use_beam_search": False, "skip_special_tokens": True, "spaces_between_special_tokens": True},
    {"min_tokens": 0, "length_penalty": 1.0, "early_stopping": False, "include_stop_str_in_output": False},
    {"length_penalty": 1, "repeat_penalty": 1.0, "typical_p": 1.0, "num_beams": 1},
    {"seed": -1, "temperature": 1e-8, "logit_bias": {}, "stop": []},
    {"stream_options": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": False}},
    {"prompt_cache_key": "mine", "safety_identifier": "me"},
]
COMPLETIONS = [{"logprobs": False}, {"suffix": ""}, {"echo": False}, {"add_special_tokens": True}]
CHAT = [
    {"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False},
    {
        "function_call": "none",
        "functions": [],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    },
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": 0},
    {"response_format": {"type": "text"}, "modalities": ["text"], "documents": [], "echo": False},
]
MESSAGES = [
    [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}],
    [{"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}}],
    [
        {"role": "user", "content": "a", "name": "Ada"},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": [], "annotations": [],
         "function_call": None, "audio": None, "reasoning_content": None, "provider_specific_fields": {}},
        {"role": "user", "content": [{"type": "text", "text": "c", "image_url": None}]},
    ],
]  # fmt: skip


@pytest.mark.parametrize("fields", [*BOTH, *COMPLETIONS])
def test_completions_let_pass_what_asks_for_nothing(site: Served, fields: dict[str, Any]) -> None:
    answer = post(site, ask(max_tokens=1) | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("fields", [*BOTH, *CHAT, *({"messages": talk} for talk in MESSAGES)])
def test_chat_lets_pass_what_asks_for_nothing(site: Served, fields: dict[str, Any]) -> None:
    answer = post(site, {"model": MODEL, "messages": TALK, "max_tokens": 1} | fields, "chat/completions")
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"length_penalty": True}, "length_penalty"),
        ({"use_beam_search": 0}, "use_beam_search"),
        ({"best_of": 1, "n": 2, "temperature": 1}, "best_of"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "prefix"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "x in a part"),
    ],
)
def test_any_other_value_is_refused_by_the_name_of_its_field(
    site: Served, fields: dict[str, Any], name: str
) -> None:
    answer = post(site, {"model": MODEL, "messages": TALK} | fields, "chat/completions")
    assert answer.status_code == 400
    assert f"{name} is not supported here" in answer.json()["error"]["message"]


def test_null_asks_for_nothing_and_what_is_unknown_asks() -> None:
    for where in NEUTRAL:
        assert first_that_asks(where, None) is None
        assert first_that_asks(where, {"wibble": None}) is None
        assert first_that_asks(where, {"wibble": False}) == "wibble"


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_own_fields_reach_the_engine(site: Served, stream: bool) -> None:
    alone = solo(site, HELLO, max_tokens=24, ignore_eos=True)
    word = alone.text.split()[3]
    fields = {
        "stop": [word],
        "include_stop_str_in_output": True,
        "min_tokens": 1,
        "skip_special_tokens": False,
    }
    expected = solo(site, HELLO, max_tokens=24, **fields)
    answer = post(site, ask(max_tokens=24, stream=stream) | fields).text
    lines = [line.removeprefix("data: ") for line in answer.split("\n\n")] if stream else [answer]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == expected.text and text.endswith(word)
    refused = post(site, ask(max_tokens=4, min_tokens=5))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")
