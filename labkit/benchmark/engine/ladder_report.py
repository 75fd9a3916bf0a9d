"""What the ladder found: as figures, as a table for a terminal, and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from labkit.analysis.devices import Ceiling
from labkit.benchmark.engine.peers import PeerRow
from labkit.benchmark.report import Report, table_line
from labkit.views import style

_COLUMNS = (  # of the ablations: two lines of heading, and a width
    ("", "", 22),
    ("tokens", "/s", 8),
    ("x rung", "below", 7),
    ("x", "first", 7),
    ("x trans-", "formers", 9),
    ("", "steps", 7),
    ("MB", "/step", 8),
    ("GFLOP", "/step", 8),
    ("", "GB/s", 7),
    ("GFLOP", "/s", 8),
    ("of the", "roofline", 9),
    ("in", "Python", 8),
    ("peak", "GB", 6),
)
_PEER_COLUMNS = (
    ("", 30),
    ("tokens/s", 10),
    ("x transf.", 10),
    ("seconds", 9),
    ("requests", 10),
    ("equal", 8),
    ("TTFT s", 9),
    ("ITL ms", 9),
    ("p95", 9),
)
_WIDTH = 110


@dataclass
class AblationRow:
    """An ablation: medians over the repeats. Shares are of 1, memory is in bytes.

    `bytes_per_step` and `operations_per_step` are arithmetic, means over the steps. `roofline_share` is the
    least time for the steps over the time that they took. `equal` is the share of answers that equal those
    of the exact ablations, and `first_divergence` the median place where the others differ, in tokens.
    """

    name: str
    adds: str
    failure: str = ""
    requests: int = 0
    tokens_per_second: float = 0.0
    gain_before: float | None = None
    gain_first: float | None = None
    gain_reference: float | None = None
    seconds: float = 0.0
    all_seconds: list[float] = field(default_factory=list)
    steps: int = 0
    bytes_per_step: float = 0.0
    operations_per_step: float = 0.0
    bytes_per_second: float = 0.0
    operations_per_second: float = 0.0
    roofline_share: float = 0.0
    bookkeeping_share: float | None = None
    peak_memory: int | None = None
    equal: float | None = None
    first_divergence: float | None = None

    def cells(self) -> list[str]:
        """The line of the table, as text."""
        return [
            self.name,
            f"{self.tokens_per_second:.1f}",
            _times(self.gain_before),
            _times(self.gain_first),
            _times(self.gain_reference),
            str(self.steps),
            _short(self.bytes_per_step / 1e6),
            _short(self.operations_per_step / 1e9),
            _short(self.bytes_per_second / 1e9),
            _short(self.operations_per_second / 1e9),
            f"{self.roofline_share:.1%}",
            _percent(self.bookkeeping_share),
            "-" if self.peak_memory is None else f"{self.peak_memory / 1e9:.2f}",
        ]


@dataclass
class LadderReport(Report):
    """What the ladder found."""

    same_tokens: str
    jobs: int
    ceiling: Ceiling
    rungs: list[AblationRow]
    peers: list[PeerRow]

    def __str__(self) -> str:
        return "\n".join((*self._head(), "", *self._table(), "", *self._notes(), *self._peers()))

    def _head(self) -> list[str]:
        peak = ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {kind}" for kind, value in self.ceiling.peak.items())
        measured = f"Measured in this run: {self.ceiling.bandwidth / 1e9:.1f} GB/s read, {peak}."
        return [*_wrap(self.settings_parts), self.same_tokens, measured]

    def _table(self) -> list[str]:
        widths = [width for *_, width in _COLUMNS]
        lines = [table_line([heading[i] for heading in _COLUMNS], widths) for i in (0, 1)]
        for row in self.rungs:
            lines.append(
                f"{row.name:{widths[0]}}  not here" if row.failure else table_line(row.cells(), widths)
            )
        return lines

    def _notes(self) -> list[str]:
        lines = []
        for row in self.rungs:
            notes = [row.adds]
            if row.failure:
                notes = [f"not here: {row.failure}"]
            elif row.requests < self.jobs:
                notes.append(f"on the first {row.requests} of {self.jobs} requests only")
            if row.equal is not None and row.equal < 1:
                notes.append(
                    f"{row.equal:.0%} of its answers equal those of the exact rungs, and the others leave "
                    f"them at token {row.first_divergence:.0f} (median)"
                )
            lines.append(f"{row.name}: {notes[0]}" + "".join(f";\n    {note}" for note in notes[1:]))
        return lines

    def _peers(self) -> list[str]:
        if not self.peers:
            return []
        widths = [width for _, width in _PEER_COLUMNS]
        lines = ["", table_line([name for name, _ in _PEER_COLUMNS], widths)]
        for peer in self.peers:
            if peer.failure:
                lines.append(f"{peer.system}: {peer.failure}"[:_WIDTH])
                continue
            cells = [
                peer.system,
                f"{peer.tokens_per_second:.1f}",
                _times(peer.gain),
                f"{peer.seconds:.1f}",
                f"{peer.requests}" + (f" of {self.jobs}" if peer.requests < self.jobs else ""),
                _percent(peer.equal),
                "-" if peer.ttft_median is None else f"{peer.ttft_median:.2f}",
                "-" if peer.itl_median is None else f"{peer.itl_median * 1e3:.1f}",
                "-" if peer.itl_p95 is None else f"{peer.itl_p95 * 1e3:.1f}",
            ]
            lines.append(table_line(cells, widths))
        return lines


def _wrap(parts: list[str]) -> list[str]:
    """Parts with commas between them, in lines that fit."""
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 2 > _WIDTH:
            lines[-1] += ","
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + part
    return lines


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _short(value: float) -> str:
    """A number with two or three significant digits."""
    if value < 0.01:
        return f"{value:.1g}"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


# -- the picture ----------------------------------------------------------------------------------


def figure(report: LadderReport) -> go.Figure:
    """Bars of output tokens per second, on a logarithmic axis. Its text twin is `str(report)`.

    The bar of an ablation says what share of its roofline it reaches. Peers are hatched.
    """
    rungs = [row for row in report.rungs if not row.failure]
    peers = [peer for peer in report.peers if not peer.failure]
    pattern = {"shape": "/", "size": 6, "solidity": 0.3, "fgcolor": style.PALETTE[1], "bgcolor": style.PAPER}
    drawn = go.Figure()

    def bars(
        name: str, rows: dict[str, Any], texts: list[str], facts: list[str], marker: dict[str, Any]
    ) -> None:
        drawn.add_trace(
            go.Bar(
                orientation="h",
                name=name,
                y=[style.escape(label) for label in rows],
                x=[row.tokens_per_second for row in rows.values()],
                text=texts,
                customdata=facts,
                marker=marker,
            )
        )

    bars(
        "rung (share of the roofline)",
        {row.name: row for row in rungs},
        [f"{row.tokens_per_second:,.0f} ({row.roofline_share:.0%} of the roofline)" for row in rungs],
        [_facts(row) for row in rungs],
        {"color": style.PALETTE[0]},
    )
    if peers:
        bars(
            "peers and other numbers of seats",
            {peer.system: peer for peer in peers},
            [f"{peer.tokens_per_second:,.0f}" for peer in peers],
            [_peer_facts(peer) for peer in peers],
            {
                "color": style.PALETTE[1],
                "pattern": pattern,
                "line": {"color": style.PALETTE[1], "width": 1},
            },
        )
    drawn.update_traces(
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{customdata}<extra></extra>",
        textfont={"color": style.INK},
    )
    rates = [row.tokens_per_second for row in (*rungs, *peers)]
    low, high = math.floor(math.log10(min(rates))), math.log10(max(rates)) + 0.6
    settings = report.settings
    title = f"The ladder: {settings['model']}, {settings['dtype']}, {settings['device']}"
    subtitle = f"{settings['requests']} requests, {settings['seats']} seats, blocks: {settings['blocks']}"
    small = f'<br><span style="font-size:12px;color:{style.FAINT_INK}">{style.escape(subtitle)}</span>'
    drawn.layout.template = style.TEMPLATE
    drawn.update_layout(
        title_text=style.escape(title) + small,
        height=170 + 26 * len(rates),
        margin={"t": 70, "b": 90},
        barmode="overlay",
    )
    drawn.update_xaxes(
        type="log",
        range=[low, high],
        title={"text": "output tokens per second (logarithmic)", "standoff": 4},
        showgrid=True,
        gridcolor=style.FREE,
        dtick=1,
    )
    drawn.update_yaxes(autorange="reversed", type="category")
    return drawn


def _facts(row: AblationRow) -> str:
    lines = [
        f"<b>{style.escape(row.name)}</b>: {style.escape(row.adds)}",
        f"{row.tokens_per_second:,.1f} tokens/s over {style.plural(row.requests, 'request')}",
        f"{_times(row.gain_before)} the rung below, {_times(row.gain_first)} the first",
        f"{_short(row.bytes_per_step / 1e6)} MB and {_short(row.operations_per_step / 1e9)} GFLOP to a step",
        f"{_short(row.bytes_per_second / 1e9)} GB/s, {row.roofline_share:.1%} of the roofline",
    ]
    return "<br>".join(lines)


def _peer_facts(peer: PeerRow) -> str:
    lines = [
        f"<b>{style.escape(peer.system)}</b>",
        f"{peer.tokens_per_second:,.1f} tokens/s over {style.plural(peer.requests, 'request')}",
        f"{_percent(peer.equal)} of its answers equal the exact rungs'",
    ]
    return "<br>".join(lines)
