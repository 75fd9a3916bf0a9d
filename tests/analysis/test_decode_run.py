"""Many decode steps at once give exactly what stepping gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.analysis.capacity import (
    Demand,
    FittedClock,
    Replica,
    Settings,
    draw_demands,
    replay,
)
from labkit.analysis.capacity.decode_run import DecodeRun
from labkit.analysis.capacity.replay import ROUTERS, _request
from labkit.schedulers.audit import check_pool
from tests.analysis.test_replay import DRAWN, SIZES, tick


def pool_of(replica: Replica) -> tuple[object, ...]:
    """All that the pool knows, with every order that decides what comes next."""
    pool = replica.pool
    known = {key: pool.node_of[block] for key, block in pool.block_of.items()}
    return list(pool.free), list(pool.cached), dict(pool.block_of), known, pool.tables


def after_all(demands: list[Demand], sizes: Settings, *, jump: bool, clock: FittedClock) -> Replica:
    replica = Replica(sizes, clock, jump=jump)
    for number, demand in enumerate(sorted(demands, key=lambda demand: demand.at)):
        replica.advance(demand.at)
        replica.add(_request(number, demand), demand.at)
    replica.advance(float("inf"))
    check_pool(replica.pool)
    return replica


STEADY = (
    "gaps",
    "gap_counts",
    "steps",
    "busy",
    "blocks",
    "peak_blocks",
    "preemptions",
    "cached",
    "looked_up",
)
CLOCKS = st.sampled_from((FittedClock(step=1.0), FittedClock(step=0.4, tokens=0.07, keys=0.003)))


@given(st.lists(DRAWN, min_size=1, max_size=12), SIZES, CLOCKS)
@settings(max_examples=250, deadline=None)
def test_a_jump_gives_exactly_what_stepping_gives(
    demands: list[Demand], sizes: Settings, clock: FittedClock
) -> None:
    plain = after_all(demands, sizes, jump=False, clock=clock)
    jumped = after_all(demands, sizes, jump=True, clock=clock)
    assert (jumped.first_token, jumped.finish) == (plain.first_token, plain.finish)
    for name in STEADY:
        assert getattr(jumped, name) == getattr(plain, name), name
    assert pool_of(jumped) == pool_of(plain)


@given(st.lists(DRAWN, min_size=4, max_size=16), SIZES, st.sampled_from(sorted(ROUTERS)))
@settings(max_examples=60, deadline=None)
def test_a_router_sees_the_same_replicas_whether_they_jump_or_not(
    demands: list[Demand], sizes: Settings, routing: str
) -> None:
    clock = FittedClock(step=0.4, tokens=0.07, keys=0.003)
    both = [replay(demands, clock, sizes, replicas=3, routing=routing, jump=jump) for jump in (False, True)]
    assert np.array_equal(both[0].replica, both[1].replica)
    assert np.array_equal(both[0].finish, both[1].finish)


def test_most_steps_are_jumped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the two tests above compare a thing with itself."""
    begun = []
    begin = DecodeRun.begin
    monkeypatch.setattr(DecodeRun, "begin", lambda run: begun.append(1) or begin(run))
    told = replay(draw_demands(40, rate=0.2, seed=2), tick, Settings(400, max_num_seqs=8))
    assert len(begun) > 0.7 * told.steps
    crowded = replay(draw_demands(40, seed=2), tick, Settings(40, max_num_seqs=8))
    assert crowded.preemptions
