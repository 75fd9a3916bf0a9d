"""What a client under load saw: of one request, and of all of them together."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from labkit.benchmark.engine.schedulers import percentile


@dataclass
class Measure:
    """One request as its client saw it. Times are in seconds since the run began.

    Attributes:
        at: when it was due; in a closed loop, when it was sent.
        asked: tokens that it asked for.
        sent: when it was sent, or None if it never was.
        times: when each piece of text came.
        end: when its answer was complete, or it failed.
        tokens: of the answer, as the server says; else the pieces of text.
        counted: whether the server said so.
        text: the answer.
        error: what went wrong; empty if nothing did.
    """

    at: float
    asked: int
    sent: float | None = None
    times: list[float] = field(default_factory=list)
    end: float = math.nan
    tokens: int = 0
    counted: bool = False
    text: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token (to be asked of an answer without error)."""
        return self.times[0] - self.at

    @property
    def e2e(self) -> float:
        """Time to the end."""
        return self.end - self.at

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between one piece of text and the next."""
        return [b - a for a, b in itertools.pairwise(self.times)]

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 if there is but one."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)


class Slo(NamedTuple):
    """Service level objectives, in seconds: until the first token, and per token after it on average."""

    ttft: float
    itl: float

    def met(self, measure: Measure) -> bool:
        return not measure.error and measure.ttft <= self.ttft and measure.tpot <= self.itl


class Spread(NamedTuple):
    """Median and tail, in seconds."""

    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return cls(statistics.median(values), percentile(values, 95), percentile(values, 99))


@dataclass
class Summary:
    """What a run comes to. Latencies are of all requests without error, in seconds; rates are per second.

    Attributes:
        requests, errors: how many were due, and how many of them went wrong.
        first_error: one of those.
        between: the time that the rates count.
        done, tokens: requests completed and tokens received per second.
        good: requests per second that met the objectives: goodput. None without objectives.
        attained: the share of all requests that met them.
        in_flight: requests due and not yet complete, on average.
        ttft, itl, e2e: to the first token, between two, to the end; None if there are none.
        e2e_mean: what the knee is found with.
        late: how long after its time a request was sent, at worst: the client's own delay.
        uncounted: answers whose tokens the server did not count: the pieces of text stand for them.
    """

    requests: int
    errors: int
    first_error: str
    between: tuple[float, float]
    done: float
    tokens: float
    good: float | None
    attained: float | None
    in_flight: float
    ttft: Spread | None
    itl: Spread | None
    e2e: Spread | None
    e2e_mean: float | None
    late: float
    uncounted: int

    def __str__(self) -> str:
        lines = [
            f"{self.requests} requests, {self.errors} errors" + f" ({self.first_error})" * bool(self.errors),
            f"{self.done:.2f} requests/s and {self.tokens:.1f} tokens/s; {self.in_flight:.1f} in flight",
        ]
        for name, spread in (("TTFT", self.ttft), ("ITL", self.itl), ("E2E", self.e2e)):
            if spread:
                lines.append(
                    f"{name}: median {spread.median:.3f} s, p95 {spread.p95:.3f}, p99 {spread.p99:.3f}"
                )
        if self.good is not None:
            lines.append(f"{self.good:.2f} requests/s within the objectives ({self.attained:.0%} of all)")
        return "\n".join(lines)


def summary(
    measures: Sequence[Measure], *, between: tuple[float, float] | None = None, slo: Slo | None = None
) -> Summary:
    """What a run comes to.

    Args:
        between: count requests, tokens and goodput per second between these times only, say without those
            in which the server filled and emptied; None is from the start to the last answer's end.
        slo: objectives, for goodput.

    Raises:
        ValueError: if there are no measures, or no time between the times.
    """
    if not measures:
        raise ValueError("measures is empty: nothing was sent")
    begin, end = between or (0.0, max(measure.end for measure in measures))
    if not begin < end:
        raise ValueError(f"between must be two times, the earlier one first, not {(begin, end)}")
    fine = [measure for measure in measures if not measure.error]
    wrong = [measure.error for measure in measures if measure.error]
    ended = [measure for measure in fine if begin <= measure.end <= end]
    tokens = sum(
        measure.tokens * sum(begin <= t <= end for t in measure.times) / len(measure.times)
        for measure in measures
        if measure.times
    )
    busy = sum(max(0.0, min(measure.end, end) - max(measure.at, begin)) for measure in measures)
    width = end - begin
    return Summary(
        len(measures),
        len(wrong),
        wrong[0] if wrong else "",
        (begin, end),
        len(ended) / width,
        tokens / width,
        sum(map(slo.met, ended)) / width if slo else None,
        sum(map(slo.met, fine)) / len(measures) if slo else None,
        busy / width,
        Spread.of([measure.ttft for measure in fine]),
        Spread.of([gap for measure in fine for gap in measure.gaps]),
        Spread.of([measure.e2e for measure in fine]),
        statistics.mean(measure.e2e for measure in fine) if fine else None,
        max((m.sent - m.at for m in measures if m.sent is not None), default=0.0),
        sum(not measure.counted for measure in fine),
    )
