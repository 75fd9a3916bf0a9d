"""A whole trace for a browser that replays it: `pack` once, then `frames` of the steps that it looks at.

Both refer to a request by the place of its lane, so that each name is sent once, shortened and printable.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from labkit.trace.memory_use import memory_uses
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.batch_timeline import Lane, timeline_of
from labkit.views.facts.throughput import rates_of
from labkit.views.live_feed import pack_bits
from labkit.views.wire import (
    ReplayData,
    ReplayEnd,
    ReplayFrame,
    ReplayLane,
    ReplayLine,
    ReplayRow,
    Span,
    Table,
)

MAX_FRAMES = 32  # in one answer
MAX_LISTED = 60  # members of the queue, and events, that a frame names
_LETTERS = {"prefill": "p", "chunk": "c", "decode": "d", "idle": "i", "waiting": "w"}
_NAME, _WORDS = 32, 160  # columns
_MAX_WORK = (
    5_000_000  # entries of block tables; beyond it, memory is read in every second step, or third, ...
)
_MAX_ENTRIES = 200_000  # of block tables in one answer: what is beyond it is asked for again


def pack(trace: Trace) -> ReplayData:
    """Return what does not depend on the step looked at, ready for JSON.

    `steps` holds columns with an entry per step. `begin` and `end` are in seconds since the first step
    began, or None if the trace has no clock. `owned` counts blocks during the step, and `filled` their slots
    that hold a token. If there are drafts, steps also have `drafted` and `accepted` tokens; if processes sent
    to each other, `sent_in_layers` and `sent_elsewhere` (bytes) and `sending` (seconds). `lanes` has one
    entry per request.
    """
    timeline, rates = timeline_of(trace), rates_of(trace)
    records = trace.records
    uses = memory_uses(trace, most=_MAX_WORK)
    columns: dict[str, Any] = {
        "step": [record.step for record in records],
        "sampled": [record.total_sampled for record in records],
        "computed": [record.total_tokens for record in records],
        "owned": [use.owned for use in uses],
        "filled": [use.used for use in uses],
        "waiting": [record.waiting for record in records],
        "running": rates.running if rates else [],
        "begin": None,
        "end": None,
    }
    if timeline and timeline.drafting:
        columns["drafted"] = [record.total_drafted for record in records]
        columns["accepted"] = [record.total_accepted for record in records]
    if rates and rates.sent:
        columns["sent_in_layers"] = [record.sent_in_layers for record in records]
        columns["sent_elsewhere"] = [record.sent_elsewhere for record in records]
        columns["sending"] = [round(record.sending, 6) for record in records]
    if rates and rates.per == "second":
        zero, last = records[0].time - records[0].seconds, 0.0
        begins, ends = [], []
        for record in records:  # a file may be wrong, but time never runs backwards
            begins.append(max(last, record.time - record.seconds - zero))
            last = max(begins[-1], record.time - zero)
            ends.append(last)
        columns["begin"], columns["end"] = [[round(t, 5) for t in times] for times in (begins, ends)]
    meta = asdict(trace.meta)
    for name in ("scheduler", "kv_policy", "model", "device", "dtype"):
        meta[name] = style.label(meta[name], _NAME)
    return {
        "meta": meta,
        "palette": style.PALETTE,
        "headline": timeline.headline if timeline else (style.NO_STEPS, ""),
        "steps": columns,
        "lanes": [_lane(lane) for lane in timeline.lanes] if timeline else [],
    }


def _lane(lane: Lane) -> ReplayLane:
    spans = [
        Span(_LETTERS[span.kind], span.first, span.last, span.num_tokens, span.drafted, span.accepted)
        for span in lane.spans
    ]
    return {
        "label": style.label(lane.request_id, 6),
        "name": style.label(lane.request_id, _NAME),
        "color": style.color_index(lane.request_id),
        "spans": [*spans, *(Span("x", step, step, 0) for step in lane.preempted)],
        "ends": [ReplayEnd(end.step - end.early, style.label(end.reason, _NAME)) for end in lane.ends],
    }


def frames(trace: Trace, lanes: dict[str, int], first: int, count: int) -> list[ReplayFrame]:
    """Return the pool, the batch and the queue during some steps, ready for JSON.

    Args:
        trace: the trace that was packed.
        lanes: each request's place among its lanes; see `lanes_of`.
        first: the place in the trace of the first step wanted, from 0.
        count: the number of steps; at most `MAX_FRAMES` are given, fewer where many blocks are owned, and
            none that the trace does not hold.
    """
    records = trace.records[max(0, first) : max(0, first) + min(count, MAX_FRAMES)]
    if not records:
        return []
    state = trace.state(records[0].step)
    found: list[ReplayFrame] = []
    entries = 0
    for place, record in enumerate(records):
        if place:
            state.begin(record)
        entries += state.num_entries
        if found and entries > _MAX_ENTRIES:
            break
        found.append(_frame(trace, lanes, state, record))
        state.end(record)
    return found


def _frame(trace: Trace, lanes: dict[str, int], state: PoolState, record: StepRecord) -> ReplayFrame:
    def number(request_id: str) -> int:
        return lanes.get(request_id, -1)

    queue = [*state.queue, *state.held]
    return {
        "step": record.step,
        "tables": [
            Table(number(name), state.computed.get(name, 0), list(table))
            for name, table in state.tables.items()
        ],
        "cached": pack_bits(state.cached, trace.meta.num_blocks),
        "batch": [
            ReplayRow(
                lane=number(row.request_id),
                kind=_LETTERS[row.kind],
                start=row.start,
                tokens=row.num_tokens,
                padding=row.padding,
                drafted=len(row.drafted),
                accepted=row.num_accepted,
            )
            for row in record.rows
        ],
        "queue": [ReplayLine(number(name), _why(state, record, name)) for name in queue[:MAX_LISTED]],
        "queued": len(queue),
        "events": [ReplayLine(number(name), style.label(what, _WORDS)) for name, what in _events(record)],
    }


def _why(state: PoolState, record: StepRecord, request_id: str) -> str:
    """Say why a request waits: the head of the queue has a reason of its own, those behind it have ""."""
    if request_id in state.held:
        return f"waits for the prompt of request {style.label(state.held[request_id], _NAME)}"
    if record.blocked and record.blocked[0] == request_id:
        return style.label(record.blocked[1], 80)
    return ""


def _events(record: StepRecord) -> list[tuple[str, str]]:
    """List who came and went in a step, and why."""
    moved = [(m.request_id, style.moved_words(m)) for m in record.moved]
    arrived = [(a.request_id, f"arrives with {a.num_prompt_tokens} prompt tokens") for a in record.arrived]
    admitted = []
    for admission in record.admitted:
        hit = f", {admission.num_cached_tokens} tokens found in the prefix cache"
        admitted.append((admission.request_id, f"admitted{hit if admission.num_cached_tokens else ''}"))
    preempted = [
        (name, f"preempted, gives {style.plural(len(blocks), 'page')} back")
        for name, blocks in record.preempted
    ]
    finished = [(name, f"ends: {reason}") for name, reason, _ in record.finished]
    returned = [
        (name, f"gives {style.plural(len(blocks), 'page')} back, because its drafts were wrong")
        for name, blocks in record.returned
    ]
    found = [*moved, *arrived, *preempted, *admitted, *returned, *finished][:MAX_LISTED]
    if record.evicted:
        found.append(("", f"{style.plural(len(record.evicted), 'cached page')} evicted"))
    if record.restored:
        found.append(("", f"{style.plural(len(record.restored), 'evicted page')} brought back, not computed"))
    if record.threads:
        words = f"{style.plural(record.threads, 'thread')} from now on: as many cores as other programs leave"
        found.append(("", words))
    if record.held_back:
        found.append(("", record.held_back))
    return found


def lanes_of(trace: Trace) -> dict[str, int]:
    """Return each request's place among the lanes of its packed trace."""
    timeline = timeline_of(trace)
    return {lane.request_id: place for place, lane in enumerate(timeline.lanes)} if timeline else {}
