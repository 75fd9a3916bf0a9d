"""How fast a run went: tokens per second or step, KV usage, and how many requests ran and waited."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from labkit.trace.memory_use import kv_usage
from labkit.trace.trace import Trace
from labkit.views.facts.batch_timeline import ended_early
from labkit.views.style import plural, size

_REST = 0.5  # seconds between two steps that count as a pause


@dataclass
class Rates:
    """Rates describe a run, with one point per step.

    They count tokens per second of work, or per step if the trace has no clock (`per` says which). Each is a
    mean over the last `window` seconds or steps.
    """

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
    sending: list[float]  # the share of a step's seconds in which processes sent to each other
    sent: int  # bytes that each of them sent
    idle_before: list[bool]  # whether the engine rested for a while before the step
    num_computed: int
    num_generated: int
    spent: float  # seconds of work, or steps
    spent_sending: float  # seconds

    @property
    def headline(self) -> tuple[str, str]:
        """State the numbers in two sentences."""
        took = f" in {self.spent:.3g} s of work" if self.per == "second" else ""
        amount = self.spent or 1
        first = f"{self.num_generated / amount:.4g} generated tokens per {self.per}, "
        first += f"{self.num_computed / amount:.4g} computed"
        second = f"{plural(len(self.steps), 'step')}{took}: {plural(self.num_computed, 'token')} computed, "
        second += f"{self.num_generated} generated; KV usage at most {max(self.kv_usage):.0%}"
        second += f"; {plural(sum(self.preempted), 'preemption')}" if any(self.preempted) else ""
        if self.sent:
            took = f", {self.spent_sending / amount:.0%} of the time" if self.per == "second" else ""
            second += f"; each process sent {size(self.sent)} to the others{took}"
        window = f"{self.window:.2g} s of work" if self.per == "second" else plural(self.window, "step")
        return first, f"{second}; curves are means over {window}"


def rates_of(trace: Trace, window: float | None = None) -> Rates | None:
    """Return throughput, KV usage and counts for each step, or None if the trace is empty.

    Args:
        trace: the trace of a run.
        window: the seconds, or steps, that a mean is taken over; None means a fortieth of the run.

    Raises:
        ValueError: if `window` is not positive.
    """
    if window is not None and not window > 0:
        raise ValueError(f"window must be positive, not {window}")
    records = trace.records
    if not records:
        return None
    # A record in which nothing ran took no time. The first one of a shortened trace is of that kind.
    worked = [record for record in records if record.requests]
    clock = bool(worked) and all(record.seconds > 0 for record in worked)
    spent = [record.seconds if clock else bool(record.requests) for record in records]
    window = window or (sum(spent) / 40 if clock else max(1, len(worked) // 40))
    computed = [record.total_tokens for record in records]
    generated = [record.total_sampled for record in records]
    seated = set(trace.state(records[0].step).tables)
    running = []
    for record in records:
        seated.difference_update(blocks.request_id for blocks in record.preempted)
        seated.difference_update(
            end.request_id for end in record.finished if ended_early(end.request_id, record)
        )
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
        sending=[min(1.0, r.sending / r.seconds) if r.seconds and r.total_sent else 0.0 for r in records],
        sent=sum(record.total_sent for record in records),
        idle_before=[clock and rest > _REST for rest in rests],
        num_computed=sum(computed),
        num_generated=sum(generated),
        spent=sum(spent),
        spent_sending=sum(record.sending for record in records),
    )


def _smooth(amounts: list[int], spent: list[float], window: float) -> list[float | None]:
    """Return the amount per time spent: for each entry, over all that ended within `window` before its end.

    The rate is None where no time was spent.
    """
    total, time = [0, *accumulate(amounts)], [0, *accumulate(spent)]
    rates: list[float | None] = []
    for end in range(1, len(amounts) + 1):
        begin = min(end - 1, bisect_left(time, time[end] - window))  # the entry itself at least
        took = time[end] - time[begin]
        rates.append((total[end] - total[begin]) / took if took else None)
    return rates
