"""What the engine forgets is in the file."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import load_model
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace
from labkit.trace.writer import Subscribe, TraceWriters


def listened() -> tuple[list[Callable[[StepRecord], None]], Subscribe]:
    """Those who listen, and a function that lets one more listen."""
    listeners: list[Callable[[StepRecord], None]] = []

    def subscribe(listener: Callable[[StepRecord], None]) -> Callable[[], None]:
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    return listeners, subscribe


def test_what_is_told_is_written_until_it_is_closed(tmp_path: Path) -> None:
    listeners, subscribe = listened()
    writers = TraceWriters(tmp_path / "run.jsonl")
    for blocks in (4, 8):
        meta = TraceMeta(blocks, 2, 1, 8)
        path = writers.follow(meta, subscribe)
        (write,) = listeners  # of the engine before there is no listener any more
        for step in range(3):
            write(StepRecord(step))
        assert len(listeners) == 1
    writers.close()
    write(StepRecord(3))
    assert not listeners and path.name == "run-2.jsonl"
    assert Trace.load(path) == Trace(meta, map(StepRecord, range(3)))
    assert Trace.load(tmp_path / "run.jsonl").meta.num_blocks == 4


def test_a_step_is_in_the_file_as_soon_as_it_is_told(tmp_path: Path) -> None:
    listeners, subscribe = listened()
    path = TraceWriters(tmp_path / "run.jsonl").follow(TraceMeta(4, 2, 1, 8), subscribe)
    for step in range(5):
        listeners[0](StepRecord(step))
        assert [record.step for record in Trace.load(path)] == list(range(step + 1)), "nothing is to be lost"


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("run.jsonl", "run-2.jsonl"):
        (tmp_path / name).write_text("of yesterday")
    writers = TraceWriters(tmp_path / "run.jsonl")
    names = [writers.follow(TraceMeta(4, 2, 1, 8), listened()[1]).name for _ in range(2)]
    writers.close()
    assert names == ["run-3.jsonl", "run-4.jsonl"]
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "run-2.jsonl").read_text() == "of yesterday"


class Full(io.StringIO):
    """A file on a disk that has room for so many lines."""

    name = "run.jsonl"

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        return super().write(text)

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_full_disk_is_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    listeners, subscribe = listened()
    told: list[str] = []
    writers = TraceWriters("run.jsonl", lambda: told.append(writers.problem))
    monkeypatch.setattr(Path, "open", lambda *_, **__: Full(room))
    writers.follow(TraceMeta(4, 2, 1, 8), subscribe)
    for step in range(5):
        listeners[0](StepRecord(step))
    writers.close()
    words = "Steps are not written to run.jsonl any more: no space left on device."
    assert told == caplog.messages == [words] and not any(record.exc_info for record in caplog.records)


def run(lab: Lab, max_tokens: int) -> None:
    live = lab.session.live
    for _ in live.stream(live.submit("hello", SamplingParams(max_tokens=max_tokens, ignore_eos=True))):
        pass


def test_every_step_of_every_engine_is_written(tmp_path: Path) -> None:
    config = EngineConfig(model=load_model("tiny-random", say=None), num_blocks=64, max_trace_steps=5)
    with AsyncEngine(Engine(config)) as live:
        lab = Lab(live, trace_file=tmp_path / "run.jsonl")
        run(lab, 40)
        assert len(live.engine.trace) < 40
        lab.change({"num_blocks": 32}, running="cancel")
        run(lab, 3)
        lab.close()
    first, second = Trace.load(tmp_path / "run.jsonl"), Trace.load(tmp_path / "run-2.jsonl")
    assert [record.step for record in first] == list(range(40)) and first.meta.num_blocks == 64
    assert [record.step for record in second] == [0, 1, 2] and second.meta.num_blocks == 32


def test_a_later_file_that_cannot_be_made_is_a_problem_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = TraceWriters(tmp_path / "folder" / "run.jsonl")
    with pytest.raises(OSError):
        writers.follow(TraceMeta(4, 2, 1, 8), listened()[1])
    (tmp_path / "folder").mkdir()
    writers.follow(TraceMeta(4, 2, 1, 8), listened()[1])
    (tmp_path / "folder" / "run.jsonl").unlink()
    (tmp_path / "folder").rmdir()
    assert writers.follow(TraceMeta(4, 2, 1, 8), listened()[1]) is None
    assert writers.problem.endswith("any more: no such file or directory.") and len(caplog.messages) == 1


def test_the_page_is_told_when_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=load_model("tiny-random", say=None), num_blocks=64)
    with AsyncEngine(Engine(config)) as live:
        monkeypatch.setattr(Path, "open", lambda *_, **__: Full(2))
        lab = Lab(live, trace_file="run.jsonl")
        version, before = lab.version, lab.status()["problem"]
        run(lab, 5)
        assert not before and "no space left" in lab.status()["problem"] and lab.version > version
        run(lab, 3)  # the engine goes on
        lab.close()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    config = EngineConfig(model=load_model("tiny-random", say=None), num_blocks=64)
    with AsyncEngine(Engine(config)) as live, pytest.raises(OSError):
        Lab(live, trace_file=tmp_path / "no such folder" / "run.jsonl")
