"""The usual calls of the clients that people have, each in its own words, against a running server.

`openai` is needed for the tests anyway. The others are heavy, and pin each other's versions, so they are not
in requirements.txt. With `pip install litellm langchain-openai llama-index-llms-openai-like` nothing is left
out: that was done with litellm 1.110, langchain-openai 1.7 and llama-index-llms-openai-like 0.8, which bring
openai 2.54, where the tests otherwise have openai 3.

Reported elsewhere, tried here (and in the other tests of the API):

| project, report            | what was tried                              | outcome                         |
|----------------------------|---------------------------------------------|---------------------------------|
| litellm 10793              | a prompt that is too long, through litellm  | was a plain 400; now litellm's  |
|                            |                                             | ContextWindowExceededError      |
| SGLang 1998, lm-eval 1411, | `echo` with `logprobs`, as lm-eval scores,  | was refused; now the numbers of |
| llama.cpp 27174            | also with `max_tokens` 0                    | lm-eval's own `hf`              |
| lm-eval 4158               | to find a continuation by its `text_offset` | was refused; now places in text |
| vLLM 10234                 | `echo`, `logprobs`, sampling with `top_k` 1 | was refused; now raw numbers    |
| SGLang 32290               | likeliest tokens that have the same text    | the worse stayed; now the better|
| SGLang 2301, vLLM 53722    | `logprobs` 0, and a token that is unlikely  | it was missing; now it is in    |
| SGLang 4097, aphrodite 183 | minus infinity among log-probabilities      | was 500, or no JSON in a stream;|
|                            |                                             | now OpenAI's -9999              |
| vLLM 9294                  | a template that reads contents as parts     | lost the words; now it has them |
| vLLM 15241, mlx-vlm 1331   | a temperature in `generation_config.json`   | was ignored; now holds for calls|
|                            |                                             | that name none                  |

lm-eval is lm-evaluation-harness.
"""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from labkit.serving.handler import Options
from tests.serving.api_server import MODEL, TALK, Served, nothing_left, post, served, site  # noqa: F401

KEY = "secret"


@dataclass
class Answer:
    """What a client makes of an answer."""

    texts: list[str]
    reason: str | None = None
    usage: tuple[int, int] = (0, 0)  # tokens in and out
    logprobs: list[tuple[str, float, int]] = field(default_factory=list)  # token, number, how many likeliest


class OpenAI:
    """`openai`, which the others rest upon."""

    too_long: type[Exception] = openai.BadRequestError
    many = True  # whether it takes n > 1
    scores = True  # whether it asks for log-probabilities

    def __init__(self, url: str, key: str = KEY) -> None:
        self.url, self.key = url + "/v1", key
        self.create = openai.OpenAI(base_url=self.url, api_key=key, max_retries=0).chat.completions.create

    def chat(self, messages: Sequence[dict[str, str]] = TALK, **fields: Any) -> Answer:
        return self.read(self.create(model=MODEL, messages=messages, **fields))

    def read(self, answer: Any) -> Answer:
        first = answer.choices[0]
        entries = first.logprobs.content if first.logprobs else []
        return Answer(
            [choice.message.content for choice in answer.choices],
            first.finish_reason,
            (answer.usage.prompt_tokens, answer.usage.completion_tokens),
            [(entry.token, entry.logprob, len(entry.top_logprobs)) for entry in entries],
        )

    def stream(self, **fields: Any) -> Answer:
        usual = {"stream": True, "stream_options": {"include_usage": True}}
        parts = list(self.create(model=MODEL, messages=TALK, **usual, **fields))
        choices = [choice for part in parts for choice in part.choices]
        used = parts[-1].usage
        reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
        texts = [choice.delta.content or "" for choice in choices]
        return Answer(texts, reasons[-1], (used.prompt_tokens, used.completion_tokens))


class LiteLLM(OpenAI):
    def __init__(self, url: str, key: str = KEY) -> None:
        litellm = pytest.importorskip("litellm", reason="litellm is not installed")
        super().__init__(url, key)
        self.too_long = litellm.ContextWindowExceededError
        litellm.suppress_debug_info = True

        def create(model: str, **fields: Any) -> Any:
            return litellm.completion(
                f"openai/{model}", api_base=self.url, api_key=key, max_retries=0, **fields
            )

        self.create = create


class LangChain(OpenAI):
    def __init__(self, url: str, key: str = KEY) -> None:
        self.kind = pytest.importorskip(
            "langchain_openai", reason="langchain-openai is not installed"
        ).ChatOpenAI
        super().__init__(url, key)

    def model(self, **fields: Any) -> Any:
        return self.kind(model=MODEL, base_url=self.url, api_key=self.key, max_retries=0, **fields)

    def chat(self, messages: Sequence[dict[str, str]] = TALK, **fields: Any) -> Answer:
        model = self.model(**fields)
        prompt = model._convert_input(list(messages)).to_messages()
        answers = [one.message for one in model.generate([prompt]).generations[0]]
        first, used = answers[0], answers[0].usage_metadata
        entries = (first.response_metadata.get("logprobs") or {}).get("content", [])
        return Answer(
            [answer.content for answer in answers],
            first.response_metadata["finish_reason"],
            (used["input_tokens"], used["output_tokens"]),
            [(entry["token"], entry["logprob"], len(entry["top_logprobs"])) for entry in entries],
        )

    def stream(self, **fields: Any) -> Answer:
        parts = list(self.model(**fields).stream(TALK, stream_usage=True))
        (used,) = [part.usage_metadata for part in parts if part.usage_metadata]
        reasons = [part.response_metadata.get("finish_reason") for part in parts]
        usage = used["input_tokens"], used["output_tokens"]
        return Answer([part.content for part in parts], next(filter(None, reasons)), usage)


class LlamaIndex(OpenAI):
    many = False

    def __init__(self, url: str, key: str = KEY) -> None:
        self.kind = pytest.importorskip(
            "llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed"
        ).OpenAILike
        super().__init__(url, key)

    def asked(self, messages: Sequence[dict[str, str]], fields: dict[str, Any]) -> tuple[Any, list[Any]]:
        from llama_index.core.llms import ChatMessage

        own = {name: fields.pop(name) for name in ("temperature", "max_tokens", "logprobs") if name in fields}
        if "top_logprobs" in fields:
            own["top_logprobs"] = fields.pop("top_logprobs")
        model = self.kind(
            model=MODEL, api_base=self.url, api_key=self.key, max_retries=0, is_chat_model=True, **own,
            additional_kwargs=fields,
        )  # fmt: skip
        return model, [ChatMessage(**message) for message in messages]

    def chat(self, messages: Sequence[dict[str, str]] = TALK, **fields: Any) -> Answer:
        model, asked = self.asked(messages, fields)
        answer = model.chat(asked)
        read = self.read(answer.raw)
        assert read.texts == [answer.message.content]
        return read

    def stream(self, **fields: Any) -> Answer:
        model, asked = self.asked(TALK, fields | {"stream_options": {"include_usage": True}})
        parts = list(model.stream_chat(asked))
        used = parts[-1].raw.usage
        reasons = [choice.finish_reason for part in parts for choice in part.raw.choices]
        usage = used.prompt_tokens, used.completion_tokens
        return Answer([part.delta for part in parts], next(filter(None, reasons)), usage)


CLIENTS = {"openai": OpenAI, "litellm": LiteLLM, "langchain": LangChain, "llama-index": LlamaIndex}


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(Options(api_key=KEY)) as site:
        yield site


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, site: Served, monkeypatch: pytest.MonkeyPatch) -> OpenAI:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    return CLIENTS[request.param](site.url)


def plain(site: Served, **fields: Any) -> dict[str, Any]:
    """What the server itself answers."""
    body = {"model": MODEL, "messages": TALK, "temperature": 0, "max_tokens": 12} | fields
    return post(site, body, "chat/completions", headers={"Authorization": f"Bearer {KEY}"}).json()


def test_chat_and_its_usage(client: OpenAI, site: Served) -> None:
    answer, expected = client.chat(temperature=0, max_tokens=12), plain(site)
    choice, used = expected["choices"][0], expected["usage"]
    assert answer.texts == [choice["message"]["content"]]
    assert (answer.reason, answer.usage) == ("length", (used["prompt_tokens"], 12))


def test_a_stream_and_its_usage(client: OpenAI, site: Served) -> None:
    site.live.speed = 20  # so slow that a reader keeps up
    try:
        answer = client.stream(temperature=0, max_tokens=12)
    finally:
        site.live.speed = None
    whole = client.chat(temperature=0, max_tokens=12)
    assert "".join(answer.texts) == whole.texts[0]
    assert sum(map(bool, answer.texts)) > 3  # it came in pieces
    assert (answer.reason, answer.usage) == (whole.reason, whole.usage)


def test_log_probabilities(client: OpenAI, site: Served) -> None:
    answer = client.chat(temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)
    assert "".join(token for token, _, _ in answer.logprobs) == answer.texts[0]
    assert [count for _, _, count in answer.logprobs] == [3] * 5
    entries = plain(site, max_tokens=5, logprobs=True)["choices"][0]["logprobs"]["content"]
    found = [number for _, number, _ in answer.logprobs]
    assert found == pytest.approx([entry["logprob"] for entry in entries], abs=1e-5)
    assert all(-math.inf < number <= 0 for number in found)


def test_several_answers(client: OpenAI, site: Served) -> None:
    if not client.many:
        pytest.skip("it reads the first answer alone")
    answer = client.chat(temperature=1.0, max_tokens=6, n=3, seed=5)
    assert len(set(answer.texts)) == 3
    assert client.chat(temperature=1.0, max_tokens=6, n=3, seed=5).texts == answer.texts


def test_a_stop_string(client: OpenAI, site: Served) -> None:
    whole = client.chat(temperature=0, max_tokens=12).texts[0]
    stop = whole.split()[3]
    answer = client.chat(temperature=0, max_tokens=12, stop=[stop])
    assert (answer.texts, answer.reason) == ([whole[: whole.index(stop)]], "stop")


def test_a_prompt_that_is_too_long(client: OpenAI) -> None:
    with pytest.raises(client.too_long, match="maximum context length is 200 tokens"):
        client.chat([{"role": "user", "content": "word " * 400}], max_tokens=4)


def test_errors_are_of_their_kind(client: OpenAI, site: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="presence_penalty must be between -2 and 2"):
        client.chat(max_tokens=4, presence_penalty=3)
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        type(client)(site.url, "wrong").chat(max_tokens=4)
