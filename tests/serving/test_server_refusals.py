"""What the API refuses: fields, chats and bodies that cannot be served, each with an error that names it."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from labkit.serving import handler
from labkit.serving.asgi import BodyLimit
from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from tests.serving.api_server import (  # noqa: F401
    HELLO,
    MODEL,
    TALK,
    Served,
    ask,
    nothing_left,
    post,
    served,
    site,
)

REFUSED = [
    (ask(model="gpt-4"), 404, "model", "model 'gpt-4' is not served here; 'tiny-random' is"),
    (ask(prompt=""), 400, "prompt", "prompt is empty"),
    (ask(prompt=[]), 400, "prompt", "prompt is empty"),
    (ask(prompt=[[]]), 400, "prompt", "prompt is empty"),
    (ask(prompt=[999999]), 400, "prompt", "prompt: a token id must be between 0 and"),
    (ask(prompt="word " * 400), 400, "prompt", "max_model_len is"),
    (ask(prompt="word " * 400), 400, "prompt", "This model's maximum context length is 200 tokens."),
    (ask(prompt=7), 422, "prompt", "prompt: input should be a valid string or a valid list, not 7"),
    (ask(prompt=["a", 7]), 422, "prompt", "prompt.1: input should be a valid string, not 7"),
    (ask(prompt=[1, "a"]), 422, "prompt", "prompt.1: input should be a valid integer, not \"a\""),
    (ask(prompt=[[1], [2, None]]), 422, "prompt", "prompt.1.1: input should be a valid integer, not null"),
    (ask(prompt=[[-1]]), 422, "prompt", "prompt.0.0: input should be greater than or equal to 0, not -1"),
    (ask(temperature="hot"), 422, "temperature", "temperature: input should be a valid number, not \"hot\""),
    (ask(temperature=[0]), 422, "temperature", "temperature: input should be a valid number, not a list"),
    (ask(stop=7), 422, "stop", "stop: input should be a valid string or a valid list, not 7"),
    (ask(stop=["a", 7]), 422, "stop", "stop.1: input should be a valid string, not 7"),
    (ask(stop=["x"] * 17), 422, "stop", "stop: list should have at most 16 items"),
    (ask(stop="x" * 300), 422, "stop", "stop: string should have at most 256 characters"),
    (ask(logprobs="x"), 422, "logprobs", "logprobs: input should be a valid integer or False, not \"x\""),
    (ask(stream="x" * 99), 422, "stream", "input should be a valid boolean, not \"" + "x" * 60 + "...\""),
    (ask(stream_options={"include_usage": 1}), 422, "stream_options", "stream_options.include_usage: input"),
    (ask(max_tokens=0), 400, "max_tokens", "max_tokens must be at least 1, not 0"),
    (ask(max_tokens=1.5), 422, "max_tokens", "valid integer"),
    (ask(max_tokens="9"), 422, "max_tokens", "valid integer"),
    (ask(temperature=-1), 400, "temperature", "temperature must be between 0 and 100"),
    (ask(top_p=0), 400, "top_p", "top_p must be between"),
    (ask(top_k=-2), 400, "top_k", "top_k must be at least 0"),
    (ask(n=0), 400, "n", "n must be between 1 and 64"),
    (ask(n=2), 400, "n", "n > 1 needs temperature > 0"),
    (ask(logprobs=21), 400, "logprobs", "logprobs must be between 0 and 20"),
    (ask(logit_bias={"x": 1}), 400, "logit_bias", "'x' is no token id"),
    (ask(logit_bias={"3": 101}), 400, "logit_bias", "between -100 and 100"),
    (ask(stop=[""]), 400, "stop", "not empty"),
    (ask(seed=2**70), 400, "seed", "seed must be between"),
    (ask(priority=2**40), 400, "priority", "priority must be between"),
    (ask(stream_options={"include_usage": True}), 400, "stream_options", "needs stream=true"),
    (ask(stream=True, stream_options={"include_obfuscation": True}), 400, "stream_options",
     "stream_options: include_obfuscation is not supported here"),
    (ask(best_of=3), 400, "best_of", "best_of is not supported here"),
    (ask(suffix="x"), 400, "suffix", "suffix is not supported here"),
    (ask(wibble=1), 400, "wibble", "wibble is not supported here"),
    ({"prompt": HELLO}, 422, "model", "field required"),
    ([1], 422, None, "the body must be a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "words"), REFUSED)
def test_what_cannot_be_served_is_named(
    site: Served, body: Any, status: int, param: str | None, words: str
) -> None:
    answer = post(site, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "wibble", "content": "x"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of type text"),
        ({"messages": TALK, "top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}, "no variable"),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "no variable 'tokenize'"),
        ({"messages": TALK, "chat_template_kwargs": {"messages": []}}, "no variable 'messages'"),
        (
            {"messages": TALK, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt contradict each other",
        ),
        ({"messages": TALK, "max_tokens": 1, "max_completion_tokens": 1}, "give one of them"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_served_are_named(site: Served, fields: dict[str, Any], words: str) -> None:
    answer = post(site, {"model": MODEL} | fields, "chat/completions")
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", 'messages: input should be a valid list, not "hi"'),
        ([7], "messages.0: input should be a valid dictionary or object"),
        ([{"role": "user", "content": 7}],
         "messages.0.content: input should be a valid string or a valid list, not 7"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content.0: input should be"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}],
         "messages.0.content.0.text: input should be a valid string, not 7"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages.0.content.0.type: field required"),
        ([{"content": "a"}], "messages.0.role: field required"),
    ],
)  # fmt: skip
def test_messages_that_are_none_are_named_by_their_place(site: Served, messages: Any, words: str) -> None:
    answer = post(site, {"model": MODEL, "messages": messages}, "chat/completions")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, "messages")
    assert words in error["message"]


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(site: Served) -> None:
    long = [{"role": "user", "content": "word " * 400}]
    with served(Options(limits=Limits(prompt_tokens=10))) as short:
        asked = [
            (site, ask(prompt="word " * 400), "completions", "prompt", 200),
            (site, ask(prompt=[[5], [5] * 200]), "completions", "prompt", 200),
            (site, {"model": MODEL, "messages": long}, "chat/completions", "messages", 200),
            (short, ask(prompt=[5] * 11), "completions", "prompt", 10),
            (short, {"model": MODEL, "messages": long}, "chat/completions", "messages", 10),
        ]
        for where, body, path, param, longest in asked:
            answer = post(where, body, path)
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert "This model's maximum context length is " in error["message"]
            assert f"is {longest} tokens" in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"[" * 100_000, "application/json", 400, ""),
        (
            b'{"model": "tiny-random", "prompt": "a", "temperature": NaN}',
            "application/json",
            400,
            "temperature",
        ),
        (b"model=tiny-random", "application/x-www-form-urlencoded", 422, "sent as application/json"),
        (b"", "application/json", 422, "must be a JSON object"),
        (b"\xff\xfe", "application/json", 400, ""),
        (b'{"prompt": "' + b"x" * 3_000_000 + b'"}', "application/json", 413, "the limit is 2,097,152 bytes"),
    ],
)
def test_bodies_that_are_no_requests(
    site: Served, content: bytes, kind: str, status: int, words: str
) -> None:
    answer = httpx.post(
        f"{site.url}/v1/completions", content=content, headers={"Content-Type": kind}, timeout=30
    )
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(site: Served) -> None:
    for answer, status in (
        (httpx.get(site.url + "/nowhere"), 404),
        (httpx.get(site.url + "/v1/completions"), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["🙂🙃 é́ ‮abc‬ שלום", "a\0b", "￿"])
def test_any_text_goes_in_and_comes_back(site: Served, text: str) -> None:
    answer = post(site, ask(prompt=text, echo=True, max_tokens=3))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].startswith(site.live.engine.model.tokenizer.decode(
        site.live.engine.model.tokenizer.encode(text)) or text)  # fmt: skip


def test_half_a_surrogate_pair_is_no_text(site: Served) -> None:
    content = b'{"model": "tiny-random", "prompt": "\\ud83d"}'
    answer = httpx.post(
        f"{site.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", ask(prompt="x" * 10_000)),
        ("completions", ask(prompt=["hello", "x" * 10_000])),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000}]}),
        ("chat/completions", {"model": MODEL, "messages": [{**TALK[0], "name": "x" * 10_000}]}),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": ""}] * 1_000}),
    ],
)
def test_a_prompt_beyond_measure_is_refused_before_it_is_tokenised(
    site: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(handler.Handler, "_submit", lambda *_: pytest.fail("it was tokenised"))
    answer = post(site, body, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == ("prompt" if path == "completions" else "messages")
    assert " characters, and 3,200 is the limit." in error["message"]


def test_large_bodies_are_refused_where_there_are_too_many() -> None:
    """One client could send them all. Small ones are let in meanwhile."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            await asyncio.sleep(0)
        await go_on.wait()
        await send({"type": "http.response.start"})

    async def test() -> list[object]:
        def call(size: int) -> Any:
            pieces = [{"body": bytes(50), "more_body": True}] * (size // 50) + [{"body": b""}]
            messages = iter(pieces)

            async def receive() -> Any:
                return next(messages)

            async def send(message: Any) -> None:
                held.append(limit._held)

            return asyncio.create_task(limit({"type": "http"}, receive, send))

        calls = []
        for size in (500, 500, 500, 100):
            calls.append(call(size))
            for _ in range(50):  # more than it takes
                await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    held: list[int] = []
    limit = BodyLimit(app, 1000, together=900)
    limit.SMALL, go_on = 100, asyncio.Event()  # type: ignore[misc]
    ended = asyncio.run(test())
    statuses = [getattr(error, "status_code", 200) for error in ended]
    assert statuses == [200, 200, 503, 200] and limit._held == held[-1] == 0
