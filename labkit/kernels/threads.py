"""How many threads a step uses on a CPU whose cores others want, too.

All threads meet after each operation, hundreds of times in a step. If another process takes a core now and
then, every meeting waits for the thread that has lost it, and the step becomes several times slower, not by
the share that was taken. One thread less is then much faster. So the cores that others keep busy are counted
while the engine runs, twice a second, and left to them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakSet

import psutil
import torch

_SECONDS = 0.5  # between two looks
_LONG = 5.0  # after so long without a step a look says nothing of now
_SPARE = 0.25  # how much of a core others may have before it counts as theirs


class Usage(NamedTuple):
    """Processor seconds since some moment, summed over the cores that this process may use."""

    others: float
    at: float  # the time, in seconds


class ThreadBudget:
    """Gives PyTorch the threads for which there are cores, between 1 and `most`.

    Args:
        most: the number of threads on a machine that nobody else uses.
        measure: a function that returns the `Usage` so far.
        apply: a function that sets the number of threads.
    """

    def __init__(
        self,
        most: int,
        measure: Callable[[], Usage] | None = None,
        apply: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.most = self.now = most
        self._measure, self._apply = measure or measure_usage, apply
        self._cores = len(_cores())
        self._last = self._measure()

    def after_step(self, now: float) -> None:
        """Look at the cores, if it is time to. Call it in the thread that runs the steps.

        Args:
            now: when the step ended, by `time.perf_counter`.
        """
        passed = now - self._last.at
        if passed < _SECONDS:
            return
        usage, last = self._measure(), self._last
        self._last = usage
        if passed > _LONG:
            return
        busy = (usage.others - last.others) / (usage.at - last.at)  # cores that others used
        self._use(max(1, min(self.most, int(self._cores - busy + _SPARE))))

    def rest(self) -> None:
        """Give all threads back to the process, as no step follows for now."""
        self._use(self.most)

    def _use(self, threads: int) -> None:
        if threads != self.now:
            self.now = threads
            (_lowered.add if threads < self.most else _lowered.discard)(self)
            self._apply(threads)

    def __del__(self) -> None:
        self.rest()  # an engine may be dropped in the middle of its work


_lowered: WeakSet[ThreadBudget] = WeakSet()  # PyTorch's threads are the process's, so all engines share them


def usual_threads() -> int:
    """Return PyTorch's number of threads, as it would be if no engine left cores to other processes."""
    return max([torch.get_num_threads(), *(budget.most for budget in _lowered)])


def measure_usage() -> Usage:
    """Read what all other processes have used of the cores that are ours to use."""
    cores = _cores()
    used = sum(
        each.user + each.system
        for number, each in enumerate(psutil.cpu_times(percpu=True))
        if number in cores
    )
    own = os.times()
    return Usage(used - own.user - own.system, time.perf_counter())


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # a container may be held to some of them
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
