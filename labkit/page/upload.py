"""A trace that somebody hands in: read only within limits, so that no file, however made, costs much.

Reading checks every line and replays it (`labkit.trace.jsonl`). What is bounded here is what a well-formed
file could still ask for: size, steps, pages, requests, and time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord, TraceError, TraceMeta
from labkit.trace.trace import Trace

MAX_BYTES = 16 * 2**20
MAX_LINE = 128 * 2**10  # bytes of one step
MAX_STEPS = 20_000
MAX_PAGES = 16_384
MAX_REQUESTS = 10_000  # in the whole file
MAX_AT_ONCE = 2_000
MAX_SECONDS = 8.0
_MAX_WORDS = 300  # characters of a complaint: it may quote the file

_one_at_a_time = threading.Lock()


def read_upload(path: str | os.PathLike[str]) -> Trace:
    """The trace in a file.

    Raises:
        TraceError: for a file that is no trace, or larger than the limits of this module; one sentence.
    """
    if not _one_at_a_time.acquire(timeout=MAX_SECONDS):
        raise TraceError("Another file is being read: try again in a moment.")
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise TraceError(f"The file has {size / 2**20:.1f} MiB, and the limit is {MAX_BYTES >> 20} MiB.")
        if not size:
            raise TraceError("The file is empty.")
        return _read(path)
    except OSError:
        raise TraceError("The file cannot be read.") from None
    except TraceError as error:
        text = str(error)
        raise TraceError(text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 1] + "…") from None
    finally:
        _one_at_a_time.release()


def _read(path: str | os.PathLike[str]) -> Trace:
    deadline = time.monotonic() + MAX_SECONDS
    steps = arrived = 0

    def watch(meta: TraceMeta, state: PoolState, record: StepRecord | None) -> None:
        nonlocal steps, arrived
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

    trace = Trace.from_lines(_lines(path), watch=watch)
    if not trace.records:
        raise TraceError("The trace holds no steps.")
    return trace


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise TraceError(f"line {number}: longer than {MAX_LINE >> 10} KiB")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TraceError(f"not a trace: the file is not UTF-8 text ({error.reason})") from None
