"""What each request did in each step, merged into spans of equal steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from labkit.trace.records import Row, StepRecord
from labkit.trace.trace import Trace
from labkit.views.style import drafts, plural


@dataclass(slots=True)
class Span:
    """In a span, a request did the same in each of the steps `first` to `last`.

    `kind` is prefill, chunk, decode, idle or waiting. `start` counts the tokens that were computed before the
    span. `reasons` says why the request waited while it headed the queue, and for how many steps each. The
    other numbers are sums over the span. `accepted` counts those of the `drafted` tokens that were accepted.
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
    """An end says that a request ended with a step or, if `early`, before that step ran."""

    step: int
    reason: str
    early: bool


@dataclass
class Lane:
    """A lane is the row of one request in the timeline."""

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
    """A timeline shows steps `first` to `last` of a trace, with one lane per request in order of arrival.

    `blocked` holds why the head of the queue waited, and for how many steps, the most frequent reason first.
    `allowed` says for each token of an answer that has a form how many tokens the form allowed in its place.
    """

    first: int
    last: int
    num_steps: int
    lanes: list[Lane]
    blocked: list[tuple[str, int]]
    allowed: list[int] = field(default_factory=list)

    @property
    def drafting(self) -> bool:
        """Say whether any request has drafts."""
        return any(lane.num_drafted for lane in self.lanes)

    @property
    def headline(self) -> tuple[str, str]:
        """State the numbers in two sentences."""
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
        second += f"; {_form(self.allowed)}" if self.allowed else ""
        second += f"; {plural(padding, 'padded slot')} wasted" if padding else ""
        second += f"; {plural(preempted, 'preemption')}" if preempted else ""
        return first, second


def timeline_of(trace: Trace, first: int | None = None, last: int | None = None) -> Timeline | None:
    """Return what each request did within the steps `first` to `last`, or None if the trace is empty.

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
    """The builder reads records in order and turns them into lanes."""

    def __init__(self, trace: Trace, records: list[StepRecord]) -> None:
        begin = trace.state(records[0].step)
        self.lanes = {name: Lane(name) for name in begin.arrivals}
        self.since = dict.fromkeys(begin.waiting, records[0].step)  # a waiting request -> since which step
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
            self._lane(request_id).ends.append(End(step, reason, ended_early(request_id, record)))
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
        allowed = [count for record in self.records for row in record.rows for count in row.allowed]
        return Timeline(first, last, len(self.records), list(self.lanes.values()), blocked, allowed)


def _form(allowed: Sequence[int]) -> str:
    """Say in words what forms left to the model."""
    open_ = sorted(count for count in allowed if count > 1)
    words = f"a form forced {len(allowed) - len(open_)} of {plural(len(allowed), 'token')}"
    return words + (f", and left {open_[len(open_) // 2]:,} to choose from (median)" if open_ else "")


def ended_early(request_id: str, record: StepRecord) -> bool:
    """Say whether a request that ends in this record ended before the step ran, as an aborted one does."""
    return request_id not in record.requests


def _alike(span: Span, row: Row) -> bool:
    """Say whether one more step does what each step of a span did."""
    each = (row.num_tokens, len(row.sampled), row.padding, len(row.drafted))
    sums = (span.num_tokens, len(span.sampled), span.padding, span.drafted)
    return span.kind == row.kind and tuple(count * span.steps for count in each) == sums


def step_range(first: int, last: int) -> str:
    """Return the words for a range of steps."""
    return f"step {first}" if first == last else f"steps {first} to {last}"
