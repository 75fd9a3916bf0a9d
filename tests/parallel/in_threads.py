"""Workers on threads of this process: they start at once, where a process imports for seconds."""

from __future__ import annotations

import os
import threading

import pytest

from labkit.parallel import workers
from labkit.parallel.worker import run


class Thread:
    """As much of `subprocess.Popen` as `Workers` uses."""

    def __init__(self, *_: object, **__: object) -> None:
        (messages, self_in), (self_out, answers) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(self_in, "wb"), os.fdopen(self_out, "rb")
        ends = os.fdopen(messages, "rb"), os.fdopen(answers, "wb")
        self._thread = threading.Thread(target=self._run, args=ends, daemon=True)
        self._thread.start()
        self.returncode: int | None = None

    def _run(self, messages, answers) -> None:
        try:
            run(messages, answers)
            self.returncode = 0
        except SystemExit as end:
            self.returncode = end.code

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.stdin.close()

    def wait(self) -> None:
        self._thread.join(30)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", Thread)
