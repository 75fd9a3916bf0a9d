"""OpenAI's wire format, outwards: whole answers, the chunks of streams as server-sent events, and usage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from labkit.models.token_bytes import TokenBytes
from labkit.outputs import FinishReason, RequestOutput, TokenLogprobs
from labkit.serving.answer import Piece

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
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, skip_special_tokens: bool = True
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


def chat_logprobs(entries: Sequence[TokenLogprobs], tokens: AnswerTokens) -> dict[str, Any]:
    """The log-probabilities of the next tokens of an answer as chat writes them."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text, data = tokens.shown(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

    content = []
    for entry in entries:
        top = [shown(*pair) for pair in entry.top]
        content.append(shown(entry.token, entry.logprob) | {"top_logprobs": top})
        tokens.push(entry.token)
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprobs], tokens: AnswerTokens, offset: int
) -> dict[str, Any]:
    """The same as completions write them; `offset` is where in the text the answer begins."""
    texts, tops, offsets = [], [], []
    for entry in entries:
        texts.append(tokens.shown(entry.token)[0])
        tops.append(_by_text(entry, tokens))
        offsets.append(offset + tokens.push(entry.token))
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _by_text(entry: TokenLogprobs, tokens: AnswerTokens) -> dict[str, float]:
    """The likeliest tokens and the chosen one; the better of two that have the same text."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):  # in falling order, the chosen one last
        best.setdefault(tokens.shown(token)[0], max(logprob, LEAST_LOGPROB))
    return best


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

    Attributes:
        streamed: how far a stream has come in the tokens of each choice, for log-probabilities.
    """

    head: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    promises_usage: bool = False
    skip_special_tokens: bool = True
    streamed: dict[int, AnswerTokens | None] = field(default_factory=dict)

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

    def opening(self, index: int, echo: str) -> list[dict[str, Any]]:
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

    def opening(self, index: int, echo: str) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        choices, tokens = [], self.streamed.get(index)
        if piece.text or piece.logprobs:
            logprobs = chat_logprobs(piece.logprobs, tokens) if tokens else None
            delta = {"content": piece.text}
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if reason := piece.finish_reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        tokens = self.tokens_of(output)
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": chat_logprobs(output.logprobs or (), tokens) if tokens else None,
            "finish_reason": output.finish_reason,
        }


class CompletionFormat(Format):
    """How completions are written: plain text."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int, echo: str) -> list[dict[str, Any]]:
        return [self._choice(index, echo)] if echo else []

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        tokens = self.streamed.get(index)
        return [self._choice(index, piece.text, piece.logprobs, piece.finish_reason, tokens, len(echo))]

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        text, entries, tokens = echo + output.text, output.logprobs or (), self.tokens_of(output)
        return self._choice(index, text, entries, output.finish_reason, tokens, len(echo))

    def _choice(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenLogprobs] = (),
        reason: FinishReason | None = None,
        tokens: AnswerTokens | None = None,
        offset: int = 0,
    ) -> dict[str, Any]:
        logprobs = completion_logprobs(entries, tokens, offset) if tokens and entries else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
