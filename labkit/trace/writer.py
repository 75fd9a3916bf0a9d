"""A trace written down while it grows: the engine forgets old steps, the file does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace


class TraceWriters:
    """Writes the trace of one engine after the other, each into a file that `Trace.load` reads.

    Args:
        path: of the first; the next are numbered before the suffix.

    Raises:
        OSError: from `follow`, if a file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._count = 0
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._deafen: Callable[[], None] = lambda: None

    def follow(self, live: AsyncEngine) -> Path:
        """Write down every step of an engine from now on, and of none before; returns the file's path."""
        self.close()
        self._count += 1
        path = self._path
        if self._count > 1:
            path = path.with_name(f"{path.stem}-{self._count}{path.suffix}")
        meta = live.engine.trace.meta
        file = self._file = path.open("w", encoding="utf-8")
        file.writelines(line + "\n" for line in Trace(meta).lines())

        def write(record: StepRecord) -> None:
            *_, line = Trace(meta, [record]).lines()
            with self._lock:
                if not file.closed:
                    file.write(line + "\n")

        self._deafen = live.subscribe(write, last=None)
        return path

    def close(self) -> None:
        """Finish the file."""
        self._deafen()
        with self._lock:
            if self._file:
                self._file.close()
