"""`app.py` as a process of its own, and what speaks to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.visiting import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds until a test gives up; nothing is decided by it


def until_it_listens(process: subprocess.Popen[str]) -> list[str]:
    """What the program prints until it has started."""
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


@contextlib.contextmanager
def program(*options: str, port: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it listens, and its address."""
    port = port or free_port()
    options = ("--model", "tiny-random", "--no-share", "--port", str(port), *options)
    command = [sys.executable, "app.py", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with process:
        try:
            until_it_listens(process)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
