"""What a client measured under load: of each request, and of all together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from labkit.trace import latency
from labkit.trace.latency import Spread


@dataclass
class Measure:
    """One request as its client saw it. Times are in seconds since the run began.

    A client sees pieces of text. A server sends one for each step that gave the request tokens, so ITL here
    is `latency.itl_per_step`, and TPOT counts the tokens that the server says it sent.

    Attributes:
        at: When the request was due; in a closed loop, when it was sent.
        asked: The number of tokens that it asked for.
        sent: When it was sent; None if it never was.
        times: When each piece of text came.
        end: When the answer was complete, or failed.
        tokens: The number of tokens of the answer, as the server says; else the number of pieces.
        counted: Whether the server said so.
        text: The answer.
        error: What went wrong; empty if nothing did.
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
        """Time to first token; NaN if none came."""
        first = latency.ttft(self.at, self.times)
        return math.nan if first is None else first

    @property
    def e2e(self) -> float:
        """End-to-end latency."""
        return self.end - self.at

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: from one piece of text to the next."""
        return latency.itl(self.times)

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 if there is only one."""
        return latency.tpot(self.times, self.tokens) or 0.0


class Slo(NamedTuple):
    """Service level objectives, in seconds: for TTFT, and for the mean ITL of a request, which is TPOT."""

    ttft: float
    itl: float

    def met(self, measure: Measure) -> bool:
        """Return whether a request kept both."""
        return not measure.error and measure.ttft <= self.ttft and measure.tpot <= self.itl


@dataclass
class Summary:
    """All requests of a run. Latencies are of those without error, in seconds; rates are per second.

    Attributes:
        requests, errors: How many were due, and how many of them went wrong.
        first_error: The error of the first of those.
        between: The time that the rates count.
        done, tokens: Requests completed and tokens received, per second.
        good: Requests per second that met the objectives, the goodput; None without objectives.
        attained: The share of all requests that met them.
        in_flight: Requests that were due and not complete, on average.
        ttft, itl, e2e: The latencies of `Measure`; None if there are none. Every ITL of every request counts.
        e2e_mean: The mean of the end-to-end latencies, which the knee is found with.
        late: How long after its time a request was sent, at worst: the client's own delay.
        uncounted: Answers whose tokens the server did not count, so that their pieces of text are counted.
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
    """Sum up all requests of a run in a few numbers.

    Args:
        measures: One measure for each request.
        between: The times between which requests, tokens and goodput per second are counted, for instance
            without those in which the server filled and emptied; None is from the start to the last end.
        slo: The objectives, for goodput.

    Raises:
        ValueError: If there are no measures, or there is no time between the times.
    """
    if not measures:
        raise ValueError("measures is empty: nothing was sent")
    begin, end = between or (0.0, max(measure.end for measure in measures))
    if not begin < end:
        raise ValueError(f"between must be two times, the earlier one first, not {(begin, end)}")
    fine = [measure for measure in measures if not measure.error]
    wrong = [measure.error for measure in measures if measure.error]
    ended = [measure for measure in fine if begin <= measure.end <= end]
    tokens = sum(  # the tokens of an answer are spread evenly over its pieces
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
