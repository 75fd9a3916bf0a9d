"""A closer look at one step, or at one block: from the trace, and the tokens of the answers still known.

Blocks are numbers and the trace holds no prompts, so the tokens come from the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace
from labkit.views.live_feed import Decode, looks, pack_bits, words_of
from labkit.views.wire import (
    Blocked,
    BlockFacts,
    Ended,
    LastOwner,
    Owner,
    Preempted,
    Queued,
    RanRow,
    Returned,
    StepFacts,
    Table,
)

_LOOK_BACK = 2_000  # steps, to find who had a block last


@dataclass(frozen=True)
class Inspector:
    """Looks closely at the steps of a run and at its blocks.

    Args:
        trace: the trace of the run; it may be growing.
        decode: the tokenizer's function from token ids to text.
        token_ids: a function from a request's id to its prompt and answer so far; it raises KeyError for a
            request that is no longer known.
        beginning: the tokens with which every chat begins here.
    """

    trace: Trace
    decode: Decode
    token_ids: Callable[[str], list[int]]
    beginning: tuple[int, ...] = ()

    def look(self, block: object = None, step: int | None = None) -> StepFacts | BlockFacts:
        """The facts of a block, if one is named, or else of a step; raises as the method for it does."""
        if block is not None:
            return self.block(block, step)
        return self.step(-1 if step is None else step)

    def step(self, step: int) -> StepFacts:
        """The batch, the block tables and the queue of one step, ready for JSON.

        The tables are as they were while the step ran: a request that finished in it still holds its blocks.

        Raises:
            ValueError: if the trace does not hold that step (any more).
        """
        record, state = self.trace.at(step), self.trace.state(step)
        rows = []
        for row in record.rows:
            rows.append(
                RanRow(
                    row.request_id,
                    *looks(row.request_id),
                    kind=row.kind[0],
                    start=row.start,
                    tokens=row.num_tokens,
                    text=self.decode(list(row.sampled)),
                    drafted=len(row.drafted),
                    accepted=row.num_accepted,
                    drafts=words_of(row.drafted, self.decode),
                )
            )
        return {
            "step": step,
            "ms": round(1000 * record.seconds, 3),
            "rows": rows,
            "tables": [
                Table(name, state.computed.get(name, 0), table) for name, table in state.tables.items()
            ],
            "cached": pack_bits(state.cached, self.trace.meta.num_blocks),
            "queue": [Queued(name, *looks(name)) for name in state.queue],
            "preempted": [Preempted(name, *looks(name), len(blocks)) for name, blocks in record.preempted],
            "ended": [Ended(name, *looks(name), reason) for name, reason, _ in record.finished],
            "blocked": record.blocked and Blocked(*record.blocked),
            "free": record.free_blocks,
            "returned": [Returned(name, blocks) for name, blocks in record.returned],
            "held_back": record.held_back,
        }

    def block(self, block: object, step: int | None = None) -> BlockFacts:
        """The owners of a block, its place in their block tables, and the tokens in it, each as text.

        Without a step, the facts are those after the latest one. A block without owners names the last one
        that it had. `tokens` is None where the answer is too old to be remembered.

        Raises:
            ValueError: for a block that the pool does not have, or a step that the trace does not hold.
        """
        num_blocks, size = self.trace.meta.num_blocks, self.trace.meta.block_size
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_blocks:
            raise ValueError(f"block must be between 0 and {num_blocks - 1}, not {block!r}")
        records = self.trace.records
        if not records:
            nothing = {"owners": [], "cached": False, "last": None, "tokens": None, "begins": ""}
            return cast(BlockFacts, {"block": block, **nothing})
        latest = records[-1].step
        state = self.trace.state(latest, after=True) if step is None else self.trace.state(step)
        owners = []
        for name, table in state.tables.items():
            if block in table:
                position = table.index(block)
                filled = max(0, min(size, state.computed.get(name, 0) - position * size))
                owners.append(Owner(name, position, filled))
        cached = block in state.cached
        last = None if owners else last_owner(self.trace, block, latest if step is None else step)
        known = None
        if owners:
            known = max(owners, key=lambda owner: owner.filled)
        elif last and cached:
            known = Owner(last.request, last.position, size)
        ids = known and self._ids(known, None if step is None else self.trace.at(step))
        return {
            "block": block,
            "owners": owners,
            "cached": cached,
            "last": last,
            "tokens": None if ids is None else words_of(ids, self.decode),
            "begins": self._begins(known, ids) if known and ids else "",
        }

    def _begins(self, owner: Owner, ids: list[int]) -> str:
        """What a block at the beginning of every chat is part of; "" for any other block."""
        start = owner.position * self.trace.meta.block_size
        if tuple(ids) != self.beginning[start : start + len(ids)]:
            return ""
        return "system prompt" if "system" in self.decode(list(self.beginning)) else "chat template"

    def _ids(self, owner: Owner, record: StepRecord | None) -> list[int] | None:
        """The tokens in a block of an owner, after the latest step or during that of the record."""
        try:
            ids = self.token_ids(owner.request)
        except KeyError:
            return None
        for row in record.rows if record else ():
            if row.request_id == owner.request and row.drafted:  # its drafts lie there, accepted or not
                ids = [*ids[: row.start + 1], *row.drafted]
        start = owner.position * self.trace.meta.block_size
        return ids[start : start + owner.filled]


def last_owner(trace: Trace, block: int, step: int) -> LastOwner | None:
    """The request that gave a block back last, before the end of a step; None if there is none."""
    for record in reversed(trace.records[-_LOOK_BACK:]):
        if record.step > step:
            continue
        given = [(finish.request_id, finish.blocks) for finish in reversed(record.finished)]
        for name, blocks in (*given, *reversed(record.preempted)):
            if block in blocks:
                return LastOwner(name, blocks.index(block))
        for name, blocks in record.returned:
            if block in blocks:
                return LastOwner(name, trace.state(record.step).tables[name].index(block))
    return None
