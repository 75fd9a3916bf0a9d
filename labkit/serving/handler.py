"""One call of the API, from the check of what came in to the last piece of its answer.

An answer is followed by a coroutine that waits for the engine's news, so a thousand open streams cost no
thread. A reader that is slow gets its text in larger pieces, for nothing is kept but the answer itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from labkit.core.request import answer_ids
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.serving.limits import Limits
from labkit.serving.metrics import Metrics
from labkit.serving.schema import Asked, Format, RequestError, error_object, field_of, usage

logger = logging.getLogger("labkit.server")
T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Options:
    """What a server allows.

    Args:
        limits: on requests of one client (by address) and of all, and on the length of prompt and answer.
        api_key: that clients must bring; None asks for none.
        model_name: that clients must name; None is the engine's own.
        request_seconds: after which an answer is ended.
        body_bytes: of a request at most.
        cors: origins whose pages may call; none by default.
        log_prompts: write prompts into the log.
    """

    limits: Limits = field(default_factory=lambda: Limits(requests=1024, queue=1024))
    api_key: str | None = None
    model_name: str | None = None
    request_seconds: float = 600.0
    body_bytes: int = 2 * 2**20
    cors: Sequence[str] = ()
    log_prompts: bool = False


@dataclass
class Job:
    """One call on its way: the prompts that it brought and what became of them."""

    client: str
    asked: Asked
    prompts: list[str | list[int]]
    shown: list[str]  # each prompt as text, for `echo` and the log
    format: Format
    echo: bool
    began: float
    names: list[str] = field(default_factory=list)  # of the requests in the engine, one per prompt
    # All their answers by name, in the order of the choices, and how each can be heard.
    answers: dict[str, AsyncIterator[RequestOutput]] = field(default_factory=dict)
    outputs: dict[int, RequestOutput] = field(default_factory=dict)  # the latest of each choice
    status: int = 499  # of HTTP: the client went away, unless it turns out otherwise

    @property
    def ordered(self) -> list[RequestOutput]:
        return [self.outputs[index] for index in sorted(self.outputs)]

    def echoed(self, index: int) -> str:
        """What a choice begins with."""
        return self.shown[index * len(self.prompts) // len(self.answers)] if self.echo else ""


class Server:
    """The routes' common part: takes calls in, follows their answers, and lets go of them.

    Args:
        engine: gives the engine that runs now.
        options: what is allowed.
        file: told of each request that came in: its id, its prompt as text, and its parameters.
    """

    def __init__(
        self,
        engine: Callable[[], AsyncEngine],
        options: Options,
        file: Callable[[str, str, SamplingParams], None] | None = None,
    ) -> None:
        self.engine, self.options = engine, options
        self.file = file or (lambda request_id, prompt, params: None)
        self.draining = False
        self.created = int(time.time())
        self.metrics = Metrics(self.model_name)
        self._clients: Counter[str] = Counter()

    @property
    def model_name(self) -> str:
        return self.options.model_name or self.engine().engine.model.name

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._clients)

    # -- in ---------------------------------------------------------------------------------------

    async def take(self, job: Job, *, max_tokens: int | None, logprobs: int | None) -> AsyncEngine:
        """Check a call and hand its prompts to the engine.

        Raises:
            RequestError: if it cannot be served. Nothing of it runs then.
        """
        asked, limits = job.asked, self.options.limits
        asked.refuse_unknown()
        if asked.model != self.model_name:
            raise RequestError(
                404,
                f"model {asked.model!r} is not served here; {self.model_name!r} is",
                param="model",
                code="model_not_found",
            )
        if self.draining:
            raise RequestError(503, "the server is shutting down", code="draining", retry_after=5)
        live = self.engine()
        self.metrics.follow(live)
        try:
            longest = live.engine.max_model_len
            params = asked.params(max_tokens=longest if max_tokens is None else max_tokens, logprobs=logprobs)
            limits.check_tokens(0, params.max_tokens if max_tokens is not None else 0)
            if limits.answer_tokens is not None and max_tokens is None:
                params = asked.params(max_tokens=limits.answer_tokens, logprobs=logprobs)
        except ValueError as error:
            raise RequestError(400, str(error), param=field_of(asked, str(error), "max_tokens")) from None
        more = len(job.prompts) * params.n
        if not job.prompts:
            raise RequestError(400, "prompt is empty: it must have at least one token", param="prompt")
        most = min(limits.requests, limits.queue)
        if more > most:
            message = f"prompt: {more} answers in one call, and {most} is the limit"
            raise RequestError(400, message, param="prompt")
        # The engine does not know yet of calls whose prompts are being tokenised.
        self._check_room(job.client, max(live.num_unfinished, self._clients.total()), more)
        self._count(job.client, more)
        try:
            for prompt, shown in zip(job.prompts, job.shown, strict=True):
                answers = await asyncio.to_thread(self._submit, live, prompt, params, asked.priority or 0)
                job.answers |= answers
                job.names.append(next(iter(answers)))
                self.file(job.names[-1], shown, params)
        except BaseException as error:
            self._count(job.client, -more)
            for name in job.names:
                live.abort(name)
            if isinstance(error, ValueError):
                field = field_of(asked, str(error), "prompt")
                raise RequestError(400, str(error), param=field) from None
            if isinstance(error, EngineStoppedError):
                raise RequestError(503, str(error), code="engine_stopped") from None
            raise
        return live

    def _check_room(self, client: str, everybody: int, more: int) -> None:
        limits = self.options.limits
        own = self._clients[client]
        if own + more > limits.requests:
            what = f"{own} requests of yours are under way, and {limits.requests} is the limit"
        elif everybody + more > limits.queue:
            what = f"{everybody} requests are under way, and {limits.queue} is the limit"
        else:
            return
        raise RequestError(429, what, code="rate_limit_exceeded", retry_after=1)

    def _count(self, client: str, more: int) -> None:
        """So many requests of a client more, or fewer, are under way."""
        self._clients[client] += more
        if not self._clients[client]:
            del self._clients[client]  # clients come and go for months

    def _submit(
        self, live: AsyncEngine, prompt: str | list[int], params: SamplingParams, priority: int
    ) -> dict[str, AsyncIterator[RequestOutput]]:
        """Hand a prompt in. Its answers are held on to from here on, for the engine forgets finished ones."""
        if isinstance(prompt, str) and self.options.limits.prompt_tokens is not None:
            prompt = list(live.engine.model.tokenizer.encode(prompt))
        if not isinstance(prompt, str):
            self.options.limits.check_tokens(len(prompt), 0)
        name = live.submit(prompt, params, priority=priority)
        return {answer: live.astream(answer) for answer in answer_ids(name, params.n)}

    # -- out --------------------------------------------------------------------------------------

    async def follow(self, live: AsyncEngine, job: Job) -> AsyncIterator[tuple[int, RequestOutput]]:
        """All answers of a call as they grow: (choice, snapshot). Returns when all are finished.

        Raises:
            RequestError: if one fails or is ended by somebody else.
        """
        end = job.began + self.options.request_seconds
        async with contextlib.aclosing(_merged(list(job.answers.values()))) as news:
            while True:
                try:
                    index, output = await _within(end - time.perf_counter(), anext(news))
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError:
                    job.status = 504
                    message = f"the answer took longer than {self.options.request_seconds:g} seconds"
                    raise RequestError(504, message, code="timeout") from None
                if output.finish_reason in ("error", "abort"):
                    error = _failed(output)
                    job.status = error.status
                    yield index, replace(output, finish_reason=None)  # what a slow reader has not seen yet
                    raise error
                yield index, output

    def let_go(self, live: AsyncEngine, job: Job) -> None:
        """End what is still under way of a call, and write its line to the log."""
        for name in job.names:
            live.abort(name)
        self._count(job.client, -len(job.answers))
        outputs = job.ordered
        first = [output.metrics.ttft for output in outputs if output.metrics.ttft is not None]
        line = {
            "id": job.format.head["id"],
            "requests": list(job.names),
            "client": job.client,
            "user": job.asked.user,
            "status": job.status,
            "stream": bool(job.asked.stream),
            "prompt_tokens": _prompt_tokens(outputs),
            "output_tokens": sum(len(output.token_ids) for output in outputs),
            "finish": [output.finish_reason for output in outputs],
            "ttft": round(min(first), 4) if first else None,
            "seconds": round(time.perf_counter() - job.began, 4),
        }
        if self.options.log_prompts:
            line["prompts"] = job.shown
        logger.info(json.dumps(line))

    async def whole(self, live: AsyncEngine, job: Job) -> dict[str, Any]:
        """The finished answers of a call as one object. Raises as `follow` does."""
        async for index, output in self.follow(live, job):
            job.outputs[index] = output
        job.status = 200
        choices = [job.format.choice(i, job.echoed(i), output) for i, output in enumerate(job.ordered)]
        return job.format.answer(choices, usage(job.ordered, _prompt_tokens(job.ordered)))

    async def events(self, live: AsyncEngine, job: Job) -> AsyncIterator[bytes]:
        """The answers of a call as server-sent events. What fails is said in the stream."""
        wants_usage = bool(job.asked.stream_options and job.asked.stream_options.include_usage)
        sent = [[0, 0] for _ in job.answers]  # characters of the text, and tokens, of each choice

        def event(choices: list[dict[str, Any]]) -> bytes:
            part = job.format.part(choices)
            return _event(part | {"usage": None} if wants_usage else part)

        try:
            for index in range(len(job.answers)):
                if (opening := job.format.first(index, job.echoed(index))) is not None:
                    yield event([opening])
            async for index, output in self.follow(live, job):
                job.outputs[index] = output
                characters, tokens = sent[index]
                text, entries = output.text[characters:], (output.logprobs or ())[tokens:]
                sent[index] = [len(output.text), tokens + len(entries)]
                offset = len(job.echoed(index)) + characters
                for choice in job.format.more(index, text, entries, offset, output.finish_reason):
                    yield event([choice])
            if wants_usage:
                used = usage(job.ordered, _prompt_tokens(job.ordered))
                yield _event(job.format.part([]) | {"usage": used})
            job.status = 200
        except RequestError as error:
            yield _event(error_object(error))
        yield _DONE


def _failed(output: RequestOutput) -> RequestError:
    if output.finish_reason == "error":
        return RequestError(500, output.error or "the request failed", code="engine_error")
    return RequestError(503, "the request was ended before its answer was complete", code="aborted")


def _prompt_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.prompt_token_ids) for output in outputs if output.index == 0)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _within(seconds: float, work: Awaitable[T]) -> T:
    """`asyncio.wait_for`, but a cancellation that comes with the result is not lost (before Python 3.12)."""
    task = asyncio.ensure_future(work)
    try:
        if not (await asyncio.wait({task}, timeout=max(seconds, 0)))[0]:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # else asyncio would report one that nobody came to read


async def _merged(
    streams: Sequence[AsyncIterator[RequestOutput]],
) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Snapshots of several answers, as they come. Whoever reads slowly gets fewer of them."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    news: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncIterator[RequestOutput]) -> None:
        async for output in stream:
            await news.put((index, output))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, output = await news.get()
            left -= output.finished
            yield index, output
    finally:
        for task in pumps:
            task.cancel()
