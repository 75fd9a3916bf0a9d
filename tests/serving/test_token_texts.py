"""Answers over HTTP from a model whose tokenizer is of SentencePiece's kind, with bytes to fall back to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from labkit.models.tiny import tiny_tokenizer
from labkit.serving.stream import AnswerTokens
from tests.models.tokenizers_of_all_kinds import KINDS, model_with, tokenizer_of
from tests.serving.api_server import Served, served

TOKENIZER = tokenizer_of("llama 2")
PROMPT = "hello world"
NAMES = ["▁cat", "cat", "▁", "<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "</s>", "é", "<tool>"]


def ids(*names: str) -> list[int]:
    return [TOKENIZER.convert_tokens_to_ids(name) for name in names]


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(model=model_with("llama 2")) as site:
        yield site


@pytest.fixture
def client(site: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0)


def only(*names: str, **fields: Any) -> dict[str, Any]:
    """A call that is answered with these tokens alone, in some order."""
    bias = {str(token): 100 for token in ids(*names)}
    usual = {"model": "llama 2", "logit_bias": bias, "temperature": 1.5, "seed": 5, "max_tokens": 24}
    return usual | fields


def test_a_continuation_keeps_its_space_with_echo_and_at_a_stop_string(client: openai.OpenAI) -> None:
    call = only("▁cat", prompt=PROMPT, max_tokens=2)
    assert client.completions.create(**call).choices[0].text == " cat cat"
    assert client.completions.create(echo=True, **call).choices[0].text == "hello world cat cat"
    stopped = client.completions.create(stop=[" cat"], **call)
    assert stopped.choices[0].text == ""
    assert stopped.usage.completion_tokens == 1


@pytest.mark.parametrize("stop", [None, ["€"], ["A", " cat"]])
def test_pieces_are_the_whole_answer_and_offsets_are_places_in_it(
    client: openai.OpenAI, stop: list[str] | None
) -> None:
    call = only(*NAMES, prompt=PROMPT, n=6, logprobs=3, stop=stop, extra_body={"ignore_eos": True})
    whole = client.completions.create(**call)
    parts = list(client.completions.create(stream=True, **call))
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        streamed = [c.logprobs for c in mine if c.logprobs]
        assert [text for each in streamed for text in each.tokens] == choice.logprobs.tokens
        offsets = choice.logprobs.text_offset
        assert [place for each in streamed for place in each.text_offset] == offsets
        for text, place in zip(choice.logprobs.tokens, offsets, strict=True):
            if "\ufffd" not in text and text != "</s>" and place < len(choice.text):  # not behind a stop
                assert choice.text.startswith(text, place)


def test_bytes_of_chat_are_the_bytes_of_the_text(client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": PROMPT}]
    call = only(*NAMES, messages=talk, n=6, logprobs=True, top_logprobs=4, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**call)
    parts = list(client.chat.completions.create(stream=True, **call))
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        entries = choice.logprobs.content
        assert [entry for c in mine if c.logprobs for entry in c.logprobs.content] == entries
        data = bytes(byte for entry in entries if entry.token != "</s>" for byte in entry.bytes)
        text = data.decode(errors="ignore")
        assert text == choice.message.content.replace("\ufffd", "")


def test_a_token_is_shown_as_what_it_adds_where_it_stands() -> None:
    cat, space, lead, end = ids("▁cat", "▁", "<0xE2>", "</s>")
    after = AnswerTokens(TOKENIZER, ids("<s>", "▁hello"))
    assert after.shown(cat) == (" cat", list(b" cat"))
    assert after.shown(space) == (" ", [0x20])
    assert after.shown(lead) == ("\ufffd", [0xE2])
    assert after.shown(end) == ("</s>", list(b"</s>"))
    start = AnswerTokens(TOKENIZER, ids("<s>"))
    assert start.shown(cat) == ("cat", list(b"cat"))
    assert start.shown(space) == ("", [])


def test_offsets_count_characters_of_the_text_alone() -> None:
    tokens = AnswerTokens(TOKENIZER, ids("▁hello"))
    answer = ids("▁cat", "<0xE2>", "<0x82>", "<0xAC>", "</s>", "cat", "<0xE2>", "cat", "cat")
    assert [tokens.push(token) for token in answer] == [0, 4, 4, 4, 5, 5, 8, 9, 12]  # " cat€cat\ufffdcatcat"


def test_byte_level_tokens_are_what_they_were() -> None:
    tokenizer = tiny_tokenizer()
    tokens = AnswerTokens(tokenizer, tokenizer.encode("one"))
    for token in range(len(tokenizer)):
        text, data = tokens.shown(token)
        assert text == tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert "\ufffd" in text or data == list(text.encode())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_text_if_so_asked_in_pieces_and_whole(kind: str, skip: bool) -> None:
    """Text, tokens, bytes and places of a stream are those of the whole answer, and of one another."""
    tokenizer = tokenizer_of(kind)
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    words = tokenizer.encode("hello cat a é 日", add_special_tokens=False)
    halves = [token for token in range(200, 204) if token < len(tokenizer)]  # of characters, in some kinds
    bias = {str(token): 100 for token in (*named, *words, *halves)}
    fields = {"model": kind, "logit_bias": bias, "temperature": 1.5, "seed": 5, "max_tokens": 20, "n": 4}
    more = {"ignore_eos": True, "skip_special_tokens": skip}
    with served(model=model_with(kind)) as site:
        client = openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0)
        call = fields | {"prompt": words[:2], "logprobs": 2, "extra_body": more}
        whole = client.completions.create(**call)
        parts = list(client.completions.create(stream=True, **call))
        talk = [{"role": "user", "content": "hello"}]
        chat = fields | {"messages": talk, "logprobs": True, "extra_body": more}
        said = client.chat.completions.create(**chat)
        pieces = list(client.chat.completions.create(stream=True, **chat))
    names = tokenizer.all_special_tokens
    assert any(name in choice.text for choice in whole.choices for name in names) != skip
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        streamed = [c.logprobs for c in mine if c.logprobs]
        for key in ("tokens", "text_offset"):
            assert [value for each in streamed for value in getattr(each, key)] == getattr(
                choice.logprobs, key
            )
        tops = [set(top) for each in streamed for top in each.top_logprobs]
        assert tops == [set(top) for top in choice.logprobs.top_logprobs]
        for text, place in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert "\ufffd" in text or (skip and text.strip() in names) or choice.text.startswith(text, place)
    for choice in said.choices:
        mine = [c for piece in pieces for c in piece.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        entries = [(entry.token, entry.bytes) for entry in choice.logprobs.content]
        assert [(e.token, e.bytes) for c in mine if c.logprobs for e in c.logprobs.content] == entries
        text = "".join(token for token, _ in entries if not (skip and token.strip() in names))
        assert "\ufffd" in text or text == choice.message.content
