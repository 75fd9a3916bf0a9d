"""When each token came out, on a clock that counts tokens, steps or seconds.

In a batch timeline all steps are equally wide: one that computes 300 tokens is one column, like one that
computes 3. Here a step is as long as what it cost, and every running answer shows it as a gap between two of
its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from labkit.trace import latency
from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace
from labkit.views.style import plural

Clock = Literal["tokens", "steps", "seconds"]

CLOCKS = {
    "tokens": "tokens computed so far: a step takes as long as it computes tokens",
    "steps": "steps",
    "seconds": "seconds of work",
}


@dataclass
class TokenLane:
    """A lane says when one request arrived, and when each of its tokens came out."""

    request_id: str
    arrived: float = 0
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float | None:
        """Return the time to first token, from arrival; None if there is no token yet."""
        return latency.ttft(self.arrived, self.tokens)

    @property
    def gaps(self) -> list[float]:
        """Return the inter-token latencies, token by token (`latency.itl`)."""
        return latency.itl(self.tokens)

    @property
    def worst_gap(self) -> float:
        """Return the longest gap, or 0 if there is none."""
        return max(self.gaps, default=0)


@dataclass
class TokenTimeline:
    """A token timeline shows a run on one clock, with one lane per request in order of arrival."""

    clock: Clock
    lanes: dict[str, TokenLane]

    def __getitem__(self, request_id: str) -> TokenLane:
        return self.lanes[request_id]

    @property
    def worst_gap(self) -> float:
        """Return the longest time between two tokens of a request, or 0 if none has two tokens."""
        return max((lane.worst_gap for lane in self.lanes.values()), default=0)

    @property
    def headline(self) -> str:
        """State the numbers in one sentence."""
        tokens = sum(len(lane.tokens) for lane in self.lanes.values())
        unit = "tokens computed" if self.clock == "tokens" else self.clock
        longest = f"the longest gap between two: {self.shown(self.worst_gap)} {unit}"
        return f"{plural(tokens, 'token')} came out; {longest}"

    def shown(self, time: float | None) -> str:
        """Write a time of this clock as text."""
        if time is None:
            return "-"
        return f"{time:.3f}" if self.clock == "seconds" else f"{time:,}"


def token_timeline_of(trace: Trace, clock: Clock = "tokens", *, fixed: float = 0) -> TokenTimeline:
    """Return when each token came out.

    Args:
        trace: the trace of a run.
        clock: what a step costs: the "tokens" that it computes, padding included, one of the "steps", or the
            "seconds" that it took.
        fixed: the cost of each step on top of that, however little it computes.

    Raises:
        ValueError: if there is no such clock.
    """
    now: float = 0
    lanes: dict[str, TokenLane] = {}
    for record in trace:
        for arrival in record.arrived:
            lanes[arrival.request_id] = TokenLane(arrival.request_id, now)
        now += fixed + _cost(record, clock)
        for request_id, sampled in zip(record.requests, record.sampled, strict=True):
            lanes.setdefault(request_id, TokenLane(request_id)).tokens += [now] * len(sampled)
    return TokenTimeline(clock, lanes)


def _cost(record: StepRecord, clock: Clock) -> float:
    if clock == "tokens":
        return sum(record.num_tokens) + sum(record.padding)
    if clock not in CLOCKS:
        raise ValueError(f"clock must be one of {', '.join(CLOCKS)}, not {clock!r}")
    return 1 if clock == "steps" else record.seconds
