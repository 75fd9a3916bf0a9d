"""Log-probabilities as the API writes them: nothing is lost, and all of it is JSON."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.serving.api_server import HELLO, MODEL, TALK, Served, ask, nothing_left, post, served, site  # noqa: F401


def test_of_tokens_with_one_text_the_better_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of an emoji are tokens of their own here, and each reads as the replacement character."""
    with served() as site:
        model = site.live.engine.runner.model
        better, worse, *_ = site.live.engine.model.tokenizer.encode("🙂")
        logits = model.logits

        def fixed(hidden: torch.Tensor) -> torch.Tensor:
            some = torch.zeros_like(logits(hidden))
            some[:, better], some[:, worse] = 20.0, 15.0
            return some

        monkeypatch.setattr(model, "logits", fixed)
        answer = post(site, ask(logprobs=2, max_tokens=3, ignore_eos=True)).json()["choices"][0]["logprobs"]
        assert answer["tokens"] == ["\ufffd"] * 3
        for logprob, top in zip(answer["token_logprobs"], answer["top_logprobs"], strict=True):
            assert top == {"\ufffd": logprob}
            assert logprob == pytest.approx(-math.log1p(math.exp(-5)), abs=1e-4)


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
