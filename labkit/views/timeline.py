"""What ran in each step, and how fast: the facts that figures and their text twins both state."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

from labkit.trace.memory_use import kv_usage
from labkit.trace.records import Row, StepRecord
from labkit.trace.trace import Trace
from labkit.views.style import drafts, plural

# -- timeline -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Span:
    """What a request did in steps `first` to `last`: the same in each of them.

    `kind` is prefill, chunk, decode, idle or waiting. `start` counts its tokens computed before; the others
    are sums over the span. `reasons` says why it waited while it headed the queue, and for how many steps.
    `accepted` of the `drafted` tokens were right.
    """

    kind: str
    first: int
    last: int
    start: int = 0
    num_tokens: int = 0
    sampled: list[int] = field(default_factory=list)
    padding: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    drafted: int = 0
    accepted: int = 0

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


class End(NamedTuple):
    """A request ends with a step or, if `early`, before it."""

    step: int
    reason: str
    early: bool


@dataclass
class Lane:
    """One request's row in the timeline."""

    request_id: str
    spans: list[Span] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_sampled(self) -> int:
        return sum(len(span.sampled) for span in self.spans)

    @property
    def padding(self) -> int:
        return sum(span.padding for span in self.spans)

    @property
    def num_drafted(self) -> int:
        return sum(span.drafted for span in self.spans)

    @property
    def num_accepted(self) -> int:
        return sum(span.accepted for span in self.spans)


@dataclass
class Timeline:
    """Steps `first` to `last` of a trace, a lane per request in order of arrival."""

    first: int
    last: int
    num_steps: int
    lanes: list[Lane]
    blocked: list[tuple[str, int]]  # why the head of the queue waited, and for how many steps; most first

    @property
    def drafting(self) -> bool:
        """Whether anybody drafts."""
        return any(lane.num_drafted for lane in self.lanes)

    @property
    def headline(self) -> tuple[str, str]:
        """The numbers in words, in two sentences."""
        computed = sum(lane.num_tokens for lane in self.lanes)
        sampled = sum(lane.num_sampled for lane in self.lanes)
        padding = sum(lane.padding for lane in self.lanes)
        preempted = sum(len(lane.preempted) for lane in self.lanes)
        first = f"{plural(len(self.lanes), 'request')} in {plural(self.num_steps, 'step')}"
        first += f" ({self.first} to {self.last})"
        second = f"{plural(computed, 'token')} computed, {sampled} generated"
        if self.drafting:
            drafted = sum(lane.num_drafted for lane in self.lanes)
            second += f"; {drafts(drafted, sum(lane.num_accepted for lane in self.lanes))}"
        second += f"; {plural(padding, 'padded slot')} wasted" if padding else ""
        second += f"; {plural(preempted, 'preemption')}" if preempted else ""
        return first, second


def timeline_of(trace: Trace, first: int | None = None, last: int | None = None) -> Timeline | None:
    """What each request did, within the steps `first` to `last`. None if the trace is empty.

    Raises:
        ValueError: if the trace holds no step within these limits.
    """
    if not trace.records:
        return None
    low = trace[0].step if first is None else first
    high = trace[-1].step if last is None else last
    records = [record for record in trace.records if low <= record.step <= high]
    if not records:
        held = f"{trace[0].step} to {trace[-1].step}"
        raise ValueError(f"no step from {low} to {high} is in this trace (steps held: {held})")
    builder = _Builder(trace, records)
    for record in records:
        builder.add(record)
    return builder.finish()


class _Builder:
    """Reads records in order and turns them into lanes."""

    def __init__(self, trace: Trace, records: list[StepRecord]) -> None:
        begin = trace.state(records[0].step)
        self.lanes = {name: Lane(name) for name in begin.arrivals}
        self.since = dict.fromkeys(begin.waiting, records[0].step)  # who waits -> since which step
        self.reasons: dict[str, list[str]] = {}
        self.records = records

    def add(self, record: StepRecord) -> None:
        step = record.step
        for arrival in record.arrived:
            self.since.setdefault(arrival.request_id, step)
        for request_id, _ in record.preempted:
            self.since.setdefault(request_id, step)
            self._lane(request_id).preempted.append(step)
        for admission in record.admitted:
            self._stop_waiting(admission.request_id, step - 1)
        for row in record.rows:
            self._append(row, step)
        for request_id, reason, _ in record.finished:
            self._stop_waiting(request_id, step - 1)
            self._lane(request_id).ends.append(End(step, reason, _early(request_id, record)))
        if record.blocked:
            self.reasons.setdefault(record.blocked[0], []).append(record.blocked[1])

    def _lane(self, request_id: str) -> Lane:
        return self.lanes.setdefault(request_id, Lane(request_id))

    def _stop_waiting(self, request_id: str, last: int) -> None:
        first = self.since.pop(request_id, None)
        why = self.reasons.pop(request_id, [])
        lane = self._lane(request_id)
        if first is not None and first <= last:
            reasons = tuple((reason, len(list(same))) for reason, same in groupby(why))
            lane.spans.append(Span("waiting", first, last, reasons=reasons))

    def _append(self, row: Row, step: int) -> None:
        spans = self._lane(row.request_id).spans
        if spans and row.kind in ("decode", "idle") and spans[-1].last == step - 1 and _alike(spans[-1], row):
            spans[-1].last = step
            spans[-1].num_tokens += row.num_tokens
            spans[-1].sampled += row.sampled
            spans[-1].padding += row.padding
            spans[-1].drafted += len(row.drafted)
            spans[-1].accepted += row.num_accepted
        else:
            span = Span(row.kind, step, step, row.start, row.num_tokens, list(row.sampled), row.padding)
            span.drafted, span.accepted = len(row.drafted), row.num_accepted
            spans.append(span)

    def finish(self) -> Timeline:
        first, last = self.records[0].step, self.records[-1].step
        for request_id in list(self.since):
            self._stop_waiting(request_id, last)
        blocked = Counter(record.blocked[1] for record in self.records if record.blocked).most_common()
        return Timeline(first, last, len(self.records), list(self.lanes.values()), blocked)


def _early(request_id: str, record: StepRecord) -> bool:
    """Whether a request that ends in this record ended before the step ran, as an aborted one does."""
    return request_id not in record.requests


def _alike(span: Span, row: Row) -> bool:
    """Whether one more step does what each step of a span did."""
    each = (row.num_tokens, len(row.sampled), row.padding, len(row.drafted))
    sums = (span.num_tokens, len(span.sampled), span.padding, span.drafted)
    return span.kind == row.kind and tuple(count * span.steps for count in each) == sums


# -- throughput -----------------------------------------------------------------------------------


_REST = 0.5  # seconds


@dataclass
class Rates:
    """Numbers over a run, a point per step. Rates count tokens per second of work, or per step where the
    trace has no clock (`per` says which), and are means over the last `window` seconds or steps."""

    per: str
    window: float
    x: list[float]
    steps: list[int]
    computed: list[float | None]
    generated: list[float | None]
    kv_usage: list[float]
    running: list[int]
    waiting: list[int]
    preempted: list[int]
    idle_before: list[bool]  # whether the engine rested for a while before the step
    num_computed: int
    num_generated: int
    spent: float  # seconds of work, or steps

    @property
    def headline(self) -> tuple[str, str]:
        """The numbers in words, in two sentences."""
        took = f" in {self.spent:.3g} s of work" if self.per == "second" else ""
        amount = self.spent or 1
        first = f"{self.num_generated / amount:.4g} generated tokens per {self.per}, "
        first += f"{self.num_computed / amount:.4g} computed"
        second = f"{plural(len(self.steps), 'step')}{took}: {plural(self.num_computed, 'token')} computed, "
        second += f"{self.num_generated} generated; KV usage at most {max(self.kv_usage):.0%}"
        second += f"; {plural(sum(self.preempted), 'preemption')}" if any(self.preempted) else ""
        window = f"{self.window:.2g} s of work" if self.per == "second" else plural(self.window, "step")
        return first, f"{second}; curves are means over {window}"


def rates_of(trace: Trace, window: float | None = None) -> Rates | None:
    """Throughput, KV usage and counts for each step; see `Rates` (window None: a fortieth of the run).

    None if the trace is empty.

    Raises:
        ValueError: if `window` is not positive.
    """
    if window is not None and not window > 0:
        raise ValueError(f"window must be positive, not {window}")
    records = trace.records
    if not records:
        return None
    # A record in which nothing ran took no time: the beginning of a shortened trace, for instance.
    worked = [record for record in records if record.requests]
    clock = bool(worked) and all(record.seconds > 0 for record in worked)
    spent = [record.seconds if clock else bool(record.requests) for record in records]
    window = window or (sum(spent) / 40 if clock else max(1, len(worked) // 40))
    computed = [record.total_tokens for record in records]
    generated = [record.total_sampled for record in records]
    seated = set(trace.state(records[0].step).tables)
    running = []
    for record in records:
        seated.difference_update(pages.request_id for pages in record.preempted)
        seated.difference_update(end.request_id for end in record.finished if _early(end.request_id, record))
        seated.update(admission.request_id for admission in record.admitted)
        running.append(len(seated))
        seated.difference_update(end.request_id for end in record.finished)
    ends = [records[0].time, *(record.time for record in records)]
    rests = [record.time - record.seconds - end for record, end in zip(records, ends[:-1], strict=True)]
    return Rates(
        per="second" if clock else "step",
        window=window,
        x=[record.time if clock else record.step for record in records],
        steps=[record.step for record in records],
        computed=_smooth(computed, spent, window),
        generated=_smooth(generated, spent, window),
        kv_usage=[kv_usage(record.free_blocks, trace.meta.num_blocks) for record in records],
        running=running,
        waiting=[record.waiting for record in records],
        preempted=[len(record.preempted) for record in records],
        idle_before=[clock and rest > _REST for rest in rests],
        num_computed=sum(computed),
        num_generated=sum(generated),
        spent=sum(spent),
    )


def _smooth(amounts: list[int], spent: list[float], window: float) -> list[float | None]:
    """Amount per time spent, for each entry over those that ended within the last `window` before its end.

    None where that was no time.
    """
    total, time = [0, *accumulate(amounts)], [0, *accumulate(spent)]
    rates: list[float | None] = []
    for end in range(1, len(amounts) + 1):
        begin = min(end - 1, bisect_left(time, time[end] - window))  # the entry itself at least
        took = time[end] - time[begin]
        rates.append((total[end] - total[begin]) / took if took else None)
    return rates


def step_range(first: int, last: int) -> str:
    """The words for a range of steps."""
    return f"step {first}" if first == last else f"steps {first} to {last}"
