"""A trace written to a file while it grows: the engine drops old steps, the file keeps them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from labkit.trace.jsonl import header_line, step_line
from labkit.trace.records import StepRecord, TraceMeta

logger = logging.getLogger(__name__)

Subscribe = Callable[[Callable[[StepRecord], None]], Callable[[], None]]


class TraceWriters:
    """Writes the traces of one engine after the other, each to a file that `Trace.load` reads.

    Each step is in the file as soon as it is told, so that a program that is killed loses none. A file that
    is there already is left as it is.

    Args:
        path: The first file. The next ones have a number before the suffix, as has one whose name is taken.
        failed: A function that is called, on any thread, when a file cannot be written any more.

    Attributes:
        problem: Why steps are not written any more, in one sentence; "" if they are.
    """

    def __init__(self, path: str | os.PathLike[str], failed: Callable[[], object] = lambda: None) -> None:
        self.problem = ""
        self._path = Path(path)
        self._is_first = True
        self._failed = failed
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    def follow(self, meta: TraceMeta, subscribe: Subscribe) -> Path | None:
        """Write every step of another engine; the file of the one before is finished.

        Args:
            meta: The header of the engine's trace.
            subscribe: A function that takes a listener, calls it with each record of the engine, and returns
                a function that ends the subscription.

        Returns:
            The path of the file; None if it cannot be made, which is a `problem`.

        Raises:
            OSError: If the first file of all cannot be made.
        """
        self.close()
        try:
            path, file = self._open()
        except OSError as error:
            if self._is_first:
                raise
            self._give_up(str(self._path), error)
            return None
        self._is_first = False
        self.problem, self._file = "", file
        self._write(file, header_line(meta))

        def append(record: StepRecord) -> None:
            with self._lock:
                if file is self._file:
                    self._write(file, step_line(record))

        self._unsubscribe = subscribe(append)
        return path

    def _open(self) -> tuple[Path, TextIO]:
        path, number = self._path, 1
        while True:
            try:
                return path, path.open("x", encoding="utf-8", buffering=1)  # a line at a time
            except FileExistsError:
                number += 1
                path = self._path.with_name(f"{self._path.stem}-{number}{self._path.suffix}")

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write(line + "\n")
        except OSError as error:
            self._file = None
            with contextlib.suppress(OSError):
                file.close()
            self._give_up(file.name, error)

    def _give_up(self, name: str, error: OSError) -> None:
        self.problem = f"Steps are not written to {name} any more: {(error.strerror or str(error)).lower()}."
        logger.error("%s", self.problem)
        self._failed()

    def close(self) -> None:
        """Finish the current file."""
        self._unsubscribe()
        with self._lock:
            file, self._file = self._file, None
            if file:
                file.close()
