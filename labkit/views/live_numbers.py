"""The numbers beside the pictures: latencies, prefix hits, waste. They are read from the trace, step by step.

Only seconds of work count. The time between two steps does not, so that neither a pause nor an engine that is
slowed down to be watched spoils what is measured.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from labkit.trace import latency
from labkit.trace.lookups import Lookups
from labkit.trace.records import StepRecord

LATEST_REQUESTS = 100  # TTFT and the hit rate are those of so many requests
LATEST_GAPS = 1000  # ITL is that of so many gaps between tokens
LATEST_CHECKS = 200  # the share of accepted drafts is that of so many rows with drafts


class Numbers:
    """Takes in every step, in order, and knows the latest numbers. Its memory is bounded."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.generated = 0
        self._worked = 0.0
        self._arrived: dict[str, float] = {}  # requests without a token yet
        self._latest: dict[str, float] = {}  # when each running request got its latest token
        self._ttft: deque[float] = deque(maxlen=LATEST_REQUESTS)
        self._itl: deque[float] = deque(maxlen=LATEST_GAPS)
        self._lookups = Lookups()
        self._looked_up: deque[tuple[int, int]] = deque(maxlen=LATEST_REQUESTS)
        self._checked: deque[tuple[int, int]] = deque(maxlen=LATEST_CHECKS)

    def append(self, record: StepRecord) -> None:
        """Take in the next step."""
        begin = self._worked
        end = self._worked = begin + record.seconds
        if record.requests or not record.admitted:  # else it stands for steps that never came in
            for arrival in record.arrived:
                self._arrived[arrival.request_id] = begin
        for admission in self._lookups.take(record):
            self._looked_up.append((admission.num_cached_tokens, admission.num_looked_up))
        for request_id, tokens in zip(record.requests, record.sampled, strict=True):
            if tokens:
                self._tokens(request_id, len(tokens), end)
                self.generated += len(tokens)
        for row in record.rows if record.drafted else ():
            if row.drafted:
                self._checked.append((row.num_accepted, len(row.drafted)))
        self.preemptions += len(record.preempted)
        for finish in record.finished:
            self._arrived.pop(finish.request_id, None)
            self._latest.pop(finish.request_id, None)

    def _tokens(self, request_id: str, count: int, now: float) -> None:
        arrived = self._arrived.pop(request_id, None)
        if arrived is not None:
            self._ttft.append(now - arrived)  # `latency.ttft`
        self._itl.extend(latency.share_gap(self._latest.get(request_id), now, count))
        self._latest[request_id] = now

    def pack(self) -> dict[str, Any]:
        """The numbers, ready for JSON; None where nothing has been measured.

        "ttft" and "itl" are medians over the latest requests and gaps; "itl" is `latency.itl_shared`.
        """
        packed = {
            "ttft": _median(self._ttft),
            "itl": _median(self._itl),
            "hits": _share(self._looked_up),
            "preemptions": self.preemptions,
            "generated": self.generated,
        }
        if self._checked:
            packed["drafts"] = _share(self._checked)
        return packed


def _share(counts: Iterable[tuple[int, int]]) -> float | None:
    """The sum of the first numbers over the sum of the second ones; None if that is zero."""
    part, whole = (sum(column) for column in zip((0, 0), *counts, strict=True))
    return part / whole if whole else None


def _median(values: deque[float]) -> float | None:
    return round(statistics.median(values), 6) if values else None
