"""What the live pictures need, read from the trace one step at a time and packed for a browser.

`Feed` hears every step and keeps the last ones in a shape that `canvas.js` can draw. A browser is told what
is new since step 140, say, and just that. What it is told comes from one published frame, which is made at
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
from pathlib import Path
from typing import Any

from labkit.trace.memory_use import wasted_slots
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord, TraceMeta
from labkit.views import events, style
from labkit.views.live_numbers import Numbers

WINDOW = 200  # steps that are kept and drawn
WAITING, PREEMPTED, IDLE = "w", "x", "i"  # kinds of span beside the trace's p, c, d, i
Decode = Callable[[list[int]], str]  # a tokenizer's


class _Lane:
    """One request's row in the timeline: spans of [kind, first step, last step, tokens computed].

    A span with drafts has how many there were, and how many were right, at its end.
    """

    __slots__ = ("arrived", "color", "ended", "label", "num_prompt_tokens", "reason", "request_id", "spans")

    def __init__(self, request_id: str, arrived: int, num_prompt_tokens: int) -> None:
        self.request_id = request_id
        self.label = style.label(request_id, 6)
        self.color = style.color_index(request_id)
        self.arrived = arrived
        self.num_prompt_tokens = num_prompt_tokens
        self.ended = -1
        self.reason = ""
        self.spans: deque[list[Any]] = deque()

    def extend(self, kind: str, step: int, num_tokens: int = 0, drafts: tuple[int, ...] = ()) -> None:
        last = self.spans[-1] if self.spans else None
        if last and last[0] == kind and last[2] == step - 1 and kind != PREEMPTED:
            steps = step - last[1]
            if last[4:] == [count * steps for count in drafts]:  # each step was like this one
                last[2:] = [step, last[3] + num_tokens, *(count * (steps + 1) for count in drafts)]
                return
        self.spans.append([kind, step, step, num_tokens, *drafts])

    def pack(self) -> tuple[Any, ...]:
        facts = (self.request_id, self.label, self.color, self.arrived, self.num_prompt_tokens)
        return (*facts, self.ended, self.reason, tuple(map(tuple, self.spans)))


@dataclass(frozen=True)
class Frame:
    """All that is known after one step. Immutable, so readers need no lock."""

    step: int
    first: int  # the oldest step that it holds
    made: float
    tables: tuple[tuple[str, int, tuple[int, ...]], ...]  # request, tokens in the cache, its pages
    cached: str  # a bit for each page, base64
    lanes: tuple[tuple[Any, ...], ...]
    steps: tuple[tuple[Any, ...], ...]
    events: tuple[events.Event, ...]
    queue: tuple[str, ...]  # in the order in which they will be admitted
    held: tuple[tuple[str, str], ...]  # waits for the prompt of that other request
    numbers: dict[str, Any]


class Feed:
    """Turns step records into what a browser draws.

    Args:
        meta: of the trace whose records come in.
        min_interval: seconds between two frames; steps in between are seen in the next one.
        speculative: who drafts, as in `EngineConfig`.
    """

    def __init__(
        self, meta: TraceMeta, *, min_interval: float = 0.05, speculative: str | None = None
    ) -> None:
        self.meta = meta
        self.speculative = speculative
        self.name = uuid.uuid4().hex[:8]  # a browser that outlives the engine notices that this changed
        self._min_interval = min_interval
        self._lock = threading.Lock()
        self._state = PoolState(meta.block_size)
        self._lanes: dict[str, _Lane] = {}
        self._ended: deque[_Lane] = deque()
        self._steps: deque[tuple[Any, ...]] = deque(maxlen=WINDOW)
        self._events: deque[events.Event] = deque(maxlen=events.KEPT)
        self._numbers = Numbers()
        self._held_back = ""  # what was said last of why no more is drafted
        self._step = -1
        self._frame = Frame(-1, 0, 0.0, (), "", (), (), (), (), (), self._numbers.pack())

    def append(self, record: StepRecord) -> None:
        """Take in the next step. Quick: it runs on the engine's thread."""
        with self._lock:
            self._state.begin(record)
            self._extend_lanes(record)
            self._state.end(record)
            self._count(record)
            self._numbers.append(record)
            self._events.extend(events.events_of(record, self._held_back))
            self._held_back = record.held_back or self._held_back
            self._step = record.step
            self._forget(record.step - WINDOW)

    def _extend_lanes(self, record: StepRecord) -> None:
        step, lanes, state = record.step, self._lanes, self._state
        for arrival in record.arrived:
            lanes[arrival.request_id] = _Lane(arrival.request_id, step, arrival.num_prompt_tokens)
        for request_id, blocks in record.preempted:
            self._lane(request_id, step).extend(PREEMPTED, step, len(blocks))
        for request_id, kind, num_tokens, drafts in zip(
            record.requests, record.kinds, record.num_tokens, _drafts(record), strict=True
        ):
            self._lane(request_id, step).extend(kind, step, num_tokens, drafts)
        ran = set(record.requests)
        for request_id in state.tables.keys() - ran:  # has a seat, and got nothing of the budget
            self._lane(request_id, step).extend(IDLE, step)
        ended = {finish.request_id for finish in record.finished}
        for request_id in state.waiting:
            if request_id not in ended:
                self._lane(request_id, step).extend(WAITING, step)
        for request_id, reason, _ in record.finished:
            lane = self._lane(request_id, step)
            lane.ended, lane.reason = step, reason
            self._ended.append(lane)

    def _lane(self, request_id: str, step: int) -> _Lane:
        lane = self._lanes.get(request_id)
        if lane is None:  # arrived before the first record that we heard
            lane = self._lanes[request_id] = _Lane(request_id, step, 0)
        return lane

    def _count(self, record: StepRecord) -> None:
        used = self.meta.num_blocks - record.free_blocks
        ran = len(self._state.tables) + sum(
            finish.request_id in record.requests for finish in record.finished
        )
        self._steps.append(
            (
                record.step,
                round(record.seconds, 6),
                record.total_sampled,
                record.total_tokens,
                used,
                ran,
                record.waiting,
                record.blocked,
                wasted_slots(self._state),
                *((record.total_drafted, record.total_accepted) if record.drafted else ()),
            )
        )

    def _forget(self, horizon: int) -> None:
        """Drop what is older than the window, so that a page that runs for weeks does not grow."""
        while self._ended and self._ended[0].ended <= horizon:
            lane = self._ended.popleft()
            if self._lanes.get(lane.request_id) is lane:  # the name may be in use again
                del self._lanes[lane.request_id]
        for lane in self._lanes.values():
            while lane.spans and lane.spans[0][2] <= horizon:
                lane.spans.popleft()

    def _publish(self) -> Frame:
        with self._lock:
            self._frame = Frame(
                step=self._step,
                first=self._steps[0][0] if self._steps else 0,
                made=time.monotonic(),
                tables=tuple(
                    (name, self._state.computed.get(name, 0), tuple(table))
                    for name, table in self._state.tables.items()
                ),
                cached=pack_bits(self._state.cached, self.meta.num_blocks),
                lanes=tuple(lane.pack() for lane in self._lanes.values()),
                steps=tuple(self._steps),
                events=tuple(self._events),
                queue=tuple(self._state.queue),
                held=tuple(self._state.held.items()),
                numbers=self._numbers.pack(),
            )
            return self._frame

    def frame(self) -> Frame:
        """All there is to draw at present; never waits for a step."""
        frame = self._frame
        if frame.step != self._step and time.monotonic() - frame.made >= self._min_interval:
            frame = self._publish()
        return frame

    def snapshot(self, name: str = "", after: int = -1, frame: Frame | None = None) -> dict[str, Any]:
        """What is new since step `after` of the feed called `name`, ready for JSON; never waits for a step.

        An unknown name, or a step that is no longer held, is answered with everything there is, marked
        `full` and with the `meta` of the trace. A `frame` from a moment ago is told in place of that of now.
        """
        frame = frame or self.frame()
        full = name != self.name or after > frame.step or after + 1 < frame.first
        answer: dict[str, Any] = {"feed": self.name, "step": frame.step}
        if full:
            after = -1
            answer |= {"full": True, "meta": asdict(self.meta), "palette": style.PALETTE, "window": WINDOW}
            if self.speculative:
                answer["speculative"] = self.speculative
        if full or frame.step > after:
            answer |= {
                "tables": frame.tables,
                "cached": frame.cached,
                "lanes": [news for lane in frame.lanes if (news := _since(lane, after))],
                "steps": [step for step in frame.steps if step[0] > after],
                "events": [event for event in frame.events if event[0] > after],
                "queue": frame.queue,
                "held": frame.held,
                "numbers": frame.numbers,
            }
        return answer

    def preview(self, record: StepRecord, decode: Decode | None = None) -> dict[str, Any] | None:
        """The step to come, as `Engine.preview` foresees it, for JSON; None if it is not the next one.

        With `decode`, drafts are told as text too.
        """
        with self._lock:
            if record.step != self._step + 1:
                return None
            state = self._state.copy()
        before = state.tables.keys() | state.waiting.keys()
        state.begin(record)
        taken: dict[str, list[int]] = {}
        for request_id, blocks in record.taken:
            taken.setdefault(request_id, []).extend(blocks)
        rows = [
            [
                row.request_id,
                *looks(row.request_id),
                row.kind[0],
                row.start,
                row.num_tokens,
                taken.get(row.request_id, []),
                *((len(row.drafted), None, words_of(row.drafted, decode)) if row.drafted else ()),
            ]
            for row in record.rows
        ]
        return {
            "step": record.step,
            "rows": rows,
            "shared": [[a.request_id, a.num_cached_tokens, a.shared] for a in record.admitted if a.shared],
            "admitted": [admission.request_id for admission in record.admitted],
            "preempted": [[name, *looks(name), len(blocks)] for name, blocks in record.preempted],
            "ended": [[finish.request_id, *looks(finish.request_id)] for finish in record.finished],
            "evicted": len(record.evicted),
            "queue": [[name, *looks(name), name not in before] for name in state.queue],
            "blocked": record.blocked,
            "free": record.free_blocks,
            **({"held_back": record.held_back} if record.held_back else {}),
        }


def words_of(tokens: Sequence[int], decode: Decode | None) -> list[str]:
    """Each token as text."""
    return [decode([token]) for token in tokens] if decode else []


def _drafts(record: StepRecord) -> list[tuple[int, ...]]:
    """For each row how many drafts it had, and how many were right; nothing where it had none."""
    if not record.drafted:
        return [()] * len(record.requests)
    return [(len(row.drafted), row.num_accepted) if row.drafted else () for row in record.rows]


def pack_bits(blocks: Iterable[int], num_blocks: int) -> str:
    """A bit for each page that is among `blocks`, lowest first, in base64."""
    bits = bytearray(-(-num_blocks // 8))
    for block in blocks:
        bits[block >> 3] |= 1 << (block & 7)
    return base64.b64encode(bits).decode("ascii")


def looks(request_id: str) -> tuple[str, int]:
    """A request's short name, and its place in the palette."""
    return style.label(request_id, 6), style.color_index(request_id)


def _since(lane: tuple[Any, ...], after: int) -> tuple[Any, ...] | None:
    """The part of a lane that is newer than step `after`, or None if there is none."""
    *facts, ended, reason, spans = lane
    news = tuple(span for span in spans if span[2] > after)
    return (*facts, ended, reason, news) if news or ended > after else None


def asset(name: str) -> str:
    """The text of one of the files beside this one, such as `canvas.js`."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")
