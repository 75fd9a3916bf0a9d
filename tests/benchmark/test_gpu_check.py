"""What only a GPU can tell: every part runs on a CPU stand-in, and a part that goes wrong stops no other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from labkit.benchmark.__main__ import main
from labkit.benchmark.gpu import check, check_parts
from labkit.benchmark.gpu.check import gpu_check
from labkit.benchmark.gpu.check_parts import CPU, PARTS, Part, Target


def test_every_part_has_a_stand_in_that_runs_to_its_end() -> None:
    begun: list[str] = []
    text = gpu_check("cpu", say=begun.append, seconds=1000)
    lines = text.splitlines()
    assert "STAND-INS ON A CPU" in lines[0]
    assert f"{len(PARTS)} of {len(PARTS)} parts ran to their end" in lines[-1], text
    assert "FAILED" not in text and "NOT OK" not in text and "LEFT OUT" not in text
    assert [line.split()[-1] for line in begun] == list(PARTS)
    for start in (
        "machine: ",
        "prediction: 4 steps for a T4",
        "sdpa float32 decode: ",
        "attention sdpa float32: off by ",
        "fp32 sdpa graphs against transformers: 3 of 3 answers equal OK",
        "graphs int8 against eager: 3 of 3 answers equal",
        "step tiny 4 graphs: ",
        "memory built three times: ",
        "together engine built beside it: 3 of 3 answers equal OK",
        "ladder int8: ",
    ):
        assert any(line.startswith(start) for line in lines), (start, text)
    assert any(line.startswith("step tiny 1 eager: ") and "predicted" in line for line in lines)


# -- faults ---------------------------------------------------------------------------------------


def fine(target: Target) -> Iterator[str]:
    yield f"fine: {os.getpid()}"


def raises(target: Target) -> Iterator[str]:
    yield "raises: before"
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def dies(target: Target) -> Iterator[str]:
    yield "dies: before"
    os._exit(9)


def hangs(target: Target) -> Iterator[str]:
    yield "hangs: before"
    time.sleep(600)


def faults() -> dict[str, Part]:
    return {
        "fine": Part(fine, 60),
        "raises": Part(raises, 60),
        "fine again": Part(fine, 60),
        "dies": Part(dies, 60),
        "hangs": Part(hangs, 2),
        "fine at last": Part(fine, 60),
    }


def work(connection: object) -> None:
    """What the process runs: the parts are replaced in it as well, as it has modules of its own."""
    check.PARTS.clear()
    check.PARTS.update(faults())
    _WORK(connection)


_WORK = vars(check)["_work"]


def test_a_part_that_raises_dies_or_hangs_is_named_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "PARTS", faults())
    monkeypatch.setattr(check, "_work", work)
    monkeypatch.setattr(check, "_START", 60.0)
    worker = vars(check)["_Worker"]
    run = worker.run

    def soon(self: object, name: str, target: Target, seconds: float) -> object:
        if name == "hangs":  # the process has been started, and shall not be waited for
            run(self, "fine", target, 60)
            seconds = 2
        return run(self, name, target, seconds)

    monkeypatch.setattr(worker, "run", soon)
    text = gpu_check("cpu", seconds=1000)
    assert "raises: before\nFAILED raises: RuntimeError: CUDA error: an illegal memory access" in text
    assert "and more" not in text
    assert "dies: before\nFAILED dies: its process ended with code 9" in text
    assert "hangs: before\nFAILED hangs: it took longer than 2 s" in text
    assert "3 of 6 parts ran to their end" in text
    first, second, third = (line for line in text.splitlines() if line.startswith("fine: "))
    assert len({first, second, third}) == 3  # a fresh process after each fault


def test_what_no_time_is_left_for_is_said_and_not_begun() -> None:
    text = gpu_check("cpu", seconds=1)
    assert text.count("LEFT OUT") == len(PARTS)
    with pytest.raises(ValueError, match="there is no part 'luck'; there is machine, prediction"):
        gpu_check("cpu", parts=["luck"])


def test_attention_that_is_off_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = check_parts.attend
    monkeypatch.setattr(check_parts, "attend", lambda *args, **kw: attend(*args, **kw) + 0.01)
    assert [line.split()[-2:] for line in PARTS["attention"].run(CPU)] == [["NOT", "OK"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu-check"]) == 0
    assert capsys.readouterr().out.startswith("There is no CUDA GPU here")
