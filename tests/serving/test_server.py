"""The API, used as people use it: OpenAI's own client, and clients that behave badly."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from tests.serving.api_server import (  # noqa: F401
    HELLO,
    MODEL,
    TALK,
    Served,
    ask,
    client,
    nothing_left,
    post,
    served,
    site,
    solo,
)

# -- as OpenAI's client sees it -------------------------------------------------------------------


def test_a_completion_is_the_engines_answer(site: Served, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=HELLO, max_tokens=12, temperature=0)
    alone = solo(site, HELLO, max_tokens=12)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (alone.text, alone.finish_reason)
    assert answer.object == "text_completion" and answer.model == MODEL
    used = answer.usage
    assert (used.prompt_tokens, used.completion_tokens) == (len(alone.prompt_token_ids), len(alone.token_ids))
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens


def test_completions_have_sixteen_tokens_unless_asked(client: openai.OpenAI) -> None:
    body = {"ignore_eos": True}
    answer = client.completions.create(model=MODEL, prompt=HELLO, temperature=0, extra_body=body)
    assert answer.usage.completion_tokens == 16


def test_chat_speaks_the_models_template_and_goes_on_to_the_end(site: Served, client: openai.OpenAI) -> None:
    tokenizer = site.live.engine.model.tokenizer
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    prompt = list(tokenizer.encode(text, add_special_tokens=False))
    answer = client.chat.completions.create(model=MODEL, messages=TALK, temperature=0)
    alone = solo(site, prompt, max_tokens=site.live.engine.max_model_len)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.prompt_tokens == len(prompt)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "something"}]}
    ]
    again = client.chat.completions.create(model=MODEL, messages=parts, temperature=0)
    assert again.choices[0].message.content == alone.text
    short = client.chat.completions.create(model=MODEL, messages=TALK, max_completion_tokens=2, temperature=0)
    assert short.usage.completion_tokens <= 2


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, kind: str) -> None:
    options = {"max_tokens": 20, "temperature": 0.8, "seed": 3, "n": 2}
    if kind == "chat":
        create = client.chat.completions.create
        fields = {"messages": TALK, "logprobs": True, "top_logprobs": 2}
    else:
        create, fields = client.completions.create, {"prompt": [HELLO, "and more"], "logprobs": 2, "n": 2}
    whole = create(model=MODEL, **(options | fields))
    parts = list(
        create(model=MODEL, stream=True, stream_options={"include_usage": True}, **(options | fields))
    )
    assert parts[-1].choices == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(parts[-1].usage, count) == getattr(whole.usage, count)
    assert all(part.usage is None for part in parts[:-1])
    assert len({part.id for part in parts}) == 1
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        if kind == "chat":
            assert mine[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            tokens = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
            assert tokens == choice.logprobs.content
            assert all(len(entry.top_logprobs) == 2 for entry in tokens)
        else:
            assert "".join(c.text for c in mine) == choice.text
            tokens = [token for c in mine if c.logprobs for token in c.logprobs.tokens]
            offsets = [offset for c in mine if c.logprobs for offset in c.logprobs.text_offset]
            assert tokens == choice.logprobs.tokens
            assert offsets == choice.logprobs.text_offset


def test_prompts_of_every_kind(site: Served, client: openai.OpenAI) -> None:
    token_ids = list(site.live.engine.model.tokenizer.encode(HELLO))
    texts = []
    for prompt in (HELLO, [HELLO], token_ids, [token_ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=9, temperature=0)
        texts.append([choice.text for choice in answer.choices])
    assert texts[1:] == texts[:-1]
    both = client.completions.create(
        model=MODEL, prompt=[HELLO, "and"], max_tokens=9, temperature=0, echo=True
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == HELLO + texts[0][0]
    assert both.choices[1].text.startswith("and")


def test_every_parameter_reaches_the_engine(site: Served, client: openai.OpenAI) -> None:
    token = solo(site, HELLO, max_tokens=3).token_ids[2]
    fields = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5,
              "frequency_penalty": 0.25, "logit_bias": {str(token): 5.0}, "stop": ["zzz"]}  # fmt: skip
    extra = {
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "stop_token_ids": [token],
    }
    answer = client.completions.create(model=MODEL, prompt=HELLO, extra_body=extra, **fields)
    params = fields | extra | {"logit_bias": {token: 5.0}}
    alone = solo(site, HELLO, **params)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (alone.text, alone.finish_reason)
    everything = client.completions.create(model=MODEL, prompt=HELLO, extra_body={"top_k": -1}, temperature=0)
    assert everything.choices[0].text == solo(site, HELLO, max_tokens=16).text
    word = alone.text.split()[1]
    cut = client.completions.create(model=MODEL, prompt=HELLO, stop=word, max_tokens=24, temperature=0)
    assert word not in cut.choices[0].text


def test_token_bytes_are_those_of_the_tokenizer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=TALK, max_tokens=8, temperature=0, logprobs=True
    )
    entries = answer.choices[0].logprobs.content
    assert all(entry.logprob <= 0 and entry.top_logprobs == [] for entry in entries)
    text = bytes(byte for entry in entries for byte in entry.bytes).decode()
    assert text.startswith(answer.choices[0].message.content)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "labkit")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_many_coroutines_at_once(site: Served) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        create = client.completions.create
        stream = await create(model=MODEL, prompt=f"number {i}", max_tokens=8, temperature=0, stream=True)
        return "".join([part.choices[0].text async for part in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(60)))

    texts = asyncio.run(everybody())
    assert texts == [solo(site, f"number {i}", max_tokens=8).text for i in range(60)]


# -- keys, limits, time ---------------------------------------------------------------------------


def test_a_key_is_asked_for_where_one_is_set() -> None:
    with served(Options(api_key="gehéim")) as site:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic gehéim".encode()}):
            answer = httpx.get(site.url + "/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=site.url + "/v1", api_key="x").models.list()
        right = {"Authorization": "Bearer gehéim".encode()}
        assert httpx.get(site.url + "/v1/models", headers=right).status_code == 200
        assert httpx.get(site.url + "/health").json()["status"] == "ok"


def test_limits_are_those_of_a_client_and_of_all() -> None:
    limits = Limits(requests=2, queue=8, prompt_tokens=10, answer_tokens=20)
    with served(Options(limits=limits)) as site:
        assert "limit of this lab is 20" in post(site, ask(max_tokens=21)).json()["error"]["message"]
        assert "the limit is 10" in post(site, ask(prompt="word " * 12)).json()["error"]["message"]
        half = httpx.post(
            f"{site.url}/v1/completions",
            content=b'{"model": "tiny-random", "prompt": "\\ud83d"}',
            headers={"Content-Type": "application/json"},
        )
        assert (half.status_code, half.json()["error"]["param"]) == (400, "prompt")
        assert post(site, ask(prompt=["a"] * 3)).json()["error"]["param"] == "prompt"
        site.live.pause()
        body = ask(prompt="a b", max_tokens=20, stream=True, ignore_eos=True)
        with (
            httpx.stream("POST", site.url + "/v1/completions", json=body, timeout=30) as one,
            httpx.stream("POST", site.url + "/v1/completions", json=body, timeout=30) as two,
        ):
            answer = post(site, ask(prompt="a"))
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
            assert answer.json()["error"]["type"] == "rate_limit_error"
            site.live.resume()
            for stream in (one, two):
                assert stream.read().endswith(b"data: [DONE]\n\n")
        site.until_quiet()
        assert post(site, ask(prompt="a")).status_code == 200
        chat = post(
            site, {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}, "chat/completions"
        )
        assert chat.json()["usage"]["completion_tokens"] <= 20


def test_an_answer_that_takes_too_long_is_ended() -> None:
    with served(Options(request_seconds=0.2)) as site:
        site.live.pause()
        answer = post(site, ask())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        site.live.resume()
        site.until_quiet()


# -- clients that go away, and faults -------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request_within_a_step(site: Served, stream: bool) -> None:
    site.live.pause()
    body = json.dumps(ask(max_tokens=150, ignore_eos=True, stream=stream)).encode()
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not site.live.num_unfinished:
            time.sleep(0.01)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    while site.handler._under_way:  # it was noticed, though not a token was written
        time.sleep(0.01)
    first = site.live.engine.trace[-1].step if len(site.live.engine.trace) else -1
    site.live.single_step()
    site.until_quiet()
    assert site.live.engine.trace[-1].step == first + 1
    site.live.resume()


def test_a_slow_reader_holds_up_nobody_and_gets_everything(site: Served) -> None:
    body = json.dumps(ask(max_tokens=150, ignore_eos=True, stream=True, logprobs=5)).encode()
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = "POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        alone = solo(site, HELLO, max_tokens=150, ignore_eos=True)  # others go on meanwhile
        text = b""
        while piece := slow.recv(2048):
            text += piece
    events = [json.loads(line[6:]) for line in text.decode().split("\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == alone.text
    tokens = [
        token for event in events for token in (event["choices"][0]["logprobs"] or {}).get("tokens", ())
    ]
    assert len(tokens) == 150


def test_a_forward_that_fails_ends_its_requests_with_an_error_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as site:
        runner = site.live.engine.runner
        run, calls = runner.run, 0

        def failing(plan: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("a fault of the kernel")
            return run(plan)

        monkeypatch.setattr(runner, "run", failing)
        with httpx.stream("POST", site.url + "/v1/completions", json=ask(stream=True), timeout=30) as stream:
            lines = [line for line in stream.iter_lines() if line]
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert "a fault of the kernel" in error["message"] and error["type"] == "server_error"
        assert lines[-1] == "data: [DONE]"
        site.until_quiet()
        calls = 0
        answer = post(site, ask())
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        calls = 10
        assert post(site, ask()).status_code == 200


def test_an_engine_that_has_stopped_is_503() -> None:
    with served() as site:
        assert httpx.get(site.url + "/health").status_code == 200
        site.live.close()
        answer = post(site, ask())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")


def test_a_server_that_drains_takes_nothing_new() -> None:
    with served() as site:
        site.handler.draining = True
        answer = post(site, ask())
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert httpx.get(site.url + "/health").json()["status"] == "draining"


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_a_mistake_and_not_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must not be empty"):
        Options(api_key=key)


# -- the log --------------------------------------------------------------------------------------


def test_the_log_has_a_line_for_each_call_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "labkit.server")
    with served() as site:
        post(site, ask(user="somebody\nelse", max_tokens=4, ignore_eos=True))
        site.until_quiet()
    (record,) = [record for record in caplog.records if record.name == "labkit.server"]
    line = json.loads(record.message)
    assert (line["status"], line["user"], line["output_tokens"]) == (200, "somebody\nelse", 4)
    assert "\n" not in record.message and "hello" not in record.message
    caplog.clear()
    with served(Options(log_prompts=True)) as site:
        post(site, ask(user="x" * 100_000))
        site.until_quiet()
    assert json.loads(caplog.records[-1].message)["user"] == "x" * 64
    assert json.loads(caplog.records[-1].message)["prompts"] == [HELLO]
