"""OpenAI's wire format, outwards: whole answers, the chunks of streams as server-sent events, and usage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from labkit.outputs import FinishReason, RequestOutput, TokenLogprobs
from labkit.serving.answer import Piece

DONE = b"data: [DONE]\n\n"  # how a stream ends
LEAST_LOGPROB = -9999.0  # OpenAI's number for what cannot be: JSON has no infinity
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip


def event(data: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class Vocabulary:
    """Tokens as text and as bytes, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()}

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def bytes(self, token: int) -> list[int]:
        """A token's bytes, which need not be a whole character."""
        text = self.text(token)
        if "\ufffd" in text:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if all(char in self._bytes for char in piece):
                return [self._bytes[char] for char in piece]
        return list(text.encode())


def chat_logprobs(entries: Sequence[TokenLogprobs], vocabulary: Vocabulary) -> dict[str, Any]:
    """Log-probabilities as chat writes them."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.text(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": vocabulary.bytes(token),
        }

    return {
        "content": [
            shown(entry.token, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    entries: Sequence[TokenLogprobs], vocabulary: Vocabulary, offset: int
) -> dict[str, Any]:
    """Log-probabilities as completions write them; `offset` is where in the text the first token begins."""
    texts = [vocabulary.text(entry.token) for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in entries],
        "top_logprobs": [_by_text(entry, vocabulary) for entry in entries],
        "text_offset": offsets,
    }


def _by_text(entry: TokenLogprobs, vocabulary: Vocabulary) -> dict[str, float]:
    """The likeliest tokens and the chosen one; the better of two that have the same text."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):  # in falling order, the chosen one last
        best.setdefault(vocabulary.text(token), max(logprob, LEAST_LOGPROB))
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
        vocabulary: the texts of tokens, for log-probabilities; None if none are asked for.
        promises_usage: whether each chunk of a stream says that the usage will follow.
    """

    head: dict[str, Any]
    vocabulary: Vocabulary | None = None
    promises_usage: bool = False

    prefix: ClassVar[str]  # of the id of an answer
    whole: ClassVar[str]  # the type of a whole answer
    part: ClassVar[str]  # the type of a chunk

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
        choices = []
        if piece.text or piece.logprobs:
            logprobs = chat_logprobs(piece.logprobs, self.vocabulary) if self.vocabulary else None
            delta = {"content": piece.text}
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if reason := piece.finish_reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": chat_logprobs(output.logprobs or (), self.vocabulary) if self.vocabulary else None,
            "finish_reason": output.finish_reason,
        }


class CompletionFormat(Format):
    """How completions are written: plain text."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int, echo: str) -> list[dict[str, Any]]:
        return [self._choice(index, echo, (), 0, None)] if echo else []

    def growth(self, index: int, echo: str, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        offset = len(echo) + piece.start
        return [self._choice(index, piece.text, piece.logprobs, offset, piece.finish_reason)]

    def choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        text, entries = echo + output.text, output.logprobs or ()
        return self._choice(index, text, entries, len(echo), output.finish_reason)

    def _choice(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenLogprobs],
        offset: int,
        reason: FinishReason | None,
    ) -> dict[str, Any]:
        logprobs = (
            completion_logprobs(entries, self.vocabulary, offset) if self.vocabulary and entries else None
        )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
