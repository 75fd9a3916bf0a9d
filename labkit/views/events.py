"""What happened, as a list of events: who came, got a seat, lost it, found a prefix, ended. From traces."""

from __future__ import annotations

import re
from collections.abc import Iterator

from labkit.trace.records import StepRecord
from labkit.views.wire import Event

KEPT = 200  # events
_NUMBERS = re.compile(r"\d+%?( to \d+%)?")


def events_of(record: StepRecord, held_back: str = "") -> Iterator[Event]:
    """Yield the events of one step, in the order in which they happened.

    `held_back` is the reason that an earlier step gave last for drafting no more. The same reason with other
    numbers is no event.

    Kinds and their numbers: "arrive" (prompt tokens), "abort" (blocks given back), "preempt" (blocks given
    back), "evict" (cached blocks forgotten), "admit" (blocks held now), "hit" (tokens found, tokens looked
    up), "hold" (the word says why no more is drafted), "return" (blocks given back because drafts were
    wrong), "threads" (the number of threads from now on), "finish" (blocks given back; the word is the
    reason); "unsent" and "there" (prompt tokens) and "arriving" (bytes), as in `Moved`.
    """
    step = record.step
    if record.threads:
        yield Event(step, "threads", "", record.threads)
    for request_id, place, amount in record.moved:
        yield Event(step, place, request_id, amount)
    for arrival in record.arrived:
        yield Event(step, "arrive", arrival.request_id, arrival.num_prompt_tokens)
    for request_id, reason, blocks in record.finished:
        if reason == "abort":
            yield Event(step, "abort", request_id, len(blocks))
    for request_id, blocks in record.preempted:
        yield Event(step, "preempt", request_id, len(blocks))
    if record.evicted:
        yield Event(step, "evict", "", len(record.evicted))
    taken: dict[str, int] = {}
    for request_id, blocks in record.taken:
        taken[request_id] = taken.get(request_id, 0) + len(blocks)
    for admission in record.admitted:
        name, found = admission.request_id, admission.num_cached_tokens
        yield Event(step, "admit", name, len(admission.shared) + taken.get(name, 0))
        if found and admission.num_looked_up:
            yield Event(step, "hit", name, found, admission.num_looked_up)
    if record.held_back and _NUMBERS.sub("", record.held_back) != _NUMBERS.sub("", held_back):
        yield Event(step, "hold", "", word=record.held_back)
    for request_id, blocks in record.returned:
        yield Event(step, "return", request_id, len(blocks))
    for request_id, reason, blocks in record.finished:
        if reason != "abort":
            yield Event(step, "finish", request_id, len(blocks), word=reason)
