"""How much of the KV cache is in use, and how much of that is wasted. Computed here, once.

A block is **owned** if a request has it in its block table, and **shared** if several have. The slots of
owned blocks are **reserved**: no other request can have them. Those that hold the keys and values of a token
are **used**, the others are **wasted**: the tail of a request's last block, and all that was taken before it
was needed. A shared block counts once.

KV usage is the share of the pool's blocks that are owned. Records say how many blocks are free after a step,
so `kv_usage` of a record is that after the step; `memory_uses` looks at the pool during each step, when the
requests that finish in it still hold their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from labkit.trace.pool_state import PoolState
from labkit.trace.trace import Trace


class MemoryUse(NamedTuple):
    """The KV cache at one moment: counts of blocks (`owned`, `shared`) and of slots (`reserved`, `used`)."""

    owned: int
    shared: int
    reserved: int
    used: int

    @property
    def wasted(self) -> int:
        """Slots that are reserved and hold no token."""
        return self.reserved - self.used


def memory_use(state: PoolState) -> MemoryUse:
    """The use of the pool at one moment."""
    owned: set[int] = set()
    shared: set[int] = set()
    for table in state.tables.values():
        shared.update(owned.intersection(table))
        owned.update(table)
    reserved = len(owned) * state.block_size
    return MemoryUse(len(owned), len(shared), reserved, reserved - wasted_slots(state))


def wasted_slots(state: PoolState) -> int:
    """`MemoryUse.wasted` alone, for each step of a live engine: it looks at little but the last blocks."""
    size = state.block_size
    empty: dict[int, int] = {}  # slots without a token, of blocks that a request has not filled
    full: list[list[int]] = []
    for request_id, table in state.tables.items():
        whole, rest = divmod(state.computed.get(request_id, 0), size)
        full.append(table[:whole])
        for block in table[whole:]:
            empty[block] = min(size - rest, empty.get(block, size))
            rest = 0
    for blocks in (*full, state.cached):  # another owner may have filled them; cached blocks are full
        if not empty.keys().isdisjoint(blocks):
            empty = {block: slots for block, slots in empty.items() if block not in blocks}
    return sum(empty.values())


def memory_uses(trace: Trace, *, most: int | None = None) -> list[MemoryUse]:
    """The use of the pool during each step of a trace.

    Args:
        trace: The trace of a run.
        most: About how many entries of block tables may be looked at, over all steps (None: all). A trace
            with more than half as many has steps that are not looked at: they get the use of the one before.
    """
    state, uses = PoolState(trace.meta.block_size), []
    spent = 0
    for place, record in enumerate(trace.records):
        state.begin(record)
        if most is None or 2 * spent <= most * (1 + place / len(trace)):
            spent += state.num_entries
            uses.append(memory_use(state))
        else:
            uses.append(uses[-1])
        state.end(record)
    return uses


def waste(uses: Iterable[MemoryUse]) -> float:
    """The share of the reserved slots that hold no token, over several moments; 0 if none are reserved."""
    reserved = used = 0
    for use in uses:
        reserved += use.reserved
        used += use.used
    return 1 - used / reserved if reserved else 0.0


def kv_usage(free_blocks: int, num_blocks: int) -> float:
    """The share of the pool's blocks that are owned, 0 to 1."""
    return 1 - free_blocks / num_blocks
