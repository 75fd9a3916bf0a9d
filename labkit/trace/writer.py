"""A trace written to a file while it grows: the engine drops old steps, the file keeps them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from labkit.trace.jsonl import header_line, step_line
from labkit.trace.records import StepRecord, TraceMeta

Subscribe = Callable[[Callable[[StepRecord], None]], Callable[[], None]]


class TraceWriters:
    """Writes the traces of one engine after the other, each to a file that `Trace.load` reads.

    Args:
        path: The first file. The next ones have a number before the suffix.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._count = 0
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    def follow(self, meta: TraceMeta, subscribe: Subscribe) -> Path:
        """Write every step of another engine; the file of the one before is finished.

        Args:
            meta: The header of the engine's trace.
            subscribe: A function that takes a listener, calls it with each record of the engine, and returns
                a function that ends the subscription.

        Returns:
            The path of the file.

        Raises:
            OSError: If the file cannot be written.
        """
        self.close()
        self._count += 1
        path = self._path
        if self._count > 1:
            path = path.with_name(f"{path.stem}-{self._count}{path.suffix}")
        file = self._file = path.open("w", encoding="utf-8")
        file.write(header_line(meta) + "\n")

        def write(record: StepRecord) -> None:
            with self._lock:
                if not file.closed:
                    file.write(step_line(record) + "\n")

        self._unsubscribe = subscribe(write)
        return path

    def close(self) -> None:
        """Finish the current file."""
        self._unsubscribe()
        with self._lock:
            if self._file:
                self._file.close()
