"""The token timeline as a plotly figure: a rail per request, and a mark per token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.token_timeline import CLOCKS, Clock, TokenLane, token_timeline_of


def token_timeline(trace: Trace, clock: Clock = "tokens") -> go.Figure:
    """Draw when each token came out, and shade the longest gap.

    Raises:
        ValueError: if there is no such clock.
    """
    timeline = token_timeline_of(trace, clock)
    figure = go.Figure()
    in_legend: set[str] = set()
    for lane in timeline.lanes.values():
        if not lane.tokens:
            continue
        label = style.escape(style.label(lane.request_id))
        for part in _parts(lane, timeline.worst_gap):
            name = part["name"]
            common = {"y": [label] * len(part["x"]), "legendgroup": name, "showlegend": name not in in_legend}
            figure.add_trace(go.Scatter(**part, **common, hoverinfo="skip"))
            in_legend.add(name)
    figure.layout.template = style.TEMPLATE
    figure.update_layout(
        title_text=style.escape(timeline.headline),
        height=150 + 30 * max(1, len(timeline.lanes)),
        margin={"t": 50, "b": 80},
    )
    figure.update_xaxes(title={"text": CLOCKS[clock], "standoff": 4}, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _parts(lane: TokenLane, worst: float) -> Iterator[dict[str, Any]]:
    """Yield what is drawn for a request with tokens; what comes later lies on top."""
    color = style.color_of(lane.request_id)
    yield {
        "name": "from arrival to the first token",
        "x": [lane.arrived, lane.tokens[0]],
        "mode": "lines",
        "line": {"color": style.WAITING, "dash": "dot", "width": 2},
    }
    for before, after in pairwise(lane.tokens):
        if after - before == worst:
            wide = {"color": style.tint(style.PALETTE[5], 0.35), "width": 14}
            yield {"name": "the longest gap", "x": [before, after], "mode": "lines", "line": wide}
            break
    yield {
        "name": "a token",
        "x": lane.tokens,
        "mode": "lines+markers",
        "line": {"color": color, "width": 1},
        "marker": {"symbol": "line-ns", "size": 11, "line": {"color": color, "width": 2}},
    }
