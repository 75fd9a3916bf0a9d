"""OpenAI's wire format: what comes in becomes prompts and `SamplingParams`; what goes out is written here.

Nothing is ignored in silence. A field that is unknown here, or that asks for something we cannot do, is
refused by its name, unless its value says "as usual" (null, or one of `NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from labkit.outputs import RequestOutput, TokenLogprobs
from labkit.sampling_params import MAX_LOGPROBS, SamplingParams

Number = StrictInt | StrictFloat
Token = Annotated[StrictInt, Field(ge=0)]
# A list is given up at its first mistake: a body can hold a million, and pydantic would describe each.
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
# All of them are looked for after each token.
Stop = Annotated[StrictStr, Field(max_length=256)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=16)]

# Fields that we do not have, with the value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "metadata": ({},),
}
ROLES = ("system", "developer", "user", "assistant")
_LONGEST_ERROR = 1000  # characters: it may repeat what was sent


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for whoever sent it; names the field and the limit.
        param: the field, if it is one.
        code: one word for a program.
        retry_after: seconds, if it makes sense to come again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str = "", retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code or None
        self.retry_after = retry_after


def error_object(error: RequestError) -> dict[str, Any]:
    """An error as the protocol writes it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = None if error.param is None else _sendable(error.param)
    return {"error": {"message": _sendable(error.message), "type": kind, "param": param, "code": error.code}}


def _sendable(text: str) -> str:
    """Text as UTF-8 can carry it (no half surrogate pairs), and not too long."""
    cut = text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What `error_object` writes, for the schema of the API."""

    error: ErrorDetail


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class Asked(BaseModel):
    """What completions and chat have in common. `None` is the default, as if the field were not there."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    seed: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None  # its numbers are checked one by one, up to the first mistake
    user: StrictStr | None = None
    # Beyond OpenAI, as vLLM names them.
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: StrictBool | None = None
    priority: StrictInt | None = None

    def refuse_unknown(self) -> None:
        """Raise `RequestError` (400) for the first field that we do not have, unless it asks for nothing."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise RequestError(400, f"{name} is not supported here", param=name, code="unsupported")
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options needs stream=true", param="stream_options")

    def params(self, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """These fields as the engine takes them. Raises `ValueError` naming the field and the limit."""
        same = ("top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "min_p", "ignore_eos")
        given = {name: getattr(self, name) for name in (*same, "repetition_penalty", "stop_token_ids")}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0) if self.top_k == -1 else self.top_k  # vLLM's -1: all
        if self.logit_bias is not None:
            given["logit_bias"] = {_token("logit_bias", key): bias for key, bias in self.logit_bias.items()}
        if self.stop == "" or self.stop == []:
            del given["stop"]
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,  # OpenAI's default
            logprobs=logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionAsked(Asked):
    """The body of `POST /v1/completions`."""

    prompt: StrictStr | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    echo: StrictBool | None = None
    logprobs: StrictInt | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or many, each text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: StrictStr
    text: StrictStr | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: StrictStr | None = None

    def plain(self) -> dict[str, str]:
        """Role and text. Raises `RequestError` (400) for what is no text."""
        for name, value in (self.model_extra or {}).items():
            if value not in (None, []):
                raise RequestError(400, f"messages: {name} is not supported here", param="messages")
        if self.role not in ROLES:
            raise RequestError(
                400, f"messages: role must be one of {', '.join(ROLES)}, not {self.role!r}", param="messages"
            )
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise RequestError(
                        400, f"messages: only parts of type text are supported, not {part.type!r}",
                        param="messages",
                    )  # fmt: skip
            content = "".join(part.text or "" for part in content)
        try:
            (content or "").encode()
        except UnicodeEncodeError:
            message = "messages: content is not text: it holds half a surrogate pair"
            raise RequestError(400, message, param="messages") from None
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or ""}


class ChatAsked(Asked):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def talk(self) -> list[dict[str, str]]:
        if not self.messages:
            raise RequestError(400, "messages is empty: it must have at least one message", param="messages")
        return [message.plain() for message in self.messages]

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def field_of(asked: Asked, message: str, otherwise: str) -> str:
    """The field of a call that an error of the engine is about: it begins with a name of its own."""
    name = message.split(maxsplit=1)[0].rstrip(":").partition("[")[0] if message.strip() else ""
    if name not in {*CompletionAsked.model_fields, *ChatAsked.model_fields}:
        name = otherwise
    if isinstance(asked, ChatAsked):
        longest = "max_completion_tokens" if asked.max_tokens is None else "max_tokens"
        return {"prompt": "messages", "max_tokens": longest}.get(name, name)
    return name


def _token(name: str, key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise ValueError(f"{name} maps token ids to numbers, and {key!r} is no token id") from None


# -- what goes out --------------------------------------------------------------------------------


class Vocabulary:
    """Tokens as text and bytes, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()}

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def bytes(self, token: int) -> list[int]:
        """A token's bytes, which alone need not be a character."""
        text = self.text(token)
        if "\ufffd" in text:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if all(char in self._bytes for char in piece):
                return [self._bytes[char] for char in piece]
        return list(text.encode())


def chat_logprobs(entries: Sequence[TokenLogprobs], words: Vocabulary) -> dict[str, Any]:
    """Log-probabilities of chat."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {"token": words.text(token), "logprob": logprob, "bytes": words.bytes(token)}

    return {
        "content": [
            shown(entry.token, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(entries: Sequence[TokenLogprobs], words: Vocabulary, offset: int) -> dict[str, Any]:
    """Log-probabilities of completions; the first token begins `offset` characters into the text."""
    texts = [words.text(entry.token) for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{words.text(token): value for token, value in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def usage(outputs: Sequence[RequestOutput], num_prompt_tokens: int) -> dict[str, Any]:
    """Tokens in and out. Answers that share a prompt count it once, so it is given."""
    out = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.metrics.num_cached_tokens for output in outputs if output.index == 0)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": out,
        "total_tokens": num_prompt_tokens + out,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Format:
    """How answers of one kind are written: `ChatFormat` or `CompletionFormat`.

    Args:
        answer_id, model, created: what every object repeats.
        words: for log-probabilities; None if none are asked for.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, answer_id: str, model: str, created: int, words: Vocabulary | None) -> None:
        self.head = {"id": answer_id, "created": created, "model": model}
        self.words = words

    def answer(self, choices: list[dict[str, Any]], used: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.whole, "choices": choices, "usage": used}

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk, "choices": choices}

    def first(self, index: int, echoed: str) -> dict[str, Any] | None:
        """The choice that opens a stream, if there is one."""
        raise NotImplementedError

    def more(
        self, index: int, text: str, entries: Sequence[TokenLogprobs], offset: int, reason: str | None
    ) -> list[dict[str, Any]]:
        """Choices of a stream for new text, and its end."""
        raise NotImplementedError

    def choice(self, index: int, echoed: str, output: RequestOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError


class ChatFormat(Format):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self.words) if self.words else None

    def first(self, index: int, echoed: str) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def more(
        self, index: int, text: str, entries: Sequence[TokenLogprobs], offset: int, reason: str | None
    ) -> list[dict[str, Any]]:
        choices = []
        if text or entries:
            logprobs = self._logprobs(entries)
            delta = {"content": text}
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def choice(self, index: int, echoed: str, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = self._logprobs(output.logprobs or ())
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }


class CompletionFormat(Format):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        return completion_logprobs(entries, self.words, offset) if self.words and entries else None

    def first(self, index: int, echoed: str) -> dict[str, Any] | None:
        return self._choice(index, echoed, None, None) if echoed else None

    def more(
        self, index: int, text: str, entries: Sequence[TokenLogprobs], offset: int, reason: str | None
    ) -> list[dict[str, Any]]:
        if not (text or entries or reason):
            return []
        return [self._choice(index, text, self._logprobs(entries, offset), reason)]

    def choice(self, index: int, echoed: str, output: RequestOutput) -> dict[str, Any]:
        logprobs = self._logprobs(output.logprobs or (), len(echoed))
        return self._choice(index, echoed + output.text, logprobs, output.finish_reason)


MakeFormat = Callable[[str, str, int, "Vocabulary | None"], Format]
