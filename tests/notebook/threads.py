"""Calls from another thread, as JupyterLab makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable


def from_another_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
