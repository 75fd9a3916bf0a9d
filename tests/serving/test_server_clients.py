"""The API as others use it: pages of other origins, health checks, and proxies that do not wait long."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator

import httpx
import pytest

from labkit.serving.asgi import patiently
from labkit.serving.handler import Options
from tests.serving.api_server import MODEL, Served, ask, nothing_left, post, served, site  # noqa: F401

PAGE = "http://example.org"


# -- pages of other origins -----------------------------------------------------------------------


def preflight(site: Served, path: str, method: str) -> httpx.Response:
    """What a browser asks before it lets a page call with a key and JSON."""
    headers = {
        "Origin": PAGE,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(f"{site.url}/v1/{path}", headers=headers)


def test_a_page_of_another_origin_calls_and_reads_a_stream_if_told() -> None:
    with served(Options(cors=[PAGE], api_key="secret")) as site:
        for path, method in (("completions", "POST"), ("chat/completions", "POST"), ("models", "GET")):
            asked = preflight(site, path, method)
            assert asked.status_code == 200, asked.text
            assert asked.headers["access-control-allow-origin"] == PAGE
            assert method in asked.headers["access-control-allow-methods"]
            for header in ("authorization", "content-type", "x-stainless-lang"):
                assert header in asked.headers["access-control-allow-headers"].lower()
        headers = {"Origin": PAGE, "Authorization": "Bearer secret"}
        answer = post(site, ask(stream=True, max_tokens=4), headers=headers)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n")
        for bad, status in ((ask(max_tokens=0), 400), (ask(prompt=7), 422)):  # it may read what is wrong
            refused = post(site, bad, headers=headers)
            assert refused.status_code == status
            assert refused.headers["access-control-allow-origin"] == PAGE
        unknown = post(site, ask(), headers={"Origin": PAGE})
        assert unknown.status_code == 401 and unknown.headers["access-control-allow-origin"] == PAGE


def test_a_page_of_another_origin_may_not_call_unless_told() -> None:
    with served() as site:
        assert "access-control-allow-origin" not in preflight(site, "completions", "POST").headers
    with served(Options(cors=["http://example.com"])) as site:
        assert preflight(site, "completions", "POST").status_code == 400
        answer = post(site, ask(max_tokens=1), headers={"Origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers


# -- conversations --------------------------------------------------------------------------------


def test_templates_get_names_and_parts_in_the_form_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama Guard's kind of template reads parts alone, and writes nothing of a text without a word."""
    template = (
        "{% for m in messages %}{{ m['name'] or m['role'] }}:{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
    )
    with served() as site:
        tokenizer = site.live.engine.model.tokenizer
        monkeypatch.setattr(tokenizer, "chat_template", template)
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": {"a": 1}}]
        talk = [{"role": "user", "name": "Ada", "content": parts}, {"role": "user", "content": "three"}]
        body = {"model": MODEL, "temperature": 0, "max_tokens": 8}
        answer = post(site, body | {"messages": talk}, "chat/completions").json()
        prompt = tokenizer.encode("Ada: one two;user: three;", add_special_tokens=False)
        same = post(site, body | {"prompt": prompt}).json()
        assert answer["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"] == len(prompt)
        assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "user: one;assistant: two;assistant:"),
        ({"add_generation_prompt": False}, "user: one;assistant: two;"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "user: one;assistant: two"),
        ({"continue_final_message": True}, "user: one;assistant: two"),
        ({"chat_template_kwargs": {"mood": "calm"}}, "(calm)user: one;assistant: two;assistant:"),
        (
            {"chat_template_kwargs": {"mood": "calm"}, "continue_final_message": True},
            "(calm)user: one;assistant: two",
        ),
    ],
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_a_conversation_ends_where_the_client_says(
    fields: dict, prompt: str, as_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if mood %}({{ mood }}){% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with served() as site:
        tokenizer = site.live.engine.model.tokenizer
        monkeypatch.setattr(tokenizer, "chat_template", template)
        last = [{"type": "text", "text": "two"}] if as_parts else "two"
        talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": last}]
        body = {"model": MODEL, "temperature": 0, "max_tokens": 8}
        answer = post(site, body | {"messages": talk} | fields, "chat/completions").json()
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        same = post(site, body | {"prompt": ids}).json()
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]


# -- health checks, and proxies that hurry --------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}"])
def test_what_can_be_read_has_a_head(site: Served, path: str) -> None:
    head, whole = httpx.head(site.url + path), httpx.get(site.url + path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_stream_that_waits_for_its_first_token_is_kept_alive() -> None:
    """Proxies close a connection on which nothing comes: a comment is something, and clients skip it."""
    with served(Options(keep_alive_seconds=0.05)) as site:
        site.live.pause()
        with httpx.stream("POST", f"{site.url}/v1/completions", json=ask(stream=True), timeout=30) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert [next(lines), next(lines)] == [": keep-alive"] * 2
            site.live.resume()
            rest = [line for line in lines if not line.startswith(":")]
        assert rest[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
        alone = post(site, ask()).json()["choices"][0]["text"]
        assert "".join(event["choices"][0]["text"] for event in events) == alone
        site.until_quiet()


def test_a_client_that_leaves_before_the_first_token_is_let_go() -> None:
    with served(Options(keep_alive_seconds=0.05)) as site:
        site.live.pause()
        with httpx.stream("POST", f"{site.url}/v1/completions", json=ask(stream=True), timeout=30) as stream:
            assert next(stream.iter_lines()) == ": keep-alive"
        site.live.resume()
        site.until_quiet()


def test_waiting_patiently_loses_nothing_and_leaves_nothing() -> None:
    closed: list[str] = []

    async def source(*delays: float) -> AsyncGenerator[float, None]:
        try:
            for delay in delays:
                await asyncio.sleep(delay)
                yield delay
        finally:
            closed.append("closed")

    async def all_of(*delays: float) -> list[float | None]:
        return [item async for item in patiently(source(*delays), 0.05)]

    async def leave(*delays: float) -> None:
        async with contextlib.aclosing(patiently(source(*delays), 0.05)) as items:
            async for _ in items:
                return

    assert asyncio.run(all_of()) == []
    assert asyncio.run(all_of(0.0, 0.2, 0.0)) == [0.0, 0.2, 0.0]  # only the first is waited for aloud
    waited = asyncio.run(all_of(0.12, 0.0))
    assert waited[-2:] == [0.12, 0.0] and set(waited[:-2]) == {None}
    asyncio.run(leave(5.0))
    assert len(closed) == 4
