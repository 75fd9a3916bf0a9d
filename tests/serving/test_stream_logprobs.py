"""Log-probabilities as the API writes them: nothing is lost, and all of it is JSON."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from labkit.outputs import TokenLogprobs
from labkit.serving.stream import Vocabulary, chat_logprobs, completion_logprobs
from tests.serving.api_server import HELLO, MODEL, TALK, Served, ask, nothing_left, post, served, site  # noqa: F401


class Halves:
    """A tokenizer whose tokens 0 and 1 are halves of characters: both read as the replacement character."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ["\ufffd", "\ufffd", "two", "three"][tokens[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["Ã", "ð", "two", "three"][token]


def tops(*entries: TokenLogprobs) -> list[dict[str, float]]:
    return completion_logprobs(entries, Vocabulary(Halves()), 0)["top_logprobs"]  # type: ignore[arg-type]


def test_of_tokens_with_one_text_the_better_is_shown() -> None:
    assert tops(TokenLogprobs(0, -0.1, ((0, -0.1), (1, -5.0), (2, -6.0)))) == [{"\ufffd": -0.1, "two": -6.0}]
    assert tops(TokenLogprobs(1, -5.0, ((0, -0.1),))) == [{"\ufffd": -0.1}]


def test_the_chosen_token_is_always_among_them() -> None:
    assert tops(TokenLogprobs(3, -4.0, ((2, -0.5),)), TokenLogprobs(2, -0.5, ())) == [
        {"two": -0.5, "three": -4.0},
        {"two": -0.5},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_completions_show_the_chosen_token(site: Served, count: int, stream: bool) -> None:
    body = ask(logprobs=count, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True, stream=stream)
    answer = post(site, body).text
    events = [line.removeprefix("data: ") for line in answer.split("\n\n")] if stream else [answer]
    seen = 0
    for event in events:
        if not event.startswith("{"):
            continue
        for choice in json.loads(event)["choices"]:
            logprobs = choice["logprobs"]
            for token, logprob, top in zip(
                *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
            ):
                assert top[token] >= logprob
                assert 1 <= len(top) <= count + 1
                seen += 1
    assert seen == 12


def test_impossible_tokens_are_written_in_json() -> None:
    entry = TokenLogprobs(2, -math.inf, ((3, 0.0), (2, -math.inf)))
    vocabulary = Vocabulary(Halves())  # type: ignore[arg-type]
    for written in (completion_logprobs([entry], vocabulary, 0), chat_logprobs([entry], vocabulary)):
        assert "-9999.0" in json.dumps(written, allow_nan=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_rules_tokens_out_is_served(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models give minus infinity to the padding of their vocabulary, or to all tokens but one."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    with served() as site:
        model = site.live.engine.runner.model
        logits = model.logits

        def but_one(hidden: torch.Tensor) -> torch.Tensor:
            some = logits(hidden).clone()
            some[:, 301:] = -math.inf
            some[:, :300] = -math.inf
            return some

        monkeypatch.setattr(model, "logits", but_one)
        chat = {"model": MODEL, "messages": TALK, "logprobs": True, "top_logprobs": 3, "max_tokens": 3}
        for path, body in (("completions", ask(logprobs=3, max_tokens=3)), ("chat/completions", chat)):
            answer = post(site, body | {"stream": stream}, path)
            assert answer.status_code == 200
            assert "-9999.0" in answer.text
            for line in answer.text.split("\n\n") if stream else [answer.text]:
                if (event := line.removeprefix("data: ")).startswith("{"):
                    json.loads(event, parse_constant=refuse)


def test_more_logprobs_than_there_are_tokens_are_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as site:
        model = site.live.engine.runner.model
        logits = model.logits
        monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden)[:, :7])
        answer = post(site, ask(prompt=[1, 2], logprobs=20, max_tokens=2, ignore_eos=True))
        assert answer.status_code == 200, answer.text
        chat = {"model": MODEL, "messages": TALK, "logprobs": True, "top_logprobs": 20, "max_tokens": 1}
        entries = post(site, chat, "chat/completions").json()["choices"][0]["logprobs"]["content"]
        assert [len(entry["top_logprobs"]) for entry in entries] == [7]
