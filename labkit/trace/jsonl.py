"""A trace as JSON Lines: a header, then one step a line. Every line that is read is checked and replayed.

What is accepted can be drawn and exported: all numbers are within the limits below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from labkit.trace.foreign import HEAD, what_bytes_are, what_text_is
from labkit.trace.pool_state import PoolState
from labkit.trace.records import (
    KINDS,
    PLACES,
    Admission,
    Arrival,
    Blocks,
    Copy,
    Finish,
    Holding,
    Moved,
    OtherPool,
    Priority,
    StepRecord,
    TraceError,
    TraceMeta,
)

FORMAT = "labkit-trace"
VERSION = 1
_NESTED: dict[str, type] = {
    "arrived": Arrival,
    "reprioritised": Priority,
    "admitted": Admission,
    "preempted": Blocks,
    "taken": Blocks,
    "copied": Copy,
    "finished": Finish,
    "returned": Blocks,
    "moved": Moved,
}
_SECONDS_DIGITS = 6
_MAX_INT = 2**53  # a browser cannot represent every whole number beyond it
_MAX_SIZE = 2**20  # blocks of a pool, and tokens of a block
_MAX_SECONDS = 4e9  # 127 years, which as microseconds stay below `_MAX_INT`
TORN = "The last line is torn off, as it is when a run is killed. It is left out."

Watch = Callable[[TraceMeta, PoolState, StepRecord | None], None]


# -- writing --------------------------------------------------------------------------------------


def write_lines(meta: TraceMeta, records: Iterable[StepRecord]) -> Iterator[str]:
    """All lines of a trace."""
    yield header_line(meta)
    yield from map(step_line, records)


def header_line(meta: TraceMeta) -> str:
    """The first line of a file. Fields at their default are left out, here and in the steps."""
    return _dump({"format": FORMAT, "version": VERSION, **_to_json(meta)})


def step_line(record: StepRecord) -> str:
    """The line of one step."""
    return _dump(_to_json(record))


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))


def _to_json(record: StepRecord | TraceMeta) -> dict[str, Any]:
    values = ((f, getattr(record, f.name)) for f in fields(record))
    return {
        f.name: round(value, _SECONDS_DIGITS) if isinstance(value, float) else value
        for f, value in values
        if value != f.default
    }


# -- reading --------------------------------------------------------------------------------------


def decode(file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file as text, without the mark with which some programs begin UTF-8.

    Raises:
        TraceError: If they are not UTF-8.
    """
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            kind = what_bytes_are(line[:HEAD]) if number == 1 else ""
            why = f"the file is {kind}" if kind else f"the file is not UTF-8 text ({error.reason})"
            raise TraceError(f"not a trace: {why}") from None


def read_lines(
    lines: Iterable[str], *, watch: Watch | None = None
) -> tuple[TraceMeta, list[StepRecord], str]:
    """The header and the records in the lines of a file, and a note on what is missing ("" if nothing is).

    Args:
        lines: The lines of the file; empty ones are skipped. A last line that is torn off is left out.
        watch: A function that is called after the header (without a record) and after each step, with the
            pool's state at that moment. It may raise `TraceError` to refuse the file.

    Raises:
        TraceError: If a line is wrong. The message says which line and why.
    """
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    meta = _read_header(*next(numbered, (1, "")))
    state = PoolState(meta.block_size)
    if watch:
        watch(meta, state, None)
    records: list[StepRecord] = []
    last, coming = -1, next(numbered, None)
    while coming:
        (number, line), coming = coming, next(numbered, None)
        try:
            values = _parse_line(number, line)
        except TraceError:
            if coming or line.endswith("\n") or not line.startswith("{"):
                raise
            return meta, records, TORN
        if "format" in values:
            raise TraceError(f"line {number}: another run begins here, and a file holds one: cut it in two")
        record = _build(StepRecord, values, number)
        _check_record(record, meta, last, number)
        _check_replay(state, record, meta, number)
        last = record.step
        records.append(record)
        if watch:
            watch(meta, state, record)
    return meta, records, ""


def _read_header(number: int, line: str) -> TraceMeta:
    kind = what_text_is(line.removeprefix("\ufeff"))
    if line.strip() in ("{", "["):  # the first line of a value that goes on
        kind = kind or "JSON over several lines, a notebook for instance"
    if kind:
        raise TraceError(f"not a trace: the file is {kind}")
    head = _parse_line(number, line.removeprefix("\ufeff"))
    if head.pop("format", None) != FORMAT:
        raise TraceError(f'line {number}: not a trace: the first line must say "format": "{FORMAT}"')
    version = head.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise TraceError(f"line {number}: version {version!r} is not one this labkit reads ({VERSION})")
    meta = _build(TraceMeta, head, number)
    for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
        if getattr(meta, name) < 1:
            raise TraceError(f"line {number}: {name} must be at least 1, not {getattr(meta, name)}")
    for name in ("num_blocks", "block_size"):
        if getattr(meta, name) > _MAX_SIZE:
            raise TraceError(
                f"line {number}: {name} must be at most {_MAX_SIZE:,}, not {getattr(meta, name)}"
            )
    return meta


def _parse_line(number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TraceError(f"line {number}: expected an object, found {type(value).__name__}")
    return value


def _build(cls: type, values: dict[str, Any], number: int) -> Any:
    known = {f.name: f for f in fields(cls)}
    unknown = values.keys() - known.keys()
    if unknown:
        name = sorted(unknown)[0]
        raise TraceError(f"line {number}: unknown field {name!r}: a newer labkit may have written the file")
    try:
        built = {name: _convert(name, value, str(known[name].type)) for name, value in values.items()}
        return cls(**built)
    except (TypeError, ValueError) as error:
        raise TraceError(f"line {number}: {error}") from None


def _convert(name: str, value: Any, kind: str) -> Any:
    """Turn JSON's lists into tuples and named tuples, and check the types on the way."""
    if name in _NESTED:
        return tuple(_entry(name, _NESTED[name], item) for item in _list(name, value))
    if name in ("sampled", "drafted", "allowed"):
        return tuple(_ints(name, item) for item in _list(name, value))
    if name == "blocked":
        head, why = _list(name, value)
        return _typed(name, head, str), _typed(name, why, str)
    if name == "other_pool":
        num_blocks, tables = _list(name, value)
        held = [_entry(name, Holding, item) for item in _list(name, tables)]
        return OtherPool(_typed(name, num_blocks, int), tuple(held))
    if kind.startswith("tuple[str"):
        return tuple(_typed(name, item, str) for item in _list(name, value))
    if kind.startswith("tuple[int"):
        return _ints(name, value)
    if kind == "float":
        number = float(_typed(name, value, (int, float)))
        if not 0 <= number <= _MAX_SECONDS:  # NaN neither
            raise ValueError(f"{name}: {number} is no time")
        return number
    return _typed(name, value, int if kind == "int" else str)


def _entry(name: str, cls: Any, item: Any) -> Any:
    parts = _list(name, item)
    kinds = [str(kind) for kind in cls.__annotations__.values()]
    if len(parts) > len(kinds):
        raise ValueError(f"{name}: too many values in {item!r}")
    checked = [
        _ints(name, part) if "tuple" in kind else _typed(name, part, str if "str" in kind else int)
        for part, kind in zip(parts, kinds, strict=False)
    ]
    return cls(*checked)


def _typed(name: str, value: Any, kinds: type | tuple[type, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name}: unexpected value {value!r}")
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        raise ValueError(f"{name}: a number is too large")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, found {value!r}")
    return value


def _ints(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_typed(name, item, int) for item in _list(name, value))


def _check_record(record: StepRecord, meta: TraceMeta, last: int, number: int) -> None:
    """Check what can be said of a step without knowing the pool."""

    def fail(what: str) -> None:
        raise TraceError(f"line {number}: {what}")

    if record.step <= last:
        fail(f"step {record.step} does not come after step {last}")
    columns = (record.kinds, record.starts, record.num_tokens, record.sampled)
    if any(len(column) != len(record.requests) for column in columns):
        fail("the columns requests, kinds, starts, num_tokens and sampled differ in length")
    for name in ("padding", "drafted", "allowed"):
        if getattr(record, name) and len(getattr(record, name)) != len(record.requests):
            fail(f"{name} must have one entry per request")
    if set(record.kinds) - KINDS.keys():
        fail(f"kinds must be made of the letters {', '.join(KINDS)}, not {record.kinds!r}")
    if any(len(row.sampled) > len(row.drafted) + 1 for row in record.rows if record.drafted):
        fail("a row has sampled more than its drafts and a token")
    if any(row.allowed and len(row.allowed) != len(row.sampled) for row in record.rows if record.allowed):
        fail("allowed must have a count for each token that a row has sampled")
    moved = [*record.preempted, *record.taken, *record.returned]
    if any(len(entry.blocks) > meta.num_blocks for entry in moved):
        fail(f"more blocks than the pool has ({meta.num_blocks})")
    blocks = [block for entry in moved for block in entry.blocks]
    blocks += [block for finish in record.finished for block in finish.blocks]
    blocks += [block for copy in record.copied for block in copy[1:]]
    blocks += [block for admission in record.admitted for block in admission.shared]
    for block in (*blocks, *record.published, *record.evicted, *record.restored):
        if not 0 <= block < meta.num_blocks:
            fail(f"block {block} is outside the pool of {meta.num_blocks}")
    if not 0 <= record.free_blocks <= meta.num_blocks:
        fail(f"free_blocks must be between 0 and {meta.num_blocks}, not {record.free_blocks}")
    counts = [*record.starts, *record.num_tokens, *record.padding, record.waiting, record.threads]
    counts += [record.sent_in_layers, record.sent_elsewhere]
    counts += [count for row in record.allowed for count in row]
    counts += [moved.amount for moved in record.moved]
    counts += [count for arrival in record.arrived for count in arrival[1:3]]
    counts += [count for _, cached, _, looked_up in record.admitted for count in (cached, looked_up)]
    if min(counts, default=0) < 0:
        fail("a count is negative")
    for moved in record.moved:
        if moved.place not in PLACES:
            fail(f"a place must be one of {', '.join(PLACES)}, not {moved.place!r}")
    if other := record.other_pool:
        if not 1 <= other.num_blocks <= _MAX_SIZE:
            fail(f"the other pool must have 1 to {_MAX_SIZE:,} blocks, not {other.num_blocks}")
        for name, computed, held in other.tables:
            if len(held) > other.num_blocks or not all(0 <= block < other.num_blocks for block in held):
                fail(f"request {name!r} holds blocks outside the other pool of {other.num_blocks}")
            if not 0 <= computed <= len(held) * meta.block_size:
                fail(f"request {name!r} has more tokens in the other pool than its blocks hold")


def _check_replay(state: PoolState, record: StepRecord, meta: TraceMeta, number: int) -> None:
    """Replay the step as it is read, so that a picture never meets a block that nobody took."""
    try:
        state.begin(record)
    except (KeyError, ValueError):
        raise TraceError(f"line {number}: copies a block that its request does not hold") from None
    if any(len(table) > meta.num_blocks for table in state.tables.values()):
        raise TraceError(f"line {number}: a request holds more blocks than the pool has ({meta.num_blocks})")
    for request_id, num_tokens, start in zip(record.requests, record.num_tokens, record.starts, strict=True):
        held = len(state.tables.get(request_id, ())) * state.block_size
        if num_tokens and start + num_tokens > held:
            raise TraceError(
                f"line {number}: request {request_id!r} computes token {start + num_tokens - 1} "
                f"but holds blocks for {held} only"
            )
    for request_id, blocks in record.returned:
        if not blocks or tuple(state.tables.get(request_id, ())[-len(blocks) :]) != blocks:
            raise TraceError(
                f"line {number}: request {request_id!r} returns blocks that do not end its table"
            )
    state.end(record)
