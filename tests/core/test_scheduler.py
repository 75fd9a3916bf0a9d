"""The schedulers without a model: in any order of events the rules hold, and no request is left behind."""

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
        """The pool refuses blocks that it said it had: the request ends, unless they were for a draft."""
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


def test_a_block_that_was_copied_and_freed_may_come_back_in_the_same_step() -> None:
    bench = Bench(blocks=10, size=2, seats=3, budget=4, caching=False)
    bench.add([0], 4, n=2)  # both answers share the block in which the prompt ends
    bench.step()
    allocate, calls = bench.pool.make_writable, itertools.count()

    def failing(request_id: str, index: int) -> tuple[int, int] | None:
        if next(
            calls
        ):  # the first answer gets a copy; the second finds no block, ends, and frees the old one
            raise OutOfBlocks("made up")
        return allocate(request_id, index)

    bench.pool.make_writable = failing
    record = bench.step(drafts=1)  # the draft of the first takes that block again
    assert record.copied[0].old in record.taken[0].blocks


def test_a_request_added_while_others_run_joins_at_the_next_step() -> None:
    bench = Bench()
    first = bench.add(3, 10)
    bench.step()
    bench.step()
    late = bench.add([0] * 5, 10)  # no prefix to share
    record = bench.step()
    assert record.requests == (first, late)
    assert record.kinds == "dp"
    assert record.num_tokens == (1, 5)


def test_prompts_are_chunked_and_never_stop_decode() -> None:
    bench = Bench(blocks=60, budget=6)
    first = bench.add(2, 20)
    bench.step()
    bench.add(30, 2)
    records = [bench.step() for _ in range(8)]
    assert all(record.requests[0] == first and record.kinds[0] == "d" for record in records)
    assert [record.num_tokens[1] for record in records[:6]] == [5] * 6
    assert records[0].kinds == "dc"
    assert records[5].sampled[1] == (1,)  # the last chunk samples


def test_first_come_first_served_and_priorities_before_that() -> None:
    bench = Bench(seats=1, blocks=40)
    names = [bench.add(3, 2, priority=priority) for priority in (0, 0, -1, 1)]
    bench.drain()
    assert bench.admissions == [names[2], names[0], names[1], names[3]]


def test_a_changed_priority_moves_a_request_in_the_queue() -> None:
    bench = Bench(seats=1, blocks=40)
    names = [bench.add(3, 2) for _ in range(4)]
    bench.step()
    bench.scheduler.set_priority(names[3], -5)
    assert [r.request_id for r in bench.scheduler.waiting] == [names[3], names[1], names[2]]
    record = bench.step()
    assert bench.trace.why(names[0], record.step) == "request 0 is not in the engine"
    assert not bench.scheduler.set_priority("nobody", 1)
    bench.drain()
    assert bench.admissions == [names[0], names[3], names[1], names[2]]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    bench = Bench(blocks=6, size=2, seats=3, caching=False)
    old, new = bench.add(4, 8), bench.add(3, 6)
    bench.step()
    later = bench.add(8, 2)
    preempted = [name for _ in range(9) for name, _ in bench.step().preempted]
    assert preempted == [new]
    bench.drain()
    assert bench.admissions == [old, new, new, later]


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


def test_a_request_that_waits_for_pages_is_looked_at_again_once_they_can_be_shared() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=24)
    prompt = list(range(48))
    bench.add(prompt, 9)
    bench.add(prompt, 9)
    first = bench.step()
    assert first.blocked == ("1", "the token budget of 24 is used up")
    second = bench.step()  # the pages of the first are full now, but not yet known
    assert not second.admitted
    assert bench.step().admitted[0].num_cached_tokens == 44


def test_static_pads_to_the_longest_and_keeps_idle_seats() -> None:
    bench = Bench("static", blocks=60, seats=3, budget=12)
    bench.add(8, 1)
    bench.add(3, 4)
    bench.add(5, 2)
    bench.add(1, 1)  # must wait for the whole batch
    records = []
    while bench.scheduler.has_unfinished:
        records.append(bench.step())
    prefill = records[:2]  # 8 columns, 12 // 3 at a time
    assert [sum(r.num_tokens[i] for r in prefill) for i in range(3)] == [8, 3, 5]
    assert [sum(r.padding[i] for r in prefill) for i in range(3)] == [0, 5, 3]
    assert records[1].sampled == ((1,), (1,), (1,))  # left padding: all reach the first token together
    decode = records[2:5]
    assert [record.kinds for record in decode] == ["idd", "idi", "idi"]
    assert all(record.padding[0] == 1 for record in decode)
    assert records[5].requests == ("3",)


def test_reserved_takes_the_whole_maximum_and_never_preempts() -> None:
    bench = Bench(blocks=12, size=4, policy="reserved")
    for _ in range(6):
        bench.add(5, 12)
    record = bench.step()
    assert [len(pages.blocks) for pages in record.taken] == [4, 4, 4]  # 5 + 12 - 1 tokens each
    bench.drain()
    assert not any(record.preempted for record in bench.trace)


def test_a_request_that_could_never_fit_is_refused_at_once() -> None:
    bench = Bench(blocks=4, size=4)
    bench.add(10, 7)  # 16 tokens to store: the last is never written
    with pytest.raises(
        ValueError, match=r"may need 5 pages .* the pool has 4: lower max_tokens, or raise num"
    ):
        bench.add(10, 8)
    bench.drain()


def test_n_shares_the_prompt_and_copies_the_tail_on_the_first_write() -> None:
    bench = Bench(blocks=20, size=4, seats=4, budget=12)
    bench.add(10, 4, n=3)
    record = bench.step()
    assert record.requests == ("0", "0.1", "0.2")
    assert record.sampled == ((1,), (1,), (1,))
    assert bench.pool.num_blocks - bench.pool.num_free == 3
    record = bench.step()
    assert [(copy.request_id, copy.old) for copy in record.copied] == [("0", 2), ("0.1", 2)]
    assert bench.pool.num_blocks - bench.pool.num_free == 5
    bench.drain()


def test_children_start_when_a_single_token_of_the_prompt_was_left() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=3)
    bench.add(4, 4, n=2)
    assert [bench.step().requests for _ in range(2)] == [("0",), ("0", "0.1")]
    bench.drain()


def test_more_answers_than_seats_still_all_come() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=12)
    bench.add(9, 4, n=5)
    bench.drain()
    assert sorted(bench.admissions) == ["0", "0.1", "0.2", "0.3", "0.4"]
    cached = {a.request_id: a.num_cached_tokens for record in bench.trace for a in record.admitted}
    assert cached["0.1"] == 9  # a fork
    assert cached["0.4"] == 8  # full pages through the prefix cache


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs \(5\) must not exceed max_num_batched_tokens \(4\)"):
        Bench(seats=5, budget=4)
    bench = Bench()
    bench.add(3)
    bench.count = 0
    with pytest.raises(ValueError, match="request_id '0' is already in use"):
        bench.add(3)


def test_drafts_take_pages_for_a_step_and_give_back_those_of_the_wrong_ones() -> None:
    bench = Bench(blocks=10, size=4, seats=2, budget=12)
    bench.add(6, max_tokens=20)
    bench.step()  # the prompt, and a first token
    record = bench.step(drafts=8, right=2)
    assert (record.num_tokens, record.drafted, record.sampled) == ((9,), ((1,) * 8,), ((1, 1, 1),))
    assert record.kinds == "d"
    request = bench.scheduler.requests["0"]
    assert (request.num_computed_tokens, len(request.token_ids)) == (9, 10)
    assert [len(pages.blocks) for pages in record.taken] == [2]  # tokens 6 to 14 lie in pages 1 to 3
    assert [(name, len(blocks)) for name, blocks in record.returned] == [("0", 1)]
    assert bench.trace.state(1).computed["0"] == 15
    assert bench.trace.state(1, after=True).computed["0"] == 9
    assert (record.total_drafted, record.total_accepted) == (8, 2)
    bench.drain()


def test_drafts_never_cost_anybody_a_token_a_page_or_a_seat() -> None:
    bench = Bench(blocks=6, size=4, seats=3, budget=3)
    bench.add(3, max_tokens=12)
    bench.add(3, max_tokens=12)
    for _ in range(3):
        bench.step()
    tight = bench.step(drafts=5, right=5)
    assert sum(tight.num_tokens) == 3, "both decode, and one token is left of the budget"
    assert not tight.preempted
    bench.drain()


def test_nothing_is_published_before_it_is_accepted() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=20)
    bench.add(6, max_tokens=20)
    bench.step()
    record = bench.step(drafts=8, right=0)
    assert len(record.published) == 0, "of the second page a single token is the answer's"
    record = bench.step(drafts=8, right=8)
    assert len(record.published) == 3, "tokens 4 to 15"
    bench.drain()
