"""The block pool under any sequence of calls: its rules hold, and a shared block holds what it should."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.schedulers.audit import check_pool

BLOCKS, SIZE = 12, 3


class PoolMachine(RuleBasedStateMachine):
    """Plays requests that share, grow, fork and end, and keeps what was written to each block beside it."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.tokens: dict[str, list[int]] = {}
        self.written: dict[int, list[int | None]] = {block: [None] * SIZE for block in range(BLOCKS)}
        self.count = 0

    def write(self, name: str, start: int, end: int) -> None:
        table = self.pool.tables[name]
        for t in range(start, end):
            block = table[t // SIZE]
            assert self.pool.ref_counts[block] == 1, "a write reached a shared block"
            self.written[block][t % SIZE] = self.tokens[name][t]

    @rule(target=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def admit(self, tokens: list[int]) -> str:
        name = str(self.count)
        self.count += 1
        shared = self.pool.match(tokens)
        assert len(shared) * SIZE < len(tokens), "a hit must leave a token to compute"
        held = [token for block in shared for token in self.written[block]]
        assert held == tokens[: len(held)], "a hit led to a block with other tokens"
        need = self.pool.blocks_for(len(tokens)) - len(shared)
        if need > self.pool.num_free_without(shared):
            return name
        self.pool.share(name, shared)
        self.pool.allocate(name, need)
        self.tokens[name] = list(tokens)
        self.write(name, len(shared) * SIZE, len(tokens))
        self.pool.publish(name, tokens, len(tokens))
        return name

    @rule(name=requests, token=st.integers(0, 1))
    def grow(self, name: str, token: int) -> None:
        if name not in self.tokens:
            return
        tokens, table = self.tokens[name], self.pool.tables[name]
        at = len(tokens)
        if at == len(table) * SIZE:
            if self.pool.num_free == 0:
                with pytest.raises(OutOfBlocks):
                    self.pool.allocate(name, 1)
                return
            self.pool.allocate(name, 1)
        elif self.pool.ref_counts[table[at // SIZE]] > 1:
            if self.pool.num_free == 0:
                with pytest.raises(OutOfBlocks):
                    self.pool.make_writable(name, at // SIZE)
                return
            old, new = self.pool.make_writable(name, at // SIZE)
            self.written[new] = list(self.written[old])
        tokens.append(token)
        self.write(name, at, at + 1)
        self.pool.publish(name, tokens, len(tokens))

    @rule(target=requests, parent=requests)
    def fork(self, parent: str) -> str:
        name = str(self.count)
        self.count += 1
        if parent in self.tokens:
            self.pool.fork(parent, name)
            self.tokens[name] = list(self.tokens[parent])
        return name

    @rule(name=consumes(requests))
    def release(self, name: str) -> None:
        if name in self.tokens:
            table = list(self.pool.tables[name])
            assert self.pool.release(name) == table
            del self.tokens[name]
        with pytest.raises(InvariantError, match="double free"):
            self.pool.release(name)

    @rule()
    @precondition(lambda self: self.pool.num_free < BLOCKS)
    def forget(self) -> None:
        self.pool.forget(range(BLOCKS))

    @invariant()
    def rules_hold(self) -> None:
        check_pool(self.pool)

    @invariant()
    def blocks_hold_their_tokens(self) -> None:
        for name, tokens in self.tokens.items():
            held = [token for block in self.pool.tables[name] for token in self.written[block]]
            assert held[: len(tokens)] == tokens, f"{name} was overwritten"

    def teardown(self) -> None:
        for name in list(self.tokens):
            self.pool.release(name)
        check_pool(self.pool)
        assert self.pool.num_free == BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_nothing_is_taken_when_too_much_is_asked_for() -> None:
    pool = BlockPool(4, 2)
    pool.allocate("a", 3)
    with pytest.raises(OutOfBlocks, match="'b' asks for 2 pages, 1 are free"):
        pool.allocate("b", 2)
    assert pool.num_free == 1
    assert "b" not in pool.tables


def test_blocks_are_handed_out_in_order_and_free_ones_before_cached_ones() -> None:
    pool = BlockPool(4, 2)
    pool.share("a", [])
    assert pool.allocate("a", 2) == [0, 1]
    pool.publish("a", [5, 6, 7, 8], 4)
    pool.release("a")
    assert pool.num_free == 4
    assert pool.allocate("b", 2) == [2, 3]  # 0 and 1 hold a prefix and are kept
    assert pool.match([5, 6, 7, 8, 9]) == [0, 1]
    assert pool.allocate("c", 1) == [1]  # the tail goes first
    assert pool.match([5, 6, 7, 8, 9]) == [0]
    assert pool.drain_changes() == {"published": (0,), "evicted": (1,)}  # 1 came and went
    assert pool.allocate("d", 1) == [0]
    assert pool.drain_changes() == {"published": (), "evicted": (0,)}


def test_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(2, 1)
    for name, token in (("a", 1), ("b", 2)):
        pool.share(name, [])
        pool.allocate(name, 1)
        pool.publish(name, [token], 1)
    pool.release("a")
    pool.release("b")
    pool.share("c", pool.match([1, 0]))  # a's block is used again
    pool.release("c")
    pool.allocate("d", 1)
    assert pool.match([1, 0])
    assert not pool.match([2, 0])


@pytest.mark.parametrize("blocks, size", [(0, 4), (4, 0), (-1, 1)])
def test_sizes_are_checked(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(blocks, size)
