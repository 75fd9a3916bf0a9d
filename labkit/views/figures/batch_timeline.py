"""The batch timeline as a plotly figure."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.batch_timeline import Lane, Span, Timeline, step_range, timeline_of
from labkit.views.figures.parts import PREEMPTED, lay_out, no_steps, shown, swatch
from labkit.views.style import drafts, plural

_MAX_NUMBERED = 40  # steps; with more, a column is too narrow for a number of tokens
_HEIGHTS = {"prefill": 0.84, "chunk": 0.84, "decode": 0.44, "idle": 0.44, "waiting": 0.16}
_NAMES = {"prefill": "prefill", "chunk": "prefill, a chunk", "decode": "decode", "idle": "idle seat, padding"}
_DRAFTS = (0.52, 0.8)  # inner and outer height of the stripes that drafts make along a decode bar
_ENDS = {"stop": "circle", "length": "square", "abort": "diamond", "error": "triangle-up"}


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> go.Figure:
    """Draw what each request did in each step; see `labkit.views.batch_timeline`."""
    timeline = timeline_of(trace, first, last)
    if timeline is None:
        return no_steps()
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
    """Draw stripes along the decode bars: pale, and solid as far outwards as drafts were accepted."""
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
    """Show whose a bar is by its colour, and what it is by its pattern or height (see `_HEIGHTS`)."""
    if kind == "chunk":
        # Plotly needs one colour to contrast with; the bars' own colours take its place when they are drawn.
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
    color, width = (style.FAINT_INK, 8) if kind == "decode" else (style.WAITING, 3)
    line = {"color": color, "width": width}
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
    """Mark where a request was preempted, and where it ended."""
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
            marker=PREEMPTED if what == "preempted" else _end_look(what),
            name=what if what == "preempted" else f"ends: {shown(what)}",
            cliponaxis=False,
        )
        for what, found in points.items()
        if found
    ]


def _end_look(reason: str) -> dict[str, Any]:
    line = {"color": style.INK, "width": 1.5}
    return {"symbol": _ENDS.get(reason, "star"), "size": 8, "color": style.PAPER, "line": line}
