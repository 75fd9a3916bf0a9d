"""The engine on a thread of its own, so that many people can use it while it runs.

Only that thread touches the engine. All others leave a command in the inbox, which the thread empties between
two steps, and read what the latest step published. Nobody waits for a step unless they ask for its news.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.outputs import FinishReason, RequestMetrics, RequestOutput
from labkit.sampling_params import SamplingParams, check_number
from labkit.serving.answer import Answer, AnswerProgress, Cursor, Piece
from labkit.serving.aside import aside
from labkit.trace.records import StepRecord

if TYPE_CHECKING:
    from labkit.core.request import Request
    from labkit.engine import Engine

logger = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests: it was closed, or a step failed. The message says which."""


@dataclass(eq=False)
class _Subscription:
    subscriber: Callable[[StepRecord], None]
    knows_past: bool = False  # whether it has been told the steps that were in the trace when it came


class AsyncEngine:
    """Runs an engine on a thread and lets any thread, or any coroutine, use it.

    Args:
        engine: the engine; from now on only this object may call its `step`.
        keep_finished: the number of finished answers to remember; older ones are forgotten, to save memory.
    """

    def __init__(self, engine: Engine, *, keep_finished: int = 256) -> None:
        check_number("keep_finished", keep_finished, 1, math.inf, whole=True)
        self.engine = engine
        self.failure: BaseException | None = None  # what a step raised, if one did
        self._keep_finished = keep_finished
        self._changed = threading.Condition()  # guards what follows, and is told when it changes
        self._inbox: list[Callable[[], object]] = []
        self._answers: dict[str, Answer] = {}
        self._finished: deque[str] = deque()
        self._subscriptions: dict[_Subscription, None] = {}  # in the order in which they came
        self._paused = False
        self._steps_wanted = 0  # single steps asked for while paused
        self._preview: StepRecord | None = None
        self._previewed = False  # whether `_preview` is of the state that the engine is in
        self._speed: float | None = None
        self._closed = False
        self._why_closed = "the engine was closed"
        self._thread = threading.Thread(target=self._run, name="labkit-engine", daemon=True)
        self._thread.start()

    @classmethod
    def build(cls, make: Callable[[], Engine]) -> AsyncEngine:
        """Build an engine on a thread that ends afterwards, and start it. Raises what `make` raises.

        On a CPU, a thread that has computed keeps its helper threads. Those of the builder and those of the
        engine's thread together would outnumber the cores, and that costs the engine a third of its speed.
        """
        return cls(aside(make))

    # -- requests ---------------------------------------------------------------------------------

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
        request = self.engine.make_request(prompt, params, request_id=request_id, priority=priority)
        self.start(request)
        return request.request_id

    def start(self, request: Request) -> list[Answer]:
        """Hand in a request that `Engine.make_request` has made, and return its `n` answers at once.

        Answers can be read as long as the caller holds them, also when the engine has forgotten them.
        Raises as `submit` does.
        """
        members = (request, *request.children)
        ids, now = tuple(member.request_id for member in members), time.perf_counter()
        answers = []
        for index, member in enumerate(members):
            prompt = member.token_ids[: member.num_prompt_tokens]
            blank = RequestOutput(member.request_id, prompt, [], "", None, RequestMetrics(now), index=index)
            answers.append(Answer(blank, ids))
        with self._changed:
            if self._closed:
                raise EngineStoppedError(self._why_closed)
            for name in ids:
                if name in self._answers:
                    raise ValueError(f"request_id {name!r} is already in use")
            self._answers |= zip(ids, answers, strict=True)
            self._inbox.append(lambda: self._enqueue(request, answers))
            self._changed.notify_all()
        return answers

    def abort(self, request_id: str) -> bool:
        """End a request, with all its answers, before the next step. False if it is unknown or over."""
        with self._changed:
            answer = self._answers.get(request_id)
            if self._closed or answer is None or not any(map(self.unfinished, answer.ends_with)):
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

    def progress(self, request_id: str) -> AnswerProgress:
        """The part of an answer that a page shows while it grows, without copies. Raises as `output` does."""
        with self._changed:
            return self._find(request_id).progress()

    def unfinished(self, request_id: str) -> bool:
        """Whether an answer still grows. Also False for one that is unknown or was forgotten."""
        with self._changed:
            answer = self._answers.get(request_id)
            return answer is not None and not answer.finished

    @property
    def num_unfinished(self) -> int:
        """The number of answers that wait or grow."""
        with self._changed:
            return sum(not answer.finished for answer in self._answers.values())

    # -- following answers --------------------------------------------------------------------------

    def stream(self, request_id: str) -> Iterator[RequestOutput]:
        """Snapshots of an answer as it grows, the finished one last. Blocks between them; raises as `output`.

        A slow consumer skips snapshots and gets the latest. After one that leaves early the request goes on:
        `abort` ends it.
        """
        return self._find(request_id).snapshots(self._changed)

    async def follow(
        self, answers: Sequence[Answer], *, seconds: float = math.inf
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """What is new of some answers, each with its number, until all are finished. Waits without a thread.

        A slow consumer gets fewer and larger pieces: nothing is kept but the answers themselves.

        Args:
            answers: what `start` returned, for one request or for several.
            seconds: the time after which this ends with `asyncio.TimeoutError`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        wake = functools.partial(loop.call_soon_threadsafe, news.set)
        end = loop.time() + seconds
        alarm = loop.call_at(end + 0.05, news.set)  # certainly after the end: a timer may ring a bit early
        cursors = [Cursor(index, answer) for index, answer in enumerate(answers)]
        try:
            while cursors:
                if loop.time() >= end:
                    raise asyncio.TimeoutError
                news.clear()
                with self._changed:
                    pieces = [(cursor.index, piece) for cursor in cursors if (piece := _read(cursor))]
                    for cursor in () if pieces else cursors:
                        cursor.answer.wakers.add(wake)
                for numbered in pieces:
                    yield numbered
                cursors = [cursor for cursor in cursors if not cursor.at_end]
                if not pieces:
                    await news.wait()
        finally:
            alarm.cancel()
            with self._changed:
                for cursor in cursors:
                    cursor.answer.wakers.discard(wake)

    # -- the clock --------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether the engine waits between two steps until `resume` or `single_step`."""
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
        """Pause, if the engine is not paused yet, and run one more step if there is anything to do."""
        with self._changed:
            self._paused = True
            self._steps_wanted += 1
            self._changed.notify_all()

    @property
    def preview(self) -> StepRecord | None:
        """While paused: what the next step would do (see `Engine.preview`), if there is anything to do."""
        return self._preview if self._paused else None

    @property
    def speed(self) -> float | None:
        """The highest number of steps a second; None sets no limit."""
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
        """Whether there is something to do; by the time you read this, that may have changed."""
        return not self._closed and (bool(self._inbox) or self.engine.has_unfinished)

    # -- records of steps ---------------------------------------------------------------------------

    def records(self, after: int = -1) -> tuple[StepRecord, ...]:
        """The records of the steps after step `after` that the trace still holds, without waiting."""
        records = self.engine.trace.records  # a list that only grows, or is replaced by another
        return tuple(records[bisect.bisect_right(records, after, key=lambda record: record.step) :])

    def subscribe(
        self, subscriber: Callable[[StepRecord], None], *, last: int | None = None
    ) -> Callable[[], None]:
        """Call `subscriber(record)` for every step, beginning with those already in the trace.

        It runs on the engine's thread, so it must be quick. One that raises is logged and called no more.

        Args:
            subscriber: the function to call.
            last: the number of steps already in the trace to begin with (None: all). Those before them are
                summed up in one record that only says who held which block then; it comes first.

        Returns:
            A function that unsubscribes, from any thread: after it the subscriber is called no more.
        """
        subscription = _Subscription(subscriber)

        def catch_up() -> None:  # between two steps, so that none is missed or told twice
            for record in self._history(last):
                self._tell(subscription, record)
            subscription.knows_past = True

        with self._changed:
            self._subscriptions[subscription] = None
            self._inbox.append(catch_up)
            self._changed.notify_all()

        def unsubscribe() -> None:
            self._subscriptions.pop(subscription, None)

        return unsubscribe

    def _history(self, last: int | None) -> list[StepRecord]:
        trace, records = self.engine.trace, self.engine.trace.records
        if last is None or len(records) <= last:
            return list(records)
        before, *latest = records[len(records) - last - 1 :]
        return [trace.state(before.step, after=True).as_record(before), *latest]

    def _tell(self, subscription: _Subscription, record: StepRecord) -> None:
        if subscription not in self._subscriptions:
            return
        try:
            subscription.subscriber(record)
        except Exception:
            logger.exception("a subscriber failed at step %d and is called no more", record.step)
            self._subscriptions.pop(subscription, None)

    def close(self) -> None:
        """Stop the thread after the step it is in. Requests under way end with reason "abort"."""
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
        except BaseException as error:  # any error at all: nobody may be left waiting
            logger.exception("the engine failed")
            self.failure = error
            self._why_closed = f"the engine failed: {type(error).__name__}: {error}"
            self._end_all("error")
        else:
            self._end_all("abort")

    def _wait(self, begun: float) -> list[Callable[[], object]] | None:
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
        except Exception:  # a learner's scheduler: the step itself will say what is wrong
            logger.exception("the next step could not be planned ahead")
        self._previewed = True

    def _enqueue(self, request: Request, answers: Sequence[Answer]) -> None:
        try:
            self.engine.enqueue(request)
        except ValueError as error:  # this request is at fault, and no other
            self._end(answers, "error", str(error))
            return
        with self._changed:
            for answer in answers:
                answer.output = self.engine.outputs[answer.output.request_id]

    def _after(self, record: StepRecord) -> None:
        """Publish what a step did, and wake those who wait for it."""
        names = dict.fromkeys((*record.requests, *(finish.request_id for finish in record.finished)))
        with self._changed:
            self._publish(self._answers[name] for name in names if name in self._answers)
        for subscription in tuple(self._subscriptions):
            if subscription.knows_past:
                self._tell(subscription, record)

    def _publish(self, answers: Iterable[Answer]) -> None:
        """Show what the engine has made of some answers, and forget the oldest of those that are over."""
        wakers: set[Callable[[], object]] = set()
        for answer in answers:
            output = answer.output
            answer.text, answer.num_tokens = output.text, len(output.token_ids)
            wakers |= answer.wakers
            answer.wakers.clear()
            if answer.finished or output.finish_reason is None:
                continue
            answer.finished = True
            if all(self._answers[name].finished for name in answer.family):
                self._finished.extend(answer.family)  # together: an abort of the first must find the others
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # the event loop of a coroutine is gone
                wake()
        while len(self._finished) > self._keep_finished:
            old = self._finished.popleft()
            self._answers.pop(old, None)
            self.engine.outputs.pop(old, None)

    def _end(self, answers: Iterable[Answer], reason: FinishReason, error: str) -> None:
        with self._changed:
            ended = [answer for answer in answers if not answer.finished]
            for answer in ended:
                answer.output.error, answer.output.finish_reason = error, reason
            self._publish(ended)

    def _end_all(self, reason: FinishReason) -> None:
        with self._changed:
            self._closed = True
            self._end(tuple(self._answers.values()), reason, self._why_closed)

    def _find(self, request_id: str) -> Answer:
        try:
            return self._answers[request_id]
        except KeyError:
            raise KeyError(f"no request {request_id!r}, or it finished too long ago") from None


def _read(cursor: Cursor) -> Piece | None:
    """What is new since the cursor, which moves on; None if nothing is. The engine's lock must be held."""
    answer, start, seen = cursor.answer, cursor.characters, cursor.num_tokens
    if not answer.finished and answer.num_tokens == seen:
        return None
    cursor.characters, cursor.num_tokens, cursor.at_end = len(answer.text), answer.num_tokens, answer.finished
    return Piece(
        text=answer.text[start:],
        token_ids=answer.output.token_ids[seen : answer.num_tokens],
        logprobs=(answer.output.logprobs or [])[seen : answer.num_tokens],
        finish_reason=answer.output.finish_reason if answer.finished else None,
        error=answer.output.error,
    )
