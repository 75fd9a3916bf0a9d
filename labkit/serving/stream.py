"""OpenAI's wire format, outwards: whole answers, the chunks of streams as server-sent events, and usage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from labkit.models.token_bytes import TokenBytes
from labkit.outputs import FinishReason, RequestOutput, TokenLogprobs
from labkit.serving.answer import Piece
from labkit.serving.tool_calls import CallReader

DONE = b"data: [DONE]\n\n"  # how a stream ends
LEAST_LOGPROB = -9999.0  # OpenAI's number for what cannot be: JSON has no infinity
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip


def event(data: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class AnswerTokens:
    """The tokens of one answer as text, as bytes and by their place, for log-probabilities.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the tokens before the answer, as a token's text is what it adds after what stands before it.
        skip_special_tokens: whether special tokens are no text of the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._utf8 = self._bytes.utf8()
        self._length = 0  # of the text before the next token, in characters

    def shown(self, token: int) -> tuple[str, list[int]]:
        """The text and the bytes of a token if it came next. The bytes need not be a whole character.

        A special token that is no text of the answer is shown by its name.
        """
        added = self._bytes.peek(token)
        if not added and self._bytes.is_special(token):
            added = self._tokenizer.decode([token], skip_special_tokens=False).encode()  # type: ignore[union-attr]
        return added.decode(errors="replace"), list(added)

    def push(self, token: int) -> int:
        """Move on behind the next token. Return where in the answer it, or the character it ends, begins."""
        data = self._bytes.push(token)
        if data and data[0] & 0xC0 != 0x80:  # a new character: one that is still open is none
            self._length += len(self._utf8.decode(b"", final=True))
        begin = self._length
        self._length += len(self._utf8.decode(data))
        return begin

    def is_special(self, token: int) -> bool:
        """Whether a token has a name, and is left out of texts."""
        return self._bytes.is_special(token)


def chat_logprobs(entries: Sequence[TokenLogprobs], tokens: AnswerTokens) -> dict[str, Any]:
    """The log-probabilities of the next tokens of an answer as chat writes them."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text, data = tokens.shown(token)
        return {"token": text, "logprob": _sendable(logprob), "bytes": data}

    content = []
    for entry in entries:
        top = [shown(*pair) for pair in entry.top]
        content.append(shown(entry.token, entry.logprob) | {"top_logprobs": top})
        tokens.push(entry.token)
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Iterable[tuple[int, TokenLogprobs | None]], tokens: AnswerTokens, offset: int
) -> dict[str, list[Any]]:
    """The same as completions write them, token by token; nothing foretells the first of a prompt.

    `offset` is where in the text the first token begins.
    """
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    written: dict[str, list[Any]] = {name: [] for name in names}
    for token, entry in entries:
        written["tokens"].append(tokens.shown(token)[0])
        written["token_logprobs"].append(None if entry is None else _sendable(entry.logprob))
        written["top_logprobs"].append(None if entry is None else _by_text(entry, tokens))
        written["text_offset"].append(offset + tokens.push(token))
    return written


def _by_text(entry: TokenLogprobs, tokens: AnswerTokens) -> dict[str, float]:
    """The likeliest tokens and the chosen one; the better of two that have the same text."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):  # in falling order, the chosen one last
        best.setdefault(tokens.shown(token)[0], _sendable(logprob))
    return best


def _sendable(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)  # in this order NaN becomes the least, too


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The number of tokens in and out. The `n` answers to one prompt share it, so it counts once."""
    first = [output for output in outputs if output.index == 0]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in first)
    answer_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in first)},
    }


@dataclass
class Format:
    """How the answers to one call are written: `ChatFormat` or `CompletionFormat`.

    Args:
        head: the fields that every object repeats.
        tokenizer: the model's tokenizer, for log-probabilities; None if none are asked for.
        promises_usage: whether each chunk of a stream says that the usage will follow.
        skip_special_tokens: whether special tokens are no text of the answers.
        calls: whether answers call functions, as `Offer.how` says it.

    Attributes:
        streamed: how far a stream has come in the tokens of each choice, for log-probabilities.
        readers: what finds the calls in each choice of a stream.
    """

    head: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    promises_usage: bool = False
    skip_special_tokens: bool = True
    calls: str = "none"
    streamed: dict[int, AnswerTokens | None] = field(default_factory=dict)
    readers: dict[int, CallReader] = field(default_factory=dict)

    prefix: ClassVar[str]  # of the id of an answer
    whole: ClassVar[str]  # the type of a whole answer
    part: ClassVar[str]  # the type of a chunk

    def tokens_of(self, output: RequestOutput) -> AnswerTokens | None:
        """The tokens of an answer from its first on; None if no log-probabilities are asked for."""
        if not self.tokenizer:
            return None
        skip = self.skip_special_tokens
        return AnswerTokens(self.tokenizer, output.prompt_token_ids, skip_special_tokens=skip)

    def answer(self, echoes: Sequence[str], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer, with a choice for each output."""
        choices = [
            self.choice(index, echo, output)
            for index, (echo, output) in enumerate(zip(echoes, outputs, strict=True))
        ]
        return {**self.head, "object": self.whole, "choices": choices, "usage": usage(outputs)}

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """An event of a stream."""
        promise = {"usage": None} if self.promises_usage else {}
        return event({**self.head, "object": self.part, "choices": [choice]} | promise)

    def last_chunk(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The event with the usage."""
        return event({**self.head, "object": self.part, "choices": [], "usage": usage(outputs)})

    def opening(self, index: int, echo: str, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices that open a stream. `echo` is the text with which the answer begins."""
        raise NotImplementedError

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        """The choices of a stream for a piece of an answer."""
        raise NotImplementedError

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError


class ChatFormat(Format):
    """How chat is written: messages, and deltas of messages in streams."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int, echo: str, output: RequestOutput) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        choices, tokens = [], self.streamed.get(index)
        reason: str | None = piece.finish_reason
        deltas = [{"content": piece.text}] if piece.text or piece.logprobs else []
        if self.calls != "none":
            reader = self.readers.setdefault(index, CallReader())
            deltas = reader.push(piece.text, final=bool(reason)) or [{}] * bool(piece.logprobs)
            reason = self._reason(reason, reader)
        logprobs = chat_logprobs(piece.logprobs, tokens) if tokens else None
        for delta in deltas:
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
            logprobs = None  # they are told once
        if reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        tokens, reason = self.tokens_of(output), output.finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        if self.calls != "none":
            reader = CallReader()
            deltas = reader.push(output.text, final=True)
            message["content"] = "".join(delta.get("content", "") for delta in deltas)
            if reader.calls:
                message |= {"content": message["content"] or None, "tool_calls": reader.calls}
            reason = self._reason(reason, reader)
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(output.logprobs or (), tokens) if tokens else None,
            "finish_reason": reason,
        }

    def _reason(self, reason: str | None, reader: CallReader) -> str | None:
        """Why an answer ended, as chat says it: for its caller to answer its calls, if it chose to call."""
        called = reader.calls and not reader.is_inside and self.calls != "named"
        return "tool_calls" if reason == "stop" and called else reason


class CompletionFormat(Format):
    """How completions are written: plain text."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int, echo: str, output: RequestOutput) -> list[dict[str, Any]]:
        prompt = self._of_prompt(echo, output)
        return [_completion(index, echo, prompt)] if echo or prompt else []

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        logprobs = _of_answer(piece.logprobs, self.streamed.get(index), echo)
        return [_completion(index, piece.text, logprobs, piece.finish_reason)]

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        prompt = self._of_prompt(echo, output)
        answer = _of_answer(output.logprobs or (), self.tokens_of(output), echo)
        both = _joined(prompt, answer) if prompt and answer else prompt or answer
        return _completion(index, echo + output.text, both, output.finish_reason)

    def _of_prompt(self, echo: str, output: RequestOutput) -> dict[str, list[Any]] | None:
        """The log-probabilities of an echoed prompt, if they are asked for.

        Their offsets are places in what the tokens decode to: in the echo, unless a tokenizer changes texts.
        """
        if not self.tokenizer or output.prompt_logprobs is None:
            return None
        entries = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
        added = AnswerTokens(self.tokenizer)  # what the tokenizer puts before a text is not in the echo
        count = 0
        while count < len(entries) and added.is_special(token := entries[count][0]):
            if echo.startswith(added.shown(token)[0]):
                break
            count += 1
        text = AnswerTokens(self.tokenizer, skip_special_tokens=False)
        before, after = completion_logprobs(entries[:count], added, 0), entries[count:]
        return _joined(before, completion_logprobs(after, text, 0))


def _of_answer(
    entries: Sequence[TokenLogprobs], tokens: AnswerTokens | None, echo: str
) -> dict[str, list[Any]] | None:
    if not entries or not tokens:
        return None
    return completion_logprobs([(entry.token, entry) for entry in entries], tokens, len(echo))


def _joined(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: one[key] + other[key] for key in one}


def _completion(
    index: int, text: str, logprobs: dict[str, list[Any]] | None, reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
