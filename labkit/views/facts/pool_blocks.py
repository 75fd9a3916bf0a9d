"""Who owns which block of the pool during a step, and how full it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from labkit.trace.memory_use import MemoryUse, memory_use
from labkit.trace.trace import Trace
from labkit.views.style import plural


class PoolBlock(NamedTuple):
    """A block is during a step of one `kind`: free, cached (unowned, with known tokens), owned or shared.

    `positions` says where the block stands in each owner's block table, `filled` counts its tokens, and a
    `findable` block holds a prefix that later requests can share.
    """

    number: int
    kind: str
    owners: tuple[str, ...]
    positions: tuple[int, ...]
    filled: int
    findable: bool


@dataclass(frozen=True)
class PoolBlocks:
    """These are all blocks of the pool during a step.

    `requests` maps each owner to its number of blocks and of tokens in the cache. `owned_after` counts the
    owned blocks once the step is over, when finished requests have given theirs back.
    """

    step: int
    block_size: int
    blocks: list[PoolBlock]
    requests: dict[str, tuple[int, int]]
    use: MemoryUse
    owned_after: int

    def count(self, *kinds: str) -> int:
        """Count the blocks of these kinds."""
        return sum(block.kind in kinds for block in self.blocks)

    @property
    def owned(self) -> int:
        return self.use.owned

    @property
    def filled_slots(self) -> int:
        """Count the slots of owned blocks that hold a token."""
        return self.use.used

    @property
    def headline(self) -> tuple[str, str]:
        """State the numbers in two sentences."""
        owned, total = self.owned, len(self.blocks)
        slots = self.use.reserved
        first = f"Step {self.step}: KV usage {owned / total:.0%}, {owned} of {plural(total, 'block')} owned"
        second = f"{self.use.shared} shared, {self.count('cached')} cached and free, "
        second += f"{self.count('free')} free"
        if owned:
            second += f"; tokens fill {self.filled_slots} of {slots} owned slots"
            second += f" ({self.filled_slots / slots:.0%})"
        if owned != self.owned_after:
            second += f"; the step's end gives back {owned - self.owned_after}"
        return first, second


def blocks_of(trace: Trace, step: int) -> PoolBlocks:
    """Return who owns which block during a step.

    Raises:
        ValueError: if the trace does not hold that step.
    """
    state = trace.state(step)
    places: dict[int, list[tuple[str, int]]] = {}
    for request_id, table in state.tables.items():
        for position, number in enumerate(table):
            places.setdefault(number, []).append((request_id, position))
    filled = state.filled
    blocks = []
    for number in range(trace.meta.num_blocks):
        owners = tuple(request_id for request_id, _ in places.get(number, ()))
        positions = tuple(position for _, position in places.get(number, ()))
        findable = number in state.cached
        kind = ("cached" if findable else "free", "owned", "shared")[min(len(owners), 2)]
        blocks.append(PoolBlock(number, kind, owners, positions, filled.get(number, 0), findable))
    requests = {name: (len(table), state.computed.get(name, 0)) for name, table in state.tables.items()}
    owned_after = len(trace.state(step, after=True).owners)
    return PoolBlocks(step, trace.meta.block_size, blocks, requests, memory_use(state), owned_after)
