"""Who owns which page of the pool, and how full it is: the facts that the heatmap and its text twin state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from labkit.trace.memory_use import MemoryUse, memory_use
from labkit.trace.trace import Trace
from labkit.views.style import plural


class Page(NamedTuple):
    """A page during a step. `kind` is free, cached (no owner, but its tokens are known), owned or shared.

    `positions` says where in each owner's block table the page is; `filled` counts its tokens; `findable`
    pages hold a prefix that later requests can share.
    """

    block: int
    kind: str
    owners: tuple[str, ...]
    positions: tuple[int, ...]
    filled: int
    findable: bool


@dataclass(frozen=True)
class Pages:
    """All pages of the pool during a step, and what the step's end gives back."""

    step: int
    block_size: int
    pages: list[Page]
    requests: dict[str, tuple[int, int]]  # owner -> (pages, tokens in the cache)
    use: MemoryUse
    owned_after: int

    def count(self, *kinds: str) -> int:
        """How many pages are of these kinds."""
        return sum(page.kind in kinds for page in self.pages)

    @property
    def owned(self) -> int:
        return self.use.owned

    @property
    def filled_slots(self) -> int:
        """Slots of owned pages that hold a token."""
        return self.use.used

    @property
    def headline(self) -> tuple[str, str]:
        """The numbers in words, in two sentences."""
        owned, total = self.owned, len(self.pages)
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


def pages_of(trace: Trace, step: int) -> Pages:
    """Who owns which page during a step. Raises ValueError if the trace does not hold the step."""
    state = trace.state(step)
    places: dict[int, list[tuple[str, int]]] = {}
    for request_id, table in state.tables.items():
        for position, block in enumerate(table):
            places.setdefault(block, []).append((request_id, position))
    filled = state.filled
    pages = []
    for block in range(trace.meta.num_blocks):
        owners = tuple(request_id for request_id, _ in places.get(block, ()))
        findable = block in state.cached
        kind = ("cached" if findable else "free", "owned", "shared")[min(len(owners), 2)]
        positions = tuple(position for _, position in places.get(block, ()))
        pages.append(Page(block, kind, owners, positions, filled.get(block, 0), findable))
    requests = {name: (len(table), state.computed.get(name, 0)) for name, table in state.tables.items()}
    owned_after = len(trace.state(step, after=True).owners)
    return Pages(step, trace.meta.block_size, pages, requests, memory_use(state), owned_after)
