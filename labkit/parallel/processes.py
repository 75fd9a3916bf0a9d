"""Processes of our own, which read from a pipe and answer on another."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO


def start(module: str) -> subprocess.Popen[bytes]:
    """Start `python -m module`, with pipes for its input and its output.

    A Ctrl-C in the terminal does not reach it. It should end when its input does: the system closes that for
    us even if this process is killed.
    """
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and close its pipes. It may have ended already."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be sent is lost, as it should be
            ends(pipe).close()


def ends(pipe: IO[bytes] | None) -> IO[bytes]:
    """Return a pipe that `start` made."""
    if pipe is None:
        raise ValueError("this process was started without pipes")
    return pipe


def send(pipe: IO[bytes], message: Any) -> None:
    """Write a message to a pipe, at once. Raises `OSError` if nobody reads it any more."""
    pickle.dump(message, pipe)
    pipe.flush()


def answer(run: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """Be a process that `start` started: run a function of messages and answers. Ctrl-C is not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between answers
    run(sys.stdin.buffer, answers)
