"""Which look-ups in the prefix cache say what requests share."""

from __future__ import annotations

from labkit.trace.records import Admission, StepRecord


class Lookups:
    """Takes in every step, in order, and picks the admissions that count for the hit rate.

    A request that returns after a preemption finds the blocks that it filled itself. That is no sharing, so
    its look-ups do not count, as in vLLM.
    """

    def __init__(self) -> None:
        self._preempted: set[str] = set()  # requests that were, and are not finished

    def take(self, record: StepRecord) -> list[Admission]:
        """Take in the next step; return those of its admissions that count."""
        # An abort takes effect before the step: its id may already be that of a new request.
        self._preempted.difference_update(f.request_id for f in record.finished if f.reason == "abort")
        self._preempted.update(request_id for request_id, _ in record.preempted)
        counted = [a for a in record.admitted if a.num_looked_up and a.request_id not in self._preempted]
        self._preempted.difference_update(finish.request_id for finish in record.finished)
        return counted
