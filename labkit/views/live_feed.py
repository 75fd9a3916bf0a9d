"""What the live pictures need, read from the trace one step at a time and packed for a browser.

`Feed` takes in every step and keeps the last ones as rows that `live_feed.js` can draw. A browser that knows
step 140 is told only what is new since then. It is told from a published frame, and a new frame is made at
most twenty times a second, so that a class full of browsers costs the engine little more than one.
"""

from __future__ import annotations

import base64
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from labkit.trace.memory_use import wasted_slots
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord, TraceMeta
from labkit.views import style
from labkit.views.events import KEPT, events_of
from labkit.views.facts.joins import Joins
from labkit.views.live_numbers import Numbers
from labkit.views.wire import (
    Blocked,
    Elsewhere,
    Ended,
    Event,
    FarPool,
    Held,
    Joined,
    Lane,
    Pictures,
    Plan,
    PlannedRow,
    Preempted,
    Queued,
    Shared,
    Span,
    Step,
    Table,
)

WINDOW = 200  # steps that are kept and drawn
WAITING, PREEMPTED, IDLE = "w", "x", "i"  # kinds of span beside the trace's p, c, d, i
Decode = Callable[[list[int]], str]  # a tokenizer's


class _GrowingLane:
    """One request's row in the timeline, while steps are added to it."""

    __slots__ = ("arrived", "color", "ended", "label", "prompt_tokens", "reason", "request", "spans")

    def __init__(self, request: str, arrived: int, prompt_tokens: int) -> None:
        self.request = request
        self.label, self.color = looks(request)
        self.arrived = arrived
        self.prompt_tokens = prompt_tokens
        self.ended = -1
        self.reason = ""
        self.spans: deque[Span] = deque()

    def extend(self, kind: str, step: int, tokens: int = 0, drafted: int = 0, accepted: int = 0) -> None:
        """Add a step: to the latest span if every step of that was like this one, else as a new span."""
        span = self.spans[-1] if self.spans else None
        if span and span.kind == kind != PREEMPTED and span.last == step - 1:
            steps = step - span.first
            if (span.drafted, span.accepted) == (drafted * steps, accepted * steps):
                drafts = drafted * (steps + 1), accepted * (steps + 1)
                self.spans[-1] = Span(kind, span.first, step, span.tokens + tokens, *drafts)
                return
        self.spans.append(Span(kind, step, step, tokens, drafted, accepted))

    def row(self) -> Lane:
        """The lane as it is now, for good."""
        facts = self.request, self.label, self.color, self.arrived, self.prompt_tokens
        return Lane(*facts, self.ended, self.reason, tuple(self.spans))


@dataclass(frozen=True)
class Frame:
    """All that is known after one step. It never changes, so readers need no lock."""

    step: int
    first: int  # the oldest step that it holds
    made: float
    tables: tuple[Table, ...]
    cached: str  # a bit for each block, base64
    lanes: tuple[Lane, ...]
    steps: tuple[Step, ...]
    events: tuple[Event, ...]
    queue: tuple[str, ...]  # in the order in which they will be admitted
    held: tuple[Held, ...]
    elsewhere: tuple[Elsewhere, ...]
    far: FarPool | None  # None: no other engine computes prompts
    joins: tuple[Joined, ...]
    joins_changed: int  # the step in which they did
    numbers: dict[str, Any]


class Feed:
    """Turns step records into what a browser draws.

    Args:
        meta: sizes and settings of the engine whose records come in.
        min_interval: seconds between two frames; the next frame shows the steps in between.
        speculative: what drafts, as in `EngineConfig`.
    """

    def __init__(
        self, meta: TraceMeta, *, min_interval: float = 0.05, speculative: str | None = None
    ) -> None:
        self.meta = meta
        self.speculative = speculative
        self.name = uuid.uuid4().hex[:8]  # a browser that outlives the engine notices that this changed
        self._min_interval = min_interval
        self._lock = threading.Lock()  # of all that follows, but for the frame
        self._state = PoolState(meta.block_size)
        self._cached = bytearray(-(-meta.num_blocks // 8))  # of the state: a bit for each block
        self._lanes: dict[str, _GrowingLane] = {}
        self._ended: deque[_GrowingLane] = deque()
        self._steps: deque[Step] = deque(maxlen=WINDOW)
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._joins = Joins()
        self._numbers = Numbers()
        self._held_back = ""  # the reason that was given last for drafting no more
        self._step = -1
        self._frame = Frame(-1, 0, 0.0, (), "", (), (), (), (), (), (), None, (), -1, self._numbers.pack())

    # -- steps in ---------------------------------------------------------------------------------

    def append(self, record: StepRecord) -> None:
        """Take in the next step. This is quick, because it runs on the engine's thread."""
        with self._lock:
            self._state.begin(record)
            self._state.end(record)
            for block in record.evicted:
                self._cached[block >> 3] &= ~(1 << (block & 7))
            for block in record.published:
                self._cached[block >> 3] |= 1 << (block & 7)
            self._extend_lanes(record)
            self._forget(record.step - WINDOW)
            self._steps.append(self._count(record))
            self._numbers.append(record)
            self._joins.append(record)
            self._events.extend(events_of(record, self._held_back))
            self._held_back = record.held_back or self._held_back
            self._step = record.step

    def _extend_lanes(self, record: StepRecord) -> None:
        step = record.step
        for arrival in record.arrived:
            name = arrival.request_id
            self._lanes[name] = _GrowingLane(name, step, arrival.num_prompt_tokens)
        for name, blocks in record.preempted:
            self._lane(name, step).extend(PREEMPTED, step, len(blocks))
        if record.drafted:
            for row in record.rows:
                drafts = len(row.drafted), row.num_accepted
                self._lane(row.request_id, step).extend(row.kind[0], step, row.num_tokens, *drafts)
        else:
            for name, kind, num_tokens in zip(record.requests, record.kinds, record.num_tokens, strict=True):
                self._lane(name, step).extend(kind, step, num_tokens)
        for name in self._state.tables.keys() - set(record.requests):
            self._lane(name, step).extend(IDLE, step)  # it has a seat, and got nothing of the budget
        for name in self._state.waiting:
            self._lane(name, step).extend(WAITING, step)
        for name, reason, _ in record.finished:
            lane = self._lane(name, step)
            lane.ended, lane.reason = step, reason
            self._ended.append(lane)

    def _lane(self, request: str, step: int) -> _GrowingLane:
        lane = self._lanes.get(request)
        if lane is None:  # it arrived before the first record that came in
            lane = self._lanes[request] = _GrowingLane(request, step, 0)
        return lane

    def _forget(self, horizon: int) -> None:
        """Drop what is older than the window, so that a page that runs for weeks does not grow."""
        while self._ended and self._ended[0].ended <= horizon:
            lane = self._ended.popleft()
            if self._lanes.get(lane.request) is lane:  # else the name is in use again
                del self._lanes[lane.request]
        for lane in self._lanes.values():
            while lane.spans and lane.spans[0].last <= horizon:
                lane.spans.popleft()

    def _count(self, record: StepRecord) -> Step:
        ended = sum(finish.request_id in record.requests for finish in record.finished)
        return Step(
            step=record.step,
            seconds=round(record.seconds, 6),
            sampled=sum(map(len, record.sampled)),
            computed=sum(record.num_tokens),
            used=self.meta.num_blocks - record.free_blocks,
            running=len(self._state.tables) + ended,
            waiting=record.waiting,
            blocked=record.blocked and Blocked(*record.blocked),
            wasted=wasted_slots(self._state),
            drafted=record.total_drafted if record.drafted else 0,
            accepted=record.total_accepted if record.drafted else 0,
            sent_in_layers=record.sent_in_layers,
            sent_elsewhere=record.sent_elsewhere,
            sending=round(record.sending, 6),
        )

    # -- pictures out -----------------------------------------------------------------------------

    def frame(self) -> Frame:
        """All there is to draw at present, without waiting for a step."""
        frame = self._frame
        if frame.step == self._step or time.monotonic() - frame.made < self._min_interval:
            return frame
        with self._lock:
            state = self._state
            self._frame = Frame(
                step=self._step,
                first=self._steps[0].step if self._steps else 0,
                made=time.monotonic(),
                tables=tuple(
                    Table(name, state.computed.get(name, 0), tuple(table))
                    for name, table in state.tables.items()
                ),
                cached=base64.b64encode(self._cached).decode("ascii"),
                lanes=tuple(lane.row() for lane in self._lanes.values()),
                steps=tuple(self._steps),
                events=tuple(self._events),
                held=tuple(Held(*pair) for pair in state.held.items()),
                elsewhere=tuple(
                    Elsewhere(name, *looks(name), moved.place, moved.amount)
                    for name, moved in state.elsewhere.items()
                ),
                far=state.other_pool
                and FarPool(
                    state.other_pool.num_blocks, tuple(Table(*held) for held in state.other_pool.tables)
                ),
                queue=tuple(state.queue),
                joins=self._joins.rows(),
                joins_changed=self._joins.changed,
                numbers=self._numbers.pack(),
            )
            return self._frame

    def pictures(self, name: str = "", after: int = -1, frame: Frame | None = None) -> Pictures:
        """What is new since step `after` of the feed called `name`, ready for JSON, without waiting for a
        step.

        An unknown name, or a step that is no longer held, is answered with everything there is, marked
        `full` and with the `meta` of the trace. An earlier `frame` can be told in place of the present one.
        """
        frame = frame or self.frame()
        full = name != self.name or after > frame.step or after + 1 < frame.first
        answer: Pictures = {"feed": self.name, "step": frame.step}
        if full:
            after = -1
            answer |= {"full": True, "meta": asdict(self.meta), "palette": style.PALETTE, "window": WINDOW}
            if self.speculative:
                answer["speculative"] = self.speculative
        if full or frame.step > after:
            answer |= {
                "tables": frame.tables,
                "cached": frame.cached,
                "lanes": [part for lane in frame.lanes if (part := _since(lane, after))],
                "steps": [step for step in frame.steps if step.step > after],
                "events": [event for event in frame.events if event.step > after],
                "queue": frame.queue,
                "held": frame.held,
                "numbers": frame.numbers,
            }
            if frame.far:
                answer |= {"elsewhere": frame.elsewhere, "far": frame.far}
        if full or frame.joins_changed > after:
            answer["joins"] = frame.joins
        return answer

    def preview(self, record: StepRecord, decode: Decode | None = None) -> Plan | None:
        """The step to come, as `Engine.preview` foresees it, ready for JSON; None if it is not the next one.

        With `decode`, drafts are told as text too.
        """
        with self._lock:
            if record.step != self._step + 1:
                return None
            state = self._state.copy()
        before = state.tables.keys() | state.waiting.keys()
        state.begin(record)
        taken: dict[str, list[int]] = {}
        for name, blocks in record.taken:
            taken.setdefault(name, []).extend(blocks)
        rows = []
        for row in record.rows:
            rows.append(
                PlannedRow(
                    row.request_id,
                    *looks(row.request_id),
                    kind=row.kind[0],
                    start=row.start,
                    tokens=row.num_tokens,
                    taken=taken.get(row.request_id, []),
                    drafted=len(row.drafted),
                    drafts=words_of(row.drafted, decode),
                )
            )
        return {
            "step": record.step,
            "rows": rows,
            "shared": [
                Shared(a.request_id, a.num_cached_tokens, a.shared) for a in record.admitted if a.shared
            ],
            "admitted": [admission.request_id for admission in record.admitted],
            "preempted": [Preempted(name, *looks(name), len(blocks)) for name, blocks in record.preempted],
            "ended": [Ended(name, *looks(name), reason) for name, reason, _ in record.finished],
            "evicted": len(record.evicted),
            "queue": [Queued(name, *looks(name), name not in before) for name in state.queue],
            "blocked": record.blocked and Blocked(*record.blocked),
            "free": record.free_blocks,
            "held_back": record.held_back,
        }


def _since(lane: Lane, after: int) -> Lane | None:
    """The part of a lane that is newer than step `after`, or None if there is none."""
    spans = tuple(span for span in lane.spans if span.last > after)
    return lane._replace(spans=spans) if spans or lane.ended > after else None


def words_of(tokens: Sequence[int], decode: Decode | None) -> list[str]:
    """Each token as text."""
    return [decode([token]) for token in tokens] if decode else []


def pack_bits(blocks: Iterable[int], num_blocks: int) -> str:
    """A bit for each block, set for those among `blocks`, lowest first, in base64."""
    bits = bytearray(-(-num_blocks // 8))
    for block in blocks:
        bits[block >> 3] |= 1 << (block & 7)
    return base64.b64encode(bits).decode("ascii")


def looks(request_id: str) -> tuple[str, int]:
    """A request's short name, and its place in the palette."""
    return style.label(request_id, 6), style.color_index(request_id)
