"""Who owns which block at one moment, rebuilt from the records of the steps."""

from __future__ import annotations

from labkit.trace.records import Admission, Arrival, Moved, OtherPool, StepRecord


class PoolState:
    """The block pool at one moment, rebuilt from records.

    Attributes:
        tables: The block table of each running request.
        computed: How many tokens of each running request are in the cache.
        waiting: The requests in the queue.
        arrivals: All requests that have not finished, in order of arrival.
        cached: The blocks that hold a prefix which later requests can find.
        held: A request that waits for the prompt of another, and is not in the queue yet, to that other.
        elsewhere: The requests that have not arrived in this engine, and where each is.
        other_pool: The pool of the engine that computes prompts; None if there is none.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.waiting: dict[str, Arrival] = {}
        self.arrivals: dict[str, Arrival] = {}
        self.cached: set[int] = set()
        self.held: dict[str, str] = {}
        self.elsewhere: dict[str, Moved] = {}
        self.other_pool: OtherPool | None = None

    def copy(self) -> PoolState:
        """An independent copy."""
        twin = PoolState(self.block_size)
        twin.tables = {name: list(table) for name, table in self.tables.items()}
        twin.computed, twin.waiting = dict(self.computed), dict(self.waiting)
        twin.arrivals, twin.cached, twin.held = dict(self.arrivals), set(self.cached), dict(self.held)
        twin.elsewhere, twin.other_pool = dict(self.elsewhere), self.other_pool
        return twin

    def begin(self, record: StepRecord) -> None:
        """Apply what happens before the forward pass, and the pass itself."""
        self.elsewhere.update((moved.request_id, moved) for moved in record.moved)
        self.other_pool = record.other_pool or self.other_pool
        for arrival in record.arrived:
            self.elsewhere.pop(arrival.request_id, None)
            self.arrivals[arrival.request_id] = self.waiting[arrival.request_id] = arrival
            if arrival.parent:
                self.held[arrival.request_id] = arrival.parent
        for request_id, priority in record.reprioritised:
            for known in (self.arrivals, self.waiting):
                if request_id in known:
                    known[request_id] = known[request_id]._replace(priority=priority)
        aborted = [finish.request_id for finish in record.finished if finish.reason == "abort"]
        for request_id in aborted:  # an abort takes effect before the step
            self._release(request_id)
        self._let_go(aborted)
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
        ready = []
        for request_id, start, num_tokens in zip(
            record.requests, record.starts, record.num_tokens, strict=True
        ):
            if num_tokens:
                self.computed[request_id] = start + num_tokens
                arrival = self.arrivals.get(request_id) if self.held else None
                if arrival and start + num_tokens >= arrival.num_prompt_tokens:
                    ready.append(request_id)
        self._let_go(ready)
        self.cached.update(record.published)

    def end(self, record: StepRecord) -> None:
        """Apply what happens after the pass: rejected drafts are taken back, finished requests leave."""
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
        self._let_go([finish.request_id for finish in record.finished])

    def _let_go(self, parents: list[str]) -> None:
        """The prompts of `parents` are computed: their other answers are admitted, or queue like others."""
        if self.held and parents:  # all at once: a step may end as many as there are
            gone = set(parents)
            self.held = {child: of for child, of in self.held.items() if of not in gone}

    def as_record(self, last: StepRecord) -> StepRecord:
        """One record that leads from an empty pool to this state. It replaces all records up to `last`."""
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
            moved=tuple(self.elsewhere.values()),
            other_pool=self.other_pool,
            time=last.time,
        )

    def _release(self, request_id: str) -> None:
        self.tables.pop(request_id, None)
        self.computed.pop(request_id, None)

    @property
    def num_entries(self) -> int:
        """The entries of all block tables: a block counts for each request that shares it."""
        return sum(map(len, self.tables.values()))

    @property
    def queue(self) -> list[str]:
        """The waiting requests, in the order in which they will be admitted."""
        order = {request_id: place for place, request_id in enumerate(self.arrivals)}
        queued = [name for name in self.waiting if name not in self.held]
        return sorted(queued, key=lambda name: (self.waiting[name].priority, order[name]))

    @property
    def owners(self) -> dict[int, tuple[str, ...]]:
        """The owners of each block: one, or several where a prefix is shared."""
        owners: dict[int, tuple[str, ...]] = {}
        for request_id, table in self.tables.items():
            for block in table:
                owners[block] = (*owners.get(block, ()), request_id)
        return owners

    @property
    def filled(self) -> dict[int, int]:
        """How many slots of each block hold the keys and values of a token."""
        filled = dict.fromkeys(self.cached, self.block_size)
        for request_id, table in self.tables.items():
            left = self.computed.get(request_id, 0)
            for block in table:
                tokens = max(0, min(self.block_size, left))
                filled[block] = max(filled.get(block, 0), tokens)
                left -= self.block_size
        return filled
