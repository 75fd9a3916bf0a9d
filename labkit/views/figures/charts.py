"""Two plain charts, of bars and of lines, for numbers that come from no trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from labkit.views import style

_DASHES = ("solid", "dash", "dot", "dashdot")  # so that more than colour tells lines apart
_TICKS = 10  # up to so many values, a log scale marks each of them


def bars(values: Mapping[str, float], title: str, unit: str, digits: int) -> go.Figure:
    """Draw one bar for each named value."""
    names = [style.escape(style.label(name, 60)) for name in values]
    numbers = [_plain(value) for value in values.values()]
    figure = go.Figure(
        go.Bar(
            x=numbers,
            y=names,
            orientation="h",
            marker={"color": style.PALETTE[0]},
            text=[f"{value:,.{digits}f} {unit}".strip() for value in values.values()],
            # By default plotly writes nothing beside a bar that has no length.
            textposition="auto" if all(numbers) else ["auto" if value else "outside" for value in numbers],
            hoverinfo="skip",
        )
    )
    _lay_out(figure, title, 90 + 34 * len(names))
    figure.update_xaxes(title={"text": unit, "standoff": 4}, showgrid=True, gridcolor=style.FREE)
    figure.update_yaxes(autorange="reversed", type="category")  # else a name like "1e5" is a number
    return figure


def lines(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float | None]],
    title: str,
    x_name: str,
    y_name: str,
    log: str,
) -> go.Figure:
    """Draw one line for each named series over the same x; `log` holds "x", "y" or both for log scales."""
    figure = go.Figure()
    for i, (name, series) in enumerate(ys.items()):
        line = {"color": style.PALETTE[i % len(style.PALETTE)], "dash": _DASHES[i % len(_DASHES)]}
        numbers = {"x": [_plain(value) for value in x], "y": [_plain(value) for value in series]}
        label = style.escape(style.label(name, 60))
        figure.add_trace(go.Scatter(**numbers, name=label, mode="lines+markers", line=line))
    _lay_out(figure, title, 380)
    figure.update_layout(showlegend=len(ys) > 1)
    for update, axis, name in ((figure.update_xaxes, "x", x_name), (figure.update_yaxes, "y", y_name)):
        kind = "log" if axis in log else "linear"
        update(title={"text": name, "standoff": 4}, type=kind, showgrid=True, gridcolor=style.FREE)
    if "x" in log:
        figure.update_xaxes(**_marks(x, most=_TICKS))
    if "y" in log:
        figure.update_yaxes(**_marks([value for series in ys.values() for value in series], most=0))
    return figure


def _marks(values: Sequence[float | None], most: int) -> dict[str, Any]:
    """Mark a log scale at its values, if there are at most `most` of them, or else at 1, 2, 5, 10 and so on.

    The marks are written in full, because plotly's own mark for 20 is a lone 2.
    """
    plain = {_plain(value) for value in values}
    places = sorted(value for value in plain if value is not None and value > 0)
    if len(places) > most:
        first, last = math.floor(math.log10(places[0])), math.ceil(math.log10(places[-1]))
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        places = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    names = [f"{place:,.0f}" if float(place).is_integer() else f"{place:g}" for place in places]
    return {"tickmode": "array", "tickvals": places, "ticktext": names}


def _plain(value: float | None) -> float | None:
    """Return a number as Python's own, whether numpy or torch made it, or None if JSON has no such number."""
    if value is None or isinstance(value, int):
        return value
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _lay_out(figure: go.Figure, title: str, height: int) -> None:
    figure.layout.template = style.TEMPLATE
    figure.update_layout(title_text=style.escape(title), height=height, margin={"t": 50, "b": 60})
