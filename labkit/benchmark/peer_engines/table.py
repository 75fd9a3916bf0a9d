"""What the comparison of engines found: as figures, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labkit.benchmark.report import Report, table_line

_COLUMNS = (
    ("", 42),
    ("tokens/s", 10),
    ("x transf.", 11),
    ("CPU ms/token", 14),
    ("peak MB", 9),
    ("requests", 10),
    ("equal", 7),
)
_BUSY_COLUMNS = (("busy", 8), ("kept", 7))
_AGAINST = {("vllm", "float32"): "float32", ("vllm", "bfloat16"): "bfloat16", ("llamacpp", "gguf"): "int8"}


@dataclass
class Row:
    """An engine with so many seats: medians over the repeats.

    Attributes:
        engine, precision, seats, name: What was run.
        adaptive: Whether its number of threads may change; only this engine's can.
        requests: How many requests it answered.
        tokens_per_second: Output tokens over the seconds until the last answer.
        gain: That rate over the one of `transformers` in fp32, one request at a time.
        cpu_seconds_per_token: Processor seconds of all its processes, per output token.
        memory: The most bytes that its processes have held.
        equal: How many of its answers equal the exact ones.
        busy: Output tokens per second beside a process that keeps a core busy.
    """

    engine: str
    precision: str
    seats: int
    name: str
    adaptive: bool
    requests: int
    tokens_per_second: float
    gain: float | None = None
    cpu_seconds_per_token: float | None = None
    memory: int | None = None
    equal: int | None = None
    busy: float | None = None

    def cells(self, *, busy: bool) -> list[str]:
        """The line of the table, as text."""
        cells = [
            self.name,
            f"{self.tokens_per_second:.1f}",
            "-" if self.gain is None else f"{self.gain:.2f}x",
            "-" if self.cpu_seconds_per_token is None else f"{self.cpu_seconds_per_token * 1e3:.1f}",
            "-" if self.memory is None else f"{self.memory / 1e6:.0f}",
            str(self.requests),
            "-" if self.equal is None else str(self.equal),
        ]
        if busy:
            kept = None if self.busy is None else self.busy / self.tokens_per_second
            cells += ["-", "-"] if self.busy is None else [f"{self.busy:.1f}", f"{kept:.2f}"]
        return cells


@dataclass
class TableReport(Report):
    """What `compare` found; `failed` says why something could not be measured, by its name."""

    same_tokens: str
    rows: list[Row]
    failed: dict[str, str]

    def __str__(self) -> str:
        busy = any(row.busy is not None for row in self.rows)
        columns = _COLUMNS + (_BUSY_COLUMNS if busy else ())
        widths = [width for _, width in columns]
        return "\n".join(
            (
                self.settings_line,
                self.same_tokens,
                table_line([name for name, _ in columns], widths),
                *(table_line(row.cells(busy=busy), widths) for row in self.rows),
                *(f"{name}: not here: {why}" for name, why in self.failed.items()),
                *ratios(self.rows),
            )
        )


def ratios(rows: Sequence[Row]) -> Iterator[str]:
    """Sentences that say how fast this engine is beside each other one, at the same number of seats."""
    ours = {(row.precision, row.seats): row for row in rows if row.engine == "labkit" and row.adaptive}
    for (engine, theirs), precision in _AGAINST.items():
        parts = []
        for row in rows:
            mine = ours.get((precision, row.seats))
            if (row.engine, row.precision) != (engine, theirs) or mine is None:
                continue
            part = f"{mine.tokens_per_second / row.tokens_per_second:.2f}x at {row.seats}"
            if mine.busy and row.busy:
                part += f" (busy {mine.busy / row.busy:.2f}x)"
            parts.append(part)
        if parts:
            yield f"labkit {precision} over {engine} {theirs}, by seats: {', '.join(parts)}"
