"""A bound on the time of a step, on a made-up clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Engine, EngineConfig, SamplingParams
from labkit.analysis.capacity import FittedClock
from labkit.analysis.roofline import StepWork
from labkit.analysis.step_bound import StepBound
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.trace.records import StepRecord

LEARNING = 40  # steps in which the clock becomes known


class Server:
    """A scheduler whose steps compute nothing and take what a clock says."""

    def __init__(self, clock: FittedClock, bound: float | None, *, most: int = 512, seats: int = 8) -> None:
        self.scheduler = Scheduler(BlockPool(4096, 16), max_num_seqs=seats, max_num_batched_tokens=most)
        self.bound = StepBound(self.scheduler, bound) if bound else None
        self.clock, self.records, self.slower = clock, [], 1.0
        self.needed: list[int] = []  # before each step: answers that run, and a block for prompts

    def add(self, prompt: int, answer: int) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        name = len(self.scheduler.requests) + 1000 * len(self.records)
        tokens = [name, *range(1, prompt)]  # nobody finds another's prompt in the prefix cache
        self.scheduler.add(Request(str(name), tokens, params, max_len=prompt + answer))

    def step(self) -> StepRecord:
        running = self.scheduler.running
        self.needed.append(sum(len(r.token_ids) - r.num_computed_tokens == 1 for r in running) + 16)
        plan = self.scheduler.schedule()
        sampled = [
            (7,) if start + count >= len(request.token_ids) else ()
            for request, start, count in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ]
        result = StepResult(sampled)
        self.scheduler.commit(plan, result)
        record = record_step(len(self.records), plan, result, self.scheduler)
        taken = self.slower * self.clock(StepWork.of(record))
        record = record_step_with(record, taken)
        self.records.append(record)
        if self.bound:
            self.bound.after_step(record)
        return record

    def run(self) -> None:
        while self.scheduler.requests:
            self.step()


def record_step_with(record: StepRecord, seconds: float) -> StepRecord:
    values = {name: getattr(record, name) for name in record.__slots__}
    return StepRecord(**values | {"seconds": seconds})


clocks = st.builds(
    FittedClock,
    step=st.floats(1e-4, 0.02),
    tokens=st.floats(1e-6, 1e-3),
    keys=st.sampled_from([0.0, 1e-7, 1e-6]),
)


@settings(deadline=None, max_examples=40)
@given(clock=clocks, bound=st.floats(0.005, 0.5), answers=st.integers(0, 6), prompts=st.integers(1, 3))
def test_no_step_takes_longer_than_the_bound_unless_what_must_run_does(
    clock: FittedClock, bound: float, answers: int, prompts: int
) -> None:
    server = Server(clock, bound)
    for _ in range(answers):
        server.add(4, 200)
    for _ in range(prompts):
        server.add(3000, 20)
    server.run()  # everybody is served
    for record, needed in zip(server.records, server.needed, strict=True):
        assert record.total_tokens <= 512
        most = bound if record.step >= LEARNING else 2 * bound  # and no leaps meanwhile
        assert record.seconds <= most or record.total_tokens <= needed


@settings(deadline=None, max_examples=40)
@given(clock=clocks, bound=st.floats(0.005, 0.5))
def test_the_bound_is_used(clock: FittedClock, bound: float) -> None:
    """Once the clock is known, steps with work enough take most of what they may, or the whole budget."""
    server = Server(clock, bound)
    for _ in range(3):
        server.add(6000, 1)
    for _ in range(LEARNING):
        server.step()
    while server.scheduler.requests:
        before = server.scheduler.max_num_batched_tokens
        record = server.step()
        if server.scheduler.num_waiting or len(server.scheduler.running) > 1:
            assert record.seconds > 0.7 * bound or before in (512, 16)


def test_a_machine_that_becomes_slower_gets_less_and_recovers() -> None:
    server = Server(FittedClock(step=0.01, tokens=1e-3), 0.1)
    server.add(30_000, 1)
    for _ in range(LEARNING):
        server.step()
    usual = server.scheduler.max_num_batched_tokens
    server.slower = 3.0
    for _ in range(10):
        server.step()
    assert server.scheduler.max_num_batched_tokens < 0.5 * usual
    assert server.step().seconds <= 0.1
    server.slower = 1.0
    for _ in range(2 * LEARNING):
        server.step()
    assert server.scheduler.max_num_batched_tokens > 0.8 * usual


def test_the_engine_keeps_its_answers_and_its_limit() -> None:
    def tokens(**more: float) -> list[list[int]]:
        engine = Engine(EngineConfig("tiny-random", max_num_batched_tokens=64, **more), say=None)
        for length in (90, 5, 40):
            engine.add_request(
                list(range(1, length)), SamplingParams(max_tokens=6, ignore_eos=True), request_id=str(length)
            )
        engine.run()
        assert max(record.total_tokens for record in engine.trace) <= 64
        if more:
            assert engine.trace[0].total_tokens == 16
        return [output.token_ids for output in engine.outputs.values()]

    assert tokens(max_step_seconds=0.001) == tokens()


@pytest.mark.parametrize("more", [{"scheduler": "static"}, {"enable_chunked_prefill": False}])
def test_it_needs_chunks(more: dict) -> None:
    with pytest.raises(ValueError, match="max_step_seconds needs"):
        EngineConfig(max_step_seconds=0.1, **more)
    with pytest.raises(ValueError, match="max_step_seconds must be"):
        EngineConfig(max_step_seconds=0)
