"""Real processes: they end with the engine, and the engine says so when one of them ends or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from labkit import Engine, EngineConfig, SamplingParams
from labkit.parallel import ParallelError, group
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no signals to stop a process with"
)
PARAMS = SamplingParams(max_tokens=400, ignore_eos=True)


def engine_of_two() -> Engine:
    return Engine(EngineConfig("tiny-random", tensor_parallel_size=2), say=None)


def other_process(engine: Engine) -> psutil.Process:
    (process,) = engine.model.module.workers.processes
    return psutil.Process(process.pid)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_is_killed_ends_the_engine_and_all_are_told() -> None:
    with AsyncEngine(engine_of_two()) as engine:
        ids = [engine.submit("The rabbit", PARAMS) for _ in range(3)]
        wait_for(lambda: engine.output(ids[0]).token_ids)
        other_process(engine.engine).kill()
        for name in ids:
            *_, last = engine.stream(name)
            assert last.finish_reason == "error"
            assert "process 1 of this model ended (exit code -9)" in last.error
        wait_for(lambda: engine.failure)
        with pytest.raises(EngineStoppedError, match="process 1 of this model ended"):
            engine.submit("late", PARAMS)


def test_a_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "TIMEOUT", timedelta(seconds=3))
    engine = engine_of_two()
    monkeypatch.setattr("labkit.parallel.workers._PATIENCE", 0.1)
    engine.add_request("The rabbit", PARAMS)
    engine.step()
    process = other_process(engine)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ParallelError, match="the processes of this model failed"):
        engine.step()
    assert gone(process)


def test_processes_share_the_threads_of_one() -> None:
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine = engine_of_two()
        assert torch.get_num_threads() == 1  # and as many in the other
        engine.add_request("The rabbit", SamplingParams(max_tokens=2))
        engine.run()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(usual)


def test_the_others_end_with_the_model() -> None:
    engine = engine_of_two()
    process = other_process(engine)
    assert not gone(process)
    del engine
    wait_for(lambda: gone(process))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_behind(how: signal.Signals) -> None:
    """A Ctrl-C goes to the whole terminal; here it goes to the first process alone."""
    script = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from labkit import Engine, EngineConfig, SamplingParams\n"
        "engine = Engine(EngineConfig('tiny-random', tensor_parallel_size=2), say=None)\n"
        "print(engine.model.module.workers.processes[0].pid, flush=True)\n"
        "while True:\n"
        "    engine.add_request('The rabbit', SamplingParams(max_tokens=50))\n"
        "    engine.run()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    with first:
        try:
            other = psutil.Process(int(first.stdout.readline()))
            first.send_signal(how)
            wait_for(lambda: gone(other))
        finally:
            first.kill()
