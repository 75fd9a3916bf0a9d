"""A trace that somebody hands in: read only within limits, so that no file, however made, costs much.

Reading checks every line and replays it (`labkit.trace.jsonl`). What is bounded here is what a well-formed
file could still ask for: size, steps, pages, requests, and the work of replaying them. Work is counted and
not timed, so a file is refused on a slow machine as on a fast one. The bytes stay in memory: nothing that is
handed in is ever on disk.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

from labkit.trace.jsonl import decode
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord, TraceError, TraceMeta
from labkit.trace.trace import Trace

MAX_BYTES = 16 * 2**20
MAX_LINE = 128 * 2**10  # bytes of one step
MAX_STEPS = 20_000
MAX_PAGES = 16_384
MAX_REQUESTS = 10_000  # in the whole file
MAX_AT_ONCE = 2_000
MAX_ENTRIES = 500_000  # of all block tables at once: a shared page counts for each that shares it
MAX_WORK = 400_000_000  # entries, summed over the steps: a pool that is full in each step stays below it
MAX_SECONDS = 8.0  # the last resort, on a machine that is busy with something else
_COPY = 4  # what it costs to look through a block table for a page to copy, against counting its entries
_MAX_WORDS = 300  # characters of a complaint: it may quote the file
MAX_READERS = 2  # files that are read at once: each may take a few hundred MiB meanwhile


class BusyError(RuntimeError):
    """A file cannot be read now, and can be in a moment."""


class Uploads:
    """Reads one file of each sender at a time, and few of all. Nobody waits here, because a thread would."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._senders: set[str] = set()

    def read(self, data: bytes, sender: str) -> Trace:
        """The trace in a file.

        Args:
            data: the bytes of the file.
            sender: what cannot be made up, such as an address.

        Raises:
            TraceError: as `read_upload` does.
            BusyError: while another file of the sender is read, or others' files.
        """
        with self._lock:
            if sender in self._senders or len(self._senders) >= MAX_READERS:
                raise BusyError("Other files are being read: try again in a moment.")
            self._senders.add(sender)
        try:
            return read_upload(data)
        finally:
            with self._lock:
                self._senders.discard(sender)


def check_size(size: int) -> None:
    """Raise `TraceError` unless a file of so many bytes can be read."""
    if size > MAX_BYTES:
        raise TraceError(f"The file has {size / 2**20:.1f} MiB, and the limit is {MAX_BYTES >> 20} MiB.")
    if not size:
        raise TraceError("The file is empty.")


def read_upload(data: bytes) -> Trace:
    """The trace in the bytes of a file.

    Raises:
        TraceError: for a file that is no trace, or larger than the limits of this module; one sentence.
    """
    check_size(len(data))
    try:
        return _read(data)
    except TraceError as error:
        text = str(error)
        raise TraceError(text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 1] + "…") from None


def _read(data: bytes) -> Trace:
    deadline = time.monotonic() + MAX_SECONDS
    steps = arrived = work = 0

    def watch(meta: TraceMeta, state: PoolState, record: StepRecord | None) -> None:
        nonlocal steps, arrived, work
        if time.monotonic() > deadline:
            raise TraceError(f"The file takes more than {MAX_SECONDS:.0f} seconds to check.")
        if record is None:
            if meta.num_blocks > MAX_PAGES or meta.block_size > MAX_PAGES:
                raise TraceError(
                    f"A pool of more than {MAX_PAGES:,} pages, or tokens to a page, is too large."
                )
            return
        steps += 1
        arrived += len(record.arrived)
        if steps > MAX_STEPS:
            raise TraceError(f"The file has more than {MAX_STEPS:,} steps.")
        named = max(arrived, len(state.arrivals), len(record.requests))
        if named > MAX_REQUESTS or max(len(state.arrivals), len(state.tables)) > MAX_AT_ONCE:
            at_once = f"{MAX_REQUESTS:,} requests, or {MAX_AT_ONCE:,} at once"
            raise TraceError(f"The file has more than {at_once}.")
        entries = state.num_entries
        work += entries + _COPY * sum(len(state.tables.get(copy.request_id, ())) for copy in record.copied)
        if entries > MAX_ENTRIES or work > MAX_WORK:
            raise TraceError("The requests of the file share more pages than can be replayed here.")

    trace = Trace.from_lines(decode(_lines(data)), watch=watch)
    if not trace.records:
        raise TraceError("The trace holds no steps.")
    return trace


def _lines(data: bytes) -> Iterator[bytes]:
    file, number = io.BytesIO(data), 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise TraceError(f"line {number}: longer than {MAX_LINE >> 10} KiB")
        yield line
