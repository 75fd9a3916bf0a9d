"""What of the KV cache is used, reserved, shared and wasted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.trace import memory_use as memory_use_module
from labkit.trace.memory_use import MemoryUse, kv_usage, memory_use, memory_uses, waste, wasted_slots
from labkit.trace.pool_state import PoolState
from labkit.trace.records import Admission, StepRecord, TraceMeta
from labkit.trace.trace import Trace
from tests.trace.test_trace import played


def counted(state: PoolState) -> MemoryUse:
    """The same, block by block."""
    owners = Counter(block for table in state.tables.values() for block in table)
    filled = state.filled
    return MemoryUse(
        len(owners),
        sum(count > 1 for count in owners.values()),
        len(owners) * state.block_size,
        sum(filled[block] for block in owners),
    )


@st.composite
def states(draw: st.DrawFn) -> PoolState:
    """Any pool: several requests may hold a block at different places, with too many or too few tokens."""
    state = PoolState(draw(st.integers(1, 5)))
    blocks = st.lists(st.integers(0, 9), unique=True, max_size=6)
    state.tables = draw(st.dictionaries(st.sampled_from("abcd"), blocks))
    state.computed = {name: draw(st.integers(0, 20)) for name in state.tables if draw(st.booleans())}
    state.cached = draw(st.sets(st.integers(0, 9)))
    return state


def test_what_is_held_and_empty_is_wasted() -> None:
    state = PoolState(4)
    state.tables = {"a": [0, 1, 2], "b": [0, 3], "c": [4, 5]}
    state.computed = {"a": 9, "b": 5, "c": 0}
    assert memory_use(state).wasted == 3 + 3 + 8
    assert memory_use(state) == MemoryUse(owned=6, shared=1, reserved=24, used=10)
    state.tables["d"], state.computed["d"] = [0, 1, 2], 10  # a fork of a, one token ahead in the same block
    assert memory_use(state).wasted == 2 + 3 + 8
    assert memory_use(state).shared == 3
    assert memory_use(PoolState(4)) == MemoryUse(0, 0, 0, 0)


@given(states())
def test_it_is_what_one_counts_block_by_block(state: PoolState) -> None:
    use = memory_use(state)
    assert use == counted(state)
    assert 0 <= use.shared <= use.owned and 0 <= use.used <= use.reserved
    assert use.wasted == use.reserved - use.used == wasted_slots(state)


@pytest.mark.parametrize("kind", ["continuous", "static"])
def test_during_each_step_of_a_run(kind: str) -> None:
    trace = played(kind).trace
    uses = memory_uses(trace)
    for record, use in zip(trace, uses, strict=True):
        assert use == counted(trace.state(record.step))
        after = memory_use(trace.state(record.step, after=True))
        usage = kv_usage(record.free_blocks, trace.meta.num_blocks)
        assert after.owned / trace.meta.num_blocks == pytest.approx(usage)
        assert after.owned <= use.owned
    assert memory_uses(trace, most=10**9) == uses


def test_no_more_is_looked_at_than_is_allowed_and_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that share all blocks: the sum over block tables is many times the pool."""
    steps = [StepRecord(i, admitted=(Admission(str(i), 0, tuple(range(16))),)) for i in range(40)]
    trace, seen = Trace(TraceMeta(16, 1, 1, 1), steps), []
    exact = memory_uses(trace)
    look = memory_use_module.memory_use

    def counted_look(state: PoolState) -> MemoryUse:
        seen.append(state.num_entries)
        return look(state)

    monkeypatch.setattr(memory_use_module, "memory_use", counted_look)
    few = memory_uses(trace, most=3000)
    assert sum(exact_entries(trace)) > 4 * 3000 >= 4 * (sum(seen) - max(seen))
    assert few[0] == exact[0] and len(few) == len(trace) and set(few) <= set(exact)


def exact_entries(trace: Trace) -> list[int]:
    return [trace.state(record.step).num_entries for record in trace]


def test_waste_is_of_all_that_was_reserved() -> None:
    uses = [MemoryUse(2, 0, 8, 6), MemoryUse(1, 0, 4, 0), MemoryUse(0, 0, 0, 0)]
    assert waste(uses) == 0.5
    assert waste([]) == waste(uses[2:]) == waste(memory_uses(Trace(TraceMeta(4, 2, 1, 1)))) == 0.0
