"""Texts are scored: `echo` with `logprobs` gives what the model foretells of each token of a prompt.

lm-evaluation-harness scores with it (its `local-completions`; 0.4.13 was run on multiple choice and on
perplexity against this server and against its own `hf`: of 160 numbers of choices none differs by more than
5.6e-5, of 12 sums over whole documents none by more than 8.6e-4).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
import torch

from tests.conftest import loaded, reference
from tests.models.tokenizers_of_all_kinds import KINDS, model_with, tokenizer_of
from tests.serving.api_server import Served, nothing_left, post, served  # noqa: F401

FAMILY = "qwen2"
KIND, TEXT = "byte-level", "hello wide world"  # a model that reads texts


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(model=loaded(FAMILY)) as site:
        yield site


@pytest.fixture(scope="module")
def reader() -> Iterator[openai.OpenAI]:
    with served(model=model_with(KIND)) as site:
        yield openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0)


def foretold(tokens: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(FAMILY)(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


def joined(answer: str) -> dict[str, Any]:
    """A stream's only choice, put together."""
    whole: dict[str, Any] = {"text": "", "logprobs": None}
    for line in answer.split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            if logprobs := choice["logprobs"]:
                before = whole["logprobs"] or {key: [] for key in logprobs}
                whole["logprobs"] = {key: before[key] + logprobs[key] for key in logprobs}
    return whole


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_prompt_is_scored_as_transformers_does(site: Served, max_tokens: int) -> None:
    prompt = [5, 77, 130, 9, 42, 42, 17, 99]
    body = {"model": FAMILY, "prompt": prompt, "echo": True, "logprobs": 2, "temperature": 0}
    answer = post(site, body | {"max_tokens": max_tokens, "ignore_eos": True}).json()
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert all(len(values) == len(prompt) + max_tokens for values in logprobs.values())
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    for before, token, value, top in zip(
        foretold(prompt),
        prompt[1:],
        logprobs["token_logprobs"][1:],
        logprobs["top_logprobs"][1:],
        strict=False,
    ):
        assert value == pytest.approx(float(before[token]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(before.max()), abs=1e-4)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    streamed = joined(post(site, body | {"max_tokens": max_tokens, "ignore_eos": True, "stream": True}).text)
    assert streamed == {key: choice[key] for key in streamed}


def test_choices_are_scored_as_the_harness_does(site: Served) -> None:
    """Its call, and how it reads the answer: the sum over a continuation, and whether greedy would say it."""
    greedy = [int(foretold([3, 4, 5])[-1].argmax())]
    greedy.append(int(foretold([3, 4, 5, *greedy])[-1].argmax()))
    pairs = [([3, 4, 5], [6, 7]), ([3, 4, 5], greedy), ([9] * 30, [8]), ([1], [2, 3, 4, 5])]
    call = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "model": FAMILY}
    answer = post(site, call | {"prompt": [[*context, *ending] for context, ending in pairs]}).json()
    found = []
    for choice, (context, ending) in zip(answer["choices"], pairs, strict=True):
        part = slice(len(context), -1)
        values = choice["logprobs"]["token_logprobs"][part]
        tops = choice["logprobs"]["top_logprobs"][part]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        logits = foretold([*context, *ending])[len(context) - 1 : -1]
        assert sum(values) == pytest.approx(float(logits[range(len(ending)), ending].sum()), abs=1e-3)
        assert is_greedy == (logits.argmax(-1).tolist() == ending)
        found.append(is_greedy)
    assert found[1] and not all(found)


def test_how_one_samples_does_not_change_the_score(site: Served) -> None:
    prompt = [5, 77, 130, 9, 42, 42, 17, 99]
    body = {"model": FAMILY, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    plain = post(site, body | {"temperature": 0}).json()["choices"]
    filtered = {"temperature": 1.3, "top_k": 1, "repetition_penalty": 2, "logit_bias": {"130": -100}}
    scored = post(site, body | filtered).json()["choices"]
    values = [choice[0]["logprobs"]["token_logprobs"][1:] for choice in (plain, scored)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_alone(reader: openai.OpenAI, stream: bool) -> None:
    call = {"model": KIND, "prompt": TEXT, "echo": True, "max_tokens": 0, "temperature": 0}
    if not stream:
        answer = reader.completions.create(**call)
        assert (answer.choices[0].text, answer.choices[0].logprobs) == (TEXT, None)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 0
    else:
        parts = list(reader.completions.create(**call, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for part in parts for choice in part.choices) == TEXT
        assert parts[-1].usage.completion_tokens == 0
        assert [c.finish_reason for part in parts for c in part.choices][-1] == "length"
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        reader.completions.create(**{**call, "echo": False})


def test_many_answers_begin_with_the_same_scored_prompt(reader: openai.OpenAI) -> None:
    call = {"model": KIND, "prompt": TEXT, "echo": True, "logprobs": 1, "n": 3, "max_tokens": 4}
    call |= {"temperature": 1, "seed": 1}
    answer = reader.completions.create(**call)
    length = len(tokenizer_of(KIND).encode(TEXT))
    scores = [choice.logprobs.token_logprobs for choice in answer.choices]
    assert len({tuple(score[:length]) for score in scores}) == 1
    assert len({tuple(score[length:]) for score in scores}) > 1
    by_choice: dict[int, list[float | None]] = {}
    for part in reader.completions.create(**call, stream=True):
        for choice in part.choices:
            by_choice.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
    assert [by_choice[index] for index in range(3)] == scores


# As text: where the tokens decode to the text, as they do with real tokenizers of all but a few kinds.
@pytest.mark.parametrize(
    ("kind", "as_ids"),
    [
        *((kind, True) for kind in KINDS),
        *((kind, False) for kind in KINDS if kind not in ("gemma", "end of word")),
    ],
)
def test_offsets_are_places_in_the_echoed_text(kind: str, as_ids: bool) -> None:
    """Special tokens count where their names stand in the text, and not where the tokenizer added them."""
    tokenizer = tokenizer_of(kind)
    text = "hello cat a</s>b world" if as_ids else "hello cat b world"
    ids = tokenizer.encode(text)
    with served(model=model_with(kind)) as site:
        body = {"model": kind, "prompt": ids if as_ids else text, "echo": True, "logprobs": 0}
        (choice,) = post(site, body | {"max_tokens": 3, "ignore_eos": True, "temperature": 0}).json()[
            "choices"
        ]
    echo = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if as_ids else text
    assert choice["text"].startswith(echo)
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 3
    assert logprobs["text_offset"][len(ids)] == len(echo)
    for token, place in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or choice["text"].startswith(token, place)
