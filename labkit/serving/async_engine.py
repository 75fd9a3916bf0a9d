"""The engine on a thread of its own, so that many people can talk to it while it runs.

Only that thread touches the engine. Everybody else leaves a command in the inbox, which is emptied between
two steps, and reads what the last step published. Nobody ever waits for a step, except to hear its news.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from labkit.core.request import answer_ids
from labkit.outputs import RequestMetrics, RequestOutput
from labkit.sampling_params import MAX_N, SamplingParams, check_number
from labkit.trace.records import StepRecord

if TYPE_CHECKING:
    from labkit.core.request import Request
    from labkit.engine import Engine
    from labkit.outputs import FinishReason

logger = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests: it was closed, or a step failed. The message says which."""


class Progress(NamedTuple):
    """How far an answer is after the latest step."""

    text: str
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: FinishReason | None
    error: str | None


class _Answer:
    """One answer being written: the engine's own object, and what of it the last step made public."""

    __slots__ = ("length", "output", "reason", "text", "wakers")

    def __init__(self, output: RequestOutput) -> None:
        self.output = output
        self.length = 0  # tokens published; the engine may already be appending more
        self.text = ""
        self.reason: FinishReason | None = None
        self.wakers: list[Callable[[], None]] = []  # called once, at the next news

    def publish(self) -> None:
        output = self.output
        self.length, self.text, self.reason = len(output.token_ids), output.text, output.finish_reason

    def snapshot(self) -> RequestOutput:
        """A copy that never changes: the state at the end of a step, not in the middle of one."""
        output, length = self.output, self.length
        metrics = replace(output.metrics, token_times=output.metrics.token_times[:length])
        return replace(
            output,
            token_ids=output.token_ids[:length],
            text=self.text,
            finish_reason=self.reason,
            metrics=metrics,
            logprobs=None if output.logprobs is None else output.logprobs[:length],
        )


class AsyncEngine:
    """Runs an engine on a thread and lets any thread, or any coroutine, use it.

    Args:
        engine: to run; from now on only this object may call its `step`.
        keep_finished: how many finished answers to remember. Older ones are forgotten, so that an engine
            that runs for weeks does not grow.
    """

    def __init__(self, engine: Engine, *, keep_finished: int = 256) -> None:
        check_number("keep_finished", keep_finished, 1, float("inf"), whole=True)
        self.engine = engine
        self.failure: BaseException | None = None  # what a step raised, if one did
        self._keep_finished = keep_finished
        self._changed = threading.Condition()  # guards everything below
        self._inbox: list[Callable[[], None]] = []
        self._answers: dict[str, _Answer] = {}
        self._finished: deque[str] = deque()
        self._listeners: list[Callable[[StepRecord], None]] = []
        self._paused = False
        self._steps_wanted = 0  # single steps asked for while paused
        self._preview: StepRecord | None = None
        self._previewed = False  # whether `_preview` is of the state that the engine is in
        self._speed: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="labkit-engine", daemon=True)
        self._thread.start()

    # -- requests ---------------------------------------------------------------------------------

    @classmethod
    def build(cls, make: Callable[[], Engine]) -> AsyncEngine:
        """Build an engine on a thread that ends with that, and set it going. Raises what `make` raises.

        On a CPU, a thread that has computed keeps helpers for its next time. Were they kept by the thread
        that built the engine, the helpers of both would outnumber the cores, and those that the engine waits
        for would sleep at each product instead of staying awake: a third of its speed.
        """
        with ThreadPoolExecutor(1) as aside:
            return cls(aside.submit(make).result())

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Hand in a request and return its id at once. It joins the queue before the next step.

        Raises:
            ValueError: for a request that cannot be served, in the words of `Engine.make_request`.
            EngineStoppedError: if the engine was closed or has failed.
        """
        self._check_running()
        params = params or SamplingParams()
        request = self.engine.make_request(prompt, params, request_id=request_id, priority=priority)
        names = answer_ids(request.request_id, params.n)
        with self._changed:
            self._check_running()
            for name in names:
                if name in self._answers:
                    raise ValueError(f"request_id {name!r} is already in use")
            for index, name in enumerate(names):
                self._answers[name] = _Answer(_blank_output(request, name, index))
            self._inbox.append(lambda: self._enqueue(request, names))
            self._changed.notify_all()
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request at the next step boundary. False if it is unknown or already over."""
        with self._changed:
            answers = self._family(request_id)
            if self._closed or all(answer.reason is not None for answer in answers):
                return False
            self._inbox.append(lambda: self.engine.abort(request_id))
            self._changed.notify_all()
        return True

    def output(self, request_id: str) -> RequestOutput:
        """What an answer holds after the latest step, without waiting.

        Raises:
            KeyError: for an id that is unknown, or finished so long ago that it was forgotten.
        """
        with self._changed:
            return self._find(request_id).snapshot()

    def progress(self, request_id: str) -> Progress:
        """The little of an answer that a page shows as it grows: quicker than `output`; raises the same."""
        with self._changed:
            answer = self._find(request_id)
            output = answer.output
            return Progress(
                answer.text, answer.length, len(output.prompt_token_ids), answer.reason, output.error
            )

    def unfinished(self, request_id: str) -> bool:
        """Whether more is to come of an answer. False, too, for one that is unknown or was forgotten."""
        with self._changed:
            answer = self._answers.get(request_id)
            return answer is not None and answer.reason is None

    @property
    def num_unfinished(self) -> int:
        """How many answers are still to come or growing."""
        with self._changed:
            return sum(answer.reason is None for answer in self._answers.values())

    def stream(self, request_id: str) -> Iterator[RequestOutput]:
        """Snapshots of an answer as it grows, the finished one last. Blocks between them; raises as `output`.

        A consumer that is slow skips snapshots and gets the latest. One that leaves early costs nothing,
        and leaves the request running: `abort` ends it.
        """
        return self._stream(self._find(request_id))

    def astream(self, request_id: str) -> AsyncIterator[RequestOutput]:
        """`stream` for coroutines: waits without a thread. Raises the same."""
        return self._astream(self._find(request_id))

    def _stream(self, answer: _Answer) -> Iterator[RequestOutput]:
        seen = -1
        while True:
            news = threading.Event()
            snapshot = self._next(answer, seen, news.set)
            if snapshot is None:
                news.wait()
                continue
            yield snapshot
            if snapshot.finished:
                return
            seen = len(snapshot.token_ids)

    async def _astream(self, answer: _Answer) -> AsyncIterator[RequestOutput]:
        loop, seen = asyncio.get_running_loop(), -1
        while True:
            news = asyncio.Event()
            snapshot = self._next(answer, seen, lambda news=news: loop.call_soon_threadsafe(news.set))
            if snapshot is None:
                await news.wait()
                continue
            yield snapshot
            if snapshot.finished:
                return
            seen = len(snapshot.token_ids)

    def _next(self, answer: _Answer, seen: int, waker: Callable[[], None]) -> RequestOutput | None:
        """What is new since `seen` tokens, or None with the waker armed for the next news."""
        with self._changed:
            if answer.reason is None and answer.length <= seen:
                answer.wakers.append(waker)
                return None
            return answer.snapshot()

    # -- the clock --------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Stop before the next step. Requests can still be handed in."""
        with self._changed:
            self._paused = True
            self._changed.notify_all()

    def resume(self) -> None:
        """Go on after a pause."""
        with self._changed:
            self._paused, self._steps_wanted = False, 0
            self._changed.notify_all()

    def single_step(self) -> None:
        """Pause, if need be, and run one step more; nothing happens when there is nothing to do."""
        with self._changed:
            self._paused = True
            self._steps_wanted += 1
            self._changed.notify_all()

    @property
    def preview(self) -> StepRecord | None:
        """While paused: what the next step would do (see `Engine.preview`). None if there is none to come."""
        return self._preview if self._paused else None

    @property
    def speed(self) -> float | None:
        """How many steps a second at most; None is flat out."""
        return self._speed

    @speed.setter
    def speed(self, steps_per_second: float | None) -> None:
        if steps_per_second is not None:
            check_number("speed", steps_per_second, 0.01, 1e6)
        with self._changed:
            self._speed = steps_per_second
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether there is something to do, by the time you read this perhaps no longer."""
        return not self._closed and (bool(self._inbox) or self.engine.has_unfinished)

    # -- what happened ----------------------------------------------------------------------------

    def records(self, after: int = -1) -> tuple[StepRecord, ...]:
        """The records of the steps after step `after` that the trace still holds, without waiting."""
        records = self.engine.trace.records  # a list that only grows, or is replaced by another
        return tuple(records[bisect.bisect_right(records, after, key=lambda record: record.step) :])

    def listen(
        self, listener: Callable[[StepRecord], None], *, last: int | None = None
    ) -> Callable[[], None]:
        """Call `listener(record)` for every step, those already in the trace first.

        It runs on the engine's thread, so it must be quick. One that raises is logged and let go.

        Args:
            listener: to call.
            last: how many of the steps already in the trace to tell (None: all). Those before them become
                one record, told first, that only says who held which page then.

        Returns:
            A function, for any thread, after which the listener is called no more.
        """
        wanted = True

        def hear(record: StepRecord) -> None:  # a name of its own for each call of `listen`
            if wanted:
                listener(record)

        def start() -> None:
            self._listeners.append(hear)
            for record in self._history(last):
                self._tell(hear, record)

        def stop() -> None:
            nonlocal wanted
            wanted = False
            self._command(lambda: self._deafen(hear))

        self._command(start)
        return stop

    def _history(self, last: int | None) -> list[StepRecord]:
        trace = self.engine.trace
        records = trace.records
        if last is None or len(records) <= last:
            return list(records)
        before = records[len(records) - last - 1]
        return [trace.state(before.step, after=True).as_record(before), *records[len(records) - last :]]

    def _deafen(self, hear: Callable[[StepRecord], None]) -> None:
        if hear in self._listeners:  # not if it failed before
            self._listeners.remove(hear)

    def _command(self, command: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps."""
        with self._changed:
            self._inbox.append(command)
            self._changed.notify_all()

    def _tell(self, listener: Callable[[StepRecord], None], record: StepRecord) -> None:
        if listener not in self._listeners:
            return
        try:
            listener(record)
        except Exception:
            logger.exception("a listener failed at step %d and hears no more", record.step)
            self._deafen(listener)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the thread after the step it is in. Requests in flight end with reason "abort"."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            begun = 0.0  # when the latest step began
            while (commands := self._wait(begun)) is not None:
                self._preview, self._previewed = None, False
                for command in commands:
                    command()
                if not commands:
                    begun = time.perf_counter()
                    self._after(self.engine.step())
        except BaseException as error:  # whatever it is, nobody may be left waiting
            logger.exception("the engine failed")
            self.failure = error
            self._end_all("error", f"the engine failed: {type(error).__name__}: {error}")
        else:
            self._end_all("abort", "the engine was closed")

    def _wait(self, begun: float) -> list[Callable[[], None]] | None:
        """Sleep until there are commands to obey, or (an empty list) a step to run. None once closed."""
        with self._changed:
            while not self._closed:
                left = begun + 1 / self._speed - time.perf_counter() if self._speed else 0.0
                if self._inbox:
                    commands, self._inbox = self._inbox, []
                    return commands
                if not self.engine.has_unfinished:
                    self._steps_wanted = 0  # a step asked for in vain is not owed to the next request
                    self._changed.wait()
                elif self._paused and self._steps_wanted:
                    self._steps_wanted -= 1
                    return []
                elif self._paused and not self._previewed:
                    return [self._look_ahead]
                elif self._paused:
                    self._changed.wait()
                elif left > 0:
                    self._changed.wait(left)
                else:
                    return []
            return None

    def _look_ahead(self) -> None:
        try:
            self._preview = self.engine.preview()
        except Exception:  # a scheduler that somebody wrote: the step itself will say what is wrong
            logger.exception("the next step could not be planned ahead")
        self._previewed = True

    def _enqueue(self, request: Request, names: Sequence[str]) -> None:
        try:
            self.engine.enqueue(request)
        except ValueError as error:  # its own fault, and nobody else's
            self._end(names, "error", str(error))
            return
        with self._changed:
            for name in names:
                self._answers[name].output = self.engine.outputs[name]

    def _after(self, record: StepRecord) -> None:
        """Publish what a step did, and wake those who wait for it."""
        names = dict.fromkeys((*record.requests, *(finish.request_id for finish in record.finished)))
        with self._changed:
            for name in names:
                answer = self._answers.get(name)
                if answer is None:
                    continue
                answer.output = self.engine.outputs.get(name, answer.output)
                self._publish(answer)
        for listener in tuple(self._listeners):
            self._tell(listener, record)

    def _publish(self, answer: _Answer) -> None:
        was_running = answer.reason is None
        answer.publish()
        for wake in answer.wakers:
            with contextlib.suppress(RuntimeError):  # a coroutine whose event loop is gone
                wake()
        answer.wakers.clear()
        if was_running and answer.reason is not None:
            self._finished.append(answer.output.request_id)
        while len(self._finished) > self._keep_finished:
            old = self._finished.popleft()
            self._answers.pop(old, None)
            self.engine.outputs.pop(old, None)

    def _end(self, names: Sequence[str], reason: FinishReason, error: str) -> None:
        with self._changed:
            for answer in [self._answers[name] for name in names]:
                if answer.reason is None:
                    answer.output.error = error
                    answer.output.finish_reason = reason
                    self._publish(answer)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        with self._changed:
            self._closed = True
            self._end(tuple(self._answers), reason, error)

    # -- small things -----------------------------------------------------------------------------

    def _check_running(self) -> None:
        if self.failure is not None:
            raise EngineStoppedError(f"the engine failed: {type(self.failure).__name__}: {self.failure}")
        if self._closed:
            raise EngineStoppedError("the engine was closed")

    def _find(self, request_id: str) -> _Answer:
        try:
            return self._answers[request_id]
        except KeyError:
            raise KeyError(f"no request {request_id!r}, or it finished too long ago") from None

    def _family(self, request_id: str) -> list[_Answer]:
        """The answers to one prompt: `n` of them, of which the first bears the request's own id."""
        named = [(i, self._answers.get(name)) for i, name in enumerate(answer_ids(request_id, MAX_N))]
        return [a for i, a in named if a is not None and (i == 0 or a.output.index == i)]


def _blank_output(request: Request, name: str, index: int) -> RequestOutput:
    """Stands for an answer until the engine has seen the request."""
    return RequestOutput(
        request_id=name,
        prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
        token_ids=[],
        text="",
        finish_reason=None,
        metrics=RequestMetrics(arrival_time=time.perf_counter()),
        index=index,
    )
