"""Two plain charts for numbers that come from no trace. Their text twins are in `labkit.views.text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from labkit.views import style

_DASHES = ("solid", "dash", "dot", "dashdot")  # so that colour is not all that tells lines apart


def bars(values: Mapping[str, float], title: str, unit: str, digits: int) -> go.Figure:
    """One bar for each named value."""
    names = [style.escape(name) for name in values]
    figure = go.Figure(
        go.Bar(
            x=list(values.values()),
            y=names,
            orientation="h",
            marker={"color": style.PALETTE[0]},
            text=[f"{value:,.{digits}f} {unit}".strip() for value in values.values()],
            textposition="auto",
            hoverinfo="skip",
        )
    )
    _lay_out(figure, title, 90 + 34 * len(names))
    figure.update_xaxes(title={"text": unit, "standoff": 4}, showgrid=True, gridcolor=style.FREE)
    figure.update_yaxes(autorange="reversed")
    return figure


def lines(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float | None]],
    title: str,
    x_name: str,
    y_name: str,
    log: str,
) -> go.Figure:
    """One line for each named series over the same x."""
    figure = go.Figure()
    for i, (name, series) in enumerate(ys.items()):
        line = {"color": style.PALETTE[i % len(style.PALETTE)], "dash": _DASHES[i % len(_DASHES)]}
        figure.add_trace(
            go.Scatter(x=list(x), y=list(series), name=style.escape(name), mode="lines+markers", line=line)
        )
    _lay_out(figure, title, 380)
    figure.update_layout(showlegend=len(ys) > 1)
    for update, axis, name in ((figure.update_xaxes, "x", x_name), (figure.update_yaxes, "y", y_name)):
        kind = "log" if axis in log else "linear"
        update(title={"text": name, "standoff": 4}, type=kind, showgrid=True, gridcolor=style.FREE)
    return figure


def _lay_out(figure: go.Figure, title: str, height: int) -> None:
    figure.layout.template = style.TEMPLATE
    figure.update_layout(title_text=style.escape(title), height=height, margin={"t": 50, "b": 60})
