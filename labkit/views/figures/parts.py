"""What all figures have in common: names, legend entries, and the room around a plot."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from labkit.views import style

PLOT_WIDTH = 930  # pixels that a notebook gives
PREEMPTED = {"symbol": "x", "size": 9, "color": style.INK, "line": {"color": style.PAPER, "width": 1}}
_TOP, _AXIS, _LEGEND_ROW = 60, 50, 20  # pixels


def shown(request_id: str, width: int = 40) -> str:
    """Return a request's name as plotly text.

    Users type request ids, and plotly renders markup in labels and hovers, so ids are always escaped.
    """
    return style.escape(style.label(request_id, width))


def swatch(name: str, marker: dict[str, Any]) -> go.Bar:
    """Make a legend entry that belongs to no drawn bar."""
    return go.Bar(orientation="h", x=[None], y=[None], marker=marker, name=name, showlegend=True)


def lay_out(figure: go.Figure, headline: tuple[str, str], plot: int, entry_width: int) -> None:
    """Put the title above and the legend below, at a height that leaves `plot` pixels for the plot."""
    title, subtitle = headline
    small = f'<br><span style="font-size:12px;color:{style.FAINT_INK}">{subtitle}</span>'
    entries = sum(trace.showlegend is not False for trace in figure.data)
    bottom = _AXIS + _LEGEND_ROW * -(-entries // (PLOT_WIDTH // (entry_width + 50)))  # 50: the entry's mark
    figure.layout.template = style.TEMPLATE
    figure.update_layout(
        title_text=title + small,
        height=_TOP + plot + bottom,
        margin={"t": _TOP, "b": bottom},
        legend_entrywidth=entry_width,
    )


def no_steps() -> go.Figure:
    """Make a small figure that says that nothing has run."""
    note = {"text": style.NO_STEPS, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    figure = go.Figure()
    figure.layout.template = style.TEMPLATE
    figure.update_layout(height=100, margin={"t": 20, "b": 20}, annotations=[note])
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
