"""Export of a trace in the trace event format of Chrome, which https://ui.perfetto.dev opens.

There is one track for the engine's steps and one for each request, and counters stand above them.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.batch_timeline import Lane, Span, timeline_of
from labkit.views.facts.throughput import Rates, rates_of

_PROCESS, _ENGINE = 1, 1  # ids of the process and of the engine's track; requests come after it
_UNTIMED_STEP = 1000  # microseconds that a step is given where the trace has no clock
_MAX_NAME = 64

Event = dict[str, Any]


def events(trace: Trace) -> Iterator[Event]:
    """Yield the events of a trace; `ts` and `dur` are in microseconds since the trace began.

    A span is named after what the request did: waiting, prefill, decode, preempted (it waits to come back)
    or idle (a padded seat of a static batch). A request counts as arriving when the first step begins that
    knows of it. In a trace without a clock each step takes a millisecond.
    """
    timeline, rates = timeline_of(trace), rates_of(trace)
    meta = trace.meta
    name = f"labkit: {meta.model or 'engine'}, {meta.scheduler}, {meta.kv_policy}"
    yield _metadata("process_name", _ENGINE, name=style.label(name, _MAX_NAME))
    yield _metadata("thread_name", _ENGINE, name="engine")
    yield _metadata("thread_sort_index", _ENGINE, sort_index=0)
    if timeline is None or rates is None:
        return
    clock = _Clock(trace, timed=rates.per == "second")
    yield from _steps(trace, clock)
    yield from _counters(rates, clock)
    if rates.sent:
        yield from _communication(trace, rates, clock)
    for number, lane in enumerate(timeline.lanes, 1):
        track = _ENGINE + number
        who = f"request {style.label(lane.request_id, _MAX_NAME)}"
        yield _metadata("thread_name", track, name=who)
        yield _metadata("thread_sort_index", track, sort_index=number)
        yield from _lane(lane, track, clock)


def lines(trace: Trace) -> Iterator[str]:
    """Yield the same as JSON text, a line for each event."""
    meta = trace.meta
    facts = {
        "model": style.label(meta.model, _MAX_NAME),
        "scheduler": style.label(meta.scheduler, _MAX_NAME),
        "kv_policy": style.label(meta.kv_policy, _MAX_NAME),
        "num_blocks": meta.num_blocks,
        "block_size": meta.block_size,
        "max_num_seqs": meta.max_num_seqs,
        "max_num_batched_tokens": meta.max_num_batched_tokens,
    }
    yield f'{{"displayTimeUnit":"ms","otherData":{_json(facts)},"traceEvents":[\n'
    comma = ""
    for event in events(trace):
        yield f"{comma}{_json(event)}"
        comma = ",\n"
    yield "\n]}\n"


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the trace to a file that Perfetto and `chrome://tracing` open."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines(trace))


class _Clock:
    """The clock times steps in whole microseconds, so that no two spans of a track ever overlap."""

    def __init__(self, trace: Trace, *, timed: bool) -> None:
        self._spans: dict[int, tuple[int, int]] = {}
        self._steps = [record.step for record in trace.records]
        end = 0
        for place, record in enumerate(trace.records):
            if timed:
                begin = max(end, round((record.time - record.seconds) * 1e6))
                end = max(begin, round(record.time * 1e6))
            else:
                begin, end = place * _UNTIMED_STEP, (place + 1) * _UNTIMED_STEP
            self._spans[record.step] = (begin, end)

    def begin(self, step: int) -> int:
        return self._spans[step][0]

    def end(self, step: int) -> int:
        return self._spans[step][1]

    def last_within(self, first: int, last: int) -> int:
        """Return the latest step of the trace up to `last`: a shortened trace does not hold every number."""
        return max(first, self._steps[bisect_right(self._steps, last) - 1])


def _steps(trace: Trace, clock: _Clock) -> Iterator[Event]:
    for record in trace.records:
        facts: Event = {
            "requests": len(record.requests),
            "tokens computed": record.total_tokens,
            "tokens generated": record.total_sampled,
            "padding": sum(record.padding),
            "waiting": record.waiting,
            "free pages": record.free_blocks,
        }
        if record.drafted:
            facts |= {"tokens drafted": record.total_drafted, "drafts right": record.total_accepted}
        if record.restored:
            facts["evicted pages brought back"] = len(record.restored)
        if record.total_sent:
            facts |= {
                "bytes sent in layers": record.sent_in_layers,
                "other bytes sent": record.sent_elsewhere,
                "ms of sending": round(1000 * record.sending, 3),
            }
        if record.threads:
            facts["threads from now on"] = record.threads
        if record.held_back:
            facts["drafts held back"] = style.label(record.held_back, 200)
        if record.blocked:
            who, why = record.blocked
            facts["blocked"] = f"request {style.label(who, _MAX_NAME)}: {style.label(why, 200)}"
        yield _span(f"step {record.step}", _ENGINE, clock.begin(record.step), clock.end(record.step), facts)


def _counters(rates: Rates, clock: _Clock) -> Iterator[Event]:
    """Yield the counters. Perfetto joins the names of event and value: "KV usage %", "requests waiting"."""
    per = f"per {rates.per}"
    for i, step in enumerate(rates.steps):
        begin, end = clock.begin(step), clock.end(step)
        yield _counter("tokens", begin, {per: round(rates.generated[i] or 0, 3)})
        yield _counter("requests", begin, {"running": rates.running[i], "waiting": rates.waiting[i]})
        yield _counter("KV usage", end, {"%": round(100 * rates.kv_usage[i], 3)})
    yield _counter("tokens", clock.end(rates.steps[-1]), {per: 0})


def _communication(trace: Trace, rates: Rates, clock: _Clock) -> Iterator[Event]:
    """Yield "communication % of a step" and "sent bytes in layers": what processes of one model exchanged."""
    for record, share in zip(trace.records, rates.sending, strict=True):
        begin = clock.begin(record.step)
        sent = {"bytes in layers": record.sent_in_layers, "bytes elsewhere": record.sent_elsewhere}
        yield _counter("communication", begin, {"% of a step": round(100 * share, 3)})
        yield _counter("sent", begin, sent)
    end = clock.end(rates.steps[-1])
    yield _counter("communication", end, {"% of a step": 0})
    yield _counter("sent", end, {"bytes in layers": 0, "bytes elsewhere": 0})


def _lane(lane: Lane, track: int, clock: _Clock) -> Iterator[Event]:
    for span, last in _without_overlap(lane.spans):
        begin, end = clock.begin(span.first), clock.end(clock.last_within(span.first, last))
        yield _span(_name(lane, span), track, begin, end, _span_facts(span))
    for step in lane.preempted:
        yield _instant("preempted", track, clock.begin(step), {"step": step})
    for step, reason, early in lane.ends:
        when = clock.begin(step) if early else clock.end(step)
        yield _instant(f"ends: {style.label(reason, _MAX_NAME)}", track, when, {"step": step})


def _without_overlap(spans: list[Span]) -> Iterator[tuple[Span, int]]:
    """Yield spans and their last steps, without idle seats where the request itself does something.

    A request that was preempted out of a static batch waits to come back while its seat is padded.
    """
    busy = sorted((span for span in spans if span.kind != "idle"), key=lambda span: span.first)
    firsts = [span.first for span in busy]
    for span in spans:
        place = bisect_right(firsts, span.first)
        if span.kind != "idle":
            yield span, span.last
        elif not place or busy[place - 1].last < span.first:
            yield span, min([span.last, *(first - 1 for first in firsts[place : place + 1])])


def _name(lane: Lane, span: Span) -> str:
    if span.kind == "waiting":
        return "preempted" if span.first in lane.preempted else "waiting"
    return "prefill" if span.kind == "chunk" else span.kind


def _span_facts(span: Span) -> Event:
    facts: Event = {"first step": span.first, "steps": span.steps}
    if span.kind == "waiting":
        if span.reasons:
            why, _ = max(span.reasons, key=lambda reason: reason[1])
            facts["why"] = style.label(why, 200)
        return facts
    facts |= {"tokens computed": span.num_tokens, "from position": span.start}
    if span.kind == "chunk":
        facts["chunk"] = "more of the prompt is to come"
    if span.sampled:
        facts["tokens generated"] = len(span.sampled)
    if span.drafted:
        facts |= {"tokens drafted": span.drafted, "drafts right": span.accepted}
    if span.padding:
        facts["padding"] = span.padding
    return facts


def _span(name: str, track: int, begin: int, end: int, facts: Event) -> Event:
    common = {"pid": _PROCESS, "tid": track, "args": facts}
    return {"ph": "X", "name": name, "cat": "labkit", "ts": begin, "dur": end - begin, **common}


def _instant(name: str, track: int, when: int, facts: Event) -> Event:
    common = {"pid": _PROCESS, "tid": track, "args": facts}
    return {"ph": "i", "s": "t", "name": name, "cat": "labkit", "ts": when, **common}


def _counter(name: str, when: int, values: Event) -> Event:
    return {"ph": "C", "name": name, "pid": _PROCESS, "tid": _ENGINE, "ts": when, "args": values}


def _metadata(what: str, track: int, **facts: Any) -> Event:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": track, "ts": 0, "args": facts}


def _json(value: Event) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
