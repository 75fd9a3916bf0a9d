"""When each token came out, on a clock of one's choice, which a timeline of equally wide steps cannot show.

A step that computes 300 tokens is one column of a timeline, like a step that computes 3. Here it is as long
as what it cost, and every running answer shows it as a gap between two of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from labkit.trace import latency
from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace
from labkit.views import style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Clock = Literal["tokens", "steps", "seconds"]

_COLUMNS = 60  # of the text twin
_NO_STEPS = "No steps yet: nothing has run."
_CLOCKS = {
    "tokens": "tokens computed so far: a step takes as long as it computes tokens",
    "steps": "steps",
    "seconds": "seconds of work",
}


@dataclass
class Rail:
    """One request: when it arrived, and when each of its tokens came out."""

    request_id: str
    arrived: float = 0
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float | None:
        """Time to first token; None if there is none yet."""
        return latency.ttft(self.arrived, self.tokens)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies, token by token (`latency.itl`)."""
        return latency.itl(self.tokens)

    @property
    def worst_gap(self) -> float:
        """The longest of the gaps; 0 if there is none."""
        return max(self.gaps, default=0)


def rails_of(trace: Trace, clock: Clock = "tokens", *, fixed: float = 0) -> dict[str, Rail]:
    """A rail for each request, in order of arrival.

    Args:
        trace: of a run.
        clock: what a step costs: the "tokens" that it computes, padding included, one of the "steps", or the
            "seconds" that it took.
        fixed: what each step costs on top of that, however little it computes.

    Raises:
        ValueError: for any other clock.
    """
    now: float = 0
    rails: dict[str, Rail] = {}
    for record in trace:
        for arrival in record.arrived:
            rails[arrival.request_id] = Rail(arrival.request_id, now)
        now += fixed + _cost(record, clock)
        for request_id, sampled in zip(record.requests, record.sampled, strict=True):
            rails.setdefault(request_id, Rail(request_id)).tokens += [now] * len(sampled)
    return rails


def _cost(record: StepRecord, clock: Clock) -> float:
    if clock == "tokens":
        return sum(record.num_tokens) + sum(record.padding)
    if clock not in _CLOCKS:
        raise ValueError(f"clock must be one of {', '.join(_CLOCKS)}, not {clock!r}")
    return 1 if clock == "steps" else record.seconds


def worst_gap(rails: Iterable[Rail]) -> float:
    """The longest that anybody waited between two tokens; 0 if nobody has two."""
    return max((rail.worst_gap for rail in rails), default=0)


def token_rails(trace: Trace, clock: Clock = "tokens") -> Figure:
    """A rail for each request with a mark for each token; the longest gap is shaded.

    Raises:
        ValueError: as `rails_of` does.
    """
    import plotly.graph_objects as go

    rails = rails_of(trace, clock)
    worst = worst_gap(rails.values())
    figure = go.Figure()
    shown: set[str] = set()

    def draw(name: str, rail: Rail, x: list[float], **how: object) -> None:
        label = style.escape(style.label(rail.request_id))
        first = name not in shown
        shown.add(name)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[label] * len(x),
                name=name,
                legendgroup=name,
                showlegend=first,
                hoverinfo="skip",
                **how,
            )
        )

    for rail in rails.values():
        color = style.color_of(rail.request_id)
        if not rail.tokens:
            continue
        draw(
            "from arrival to the first token",
            rail,
            [rail.arrived, rail.tokens[0]],
            mode="lines",
            line={"color": style.WAITING, "dash": "dot", "width": 2},
        )
        for before, after in pairwise(rail.tokens):
            if after - before == worst:
                wide = {"color": style.tint(style.PALETTE[5], 0.35), "width": 14}
                draw("the longest gap", rail, [before, after], mode="lines", line=wide)
                break
        draw(
            "a token",
            rail,
            rail.tokens,
            mode="lines+markers",
            line={"color": color, "width": 1},
            marker={"symbol": "line-ns", "size": 11, "line": {"color": color, "width": 2}},
        )
    figure.layout.template = style.TEMPLATE
    figure.update_layout(
        title_text=style.escape(_headline(rails, worst, clock)),
        height=150 + 30 * max(1, len(rails)),
        margin={"t": 50, "b": 80},
    )
    figure.update_xaxes(title={"text": _CLOCKS[clock], "standoff": 4}, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def text_twin(trace: Trace, clock: Clock = "tokens") -> str:
    """The same as text, at most 100 columns wide.

    Raises:
        ValueError: as `rails_of` does.
    """
    rails = rails_of(trace, clock)
    end = max((rail.tokens[-1] for rail in rails.values() if rail.tokens), default=0)
    if not end:
        return _NO_STEPS
    names = {name: style.label(name) for name in rails}
    width = max(map(style.width_of, [*names.values(), "request"]))
    lines = [_headline(rails, worst_gap(rails.values()), clock), ""]
    lines.append(f"{'request':<{width}}  {'0':<{_COLUMNS}} {'TTFT':>8} {'worst gap':>10}")
    for name, rail in rails.items():
        marks = [" "] * _COLUMNS
        column = [min(_COLUMNS - 1, int(_COLUMNS * moment / end)) for moment in rail.tokens]
        if column:
            begin = min(_COLUMNS - 1, int(_COLUMNS * rail.arrived / end))
            marks[begin : column[0]] = style.MARKS["waiting"] * (column[0] - begin)
            marks[column[0] : column[-1]] = style.MARKS["idle"] * (column[-1] - column[0])
        for place in column:
            marks[place] = style.MARKS["decode"]
        tail = f"{_number(rail.ttft, clock):>8} {_number(rail.worst_gap, clock):>10}"
        pad = " " * (width - style.width_of(names[name]))
        lines.append(f"{names[name]}{pad}  {''.join(marks)} {tail}")
    scale = f"0 to {_number(end, clock)} {_CLOCKS[clock]}"
    legend = (
        f"{style.MARKS['waiting']} waits for its first token; {style.MARKS['decode']} a token (or several)"
    )
    return "\n".join([*lines, "", scale, f"{legend}; {style.MARKS['idle']} none"])


def _headline(rails: dict[str, Rail], worst: float, clock: Clock) -> str:
    tokens = sum(len(rail.tokens) for rail in rails.values())
    unit = "tokens computed" if clock == "tokens" else clock
    longest = f"the longest gap between two: {_number(worst, clock)} {unit}"
    return f"{style.plural(tokens, 'token')} came out; {longest}"


def _number(value: float | None, clock: Clock) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if clock == "seconds" else f"{value:,}"
