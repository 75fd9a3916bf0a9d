"""Waits until something comes true, for tests of what happens on other threads."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60  # seconds until a test gives up; nothing is decided by it


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
