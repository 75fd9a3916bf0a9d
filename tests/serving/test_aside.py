"""Work on a thread of its own: its result, its errors, and a caller who is stopped."""

from __future__ import annotations

import signal
import threading

import pytest

from labkit.serving.aside import aside
from tests.waiting import PATIENCE, wait_for


def test_its_result_and_its_error_come_back_and_the_thread_is_gone() -> None:
    assert aside(threading.current_thread).is_alive() is False
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 / 0)


def test_a_stop_ends_the_wait_and_the_work_is_told() -> None:
    told, over = threading.Event(), threading.Event()

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert told.wait(PATIENCE)
        over.set()

    with pytest.raises(KeyboardInterrupt):
        aside(work, told.set)
    wait_for(over.is_set)
