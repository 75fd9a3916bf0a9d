"""Throughput as a plotly figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.throughput import Rates, rates_of
from labkit.views.figures.parts import PREEMPTED, lay_out, no_steps

_MAX_POINTS = 1000  # of a curve


def throughput(trace: Trace, *, window: float | None = None) -> go.Figure:
    """Draw tokens per second, KV usage and counts of requests; see `labkit.views.throughput`."""
    rates = rates_of(trace, window)
    if rates is None:
        return no_steps()
    heights = [3, 2, 2, 2] if rates.sent else [3, 2, 2]
    figure = make_subplots(
        rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=0.05, row_heights=heights
    )
    lines: list[tuple[int, str, Sequence[float | None], dict[str, Any]]] = [
        (1, "computed", rates.computed, {"color": style.PALETTE[1], "dash": "dot", "width": 2}),
        (1, "generated", rates.generated, {"color": style.PALETTE[0], "width": 2.5}),
        (2, "KV usage", rates.kv_usage, {"color": style.PALETTE[2], "shape": "hv"}),
        (3, "running", rates.running, {"color": style.PALETTE[7], "shape": "hv"}),
        (3, "waiting", rates.waiting, {"color": style.FAINT_INK, "shape": "hv", "dash": "dot"}),
    ]
    if rates.sent:
        lines.append((4, "communication", rates.sending, {"color": style.PALETTE[5], "shape": "hv"}))
    for row, name, values, line in lines:
        figure.add_trace(_line(rates, name, values, line), row=row, col=1)
    places = [i for i, count in enumerate(rates.preempted) if count]
    if places:
        figure.add_trace(_preemptions(rates, places), row=2, col=1)
    lay_out(figure, rates.headline, 480 if rates.sent else 400, entry_width=112)
    unit = "s" if rates.per == "second" else "step"
    figure.update_yaxes(
        showgrid=True, gridcolor=style.FREE, rangemode="tozero", zeroline=True, zerolinecolor=style.CACHED
    )
    figure.update_yaxes(title={"text": f"tokens / {unit}"}, row=1)
    figure.update_yaxes(title={"text": "KV usage"}, tickformat=".0%", range=[0, 1.05], row=2)
    figure.update_yaxes(title={"text": "requests"}, tickformat="d", row=3)
    if rates.sent:
        figure.update_yaxes(title={"text": "sending"}, tickformat=".0%", range=[0, 1.05], row=4)
    figure.update_xaxes(title={"text": "seconds" if unit == "s" else "step", "standoff": 4}, row=len(heights))
    return figure


def _line(rates: Rates, name: str, values: Sequence[float | None], line: dict[str, Any]) -> go.Scatter:
    """Draw one curve. It breaks where the engine had nothing to do, and a long one is thinned out."""
    points: list[tuple[float | None, float | None, int | None]] = []
    every = -(-len(values) // _MAX_POINTS)
    for i in range(0, len(values), every):
        if any(rates.idle_before[i - every + 1 : i + 1] if i else ()):
            points.append((None, None, None))
        points.append((rates.x[i], values[i], rates.steps[i]))
    value = "%{y:.1%}" if name in ("KV usage", "communication") else "%{y:,.4~g}"
    return go.Scatter(
        mode="lines",
        x=[x for x, _, _ in points],
        y=[y for _, y, _ in points],
        customdata=[step for _, _, step in points],
        line=line,
        fill="tozeroy" if name == "KV usage" else None,
        fillcolor=style.tint(style.PALETTE[2], 0.25) if name == "KV usage" else None,
        hovertemplate=f"step %{{customdata}}: {name} {value}<extra></extra>",
        name=name,
    )


def _preemptions(rates: Rates, places: list[int]) -> go.Scatter:
    return go.Scatter(
        mode="markers",
        x=[rates.x[i] for i in places],
        y=[rates.kv_usage[i] for i in places],
        customdata=[[rates.steps[i], rates.preempted[i]] for i in places],
        hovertemplate="step %{customdata[0]}: %{customdata[1]} preempted<extra></extra>",
        marker=PREEMPTED,
        name="preempted",
    )
