"""What a server did under load: as figures, as a table for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from labkit.analysis.client_measures import Slo, Summary
from labkit.benchmark.report import Report, table_line
from labkit.trace.latency import Spread
from labkit.views import style

HTTP_TARGET = 0.10  # the share of the tokens per second that HTTP may cost
ITL_TARGET = 3.0  # p99 over the median at half the knee

_COLUMNS = (  # two lines of heading, and a width
    ("asked", "/s", 7),
    ("done", "/s", 7),
    ("good", "/s", 7),
    ("tokens", "/s", 8),
    ("TTFT s", "median", 8),
    ("", "p95", 7),
    ("", "p99", 7),
    ("ITL ms", "median", 8),
    ("", "p95", 7),
    ("", "p99", 7),
    ("E2E s", "median", 8),
    ("", "p95", 7),
    ("", "p99", 7),
    ("queue", "s", 7),
    ("in", "flight", 8),
    ("", "errors", 7),
)


@dataclass
class RateRow:
    """One rate of requests: what was asked for, and what came of it.

    `queue` is the mean queue time, in seconds, as the server itself measures it; None if it does not say.
    """

    rate: float
    summary: Summary
    queue: float | None = None

    @property
    def power(self) -> float:
        """Requests completed per second over the mean time to the end."""
        return self.summary.done / self.summary.e2e_mean if self.summary.e2e_mean else 0.0

    def cells(self) -> list[str]:
        """The line of the table, as text."""
        of = self.summary
        return [
            f"{self.rate:.2f}",
            f"{of.done:.2f}",
            "-" if of.good is None else f"{of.good:.2f}",
            f"{of.tokens:.1f}",
            *_three(of.ttft, 1, 2),
            *_three(of.itl, 1e3, 0),
            *_three(of.e2e, 1, 1),
            "-" if self.queue is None else f"{self.queue:.2f}",
            f"{of.in_flight:.1f}",
            str(of.errors),
        ]


def _three(spread: Spread | None, factor: float, digits: int) -> list[str]:
    return ["-"] * 3 if spread is None else [f"{value * factor:.{digits}f}" for value in spread]


def knee(rows: Sequence[RateRow]) -> int:
    """The place of the knee among rows of rising rates: where power is greatest.

    Power is throughput over response time (Giessler and others, 1978; Kleinrock, 1979). Below its maximum
    more load costs little time, above it time grows faster than throughput. It is also where a line from the
    origin touches the curve of response times.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty: there is no curve to have a knee")
    return max(range(len(rows)), key=lambda i: rows[i].power)


@dataclass
class HttpCost:
    """The same requests at once, with and without a server. Tokens per second are medians."""

    requests: int
    same: str
    in_process: float
    over_http: float
    all_seconds: dict[str, list[float]]

    @property
    def cost(self) -> float:
        """The share of the tokens a second that is lost."""
        return 1 - self.over_http / self.in_process

    def __str__(self) -> str:
        met = "under" if self.cost < HTTP_TARGET else "NOT UNDER"
        return (
            f"{self.requests} streams at once: {self.in_process:.1f} tokens/s without a server, "
            f"{self.over_http:.1f} over HTTP, which costs {self.cost:.1%} ({met} {HTTP_TARGET:.0%}).\n"
            f"{self.same}"
        )


@dataclass
class ManyStreams:
    """Many streams at once. `left` is what the server held afterwards; None if it does not say."""

    streams: int
    summary: Summary
    most: int  # streams that were open at one time
    lost: int  # tokens that were asked for and did not come
    seconds: float
    checked: int
    equal: int
    left: dict[str, float] | None

    def __str__(self) -> str:
        of = self.summary
        errors = f"{of.errors} errors ({of.first_error})" if of.errors else "no error"
        lines = [
            f"{self.streams} streams at once, up to {self.most} of them open: "
            f"{of.requests - of.errors} complete in {self.seconds:.1f} s, {errors}, "
            f"{self.lost} tokens lost, {of.tokens:.1f} tokens/s.",
            f"{self.equal} of {self.checked} looked at have the text of a solo run; "
            f"left in the server: {self._left()}.",
        ]
        return "\n".join(lines)

    def _left(self) -> str:
        if self.left is None:
            return "it does not say"
        return ", ".join(f"{name} {value:g}" for name, value in self.left.items() if value) or "nothing"


@dataclass
class LoadReport(Report):
    """All that was measured: `rows` by rising rate, and in `others` the same of the other server.

    The client's ITL is the gap from one piece of text to the next: `latency.itl_per_step`.
    """

    http: HttpCost | None
    streams: ManyStreams | None
    unloaded: Summary
    closed: Summary
    clients: int
    capacity: float  # requests per second, in the closed loop
    slo: Slo
    slo_from: str
    rows: list[RateRow]
    knee: int  # the place of the knee in `rows`
    half: RateRow  # at half the rate of the knee
    other: str = ""
    others: list[RateRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def itl_ratio(self) -> float | None:
        """p99 of the inter-token latencies at half the knee, over their median."""
        itl = self.half.summary.itl
        return itl.p99 / itl.median if itl and itl.median else None

    def to_json(self) -> dict[str, Any]:
        more = {"itl_ratio_at_half_the_knee": self.itl_ratio, "knee_rate": self.rows[self.knee].rate}
        return super().to_json() | more

    def __str__(self) -> str:
        parts = [self.settings_line, *(str(part) for part in (self.http, self.streams) if part), ""]
        closed, unloaded = self.closed, self.unloaded
        parts.append(
            f"Unloaded, one request at a time: TTFT {_three(unloaded.ttft, 1, 3)[0]} s, "
            f"ITL {_three(unloaded.itl, 1e3, 1)[0]} ms (medians)."
        )
        parts.append(
            f"Closed loop of {self.clients} clients: {closed.tokens:.1f} tokens/s, and so "
            f"{self.capacity:.2f} requests/s; E2E {_three(closed.e2e, 1, 1)[0]} s (median)."
        )
        parts.append(
            f"Objectives: TTFT {self.slo.ttft:.2f} s and on average {self.slo.itl * 1e3:.0f} ms a token "
            f"({self.slo_from})."
        )
        parts += ["", *table(self.rows, self.knee), "", *self._knee()]
        if self.others:
            parts += ["", f"The same arrivals at {self.other}:", *table(self.others)]
        return "\n".join([*parts, *self.notes])

    def _knee(self) -> list[str]:
        rate = self.rows[self.knee].rate
        share = f", {rate / self.capacity:.0%} of the closed loop's" if self.capacity else ""
        lines = [
            f"Knee (*): {rate:.2f} requests/s{share}; there power, which is throughput over response time, "
            "is greatest."
        ]
        if self.knee in (0, len(self.rows) - 1):
            lines.append("It is at an end of the sweep: the true one may lie beyond.")
        if self.itl_ratio is not None:
            met = "under" if self.itl_ratio < ITL_TARGET else "NOT UNDER"
            lines.append(
                f"At half of it ({self.half.rate:.2f}/s) the p99 of ITL is {self.itl_ratio:.1f} times its "
                f"median ({met} {ITL_TARGET:g})."
            )
        return lines


def table(rows: Sequence[RateRow], knee: int | None = None) -> list[str]:
    """Lines of text, one for each rate. The knee has an asterisk."""
    widths = [width for *_, width in _COLUMNS]
    lines = [table_line([heading[i] for heading in _COLUMNS], widths, left=0) for i in (0, 1)]
    return lines + [
        table_line(row.cells(), widths, left=0) + " *" * (i == knee) for i, row in enumerate(rows)
    ]


# -- the picture ----------------------------------------------------------------------------------

_LATENCIES = (  # of a summary, which of its spread, colour, dash
    ("ttft", "median", style.PALETTE[0], "solid"),
    ("ttft", "p99", style.PALETTE[0], "dot"),
    ("itl", "median", style.PALETTE[1], "solid"),
    ("itl", "p99", style.PALETTE[1], "dot"),
    ("e2e", "median", style.PALETTE[2], "solid"),
    ("e2e", "p99", style.PALETTE[2], "dot"),
)
_NAMES = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}


def figure(report: LoadReport) -> go.Figure:
    """Latency against rate above, throughput and goodput below. Its text twin is `str(report)`."""
    rates = [row.rate for row in report.rows]
    drawn = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[3, 2])
    for name, which, color, dash in _LATENCIES:
        spreads = [getattr(row.summary, name) for row in report.rows]
        values = [getattr(spread, which) if spread else None for spread in spreads]
        line = {"color": color, "dash": dash}
        drawn.add_trace(_curve(rates, values, f"{_NAMES[name]} {which}", line), row=1, col=1)
    done = [row.summary.done for row in report.rows]
    good = [row.summary.good for row in report.rows]
    drawn.add_trace(_curve(rates, rates, "asked", {"color": style.WAITING, "dash": "dash"}), row=2, col=1)
    drawn.add_trace(_curve(rates, done, "done", {"color": style.PALETTE[0]}), row=2, col=1)
    drawn.add_trace(_curve(rates, good, "good", {"color": style.PALETTE[5], "dash": "dot"}), row=2, col=1)
    if report.others:
        rates = [row.rate for row in report.others]
        done = [row.summary.done for row in report.others]
        line = {"color": style.PALETTE[3], "dash": "dashdot"}
        drawn.add_trace(_curve(rates, done, f"done by {report.other}", line), row=2, col=1)
    at = report.rows[report.knee].rate
    drawn.add_vline(x=at, line={"color": style.INK, "width": 1, "dash": "dash"})
    drawn.add_annotation(
        x=at, y=1, yref="paper", yanchor="bottom", text="knee", showarrow=False, font={"color": style.INK}
    )
    settings = report.settings
    title = f"Under load: {settings['model']}, {settings['dtype']}, {settings['device']}"
    drawn.layout.template = style.TEMPLATE
    drawn.update_layout(title_text=style.escape(title), height=620, margin={"t": 70, "b": 110})
    drawn.update_xaxes(rangemode="tozero", showgrid=True, gridcolor=style.FREE)
    drawn.update_xaxes(title={"text": "requests per second asked for", "standoff": 4}, row=2, col=1)
    seconds = {"text": "seconds (logarithmic)", "standoff": 4}
    drawn.update_yaxes(type="log", dtick=1, title=seconds, showgrid=True, gridcolor=style.FREE, row=1, col=1)
    drawn.update_yaxes(
        rangemode="tozero",
        title={"text": "requests per second", "standoff": 4},
        showgrid=True,
        gridcolor=style.FREE,
        row=2,
        col=1,
    )
    return drawn


def _curve(x: list[float], y: list[Any], name: str, line: dict[str, Any]) -> go.Scatter:
    return go.Scatter(x=x, y=y, name=style.escape(name), mode="lines+markers", line=line)
