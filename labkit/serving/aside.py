"""Work on a thread of its own, while the caller waits and can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def aside(act: Callable[[], T], on_stop: Callable[[], object] = lambda: None) -> T:
    """The result of `act` on a thread of its own, which ends before this returns. Raises what `act` raises.

    Ctrl-C ends the wait at once, where an executor's `with` would wait for the thread.

    Args:
        act: the work.
        on_stop: a function that tells the work to end, if the wait ends before it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="labkit-aside", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        on_stop()
        raise
    return outcome.result()
