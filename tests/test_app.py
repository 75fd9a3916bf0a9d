"""The program that serves the page: how it starts, why it does not, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import app

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds until a test gives up; nothing is decided by it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "argument --port: must be a whole number between 1 and 65535"),
        (["--num-blocks", "0"], "argument --num-blocks: must be a whole number of at least 1"),
        (["--block-size", "many"], "argument --block-size: must be a whole number"),
        (["--scheduler", "magic"], "argument --scheduler: invalid choice"),
        (["--what"], "unrecognized arguments: --what"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
        (["--model", "tiny-random", "--device", "abacus"], "abacus"),
        (["--model", "tiny-random", "--dtype", "float3"], "float3"),
        (["--model", "tiny-random", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_seqs"),
        (["--model", "tiny-random", "--num-blocks", "9" * 12], "num_blocks=999999999999"),
    ],
)
def test_a_start_that_cannot_be_ends_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--port" not in arguments:
        arguments = [*arguments, "--port", str(free_port())]
    try:
        status = app.main(arguments)
    except SystemExit as end:
        status = end.code
    errors = capsys.readouterr().err
    assert status == 2
    assert len(errors.splitlines()) == 1 and errors.startswith("app.py: ") and message in errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("no room"),
        RuntimeError("MPS backend out of memory (allocated 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_said_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("labkit.engine.Engine", fail)
    assert app.main(["--model", "tiny-random", "--port", str(free_port())]) == 2
    errors = capsys.readouterr().err
    assert errors == "app.py: too little memory: lower --num-blocks, or take a smaller --model\n"


def test_a_bug_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("labkit.engine.Engine", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        app.load(app.parse([]))


@pytest.mark.parametrize("error", [OSError("no\n port"), ValueError("no\n port")])
def test_a_page_that_cannot_be_served_is_said_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app, "launch", fail)
    assert app.main(["--model", "tiny-random", "--port", str(free_port())]) == 2
    assert capsys.readouterr().err == "app.py: no port\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "app.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_an_unknown_model() -> None:
    done = run("--port", str(free_port()), "--model", "no-such-folder/model")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "no-such-folder/model" in done.stderr


def test_a_taken_port() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"port {port}" in done.stderr and "in use" in done.stderr


def test_start_and_ctrl_c() -> None:
    port = free_port()
    command = [sys.executable, "app.py", "--model", "tiny-random", "--port", str(port), "--no-share"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("Starting the lab with tiny-random")
        assert lines[1] == "Ready: 256 pages of 16 tokens, float32 on cpu\n"
        assert lines[2] == f"The lab is at http://127.0.0.1:{port}\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()


def test_on_colab_a_public_link_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert not app.parse([]).share
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert app.parse([]).share and not app.parse(["--no-share"]).share
