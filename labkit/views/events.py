"""What happened, as a list of events: who came, got a seat, lost it, found a prefix, ended. From traces."""

from __future__ import annotations

import re
from collections.abc import Iterator

from labkit.trace.records import StepRecord

KEPT = 200  # events
_NUMBERS = re.compile(r"\d+%?( to \d+%)?")
Event = tuple[int, str, str, int, int, str]  # step, kind, request, two numbers, a word


def events_of(record: StepRecord, held_back: str = "") -> Iterator[Event]:
    """The events of one step, in the order in which they happened.

    `held_back` is what a step before said last of why no more was drafted: the same with other numbers is no
    event.

    Kinds and their numbers: "arrive" (prompt tokens), "abort" (pages given back), "preempt" (pages given
    back), "evict" (cached pages forgotten), "admit" (pages held now), "hit" (tokens found, tokens looked up),
    "hold" (the word says why no more is drafted), "return" (pages given back, for drafts were wrong),
    "finish" (pages given back; the word is the reason).
    """
    step = record.step
    for arrival in record.arrived:
        yield step, "arrive", arrival.request_id, arrival.num_prompt_tokens, 0, ""
    for request_id, reason, blocks in record.finished:
        if reason == "abort":
            yield step, "abort", request_id, len(blocks), 0, ""
    for request_id, blocks in record.preempted:
        yield step, "preempt", request_id, len(blocks), 0, ""
    if record.evicted:
        yield step, "evict", "", len(record.evicted), 0, ""
    taken: dict[str, int] = {}
    for request_id, blocks in record.taken:
        taken[request_id] = taken.get(request_id, 0) + len(blocks)
    for admission in record.admitted:
        name, found = admission.request_id, admission.num_cached_tokens
        yield step, "admit", name, len(admission.shared) + taken.get(name, 0), 0, ""
        if found and admission.num_looked_up:
            yield step, "hit", name, found, admission.num_looked_up, ""
    if record.held_back and _NUMBERS.sub("", record.held_back) != _NUMBERS.sub("", held_back):
        yield step, "hold", "", 0, 0, record.held_back
    for request_id, blocks in record.returned:
        yield step, "return", request_id, len(blocks), 0, ""
    for request_id, reason, blocks in record.finished:
        if reason != "abort":
            yield step, "finish", request_id, len(blocks), 0, reason
