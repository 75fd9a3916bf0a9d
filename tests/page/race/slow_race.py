"""A race that takes as long as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from labkit.page.race import queue
from labkit.page.race.run import Progress, RaceCancelled, RaceError


class SlowRace:
    """Takes the place of a race: it stays at 40% until it is let go or cancelled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self.error = error or RaceError("static: no")
        monkeypatch.setattr(queue, "run_race", self)

    def __call__(
        self, *_: Any, progress: Callable[[Progress], None], cancelled: Callable[[], bool], **__: Any
    ) -> None:
        progress(Progress("static", 1, 3, 17, 5, 12, 0.4))
        while not self.go.wait(0.01):
            if cancelled():
                raise RaceCancelled("stopped in static, after 17 steps")
        raise self.error
