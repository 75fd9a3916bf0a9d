"""Processes of our own, which read from a pipe and answer on another."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO


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
