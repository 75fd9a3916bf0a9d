"""Bodies, headers and bytes that mean no good: 200, or a 4xx that names the field, and never more."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from labkit.serving.schema import ChatBody, CompletionBody
from tests.serving.api_server import MODEL, Served, served

EMOJI = "🙂"
PATHS = {
    "completions": {"prompt": "a b"},
    "chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(Options(limits=Limits(requests=64, queue=64, answer_tokens=8))) as site:
        yield site


@pytest.fixture(scope="module")
def web(site: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url + "/v1/", timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left(site: Served) -> Iterator[None]:
    yield
    site.until_quiet()
    assert site.live.failure is None


# -- what is sent, and what may come back ---------------------------------------------------------


class Literal(str):
    """JSON that Python's own writer would not write."""


LITERALS = ["1e400", "-1e400", "NaN", "-Infinity", "-0", "1E+2", "1.0", "9" * 400, "-" + "9" * 400, "1e-400"]
LITERALS += [
    '"\\ud83d"',
    '"\\u0000"',
    '{"a": 1, "a": 2}',
    "[" * 300 + "]" * 300,
    '{"a":' * 300 + "1" + "}" * 300,
]


def written(value: Any) -> str:
    """A value as JSON, with half surrogate pairs and literals as they are."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def strict(text: str) -> Any:
    """JSON without NaN and infinities, which browsers do not read."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def send(web: httpx.Client, path: str, body: Any) -> httpx.Response:
    return web.post(path, content=written(body).encode(), headers={"Content-Type": "application/json"})


def judge(answer: httpx.Response) -> str | None:
    """Check an answer; returns the field that it complains of, None if it is an answer or names none."""
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        assert list(strict(answer.text)) == ["error"]
        error = strict(answer.text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and len(answer.content) < 20_000
        assert error["type"] in ("invalid_request_error", "authentication_error", "rate_limit_error")
        return error["param"]
    if answer.headers["content-type"].startswith("text/event-stream"):
        *events, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        choices = [c for event in events for c in strict(event.removeprefix("data: "))["choices"]]
        finished = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert sorted(finished) == sorted({choice["index"] for choice in choices})
    else:
        reasons = {choice["finish_reason"] for choice in strict(answer.text)["choices"]}
        assert reasons <= {"stop", "length", "tool_calls"}
    return None


any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # half surrogate pairs, NUL and all
texts = any_text | st.sampled_from(
    ["", "\0", "e\u0301\u0327", "\u202eabc\u202c שלום", EMOJI, "\ud83d", "a\udc00", "\uffff"]
)
numbers = (
    st.integers() | st.integers(-3, 12) | st.floats() | st.sampled_from([2**63, -(2**64), 10**40, 0.5, 1, 2])
)
scalars = st.none() | st.booleans() | numbers | texts | st.sampled_from(LITERALS).map(Literal)
hostile = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.just("text")}, optional={"text": texts}) | hostile, max_size=2
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]) | hostile},
        optional={"content": texts | parts | hostile, "name": texts, "tool_calls": hostile},
    ),
    max_size=3,
)
tokens = st.lists(st.integers(0, 600), min_size=1, max_size=5)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 9),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(0, 4),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "stop": texts | st.lists(texts, max_size=3),
    "seed": st.integers(-(2**63), 2**63),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(
        st.integers(-1, 600).map(str) | texts, st.floats(-100, 100) | hostile, max_size=3
    ),
    "user": texts,
    "top_k": st.integers(-2, 900) | st.just(10**40),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 3),
    "stop_token_ids": tokens,
    "ignore_eos": st.booleans(),
    "priority": st.integers(-(2**32), 2**32),
    "best_of": st.integers(0, 2),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "structured_outputs": st.sampled_from([{"choice": ["a", "b"]}, {"regex": "a+"}, {"json": {}}]),
    "metadata": st.just({}),
}
OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "completions": {
        "prompt": texts | tokens | st.lists(texts | tokens, max_size=3),
        "echo": st.booleans(),
        "logprobs": st.integers(-1, 21),
        "suffix": st.just(""),
    },
    "chat/completions": {
        "messages": messages,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "max_completion_tokens": st.integers(0, 9),
        "tools": st.sampled_from([[], [{"type": "function", "function": {"name": "a"}}]]),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
        "parallel_tool_calls": st.booleans(),
    },
}


@given(data=st.data(), path=st.sampled_from(list(PATHS)))
@settings(max_examples=250, deadline=None, derandomize=True)
def test_any_mixture_of_fields_is_answered_or_refused(
    web: httpx.Client, data: st.DataObject, path: str
) -> None:
    fields = LIKELY | OWN[path]
    names = data.draw(st.lists(st.sampled_from(list(fields)), max_size=6, unique=True))
    wild = data.draw(st.sampled_from([None, *names]))
    body = {"model": MODEL} | PATHS[path]
    body |= {name: data.draw(hostile if name == wild else fields[name], label=name) for name in names}
    judge(send(web, path, body))


@given(data=st.data(), path=st.sampled_from(list(PATHS)), value=hostile)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_one_field_that_is_wrong_is_named(
    web: httpx.Client, data: st.DataObject, path: str, value: Any
) -> None:
    name = data.draw(st.sampled_from(["model", *LIKELY, *OWN[path], "wibble"]) | texts)
    usual = {"top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}, "n": {"temperature": 1}}
    body = {"model": MODEL} | PATHS[path] | usual.get(name, {}) | {name: value}
    complaint = judge(send(web, path, body))
    assert complaint in (None, name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["x" * 100_000, "a\nb", ""])
def test_a_field_that_has_no_proper_name_is_refused_by_it(web: httpx.Client, path: str, field: str) -> None:
    complaint = judge(send(web, path, {"model": MODEL} | PATHS[path] | {field: 1}))
    assert complaint is not None and complaint.removesuffix("...") == field[:1000]
    nameless = send(web, path, {"model": MODEL} | PATHS[path] | {"\ud83d": 1})
    judge(nameless)
    assert "half a surrogate pair" in nameless.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "max_tokens", 0),
        ("chat/completions", "max_tokens", 9),  # more than this server allows
        ("chat/completions", "max_completion_tokens", 0),
        ("chat/completions", "max_completion_tokens", 9),
        ("chat/completions", "top_logprobs", 21),
        ("chat/completions", "messages", [{"role": "user", "content": "\ud83d"}]),
        ("completions", "logit_bias", {"\ud83d": 1}),
        ("completions", "logit_bias", {"1": "\ud83d"}),
        ("completions", "model", "x" * 1_000_000),
        ("completions", "stop", ["x"] * 17),
        ("completions", "stop", "x" * 257),
    ],
)
def test_what_it_complains_of_is_what_was_sent(web: httpx.Client, path: str, field: str, value: Any) -> None:
    body = {"model": MODEL} | PATHS[path] | ({"logprobs": True} if field == "top_logprobs" else {})
    assert judge(send(web, path, body | {field: value})) == field


def test_a_server_of_short_answers_serves_who_asks_for_no_length(web: httpx.Client) -> None:
    for path, fields in PATHS.items():
        answer = send(web, path, {"model": MODEL, "ignore_eos": True} | fields)
        assert judge(answer) is None and answer.json()["usage"]["completion_tokens"] == 8


# -- much of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({"prompt": [1.5] * 9999}, CompletionBody),
        ({"prompt": [[1.5] * 99] * 99}, CompletionBody),
        ({"prompt": "", "stop": [1] * 9999}, CompletionBody),
        ({"prompt": "", "stop_token_ids": [-1] * 9999}, CompletionBody),
        ({"prompt": "", "logit_bias": {str(i): "x" for i in range(9999)}}, CompletionBody),
        ({"messages": [1] * 9999}, ChatBody),
        ({"messages": [{"role": "user", "content": [1] * 9999}]}, ChatBody),
    ],
)
def test_a_million_mistakes_are_not_described_one_by_one(fields: dict[str, Any], body: type) -> None:
    try:
        value = body.model_validate({"model": MODEL} | fields)
        with pytest.raises(ValueError, match="logit_bias"):
            value.sampling_params(1, {})
    except ValidationError as error:
        assert error.error_count() <= 8


@pytest.mark.parametrize(
    "prompt",
    ["x" * 1_000_000, "word " * 200_000, EMOJI * 250_000, "\0" * 150_000, [5] * 300_000, ["a"] * 200_000],
    ids=["one word", "words", "emoji", "NUL", "tokens", "prompts"],
)
def test_a_megabyte_of_prompt_is_refused(web: httpx.Client, prompt: Any) -> None:
    content = json.dumps({"model": MODEL, "prompt": prompt}, ensure_ascii=False).encode()
    answer = web.post("completions", content=content, headers={"Content-Type": "application/json"})
    assert judge(answer) == "prompt" and answer.status_code == 400
    if isinstance(prompt, str):
        talk = [{"role": "user", "content": prompt}]
        assert judge(web.post("chat/completions", json={"model": MODEL, "messages": talk})) == "messages"


def test_a_call_with_many_prompts_gets_every_answer() -> None:
    """More than the engine remembers once they are finished."""
    with served(Options(limits=Limits(requests=1024, queue=1024)), max_num_seqs=64) as site:
        body = {"model": MODEL, "prompt": ["a"] * 1024, "max_tokens": 1, "temperature": 0}
        for stream in (False, True):
            answer = httpx.post(f"{site.url}/v1/completions", json=body | {"stream": stream}, timeout=60)
            assert answer.status_code == 200 and judge(answer) is None
            assert answer.text.count('"finish_reason":"') == 1024
        site.until_quiet()


# -- text that comes in halves --------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, EMOJI, [EMOJI + EMOJI, EMOJI[0] + "\ufffd"]])
@pytest.mark.parametrize("seed", range(6))
def test_emoji_in_pieces_stream_as_they_are_written_whole(
    site: Served, web: httpx.Client, stop: Any, seed: int
) -> None:
    """The model is made to write nothing but the bytes of an emoji, in any order."""
    pieces = site.live.engine.model.tokenizer.encode(EMOJI)
    assert len(pieces) == 4
    body = {"model": MODEL, "prompt": pieces[:-1], "echo": True, "n": 3, "temperature": 1.5, "seed": seed,
            "max_tokens": 8, "ignore_eos": True, "logit_bias": {str(t): 100 for t in pieces}}  # fmt: skip
    body |= {"stop": stop} if stop else {}
    whole, streamed = send(web, "completions", body), send(web, "completions", body | {"stream": True})
    assert judge(whole) is None and judge(streamed) is None
    texts = {choice["index"]: choice["text"] for choice in whole.json()["choices"]}
    joined = dict.fromkeys(texts, "")
    for event in streamed.text.split("\n\n")[:-2]:
        for choice in strict(event.removeprefix("data: "))["choices"]:
            joined[choice["index"]] += choice["text"]
    assert joined == texts
    assert not any(
        s in text for text in texts.values() for s in ([stop] if isinstance(stop, str) else stop or [])
    )


# -- bodies that are none, and requests that are none ---------------------------------------------


@given(
    content=st.binary(max_size=40)
    | st.sampled_from(LITERALS).map(str.encode)
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
    kind=st.sampled_from(["application/json", "application/vnd.api+json", "text/plain", "multipart/form-data",
                          "application/x-www-form-urlencoded", "application/json; charset=utf-16", "x", ""]),
    path=st.sampled_from(list(PATHS)),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_bytes_that_are_no_request(web: httpx.Client, content: bytes, kind: str, path: str) -> None:
    answer = web.post(path, content=content, headers={"Content-Type": kind})
    judge(answer)
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_json_in_any_encoding_is_read_or_refused(web: httpx.Client, encoding: str) -> None:
    content = json.dumps({"model": MODEL, "prompt": "é"}, ensure_ascii=False).encode(encoding)
    answer = web.post("completions", content=content, headers={"Content-Type": "application/json"})
    judge(answer)
    assert answer.status_code == (400 if encoding == "latin-1" else 200)


def test_a_number_too_long_to_read_and_a_body_too_deep(web: httpx.Client) -> None:
    for value in ("1" * 10_000, "[" * 200_000 + "]" * 200_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
        answer = send(web, "completions", {"model": MODEL, "prompt": "a", "seed": Literal(value)})
        judge(answer)
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "completions"), ("DELETE", "models"), ("PUT", "models/x")]
)
def test_a_method_that_is_not_there_says_which_are(web: httpx.Client, method: str, path: str) -> None:
    answer = web.request(method, path)
    judge(answer)
    assert answer.status_code == 405 and answer.headers["Allow"]


BODY = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
RAW = {
    "a flood of headers": HEAD + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)),
    "a header without end": HEAD + b"X: " + b"y" * 300_000,
    "an address without end": b"GET /v1/" + b"x" * 300_000,
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "chunks that are none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
    "no length": HEAD + b"\r\n" + BODY,
    "NUL in a header": HEAD + b"X: a\x00b\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "NUL in the address": b"GET /v1/models/%00%ff%2e%2e/../x HTTP/1.0\r\nHost: x\r\n\r\n",
    "a key that is no text": HEAD + b"Authorization: Bearer \xff\xfe\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_requests_that_are_none(site: Served, web: httpx.Client, case: str) -> None:
    """An answer, or a closed connection; and the next client is served."""
    host, port = site.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(RAW[case])
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except OSError as error:  # it does not listen to the end
            assert not isinstance(error, TimeoutError)
    assert not received or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")), received[:200]
    assert judge(send(web, "completions", json.loads(BODY))) is None


def test_a_body_that_never_ends_holds_nobody_up(site: Served, web: httpx.Client) -> None:
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + BODY)
        assert judge(send(web, "completions", json.loads(BODY))) is None
        assert site.quiet()
