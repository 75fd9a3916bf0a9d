"""The records of a run, in order.

A trace written to a file and read back is equal to the one in memory, and the state of the block pool at any
step can be rebuilt from it.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator

from labkit.trace import jsonl
from labkit.trace.lookups import Lookups
from labkit.trace.pool_state import PoolState
from labkit.trace.records import PLACES, StepRecord, TraceMeta, printable

_KEYFRAME_EVERY = 256


class Trace:
    """The records of a run, in order, with what they were run with.

    Args:
        meta: The sizes and settings of the engine.
        records: The records to start with, for instance those of a file.
        max_steps: The number of latest steps that are always kept (None: all are). Older ones are replaced by
            one record, the first, which only says who held which block at that time.

    Attributes:
        note: What is missing of the file that the trace was read from; "" if nothing is.
    """

    def __init__(
        self, meta: TraceMeta, records: Iterable[StepRecord] = (), *, max_steps: int | None = None
    ) -> None:
        self.meta = meta
        self.max_steps = max_steps
        self.note = ""
        # The records, and the pool's state after some of them (keyframes). Both are replaced in one
        # assignment, because other threads read while the engine writes.
        self._kept: tuple[list[StepRecord], dict[int, PoolState]] = ([], {})
        for record in records:
            self.append(record)

    def append(self, record: StepRecord) -> StepRecord:
        """Keep a record; returns it."""
        records = self._kept[0]
        records.append(record)
        if self.max_steps is not None and len(records) >= 2 * self.max_steps:
            self._forget(len(records) - self.max_steps)
        return record

    def _forget(self, count: int) -> None:
        last = self.records[count - 1]
        start = self.state(last.step, after=True).as_record(last)
        self._kept = ([start, *self.records[count:]], {})

    @property
    def records(self) -> list[StepRecord]:
        """The records that are kept, oldest first. Callers must not change the list."""
        return self._kept[0]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> StepRecord:
        """The record at a place in the trace: `trace[-1]` is the latest. See `at` for a step's number."""
        return self.records[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.meta == other.meta and self.records == other.records

    def __repr__(self) -> str:
        return f"Trace({len(self)} steps, {self.meta})"

    def at(self, step: int) -> StepRecord:
        """The record of one step.

        Raises:
            ValueError: If the trace does not hold that step.
        """
        records = self.records
        return records[_index(records, step)]

    def state(self, step: int, *, after: bool = False) -> PoolState:
        """The block pool during a step (finished requests still hold their blocks) or `after` it.

        Raises:
            ValueError: If the trace does not hold that step.
        """
        records, keyframes = self._kept  # read once: the engine may drop old steps meanwhile
        index = _index(records, step)
        start = index - 1 - (index - 1) % _KEYFRAME_EVERY
        while start >= 0 and start not in keyframes:
            start -= _KEYFRAME_EVERY
        state = keyframes[start].copy() if start >= 0 else PoolState(self.meta.block_size)
        for i in range(max(start, -1) + 1, index):
            state.begin(records[i])
            state.end(records[i])
            if i % _KEYFRAME_EVERY == 0:
                keyframes[i] = state.copy()
        state.begin(records[index])
        if after:
            state.end(records[index])
        return state

    @property
    def prefix_hit_rate(self) -> float | None:
        """The share of the tokens looked up in the prefix cache, at admission, that were found there.

        What a request finds again after a preemption does not count (see `Lookups`).
        """
        lookups = Lookups()
        looked = [admission for record in self.records for admission in lookups.take(record)]
        queries = sum(admission.num_looked_up for admission in looked)
        return sum(admission.num_cached_tokens for admission in looked) / queries if queries else None

    def why(self, request_id: str, step: int) -> str:
        """One sentence about a request after a step: whether it runs or is gone, or where and why it waits.

        Raises:
            ValueError: If the trace does not hold that step.
        """
        record, state = self.at(step), self.state(step, after=True)
        who = f"request {printable(request_id)}"
        if request_id in state.tables:
            return f"{who} is running"
        if request_id in state.elsewhere:
            return f"{who} {PLACES[state.elsewhere[request_id].place]}"
        if request_id not in state.waiting:
            return f"{who} is not in the engine"
        if request_id in state.held:
            return f"{who} waits for the prompt of request {printable(state.held[request_id])}"
        queue = state.queue
        head, reason = record.blocked or (queue[0], "it has just arrived")
        why = f"is next, but {printable(reason)}"
        if request_id == head:
            return f"{who} {why}"
        place = f"number {queue.index(request_id) + 1} of {len(queue)}"
        return f"{who} is {place}; request {printable(head)} {why}"

    # -- files ------------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """The trace as JSON Lines: a header, then one step a line. Fields at their default are left out."""
        return jsonl.write_lines(self.meta, self.records)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file (JSON Lines, UTF-8)."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.lines())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace from a file. One whose last line is torn off is read up to there; `note` says so.

        Raises:
            TraceError: If the file is no trace. The message says which line is wrong and why.
        """
        with open(path, "rb") as file:
            return cls.from_lines(jsonl.decode(file))

    @classmethod
    def from_lines(cls, lines: Iterable[str], *, watch: jsonl.Watch | None = None) -> Trace:
        """Read a trace from JSON Lines; `watch` sees each step as it is read.

        Raises:
            TraceError: As `load` does, and as `watch` does.
        """
        meta, records, note = jsonl.read_lines(lines, watch=watch)
        trace = cls(meta, records)
        trace.note = note
        return trace


def _index(records: list[StepRecord], step: int) -> int:
    index = bisect.bisect_left(records, step, key=lambda record: record.step)
    if index == len(records) or records[index].step != step:
        held = f"{records[0].step} to {records[-1].step}" if records else "none"
        raise ValueError(f"step {step} is not in this trace (steps held: {held})")
    return index
