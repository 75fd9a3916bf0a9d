"""Threads are left to other processes, and come back."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import Engine, EngineConfig, SamplingParams, Trace
from labkit.kernels import threads
from labkit.kernels.threads import ThreadBudget, Usage, measure_usage
from labkit.views.events import events_of
from tests.waiting import wait_for


class Machine:
    """A machine on which others use some cores, and a clock."""

    def __init__(self) -> None:
        self.usage, self.set = Usage(0.0, 0.0), []

    def run(self, budget: ThreadBudget, seconds: float, busy: float) -> None:
        """Let others keep `busy` cores busy for a while, in which the engine runs one step."""
        self.usage = Usage(self.usage.others + busy * seconds, self.usage.at + seconds)
        budget.after_step(self.usage.at)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(threads, "_cores", lambda: set(range(4)))
    return Machine()


def budget_of(machine: Machine, most: int = 4) -> ThreadBudget:
    return ThreadBudget(most, lambda: machine.usage, machine.set.append)


def test_a_core_that_others_use_is_left_to_them_and_taken_back(machine: Machine) -> None:
    budget = budget_of(machine)
    for busy in (0.1, 1.0, 1.1, 3.9, 0.0):
        machine.run(budget, 0.6, busy)
    assert machine.set == [3, 1, 4]


def test_it_looks_twice_a_second_and_forgets_a_pause(machine: Machine) -> None:
    budget = budget_of(machine)
    for _ in range(4):
        machine.run(budget, 0.1, 4.0)
    assert machine.set == []
    machine.run(budget, 60.0, 4.0)  # the engine had nothing to do
    assert machine.set == []
    machine.run(budget, 0.6, 4.0)
    assert machine.set == [1]


def test_threads_come_back_when_there_is_nothing_to_do(machine: Machine) -> None:
    budget = budget_of(machine)
    machine.run(budget, 1.0, 2.0)
    budget.rest()
    assert machine.set == [2, 4]


@given(most=st.integers(1, 9), busy=st.floats(0, 64))
def test_there_is_always_a_thread_and_never_one_too_many(most: int, busy: float) -> None:
    machine = Machine()
    budget = budget_of(machine, most)
    machine.run(budget, 1.0, busy)
    assert 1 <= budget.now <= most


def test_what_others_use_is_measured() -> None:
    script = "while True: pass"
    busy = subprocess.Popen([sys.executable, "-c", script])
    try:
        before = measure_usage()
        wait_for(lambda: measure_usage().others - before.others > 0.3)
    finally:
        busy.kill()
        busy.wait()


def test_the_switch_and_a_single_thread() -> None:
    before = torch.get_num_threads()
    try:
        engine = Engine(EngineConfig("tiny-random", num_threads=2), say=None)
        assert engine.threads is not None and engine.threads.most == 2
        assert (
            Engine(EngineConfig("tiny-random", num_threads=2, adaptive_threads=False), say=None).threads
            is None
        )
        assert Engine(EngineConfig("tiny-random", num_threads=1), say=None).threads is None
    finally:
        torch.set_num_threads(before)


def lowered_engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on a machine with two cores, one of which others keep busy: it has just left it to them."""
    monkeypatch.setattr(threads, "_cores", lambda: set(range(2)))
    engine = Engine(EngineConfig("tiny-random", num_threads=2), say=None)
    begin = time.perf_counter() - 1.0
    looks = iter([Usage(0.0, begin)])
    engine.threads = ThreadBudget(
        2, lambda: next(looks, None) or Usage(time.perf_counter() - begin, time.perf_counter())
    )
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    return engine


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_trace_says_when_the_number_changes(monkeypatch: pytest.MonkeyPatch, torch_threads: None) -> None:
    engine = lowered_engine(monkeypatch)
    assert torch.get_num_threads() == 1
    engine.run()
    assert [record.threads for record in engine.trace.records] == [0, 1, 0, 0]
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=1))
    first = engine.step()  # the engine had rested
    assert first.threads == 2 and torch.get_num_threads() == 2
    events = [event for record in engine.trace.records for event in events_of(record)]
    assert [(event.step, event.first) for event in events if event.kind == "threads"] == [(1, 1), (4, 2)]
    again = Trace.from_lines(engine.trace.lines())
    assert [record.threads for record in again.records] == [0, 1, 0, 0, 2]


def test_an_engine_built_while_another_has_lowered_the_threads(
    monkeypatch: pytest.MonkeyPatch, torch_threads: None
) -> None:
    first = lowered_engine(monkeypatch)
    second = Engine(EngineConfig("tiny-random"), say=None)
    assert second.threads is not None and second.threads.most == second.threads.now == 2
    assert torch.get_num_threads() == 2
    first.run()  # and gives its threads back
    second = lowered_engine(monkeypatch)
    assert torch.get_num_threads() == 1
    del second  # in the middle of its work
    gc.collect()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert Engine(EngineConfig("tiny-random"), say=None).threads is None  # what was asked for since
