"""How an engine's step divides into computing and everything else, and how much memory a process takes.

The engine knows nothing of this: a meter puts timers around the parts of the engine that it is given.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from labkit.analysis.device_probe import synchronize
from labkit.engine import Engine


class Meter:
    """Counts the seconds of an engine's steps, and of the model and the sampling within them.

    What is left is Python and bookkeeping: planning, building the batch, turning tokens into text, recording.
    Where CUDA graphs are replayed, filling their inputs counts as computing.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.computing_seconds = 0.0

    @property
    def bookkeeping_share(self) -> float | None:
        """The share of the steps' time that is not spent in the model or in sampling; None before a step."""
        return 1 - self.computing_seconds / self.step_seconds if self.step_seconds else None

    @contextlib.contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Time the steps of an engine within this context. Afterwards the engine is as it was."""
        runner, device = engine.runner, engine.model.device
        step, model, graphs, sample = engine.step, runner.model, runner.graphs, runner.sample

        def timed_step() -> Any:
            begin = time.perf_counter()
            try:
                return step()
            finally:
                self.step_seconds += time.perf_counter() - begin

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                result = function(*args, **kwargs)
                synchronize(device)
                self.computing_seconds += time.perf_counter() - begin
                return result

            return call

        engine.step = timed_step  # type: ignore[method-assign]
        runner.model = _Stand(model, call=timed(model), logits=timed(model.logits))  # type: ignore[assignment]
        if graphs is not None:
            runner.graphs = _Stand(graphs, run=timed(graphs.run))  # type: ignore[assignment]
        runner.sample = timed(sample)
        try:
            yield
        finally:
            del engine.step  # the method of the class is there again
            runner.model, runner.graphs = model, graphs
            runner.sample = sample


class _Stand:
    """Stands in for another object: some of its methods are replaced, everything else is passed on."""

    def __init__(self, other: Any, *, call: Callable[..., Any] | None = None, **methods: Any) -> None:
        self._other, self._call = other, call
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            raise TypeError(f"{type(self._other).__name__} is not called")
        return self._call(*args, **kwargs)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: resident on a CPU, allocated by PyTorch on a GPU.

    None if the system does not say.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def peak_resident(pid: int | None = None) -> int | None:
    """The most bytes that a process has held, by default this one; None if the system does not say."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():
        # Not getrusage: what it says on Linux is inherited from the process that started this one.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "darwin":
        import resource

        return None if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import psutil

    return getattr(psutil.Process(pid).memory_info(), "peak_wset", None)
