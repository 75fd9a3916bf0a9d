"""Batch timeline and throughput as plotly figures, and what all figures have in common.

Equal traces give equal JSON, in plotly 5.24 and later. Heatmap and timeline are made of steps and tokens
only, never of seconds, so a notebook can compare them exactly. What a user typed (request ids) is escaped:
plotly renders markup in labels and hovers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.style import drafts, plural
from labkit.views.timeline import Lane, Rates, Span, Timeline, rates_of, step_range, timeline_of

_TOP, _AXIS, _LEGEND_ROW = 60, 50, 20  # pixels
_MAX_POINTS = 1000  # of a curve
_MAX_NUMBERED = 40  # steps, for their columns to be wide enough for a number of tokens

# -- common parts ---------------------------------------------------------------------------------


def shown(request_id: str, width: int = 40) -> str:
    """A request's name as plotly text."""
    return style.escape(style.label(request_id, width))


def swatch(name: str, marker: dict[str, Any]) -> go.Bar:
    """A legend entry that belongs to no drawn bar."""
    return go.Bar(orientation="h", x=[None], y=[None], marker=marker, name=name, showlegend=True)


def lay_out(figure: go.Figure, headline: tuple[str, str], plot: int, entry_width: int) -> None:
    """Title above, legend below, and a height that leaves the plot `plot` pixels."""
    title, subtitle = headline
    small = f'<br><span style="font-size:12px;color:{style.FAINT_INK}">{subtitle}</span>'
    entries = sum(trace.showlegend is not False for trace in figure.data)
    bottom = _AXIS + _LEGEND_ROW * -(-entries // (930 // (entry_width + 50)))  # 50: the mark
    figure.layout.template = style.TEMPLATE
    figure.update_layout(
        title_text=title + small,
        height=_TOP + plot + bottom,
        margin={"t": _TOP, "b": bottom},
        legend_entrywidth=entry_width,
    )


def nothing(sentence: str) -> go.Figure:
    """A small figure that says why there is nothing to see."""
    note = {"text": sentence, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    figure = go.Figure()
    figure.layout.template = style.TEMPLATE
    figure.update_layout(height=100, margin={"t": 20, "b": 20}, annotations=[note])
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


# -- batch timeline -------------------------------------------------------------------------------

_HEIGHTS = {"prefill": 0.84, "chunk": 0.84, "decode": 0.44, "idle": 0.44, "waiting": 0.16}
_NAMES = {"prefill": "prefill", "chunk": "prefill, a chunk", "decode": "decode", "idle": "idle seat, padding"}
_DRAFTS = (0.52, 0.8)  # drafts: stripes along a decode bar, from so high to so high
_ENDS = {"stop": "circle", "length": "square", "abort": "diamond", "error": "triangle-up"}
_PREEMPTED = {"symbol": "x", "size": 9, "color": style.INK, "line": {"color": style.PAPER, "width": 1}}


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> go.Figure:
    """See `labkit.views.batch_timeline`."""
    timeline = timeline_of(trace, first, last)
    if timeline is None:
        return nothing("No steps yet: nothing has run.")
    rows = len(timeline.lanes)
    row_height = 24 if rows <= 24 else 18 if rows <= 64 else 12 if rows <= 96 else 9
    numbered = timeline.last - timeline.first < _MAX_NUMBERED
    figure = go.Figure()
    for kind in _HEIGHTS:
        lanes = enumerate(timeline.lanes)
        spans = [(row, lane, span) for row, lane in lanes for span in lane.spans if span.kind == kind]
        if drafted := [entry for entry in spans if entry[2].drafted]:
            figure.add_traces(_draft_bars(drafted))
        if spans:
            figure.add_traces([_span_bars(kind, spans, numbered), _kind_swatch(kind)])
    figure.add_traces(_event_marks(timeline))
    lay_out(figure, timeline.headline, rows * row_height + 10, entry_width=150)
    figure.update_layout(barmode="overlay", uniformtext={"minsize": 8, "mode": "hide"})
    figure.update_xaxes(
        range=[timeline.first - 0.75, timeline.last + 0.75],
        title={"text": "step", "standoff": 4},
        tickformat="d",
        showgrid=True,
        gridcolor=style.FREE,
        dtick=1 if timeline.last - timeline.first <= 24 else None,
    )
    every = -(-14 // row_height)
    figure.update_yaxes(
        range=[rows - 0.5, -0.5],
        tickvals=list(range(0, rows, every)),
        ticktext=[shown(lane.request_id, 16) for lane in timeline.lanes[::every]],
        title={"text": "request", "standoff": 6},
    )
    return figure


def _span_bars(kind: str, spans: list[tuple[int, Lane, Span]], numbered: bool) -> go.Bar:
    numbered = numbered and kind in ("prefill", "chunk")
    return go.Bar(
        orientation="h",
        base=[span.first - 0.5 for _, _, span in spans],
        x=[span.steps for _, _, span in spans],
        y=[row for row, _, _ in spans],
        width=_HEIGHTS[kind],
        marker=_look(kind, [style.color_of(lane.request_id) for _, lane, _ in spans]),
        text=[str(span.num_tokens) for _, _, span in spans] if numbered else None,
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        customdata=[_span_facts(lane, span) for _, lane, span in spans],
        hovertemplate="%{customdata}<extra></extra>",
        name=kind,
        showlegend=False,
    )


def _draft_bars(spans: list[tuple[int, Lane, Span]]) -> list[go.Bar]:
    """Stripes along the decode bars: pale, and solid as far outwards as drafts were right."""
    colors = [style.color_of(lane.request_id) for _, lane, _ in spans]
    inner, outer = _DRAFTS
    places = {
        "orientation": "h",
        "base": [span.first - 0.5 for _, _, span in spans],
        "x": [span.steps for _, _, span in spans],
        "y": [row for row, _, _ in spans],
        "customdata": [_span_facts(lane, span) for _, lane, span in spans],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
    }
    pale = {"color": [style.tint(color, 0.3) for color in colors], "line": {"width": 0}}
    solid = {"color": colors, "line": {"width": 0}}
    shares = [span.accepted / span.drafted for _, _, span in spans]
    return [
        go.Bar(**places, width=outer, marker=pale, name="drafted"),
        go.Bar(
            **places,
            width=[round(inner + (outer - inner) * share, 3) for share in shares],
            marker=solid,
            name="right",
        ),
        go.Bar(**places, width=inner, marker={"color": style.PAPER, "line": {"width": 0}}, name="between"),
        swatch("drafts, solid if right", {"color": style.tint(style.FAINT_INK, 0.3)}),
    ]


def _look(kind: str, color: Any) -> dict[str, Any]:
    """Who, as a colour; what, as a pattern or (see _HEIGHTS) a height."""
    if kind == "chunk":
        # One colour for plotly to contrast with; the bars' own colours take its place when they are drawn.
        ground = {"bgcolor": style.FAINT_INK, "fillmode": "overlay", "fgopacity": 0.4}
        pattern = {"shape": "/", "size": 6, "solidity": 0.25, "fgcolor": style.PAPER, **ground}
        return {"color": color, "pattern": pattern, "line": {"width": 0}}
    if kind == "idle":
        pattern = {"shape": ".", "size": 5, "solidity": 0.3, "fgcolor": color, "bgcolor": style.PAPER}
        return {"color": style.PAPER, "pattern": pattern, "line": {"width": 1, "color": color}}
    return {"color": style.WAITING if kind == "waiting" else color, "line": {"width": 0}}


def _kind_swatch(kind: str) -> go.Bar | go.Scatter:
    if kind in ("prefill", "chunk", "idle"):
        return swatch(_NAMES[kind], _look(kind, style.FAINT_INK))
    # A line keeps the height that tells decode and waiting from the others.
    line = {"color": style.FAINT_INK if kind == "decode" else style.WAITING}
    line["width"] = 8 if kind == "decode" else 3
    return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=kind, showlegend=True)


def _span_facts(lane: Lane, span: Span) -> str:
    lines = [f"<b>request {shown(lane.request_id)}</b>: {span.kind}, {step_range(span.first, span.last)}"]
    if span.kind == "waiting":
        lines += [f"{shown(why, 80)} ({plural(count, 'step')})" for why, count in span.reasons[:4]]
        if len(span.reasons) > 4:
            lines.append(f"and {plural(len(span.reasons) - 4, 'other reason')}")
    else:
        fact = f"{plural(span.num_tokens, 'token')} computed, from position {span.start} on"
        lines.append(fact + (f": {drafts(span.drafted, span.accepted)}" if span.drafted else ""))
    if span.sampled:
        ids = ", ".join(map(str, span.sampled[:6])) + (", …" if len(span.sampled) > 6 else "")
        lines.append(f"{plural(len(span.sampled), 'token')} sampled: {ids}")
    if span.padding:
        lines.append(f"{plural(span.padding, 'padded slot')} wasted")
    return "<br>".join(lines)


def _event_marks(timeline: Timeline) -> list[go.Scatter]:
    """A mark where a request was preempted, and where it ended."""
    points: dict[str, list[tuple[float, int, str]]] = {"preempted": [], **{reason: [] for reason in _ENDS}}
    for row, lane in enumerate(timeline.lanes):
        who = f"<b>request {shown(lane.request_id)}</b>: "
        points["preempted"] += [
            (step - 0.5, row, f"{who}preempted in step {step}") for step in lane.preempted
        ]
        for end in lane.ends:
            when = f"{'before' if end.early else 'with'} step {end.step}"
            fact = f"{who}ends {when}, {style.escape(end.reason)}"
            points.setdefault(end.reason, []).append((end.step + (-0.5 if end.early else 0.5), row, fact))
    return [
        go.Scatter(
            mode="markers",
            x=[x for x, _, _ in found],
            y=[row for _, row, _ in found],
            customdata=[fact for _, _, fact in found],
            hovertemplate="%{customdata}<extra></extra>",
            marker=_PREEMPTED if what == "preempted" else _end_look(what),
            name=what if what == "preempted" else f"ends: {shown(what)}",
            cliponaxis=False,
        )
        for what, found in points.items()
        if found
    ]


def _end_look(reason: str) -> dict[str, Any]:
    line = {"color": style.INK, "width": 1.5}
    return {"symbol": _ENDS.get(reason, "star"), "size": 8, "color": style.PAPER, "line": line}


# -- throughput -----------------------------------------------------------------------------------


def throughput(trace: Trace, *, window: float | None = None) -> go.Figure:
    """See `labkit.views.throughput`."""
    rates = rates_of(trace, window)
    if rates is None:
        return nothing("No steps yet: nothing has run.")
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.05, row_heights=[3, 2, 2])
    lines = [
        (1, "computed", rates.computed, {"color": style.PALETTE[1], "dash": "dot", "width": 2}),
        (1, "generated", rates.generated, {"color": style.PALETTE[0], "width": 2.5}),
        (2, "KV usage", rates.kv_usage, {"color": style.PALETTE[2], "shape": "hv"}),
        (3, "running", rates.running, {"color": style.PALETTE[7], "shape": "hv"}),
        (3, "waiting", rates.waiting, {"color": style.FAINT_INK, "shape": "hv", "dash": "dot"}),
    ]
    for row, name, values, line in lines:
        figure.add_trace(_line(rates, name, values, line), row=row, col=1)
    places = [i for i, count in enumerate(rates.preempted) if count]
    if places:
        figure.add_trace(_preemptions(rates, places), row=2, col=1)
    lay_out(figure, rates.headline, 400, entry_width=112)
    unit = "s" if rates.per == "second" else "step"
    figure.update_yaxes(
        showgrid=True, gridcolor=style.FREE, rangemode="tozero", zeroline=True, zerolinecolor=style.CACHED
    )
    figure.update_yaxes(title={"text": f"tokens / {unit}"}, row=1)
    figure.update_yaxes(title={"text": "KV usage"}, tickformat=".0%", range=[0, 1.05], row=2)
    figure.update_yaxes(title={"text": "requests"}, tickformat="d", row=3)
    figure.update_xaxes(title={"text": "seconds" if unit == "s" else "step", "standoff": 4}, row=3)
    return figure


def _line(rates: Rates, name: str, values: Sequence[float | None], line: dict[str, Any]) -> go.Scatter:
    """One curve; it breaks where the engine had nothing to do, and long ones are thinned out."""
    points: list[tuple[float | None, float | None, int | None]] = []
    every = -(-len(values) // _MAX_POINTS)
    for i in range(0, len(values), every):
        if any(rates.idle_before[i - every + 1 : i + 1] if i else ()):
            points.append((None, None, None))
        points.append((rates.x[i], values[i], rates.steps[i]))
    value = "%{y:.1%}" if name == "KV usage" else "%{y:,.4~g}"
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
        marker=_PREEMPTED,
        name="preempted",
    )
