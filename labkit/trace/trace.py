"""One immutable record per step: what ran, who waited and why, whose pages changed. No tensors here.

Every picture, check and export reads this and nothing else. A trace written to a file and read back is
equal to the one in memory, and the state of the block pool at any step can be rebuilt from it.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = {"p": "prefill", "c": "chunk", "d": "decode", "i": "idle"}
_KEYFRAME_EVERY = 256


class TraceError(ValueError):
    """A trace file that cannot be read: says which line and what is wrong with it."""


class Arrival(NamedTuple):
    """A request joins the queue."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    parent: str = ""  # the request whose prompt must be computed first: one of the answers of n > 1


class Priority(NamedTuple):
    """A request's priority changes (lower runs first)."""

    request_id: str
    priority: int


class Admission(NamedTuple):
    """A request gets a seat. `num_cached_tokens` need not be computed: they lie in the `shared` pages.

    `num_looked_up` tokens were asked of the prefix cache; none where a fork shares its parent's pages.
    """

    request_id: str
    num_cached_tokens: int = 0
    shared: tuple[int, ...] = ()
    num_looked_up: int = 0


class Blocks(NamedTuple):
    """Blocks that a request took (appended to its block table) or gave back, in table order."""

    request_id: str
    blocks: tuple[int, ...]


class Copy(NamedTuple):
    """Copy on write: in the request's block table `new` takes the place of the shared page `old`."""

    request_id: str
    old: int
    new: int


class Finish(NamedTuple):
    """A request ends: `reason` is stop, length, abort or error. Its pages go back to the pool."""

    request_id: str
    reason: str
    blocks: tuple[int, ...]


class Row(NamedTuple):
    """What one request did in one step. `kind` is prefill, chunk, decode or idle (a padded seat)."""

    request_id: str
    kind: str
    start: int
    num_tokens: int
    sampled: tuple[int, ...]
    padding: int
    drafted: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were right, and so are part of the answer."""
        return max(0, len(self.sampled) - 1) if self.drafted else 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine. From `requests` to `padding`, columns with one entry per request that ran.

    `kinds` has one letter each: p, the whole prompt (or all that was missing of it); c, a chunk of it;
    d, decode; i, an idle seat of a static batch. `starts` counts tokens computed before the step.
    `drafted` has an entry per request, or none where nobody drafts: the tokens after the last one known that
    were guessed and computed with it. Of `sampled`, all but the last are guesses that were right.
    `held_back` says why no more was drafted.
    `waiting` counts the queue after the step was planned and `blocked` names its head and why it waits.
    `free_blocks` counts after the step, when those that finished in it have given theirs back.
    `published` pages can be found by later requests from now on; `evicted` ones no longer. `returned` ones
    were taken for drafts that were wrong: they leave their block tables after the step.
    `time` is when the step ended, in seconds since the trace began, and `seconds` how long it took: the
    only fields that differ from run to run, which is why they do not count when records are compared.
    """

    step: int
    requests: tuple[str, ...] = ()
    kinds: str = ""
    starts: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    sampled: tuple[tuple[int, ...], ...] = ()
    padding: tuple[int, ...] = ()
    drafted: tuple[tuple[int, ...], ...] = ()
    arrived: tuple[Arrival, ...] = ()
    reprioritised: tuple[Priority, ...] = ()
    admitted: tuple[Admission, ...] = ()
    preempted: tuple[Blocks, ...] = ()
    taken: tuple[Blocks, ...] = ()
    copied: tuple[Copy, ...] = ()
    finished: tuple[Finish, ...] = ()
    returned: tuple[Blocks, ...] = ()
    published: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    waiting: int = 0
    blocked: tuple[str, str] | None = None
    held_back: str = ""
    free_blocks: int = 0
    time: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def rows(self) -> list[Row]:
        """One `Row` per request that ran, in batch order."""
        padding = self.padding or (0,) * len(self.requests)
        drafted = self.drafted or ((),) * len(self.requests)
        columns = (self.requests, self.kinds, self.starts, self.num_tokens, self.sampled, padding, drafted)
        return [Row(r, KINDS[k], *rest) for r, k, *rest in zip(*columns, strict=True)]

    @property
    def total_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return sum(self.num_tokens)

    @property
    def total_sampled(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.sampled))

    @property
    def total_drafted(self) -> int:
        """Tokens guessed, right or wrong."""
        return sum(map(len, self.drafted))

    @property
    def total_accepted(self) -> int:
        """Guesses that were right, and so are part of an answer."""
        return sum(row.num_accepted for row in self.rows) if self.drafted else 0


@dataclass(frozen=True)
class TraceMeta:
    """What the steps were run with. `started` is wall-clock time, in seconds since 1970."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    scheduler: str = "continuous"
    kv_policy: str = "paged"
    model: str = ""
    device: str = ""
    dtype: str = ""
    started: float = field(default=0.0, compare=False)


class PoolState:
    """Who owns which page at one moment, rebuilt from records.

    `tables` maps a running request to its pages in order, `computed` to its tokens in the cache, `waiting`
    holds the queue's members, `cached` the pages that hold a prefix which later requests can find.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.waiting: dict[str, Arrival] = {}
        self.arrivals: dict[str, Arrival] = {}
        self.cached: set[int] = set()
        self.held: dict[str, str] = {}  # waits for this other request's prompt, not in the queue

    def copy(self) -> PoolState:
        twin = PoolState(self.block_size)
        twin.tables = {name: list(table) for name, table in self.tables.items()}
        twin.computed, twin.waiting = dict(self.computed), dict(self.waiting)
        twin.arrivals, twin.cached, twin.held = dict(self.arrivals), set(self.cached), dict(self.held)
        return twin

    def begin(self, record: StepRecord) -> None:
        """Apply what happens before the forward pass, and the pass itself."""
        for arrival in record.arrived:
            self.arrivals[arrival.request_id] = self.waiting[arrival.request_id] = arrival
            if arrival.parent:
                self.held[arrival.request_id] = arrival.parent
        for request_id, priority in record.reprioritised:
            for known in (self.arrivals, self.waiting):
                if request_id in known:
                    known[request_id] = known[request_id]._replace(priority=priority)
        for finish in record.finished:
            if finish.reason == "abort":  # takes effect before the step
                self._release(finish.request_id)
                self._let_go(finish.request_id)
        for request_id, _ in record.preempted:
            self._release(request_id)
            if request_id in self.arrivals:
                self.waiting[request_id] = self.arrivals[request_id]
        self.cached.difference_update(record.evicted)
        for admission in record.admitted:
            self.waiting.pop(admission.request_id, None)
            self.tables[admission.request_id] = list(admission.shared)
            self.computed[admission.request_id] = admission.num_cached_tokens
        for request_id, blocks in record.taken:
            self.tables.setdefault(request_id, []).extend(blocks)
        for request_id, old, new in record.copied:
            table = self.tables[request_id]
            table[table.index(old)] = new
        for request_id, start, num_tokens in zip(
            record.requests, record.starts, record.num_tokens, strict=True
        ):
            if num_tokens:
                self.computed[request_id] = start + num_tokens
                arrival = self.arrivals.get(request_id) if self.held else None
                if arrival and start + num_tokens >= arrival.num_prompt_tokens:
                    self._let_go(request_id)
        self.cached.update(record.published)

    def end(self, record: StepRecord) -> None:
        """Apply what happens after the pass: wrong drafts are taken back, finished requests give up pages."""
        for row in record.rows if record.drafted else ():
            if row.drafted and row.request_id in self.computed:
                self.computed[row.request_id] = row.start + len(row.sampled)
        for request_id, blocks in record.returned:
            del self.tables[request_id][-len(blocks) :]
        for request_id, _, _ in record.finished:
            self._release(request_id)
            self.waiting.pop(request_id, None)
            self.arrivals.pop(request_id, None)
            self.held.pop(request_id, None)
            self._let_go(request_id)

    def _let_go(self, parent: str) -> None:
        """The other answers to a request are admitted, or queue like everybody else."""
        self.held = {child: of for child, of in self.held.items() if of != parent} if self.held else self.held

    def as_record(self, last: StepRecord) -> StepRecord:
        """One record that leads from an empty pool to this state, in place of all up to `last`."""
        return StepRecord(
            last.step,
            arrived=tuple(a._replace(parent=self.held.get(name, "")) for name, a in self.arrivals.items()),
            admitted=tuple(
                Admission(name, self.computed.get(name, 0), tuple(table))
                for name, table in self.tables.items()
            ),
            published=tuple(sorted(self.cached)),
            waiting=len(self.waiting),
            free_blocks=last.free_blocks,
            time=last.time,
        )

    def _release(self, request_id: str) -> None:
        self.tables.pop(request_id, None)
        self.computed.pop(request_id, None)

    @property
    def queue(self) -> list[str]:
        """The waiting requests in the order in which they will be admitted."""
        order = {request_id: place for place, request_id in enumerate(self.arrivals)}
        queued = [name for name in self.waiting if name not in self.held]
        return sorted(queued, key=lambda name: (self.waiting[name].priority, order[name]))

    @property
    def owners(self) -> dict[int, tuple[str, ...]]:
        """Page to its owners: one, or several where a prefix is shared."""
        owners: dict[int, tuple[str, ...]] = {}
        for request_id, table in self.tables.items():
            for block in table:
                owners[block] = (*owners.get(block, ()), request_id)
        return owners

    @property
    def filled(self) -> dict[int, int]:
        """Page to the number of its slots that hold a token's keys and values."""
        filled = dict.fromkeys(self.cached, self.block_size)
        for request_id, table in self.tables.items():
            left = self.computed.get(request_id, 0)
            for block in table:
                tokens = max(0, min(self.block_size, left))
                filled[block] = max(filled.get(block, 0), tokens)
                left -= self.block_size
        return filled


class Trace:
    """The records of a run, in order, with what they were run with.

    Args:
        meta: sizes and settings of the engine.
        records: to start from, for instance of a loaded file.
        max_steps: keep at least so many of the latest steps (None: all). Older ones become one record, the
            first, that only says who held which page then.
    """

    def __init__(
        self, meta: TraceMeta, records: Iterable[StepRecord] = (), *, max_steps: int | None = None
    ) -> None:
        self.meta = meta
        self.max_steps = max_steps
        # Records, and states after some of them. Swapped as one: other threads read while the engine writes.
        self._kept: tuple[list[StepRecord], dict[int, PoolState]] = ([], {})
        for record in records:
            self.append(record)

    def append(self, record: StepRecord) -> StepRecord:
        records = self.records
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
        """The records kept, oldest first. Read, don't write."""
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
            ValueError: if the trace does not hold that step.
        """
        records = self.records
        return records[_index(records, step)]

    def state(self, step: int, *, after: bool = False) -> PoolState:
        """The block pool during a step (finished requests still hold their pages) or `after` it.

        Raises:
            ValueError: if the trace does not hold that step.
        """
        records, keyframes = self._kept  # read once: another thread may forget meanwhile
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
        """Share of the tokens looked up in the prefix cache, at admission, that were found there."""
        looked = [a for record in self.records for a in record.admitted if a.num_looked_up]
        queries = sum(admission.num_looked_up for admission in looked)
        return sum(admission.num_cached_tokens for admission in looked) / queries if queries else None

    def why(self, request_id: str, step: int) -> str:
        """One sentence on what a request does after a step: it runs, it is gone, or why it waits and where.

        Raises:
            ValueError: if the trace does not hold that step.
        """
        record, state = self.at(step), self.state(step, after=True)
        if request_id in state.tables:
            return f"request {request_id} is running"
        if request_id not in state.waiting:
            return f"request {request_id} is not in the engine"
        if request_id in state.held:
            return f"request {request_id} waits for the prompt of request {state.held[request_id]}"
        queue = state.queue
        head, reason = record.blocked or (queue[0], "it has just arrived")
        if request_id == head:
            return f"request {request_id} is next, but {reason}"
        place = f"number {queue.index(request_id) + 1} of {len(queue)}"
        return f"request {request_id} is {place}; request {head} is next, but {reason}"

    # -- files ------------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """The trace as JSON Lines: a header, then one step a line. Fields at their default are left out."""
        from labkit.trace import jsonl

        return jsonl.write_lines(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file (JSON Lines, UTF-8)."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.lines())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace from a file.

        Raises:
            TraceError: for a file that is no trace, with the line and what is wrong with it.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_lines(file)
        except UnicodeDecodeError as error:
            raise TraceError(f"not a trace: the file is not UTF-8 text ({error.reason})") from None

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> Trace:
        """Read a trace from JSON Lines. Raises `TraceError` as `load` does."""
        from labkit.trace import jsonl

        return jsonl.read_lines(lines)


def _index(records: list[StepRecord], step: int) -> int:
    index = bisect.bisect_left(records, step, key=lambda record: record.step)
    if index == len(records) or records[index].step != step:
        held = f"{records[0].step} to {records[-1].step}" if records else "none"
        raise ValueError(f"step {step} is not in this trace (steps held: {held})")
    return index
