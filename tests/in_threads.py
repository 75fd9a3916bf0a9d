"""Our other processes, as threads of this one: they start at once, where a process imports for seconds."""

from __future__ import annotations

import importlib
import os
import threading

import pytest

from labkit.parallel import processes


class Thread:
    """As much of `subprocess.Popen` as we use, for `python -m module`."""

    def __init__(self, command: list[str], **_: object) -> None:
        self._main = importlib.import_module(command[2]).run
        (messages, self_in), (self_out, answers) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(self_in, "wb"), os.fdopen(self_out, "rb")
        ends = os.fdopen(messages, "rb"), os.fdopen(answers, "wb")
        self._thread = threading.Thread(target=self._run, args=ends, daemon=True)
        self._thread.start()
        self.returncode: int | None = None

    def _run(self, messages, answers) -> None:
        try:
            self._main(messages, answers)
            self.returncode = 0
        except SystemExit as end:
            self.returncode = end.code
        except BrokenPipeError:  # nobody listens any more
            self.returncode = 1
        answers.close()

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.stdin.close()

    def wait(self) -> int | None:
        self._thread.join(30)
        return self.returncode


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.subprocess, "Popen", Thread)
