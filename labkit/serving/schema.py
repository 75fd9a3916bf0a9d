"""OpenAI's wire format, inwards: the body of a call becomes prompts and `SamplingParams`.

Nothing is ignored in silence. A field that is unknown here, or that asks for something we cannot do, is
refused by its name, unless its value asks for nothing (`labkit.serving.neutral`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from transformers import PreTrainedTokenizerBase

from labkit.models.chat import as_chat, check_variables, text_of
from labkit.models.tools import for_template
from labkit.sampling_params import MAX_LOGPROBS, SamplingParams, Structured
from labkit.serving.errors import RequestError
from labkit.serving.forms import newer_name, of_response_format, of_structured_outputs
from labkit.serving.neutral import Where, first_that_asks
from labkit.serving.tool_calls import MOST_TOOLS, Offer, Tool

Number = StrictInt | StrictFloat
Token = Annotated[StrictInt, Field(ge=0)]
# Checking a list ends at its first mistake: a body can hold a million, and pydantic would describe each.
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
# Few and short: the engine looks for each of them after each token.
Stop = Annotated[StrictStr, Field(max_length=256)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=16)]

ROLES = ("system", "developer", "user", "assistant", "tool")
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; chat goes on until the model ends
_MARKS = 16  # characters that a chat template writes round a message, at least

Conversation = list[dict[str, Any]]  # messages, as `as_chat` takes them


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None


class Body(BaseModel):
    """The fields that completions and chat share. `None` is the default, as if the field were absent."""

    model_config = ConfigDict(extra="allow")
    where: ClassVar[Where]  # in the table of neutral values

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
    min_tokens: StrictInt | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    priority: StrictInt | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None  # OpenAI's, for chat

    offer: ClassVar[Offer] = Offer()  # what an answer may call

    @property
    def text_field(self) -> str:
        """The field that says which form an answer must have that calls nothing."""
        return "structured_outputs" if self.structured_outputs else "response_format"

    @property
    def form_field(self) -> str:
        """The field that says which form an answer must have."""
        return self.text_field

    def form(self) -> Structured | None:
        """The form that an answer must have. Raises `RequestError` (400) or `ValueError`."""
        asked = [
            None if self.response_format is None else of_response_format(self.response_format),
            None if self.structured_outputs is None else of_structured_outputs(self.structured_outputs),
        ]
        found = [form for form in asked if form]
        if len(found) > 1:
            words = "structured_outputs and response_format both name a form: give one of them"
            raise RequestError(400, words, param="structured_outputs")
        return found[0] if found else None

    def refuse_unknown(self) -> None:
        """Raise `RequestError` (400) for the first field that we do not have, unless it asks for nothing."""
        extra = dict(self.model_extra or {})
        if (best_of := extra.get("best_of")) == (self.n or 1) and not isinstance(best_of, bool):
            extra["best_of"] = None  # as many as are returned
        if (name := first_that_asks(self.where, extra)) is not None:
            words = f"{name} is not supported here{newer_name(name)}"
            raise RequestError(400, words, param=name, code="unsupported")
        if options := self.stream_options:
            if (name := first_that_asks("stream_options", options.model_extra)) is not None:
                message = f"stream_options: {name} is not supported here"
                raise RequestError(400, message, param="stream_options", code="unsupported")
            if options.include_usage and not self.stream:
                raise RequestError(400, "stream_options needs stream=true", param="stream_options")

    def prompts(self) -> list[Any]:
        """One or many prompts, as `encode` and `shown` take them. Raises `RequestError` naming the field."""
        raise NotImplementedError

    def length(self, prompt: Any) -> int:
        """The characters of a prompt that have yet to be made into tokens."""
        raise NotImplementedError

    def encode(self, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
        """A prompt as the engine takes it. Raises `RequestError` naming the field."""
        raise NotImplementedError

    def shown(self, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
        """A prompt as text for people."""
        raise NotImplementedError

    def sampling_params(self, longest: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """The fields that say how to sample.

        Args:
            longest: the length of an answer for which nobody names one.
            defaults: what the model says of fields that the call leaves out (`Engine.sampling_defaults`).

        Raises:
            ValueError: for a value that cannot be; the message names the field and the limit.
            RequestError: for fields that contradict each other.
        """
        raise NotImplementedError

    def _params(
        self,
        defaults: Mapping[str, Any],
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        names: tuple[str, ...]
        names = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "min_tokens", "ignore_eos")
        names += ("presence_penalty", "frequency_penalty", "repetition_penalty")
        names += ("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens")
        given = {name: getattr(self, name) for name in names}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token("logit_bias", key): bias for key, bias in self.logit_bias.items()}
        if self.stop == "" or self.stop == []:
            del given["stop"]
        given |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        given["structured"] = self.form()
        said = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**(dict(defaults) | said))


class CompletionBody(Body):
    """The body of `POST /v1/completions`."""

    where = "completions"

    prompt: StrictStr | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    echo: StrictBool | None = None
    logprobs: StrictInt | Literal[False] | None = None  # false is what chat calls none

    @property
    def only_echoes(self) -> bool:
        """Whether nothing but the prompt is wanted, which clients score texts with."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """One or many prompts, each text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def length(self, prompt: str | list[int]) -> int:
        """The characters of a text; token ids have none."""
        return len(prompt) if isinstance(prompt, str) else 0

    def encode(self, prompt: str | list[int], tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
        """A prompt as it is: the engine takes both kinds."""
        return prompt

    def shown(self, prompt: str | list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """A prompt as text; empty for ids that are no tokens, which the engine refuses."""
        if isinstance(prompt, str):
            return prompt
        try:
            return tokenizer.decode(prompt, clean_up_tokenization_spaces=False)  # type: ignore[return-value]
        except (OverflowError, IndexError, TypeError):
            return ""

    def sampling_params(self, longest: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """See `Body`."""
        logprobs = None if self.logprobs is False else self.logprobs
        usual = min(defaults.get("max_tokens", _COMPLETION_TOKENS), longest)
        max_tokens = usual if self.max_tokens is None else self.max_tokens
        if self.only_echoes:
            max_tokens = 1  # the engine stops at no earlier token, and nobody will see it
        return self._params(defaults, max_tokens, logprobs, logprobs if self.echo else None)


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: StrictStr
    text: StrictStr | None = None

    def plain(self) -> dict[str, Any]:
        """Type and text. Raises `RequestError` (400) for a part that is not text alone."""
        if self.type != "text" or self.text is None:
            words = f"messages: only parts of type text are supported, not {self.type!r}"
            raise RequestError(400, words, param="messages")
        if (name := first_that_asks("part", self.model_extra)) is not None:
            raise RequestError(400, f"messages: {name} in a part is not supported here", param="messages")
        return {"type": self.type, "text": self.text}


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: StrictStr
    arguments: StrictStr


class ToolCall(BaseModel):
    """A call that an earlier answer made. Streams number them, and some clients send that back."""

    model_config = ConfigDict(extra="allow")

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    index: StrictInt | None = None
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """The call as it was written. Raises `RequestError` (400) for arguments that are no JSON object."""
        for where, extra in (("call", self.model_extra), ("call", self.function.model_extra)):
            if (name := first_that_asks(where, extra)) is not None:
                words = f"messages: {name} in tool_calls is not supported here"
                raise RequestError(400, words, param="messages")
        written = self.function.arguments.strip() or "{}"  # of a function without any, some clients say so
        try:
            arguments = json.loads(written)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            words = "messages: tool_calls: arguments must be the JSON of an object"
            raise RequestError(400, words, param="messages")
        function = {"name": self.function.name, "arguments": written}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None

    def plain(self) -> dict[str, Any]:
        """Role, content, name and calls, as they came. Raises `RequestError` (400) for more than text."""
        if (name := first_that_asks("message", self.model_extra)) is not None:
            raise RequestError(400, f"messages: {name} is not supported here", param="messages")
        if self.role not in ROLES:
            raise RequestError(
                400, f"messages: role must be one of {', '.join(ROLES)}, not {self.role!r}", param="messages"
            )
        content: str | list[dict[str, Any]] = self.content if isinstance(self.content, str) else ""
        if isinstance(self.content, list):
            content = [part.plain() for part in self.content]
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                words = f"messages: {field} must be in a message of role {role}, not {self.role}"
                raise RequestError(400, words, param="messages")
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        try:
            _words_of(message).encode()
        except UnicodeEncodeError:
            words = "messages: content is not text: it holds half a surrogate pair"
            raise RequestError(400, words, param="messages") from None
        return message


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    where = "chat"

    messages: Annotated[list[Message], Field(fail_fast=True)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    # Beyond OpenAI, as vLLM names them.
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None

    @cached_property
    def offer(self) -> Offer:  # type: ignore[override]
        """What the answer may call. Raises as `Offer.of` does."""
        return Offer.of(self.tools or [], self.tool_choice, several=self.parallel_tool_calls is not False)

    @property
    def form_field(self) -> str:
        """See `Body`."""
        return self.text_field if self.offer.how == "none" else "tools"

    def form(self) -> Structured | None:
        """See `Body`. Calls have a form, too; any other is that of an answer without calls."""
        form = super().form()
        if self.offer.how == "none":
            return form
        if form and form.kind != "json":
            words = f"structured_outputs: {form.kind} cannot stand beside tools: only json can"
            raise RequestError(400, words, param="structured_outputs")
        return self.offer.form(form)

    def prompts(self) -> list[Conversation]:
        """One conversation."""
        if not self.messages:
            raise RequestError(400, "messages is empty: it must have at least one message", param="messages")
        if self.continue_final_message and self.add_generation_prompt:
            words = "continue_final_message and add_generation_prompt contradict each other: give one of them"
            raise RequestError(400, words, param="continue_final_message")
        return [[message.plain() for message in self.messages]]

    def length(self, prompt: Conversation) -> int:
        """The characters of all messages and tools, and those that the template adds to each message."""
        tools = sum(len(json.dumps(tool)) for tool in self.offer.tools)
        return tools + sum(len(_words_of(message)) + _MARKS for message in prompt)

    def encode(self, prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
        """A conversation in the model's own chat format."""
        variables = self.chat_template_kwargs or {}
        check_variables(tokenizer, variables)
        try:
            messages, more = for_template(tokenizer, prompt, self.offer.tools)
            return as_chat(
                tokenizer,
                messages,
                add_generation_prompt=self.add_generation_prompt is not False,
                continue_final_message=bool(self.continue_final_message),
                variables={**variables, **more},
            )
        except Exception as error:  # some models' templates refuse some conversations, in their own words
            raise RequestError(400, f"messages: the chat template says: {error}", param="messages") from None

    def shown(self, prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
        """The latest message."""
        return text_of(prompt[-1])

    def sampling_params(self, longest: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """See `Body`."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError(
                400, "max_tokens and max_completion_tokens say the same: give one of them", param="max_tokens"
            )
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if max_tokens is None:
            max_tokens = min(defaults.get("max_tokens", longest), longest)
        return self._params(defaults, max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


def refusal(body: Body, error: ValueError, otherwise: str) -> RequestError:
    """The answer (400) to a call that the engine refuses, in the words of the call."""
    message = str(error)
    name = field_of(body, message, otherwise)
    if name == "tools":  # what they are to the engine, a client has not seen
        said = re.sub("^structured: (grammar:? )?", "", message)
        if said.startswith("line 1: "):  # there stands the form of an answer without calls
            name, said = body.text_field, said.removeprefix("line 1: ")
        message = f"{name}: {body.offer.in_its_words(said)}"
    elif message.startswith("structured"):
        message = name + message.removeprefix("structured")
    return RequestError(400, message, param=name)


def field_of(body: Body, message: str, otherwise: str) -> str:
    """The field that an error of the engine is about: its message begins with the engine's name for it."""
    name = message.split(maxsplit=1)[0].rstrip(":").partition("[")[0] if message.strip() else ""
    if name == "structured":
        return body.form_field
    if name not in {*CompletionBody.model_fields, *ChatBody.model_fields}:
        name = otherwise
    if isinstance(body, ChatBody):
        longest = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
        return {"prompt": "messages", "max_tokens": longest}.get(name, name)
    return name


def _token(name: str, key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise ValueError(f"{name} maps token ids to numbers, and {key!r} is no token id") from None


def _words_of(message: Mapping[str, Any]) -> str:
    """All that a message says: its text, its name, and its calls."""
    calls = [part for call in message.get("tool_calls", ()) for part in call["function"].values()]
    return "".join([text_of(message), message.get("name", ""), *calls])
