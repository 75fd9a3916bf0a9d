"""Every policy, without a model: whatever comes and goes, the rules hold and nobody is left behind."""

from __future__ import annotations

import functools
import itertools
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from labkit.core.block_pool import OutOfBlocks
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.schedulers import SCHEDULERS
from labkit.schedulers.whole_prompts import WholePromptScheduler
from labkit.trace.trace import Trace
from tests.core.scheduler_bench import Bench


class SchedulerMachine(RuleBasedStateMachine):
    """Add, step, fail, abort, fork and change priorities in any order."""

    @initialize(
        kind=st.sampled_from(sorted(SCHEDULERS)),
        policy=st.sampled_from(["paged", "reserved"]),
        blocks=st.integers(10, 30),
        size=st.integers(1, 5),
        seats=st.integers(1, 6),
        slack=st.integers(0, 20),
        caching=st.booleans(),
        chunked=st.booleans(),
    )
    def build(self, kind, policy, blocks, size, seats, slack, caching, chunked) -> None:
        self.bench = Bench(
            kind,
            blocks=blocks,
            size=size,
            seats=seats,
            budget=seats + slack,
            policy=policy,
            caching=caching,
            chunked=chunked,
        )

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_tokens=st.integers(1, 15),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt, max_tokens, n, priority) -> None:
        capacity = self.bench.pool.num_blocks * self.bench.pool.block_size
        if len(prompt) + max_tokens - 1 > capacity:
            with pytest.raises(ValueError, match="lower max_tokens"):
                self.bench.add(prompt, max_tokens, n=n)
        elif isinstance(self.bench.scheduler, WholePromptScheduler) and (
            len(prompt) + max_tokens - 1 > self.bench.budget
        ):
            with pytest.raises(ValueError, match="enable_chunked_prefill"):
                self.bench.add(prompt, max_tokens, n=n)
        else:
            self.bench.add(prompt, max_tokens, n=n, priority=priority)

    @rule(token=st.integers(0, 1))
    def step(self, token) -> None:
        self.bench.step(token=token)

    @rule(token=st.integers(0, 1), drafts=st.integers(1, 12), right=st.integers(0, 12))
    def speculate(self, token, drafts, right) -> None:
        self.bench.step(token=token, drafts=drafts, right=right)

    @rule()
    def fail(self) -> None:
        self.bench.step(faulty=True)

    @rule(token=st.integers(0, 1), nth=st.integers(1, 4), drafts=st.integers(0, 5))
    def run_out(self, token, nth, drafts) -> None:
        """The pool refuses blocks that it has: the request that asked ends, unless it asked for a draft."""
        pool, calls = self.bench.pool, itertools.count(1)

        def failing(take, *asked):
            if next(calls) == nth:
                raise OutOfBlocks("made up")
            return take(*asked)

        for name in ("allocate", "make_writable"):
            setattr(pool, name, functools.partial(failing, getattr(pool, name)))
        try:
            record = self.bench.step(token=token, drafts=drafts)
        finally:
            del pool.allocate, pool.make_writable
        ended = [finish.request_id for finish in record.finished if finish.reason == "error"]
        assert ended == list(self.bench.failed)
        assert len(ended) <= 1
        assert not set(ended) & self.bench.scheduler.requests.keys()

    @rule(data=st.data())
    def abort(self, data) -> None:
        if names := sorted(self.bench.scheduler.requests):
            assert self.bench.scheduler.abort(data.draw(st.sampled_from(names)))

    @rule(data=st.data(), priority=st.integers(-2, 2))
    def reprioritise(self, data, priority) -> None:
        if names := sorted(self.bench.scheduler.requests):
            assert self.bench.scheduler.set_priority(data.draw(st.sampled_from(names)), priority)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain()
        trace = self.bench.trace
        assert Trace.from_lines(trace.lines()) == trace
        if len(trace):
            state = trace.state(trace[-1].step, after=True)
            assert not state.tables
            assert not state.waiting


TestScheduler = SchedulerMachine.TestCase


TestScheduler.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_thousands_of_requests_leave_nothing_behind(kind: str) -> None:
    rng = random.Random(kind)
    bench = Bench(kind, blocks=60, size=4, seats=8, budget=24)
    todo = 10_000 if kind == "continuous" else 1_000
    tracemalloc.start()
    early = 0
    while todo or bench.scheduler.has_unfinished:
        while todo and len(bench.scheduler.requests) < 30:
            bench.add([rng.randrange(3) for _ in range(rng.randint(1, 12))], rng.randint(1, 3))
            todo -= 1
            if bench.count == 900:
                early = tracemalloc.get_traced_memory()[0]
            if rng.random() < 0.1:
                bench.scheduler.abort(rng.choice(list(bench.scheduler.requests)))
        quick_step(bench)
    bench.drain()
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert late < early + 100_000, "memory grows with the number of requests"
    for leftover in (bench.pool._chain, bench.pool.forked, bench.scheduler._aborting):
        assert not leftover
    assert len(bench.scheduler.waiting._heap) <= 64


def quick_step(bench: Bench) -> None:
    plan = bench.scheduler.schedule()
    result = StepResult([Bench._sample(plan, row, 1) for row in range(len(plan.requests))])
    bench.scheduler.commit(plan, result)
    record_step(bench.steps, plan, result, bench.scheduler)
    bench.steps += 1


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_waiting_has_a_reason(kind: str) -> None:
    bench = Bench(kind, seats=2, blocks=40)
    for _ in range(4):
        bench.add(3, 3)
    reasons = {bench.step().blocked[1] for _ in range(3)}
    expected = {"continuous": "all 2 seats are taken"}
    expected |= dict.fromkeys(("naive", "uncached"), "the only seat is taken")
    assert expected.get(kind, "the batch runs until its last member is done") in reasons
    bench = Bench(kind, seats=4, blocks=5, size=4)
    bench.add(15, 2)
    bench.add(15, 2)
    blocked = bench.step().blocked
    assert blocked[0] == "1"
    if kind == "continuous":
        bench = Bench(seats=4, blocks=40, budget=5)
        bench.add(9, 2)
        bench.add(9, 2)
        assert bench.step().blocked == ("1", "the token budget of 5 is used up")
