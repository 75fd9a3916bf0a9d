"""Threads are left to other processes, and come back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import Engine, EngineConfig
from labkit.kernels import threads
from labkit.kernels.threads import ThreadBudget, Usage, measure_usage
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
