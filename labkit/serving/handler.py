"""One call of the API, from its checked body to the last piece of its answers.

Coroutines follow the answers and wait for the engine's news, so a thousand open streams cost no thread. A
slow reader gets its text in larger pieces, because nothing is kept but the answers themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from labkit.models.prompts import PromptTooLongError
from labkit.outputs import FinishReason, RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.serving.answer import Answer, Piece
from labkit.serving.asgi import patiently
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.serving.errors import RequestError, error_object, too_long
from labkit.serving.limits import Limits
from labkit.serving.metrics import Metrics
from labkit.serving.schema import Body, CompletionBody, field_of, refusal
from labkit.serving.stream import DONE, KEEP_ALIVE, Format, event, usage

logger = logging.getLogger("labkit.server")

MOST_CHARACTERS = 16  # of a prompt for each token that it may have; English has about 4
_LONGEST_USER = 64  # characters of a user's name in the log

OnRequest = Callable[[str, str, SamplingParams], None]


@dataclass(frozen=True)
class Options:
    """What a server allows.

    Args:
        limits: bounds on the requests of one client (by address) and of all, and on prompts and answers.
        api_key: the key that clients must bring; None asks for none.
        model_name: the name that clients must give; None is the engine's own.
        request_seconds: the time after which an answer is ended.
        keep_alive_seconds: the time after which a stream without a first token gets a comment, so that no
            proxy takes it for dead.
        body_bytes: the size of a body at most.
        cors: the origins whose pages may call; none by default.
        log_prompts: whether the log holds the prompts.

    Raises:
        ValueError: for a key that is empty.
    """

    limits: Limits = field(default_factory=lambda: Limits(requests=1024, queue=1024))
    api_key: str | None = None
    model_name: str | None = None
    request_seconds: float = 600.0
    keep_alive_seconds: float = 15.0
    body_bytes: int = 2 * 2**20
    cors: Sequence[str] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key must not be empty: None asks for none")


@dataclass
class Call:
    """A call that was let in, and what becomes of it."""

    live: AsyncEngine
    body: Body
    client: str
    prompts: list[Any]
    params: SamplingParams
    num_answers: int
    format: Format
    began: float
    shown: list[str] = field(default_factory=list)  # each prompt as text, where it is to be seen
    echoes: list[str] = field(default_factory=list)  # the text with which each choice begins
    request_ids: list[str] = field(default_factory=list)  # one for each prompt
    answers: list[Answer] = field(default_factory=list)  # one for each choice
    status: int = 499  # of HTTP: the client went away, unless it turns out otherwise

    @property
    def only_echoes(self) -> bool:
        """Whether the answers are wanted for their prompts alone."""
        return isinstance(self.body, CompletionBody) and self.body.only_echoes

    @property
    def outputs(self) -> list[RequestOutput]:
        """The outputs of the answers. Where nothing but prompts is wanted, nothing else is in them."""
        outputs = [answer.output for answer in self.answers]
        if not self.only_echoes:
            return outputs
        nothing = {"token_ids": [], "text": "", "logprobs": []}
        return [replace(output, **nothing, finish_reason=_at_once(output)) for output in outputs]


class Handler:
    """Lets calls in, follows their answers, and lets go of them.

    Args:
        engine: a function that returns the engine that runs now.
        options: what is allowed.
        on_request: a function that is told of each request: its id, its prompt as text, and its parameters.
    """

    def __init__(
        self, engine: Callable[[], AsyncEngine], options: Options, on_request: OnRequest | None = None
    ) -> None:
        self.engine, self.options, self.on_request = engine, options, on_request
        self.draining = False
        self.created = int(time.time())
        self.metrics = Metrics(self.model_name)
        self._under_way: Counter[str] = Counter()  # answers of each client

    @property
    def model_name(self) -> str:
        """The name that clients must give."""
        return self.options.model_name or self.engine().engine.model.name

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._under_way)

    def not_served(self, name: str) -> RequestError:
        """The error for a model of another name."""
        message = f"model {name!r} is not served here; {self.model_name!r} is"
        return RequestError(404, message, param="model", code="model_not_found")

    # -- in ---------------------------------------------------------------------------------------

    async def start(self, body: Body, client: str, write: type[Format]) -> Call:
        """Let a call in, and hand its prompts to the engine.

        Args:
            body: the body of the call.
            client: the address that it came from.
            write: the format of the answers.

        Raises:
            RequestError: if the call cannot be served. Nothing of it runs then.
        """
        live, began = self.engine(), time.perf_counter()
        prompts, params = self._admit(live, body, client)
        self.metrics.follow(live)
        answer_id = f"{write.prefix}-{uuid.uuid4().hex}"
        head = {"id": answer_id, "created": int(time.time()), "model": body.model}
        tokenizer = None if params.logprobs is None else live.engine.model.tokenizer
        promises_usage = bool(body.stream_options and body.stream_options.include_usage)
        written = write(head, tokenizer, promises_usage, params.skip_special_tokens, body.offer.how)
        call = Call(live, body, client, prompts, params, len(prompts) * params.n, written, began)
        self._under_way += Counter({client: call.num_answers})  # the engine learns of them when tokenised
        try:
            await asyncio.to_thread(self._submit, call)
        except BaseException as error:
            self._let_go(call)
            if isinstance(error, PromptTooLongError):
                longest = min(live.engine.max_model_len, self.options.limits.prompt_tokens or sys.maxsize)
                raise too_long(longest, str(error), field_of(body, "prompt", "prompt")) from None
            if isinstance(error, ValueError):
                raise refusal(body, error, "prompt") from None
            if isinstance(error, EngineStoppedError):
                raise RequestError(503, str(error), code="engine_stopped") from None
            raise
        if self.on_request:
            for request_id, shown in zip(call.request_ids, call.shown, strict=True):
                self.on_request(request_id, shown, call.params)
        return call

    def _admit(self, live: AsyncEngine, body: Body, client: str) -> tuple[list[Any], SamplingParams]:
        """Check all that can be checked before tokenising; return the prompts and how to sample."""
        limits = self.options.limits
        if body.model != self.model_name:
            raise self.not_served(body.model)
        if self.draining:
            raise RequestError(503, "the server is shutting down", code="draining", retry_after=5)
        body.refuse_unknown()
        prompts = body.prompts()
        if not prompts:
            raise RequestError(400, "prompt is empty: it must have at least one token", param="prompt")
        room = min(live.engine.max_model_len, limits.prompt_tokens or sys.maxsize)
        for length in map(body.length, prompts):
            if length > (most := MOST_CHARACTERS * room):
                message = f"The prompt has {length:,} characters, and {most:,} is the limit."
                raise too_long(room, message, field_of(body, "prompt", "prompt"))
        try:
            longest = limits.answer_tokens or live.engine.max_model_len
            params = body.sampling_params(longest, live.engine.sampling_defaults)
            if limits.answer_tokens is not None:
                limits.check_tokens(0, params.max_tokens)
        except ValueError as error:
            raise refusal(body, error, "max_tokens") from None

        more, own = len(prompts) * params.n, self._under_way[client]
        everybody = max(live.num_unfinished, self._under_way.total())  # the engine lags behind: see `start`
        if more > (most := min(limits.requests, limits.queue)):
            message = f"prompt: {more} answers in one call, and {most} is the limit"
            raise RequestError(400, message, param="prompt")
        if own + more > limits.requests:
            message = f"{own} requests of yours are under way, and {limits.requests} is the limit"
        elif everybody + more > limits.queue:
            message = f"{everybody} requests are under way, and {limits.queue} is the limit"
        else:
            return prompts, params
        raise RequestError(429, message, code="rate_limit_exceeded", retry_after=1)

    def _submit(self, call: Call) -> None:
        """Hand all prompts of a call to the engine, or none. Runs on a thread: tokenising takes time."""
        body, live, limits = call.body, call.live, self.options.limits
        tokenizer = live.engine.model.tokenizer
        requests = []
        for prompt in call.prompts:
            encoded = body.encode(prompt, tokenizer)
            request = live.engine.make_request(encoded, call.params, priority=body.priority or 0)
            try:
                limits.check_tokens(request.num_prompt_tokens, 0)
            except ValueError as error:
                raise PromptTooLongError(str(error)) from None
            requests.append(request)
        echo = isinstance(body, CompletionBody) and body.echo
        if echo or self.options.log_prompts or self.on_request:
            call.shown = [body.shown(prompt, tokenizer) for prompt in call.prompts]
        for request in requests:
            answers = live.start(request)
            call.request_ids.append(request.request_id)
            call.answers += answers
        written = call.format
        written.streamed = {i: written.tokens_of(answer.output) for i, answer in enumerate(call.answers)}
        call.echoes = [""] * call.num_answers
        if echo:
            call.echoes = [text for text in call.shown for _ in range(call.params.n)]

    # -- out --------------------------------------------------------------------------------------

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """The answers of a call as server-sent events. An error is told in the stream."""
        written, echoes, answers = call.format, call.echoes, call.answers
        late = call.params.prompt_logprobs is not None  # they are known once the first token has come
        opened: set[int] = set()
        try:
            for index, echo in () if late else enumerate(echoes):
                for choice in written.opening(index, echo, answers[index].output):
                    yield written.chunk(choice)
            following = patiently(self.follow(call), self.options.keep_alive_seconds)
            async with contextlib.aclosing(following) as pieces:
                async for numbered in pieces:
                    if numbered is None:
                        yield KEEP_ALIVE
                        continue
                    index, piece = numbered
                    if late and index not in opened and piece.token_ids:
                        opened.add(index)
                        for choice in written.opening(index, echoes[index], answers[index].output):
                            yield written.chunk(choice)
                    if call.only_echoes:
                        piece = piece._replace(text="", logprobs=[], finish_reason=_at_once(piece))
                    for choice in written.growth(index, echoes[index], piece):
                        yield written.chunk(choice)
            if written.promises_usage:
                yield written.last_chunk(call.outputs)
            call.status = 200
        except RequestError as error:
            yield event(error_object(error))
        yield DONE

    async def whole(self, call: Call) -> dict[str, Any]:
        """The finished answers of a call as one object. Raises as `follow` does."""
        async for _ in self.follow(call):
            pass
        call.status = 200
        return call.format.answer(call.echoes, call.outputs)

    async def follow(self, call: Call) -> AsyncGenerator[tuple[int, Piece], None]:
        """The answers of a call piece by piece, each with the number of its choice, until all are finished.

        Raises:
            RequestError: if an answer fails, is ended by another, or takes too long.
        """
        left = call.began + self.options.request_seconds - time.perf_counter()
        try:
            async with contextlib.aclosing(call.live.follow(call.answers, seconds=left)) as pieces:
                async for index, piece in pieces:
                    if piece.finish_reason in ("error", "abort"):
                        yield index, piece._replace(finish_reason=None)  # what a slow reader has not seen yet
                        error = _failed(piece, call.body)
                        call.status = error.status
                        raise error
                    yield index, piece
        except asyncio.TimeoutError:
            call.status = 504
            message = f"the answer took longer than {self.options.request_seconds:g} seconds"
            raise RequestError(504, message, code="timeout") from None

    async def finish(self, call: Call) -> None:
        """Abort what is still under way of a call, and write its line to the log."""
        self._let_go(call)
        if not logger.isEnabledFor(logging.INFO):
            return
        outputs = call.outputs
        used = usage(outputs)
        first = [output.metrics.ttft for output in outputs if output.metrics.ttft is not None]
        line = {
            "id": call.format.head["id"],
            "requests": call.request_ids,
            "client": call.client,
            "user": call.body.user and call.body.user[:_LONGEST_USER],
            "status": call.status,
            "stream": bool(call.body.stream),
            "prompt_tokens": used["prompt_tokens"],
            "output_tokens": used["completion_tokens"],
            "finish": [output.finish_reason for output in outputs],
            "ttft": round(min(first), 4) if first else None,
            "seconds": round(time.perf_counter() - call.began, 4),
        }
        if self.options.log_prompts:
            line["prompts"] = call.shown
        logger.info(json.dumps(line))

    def _let_go(self, call: Call) -> None:
        if not all(answer.finished for answer in call.answers):
            for request_id in call.request_ids:
                call.live.abort(request_id)
        self._under_way -= Counter({call.client: call.num_answers})  # and forgets a client who has none left


def _at_once(answer: Piece | RequestOutput) -> FinishReason | None:
    """Why an answer of no tokens ended, if it has: it was long enough, whatever the one token was."""
    return answer.finish_reason and "length"


def _failed(piece: Piece, body: Body) -> RequestError:
    if piece.finish_reason == "error":
        error = piece.error or "the request failed"
        if (message := error.removeprefix("ValueError: ")).startswith("structured"):  # too large on the way
            return refusal(body, ValueError(message), "prompt")
        return RequestError(500, error, code="engine_error")
    return RequestError(503, "the request was ended before its answer was complete", code="aborted")
