"""Faults stay where they are: they end the requests they touch, and the engine goes on."""

from __future__ import annotations

import math
import re
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from labkit import SamplingParams
from labkit.schedulers.audit import check_pool
from tests.conftest import greedy
from tests.engines import drain, engine_of


def test_a_nan_ends_its_own_request_and_no_other() -> None:
    engine = engine_of()
    jobs = [([i + 1] * 7, 12) for i in range(4)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    engine.step()
    engine.step()
    poisoned = engine.pool.tables[ids[2]][0]
    engine.runner.cache.v[0, poisoned] = math.nan
    record = engine.step()
    assert [(f.request_id, f.reason) for f in record.finished] == [(ids[2], "error")]
    assert "NaN" in engine.outputs[ids[2]].error
    late = engine.add_request([9] * 7, SamplingParams(max_tokens=12))  # takes over the poisoned block
    drain(engine)
    assert engine.runner.cache.v.isfinite().all()
    for request_id, job in (*zip(ids, jobs, strict=True), (late, ([9] * 7, 12))):
        if request_id != ids[2]:
            assert engine.outputs[request_id].token_ids == greedy("llama", *job)


@pytest.mark.parametrize("place", ["schedule", "commit"])
def test_a_stop_waits_for_the_end_of_the_step_and_loses_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    jobs = [([i + 1] * 7, 12) for i in range(4)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    engine.auditor = None  # as it is with the engine's own parts
    usual, act, stops = signal.getsignal(signal.SIGINT), getattr(engine.scheduler, place), []

    def stopped(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        result = act(*arguments)
        stops.append(place)
        return result

    monkeypatch.setattr(engine.scheduler, place, stopped)
    while engine.has_unfinished:
        before = len(engine.trace.records)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert len(engine.trace.records) == before + 1 == len(stops)
        check_pool(engine.pool)
        assert signal.getsignal(signal.SIGINT) is usual
    for request_id, job in zip(ids, jobs, strict=True):
        assert engine.outputs[request_id].token_ids == greedy("llama", *job)


def test_a_second_stop_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    engine.auditor = None
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))

    def never_ends() -> None:
        while True:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine.scheduler, "schedule", never_ends)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("boom\nmore"), "the step failed: RuntimeError: boom$"),
        (torch.OutOfMemoryError("x"), "ran out of memory: lower max_num_batched_tokens or num_blocks"),
    ],
)
def test_a_step_that_breaks_ends_who_was_in_it_and_the_queue_goes_on(error: Exception, message: str) -> None:
    engine = engine_of(max_num_seqs=2)
    jobs = [([i + 1] * 7, 12) for i in range(5)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    engine.step()
    forward = engine.runner._forward

    def broken(*args):
        engine.runner._forward = forward
        raise error

    engine.runner._forward = broken
    engine.step()
    drain(engine)
    for i, (request_id, job) in enumerate(zip(ids, jobs, strict=True)):
        output = engine.outputs[request_id]
        if i < 2:
            assert output.finish_reason == "error"
            assert re.search(message, output.error)
        else:
            assert output.token_ids == greedy("llama", *job)


def test_what_a_failed_request_left_in_the_prefix_cache_is_not_found_again() -> None:
    engine = engine_of()
    prompt = list(range(20))
    engine.add_request(prompt, SamplingParams(max_tokens=20))
    engine.step()
    forward, engine.runner._forward = engine.runner._forward, None
    engine.step()
    assert engine.outputs["0"].finish_reason == "error"
    engine.runner._forward = forward
    engine.add_request(prompt, SamplingParams(max_tokens=20))
    record = engine.step()
    assert record.admitted[0].num_cached_tokens == 0
    drain(engine)
    assert engine.outputs["1"].token_ids == greedy("llama", prompt, 20)


def test_a_broken_step_of_a_static_batch_with_idle_seats() -> None:
    engine = engine_of(scheduler="static")
    for i, max_tokens in enumerate((1, 9, 9)):
        engine.add_request([i + 1] * 4, SamplingParams(max_tokens=max_tokens))
    for _ in range(3):
        engine.step()
    engine.runner._forward = None  # calling it raises
    engine.step()
    assert [engine.outputs[i].finish_reason for i in ("0", "1", "2")] == ["length", "error", "error"]
    assert not engine.has_unfinished


class EngineMachine(RuleBasedStateMachine):
    """The whole engine, model included: add, step, abort, fail, fork and change priorities in any order."""

    @initialize(
        scheduler=st.sampled_from(["continuous", "static", "naive", "uncached"]),
        policy=st.sampled_from(["paged", "reserved"]),
        blocks=st.integers(12, 30),
        budget=st.integers(4, 30),
        caching=st.booleans(),
    )
    def build(self, scheduler, policy, blocks, budget, caching) -> None:
        self.jobs: dict[str, tuple[list[int], int]] = {}
        self.engine = engine_of(
            scheduler=scheduler,
            kv_policy=policy,
            num_blocks=blocks,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.forward = self.engine.runner._forward

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt, max_tokens) -> None:
        request_id = self.engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
        self.jobs[request_id] = prompt, max_tokens

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12), n=st.integers(2, 4))
    def fork(self, prompt, n) -> None:
        self.engine.add_request(prompt, SamplingParams(max_tokens=6, temperature=1.0, n=n))

    @rule()
    def step(self) -> None:
        self.engine.step()
        check_pool(self.engine.pool)

    @rule()
    def fail(self) -> None:
        def broken(*args):
            raise RuntimeError("made up")

        self.engine.runner._forward = broken
        self.engine.step()
        self.engine.runner._forward = self.forward
        check_pool(self.engine.pool)

    @rule(data=st.data())
    def abort(self, data) -> None:
        if self.engine.outputs:
            self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.outputs))))

    @rule(data=st.data(), priority=st.integers(-2, 2))
    def reprioritise(self, data, priority) -> None:
        if self.engine.outputs:
            self.engine.set_priority(data.draw(st.sampled_from(sorted(self.engine.outputs))), priority)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        drain(self.engine)
        for request_id, (prompt, max_tokens) in self.jobs.items():
            output = self.engine.outputs[request_id]
            expected = greedy("llama", prompt, max_tokens)
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason in ("length", "abort", "error")
            assert output.finish_reason != "length" or output.token_ids == expected


TestWholeEngine = EngineMachine.TestCase


TestWholeEngine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
