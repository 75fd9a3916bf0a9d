"""Runs on one clock of steps, as an SVG that moves by itself: for a page that runs no script.

Where nothing moves (in print, or for readers who want no motion) it is a picture of the whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from labkit.views import style
from labkit.views.wire import ReplayData, ReplayLane, Span

WIDTH, LEFT, RIGHT, TOP = 860, 34, 16, 46
LANE, TITLE, GAP, AXIS = 11, 24, 14, 26
SECONDS, REST = 9, 3  # how long the runs take, and how long their end stays on
LEGEND = (("w", "waits"), ("p", "reads its prompt"), ("d", "one token a step"), ("i", "idle seat"))
FAINT = 0.85  # how much of what is still to come is hidden


def race_svg(title: str, runs: Sequence[tuple[str, ReplayData]]) -> str:
    """Return an SVG of runs below each other, whose clock goes from their first step to the last.

    Args:
        title: the heading.
        runs: the name of each run, and the run as `replay_data.pack` has it.
    """
    longest = max(len(data["steps"]["step"]) for _, data in runs)
    pitch = (WIDTH - LEFT - RIGHT) / longest
    parts, y = [_heading(title)], float(TOP)
    for name, data in runs:
        parts.append(_run(name, data, y, pitch))
        y += TITLE + LANE * len(data["lanes"]) + GAP
    parts.append(_axis(longest, y - GAP, pitch))
    height = round(y - GAP + AXIS)
    parts.append(f'<g class="future"><rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{y - GAP - TOP:g}"/>')
    parts.append(f'<path d="M{LEFT} {TOP}V{y - GAP:g}"/></g>')
    body = "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">
<title>{escape(title)}</title>
<style>
text {{ font: 12px system-ui, sans-serif; fill: {style.FAINT_INK}; }}
.title {{ font-size: 15px; font-weight: 600; fill: {style.INK}; }}
.name {{ font-weight: 600; fill: {style.INK}; }}
.end {{ fill: {style.PAPER}; stroke: {style.INK}; stroke-width: 1.2; }}
.future {{ display: none; transform: translateX({longest * pitch:g}px); }}
.future rect {{ fill: {style.PAPER}; opacity: {FAINT}; }}
.future path {{ stroke: {style.INK}; stroke-width: 1.5; }}
@media (prefers-reduced-motion: no-preference) {{
  .future {{ display: inline; animation: clock {SECONDS + REST}s linear infinite; }}
}}
@keyframes clock {{
  from {{ transform: translateX(0); }}
  {100 * SECONDS / (SECONDS + REST):g}%, to {{ transform: translateX({longest * pitch:g}px); }}
}}
</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="{style.PAPER}"/>
{body}
</svg>
"""


def _heading(title: str) -> str:
    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>']
    x = float(LEFT)
    for kind, words in LEGEND:
        parts.append(_span(Span(kind, 0, 0, 1), style.FAINT_INK, x, 30, 18))
        parts.append(f'<text x="{x + 23:g}" y="39">{words}</text>')
        x += 42 + 6.2 * len(words)
    return "\n".join(parts)


def _run(name: str, data: ReplayData, top: float, pitch: float) -> str:
    steps = len(data["steps"]["step"])
    parts = [f'<text class="name" x="{LEFT}" y="{top + 16:g}">{escape(name)}</text>']
    for row, lane in enumerate(data["lanes"]):
        parts.append(_lane(lane, top + TITLE + LANE * row, pitch))
    tokens = sum(data["steps"]["sampled"])
    x, y = LEFT + steps * pitch, top + 16
    parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="end">done: {steps} steps, {tokens} tokens</text>')
    return "\n".join(parts)


def _lane(lane: ReplayLane, y: float, pitch: float) -> str:
    color = style.PALETTE[lane["color"]]
    parts = [f'<text x="{LEFT - 7}" y="{y + 9:g}" text-anchor="end">{escape(lane["label"])}</text>']
    for span in lane["spans"]:
        width = (span.last - span.first + 1) * pitch
        parts.append(_span(span, color, LEFT + span.first * pitch, y, width))
    for step, _ in lane["ends"]:
        x = LEFT + (step + 1) * pitch - 3
        parts.append(f'<rect class="end" x="{x:.1f}" y="{y + 1.5:g}" width="6" height="6"/>')
    return "".join(parts)


def _span(span: Span, color: str, x: float, y: float, width: float) -> str:
    """Draw a span in the shapes of the live pictures."""
    middle = y + (LANE - 2) / 2
    if span.kind == "w":
        return (
            f'<path d="M{x + 1:.1f} {middle:g}h{width - 2:.1f}" stroke="{style.WAITING}" '
            'stroke-width="1.5" stroke-dasharray="1.5 3"/>'
        )
    if span.kind == "i":
        return "".join(_box(color, x, middle + offset, width, 1) for offset in (-2, 1))
    if span.kind == "d":
        return _box(color, x, middle - 2, width, 4)
    if span.kind == "x":
        return _box(style.INK, x, y, 2, LANE - 2)
    return _box(color, x, y, width - 0.5, LANE - 2)


def _box(color: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect fill="{color}" x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}"/>'


def _axis(longest: int, y: float, pitch: float) -> str:
    parts = []
    for step in range(0, longest, 10):
        words = "step 0" if step == 0 else str(step)
        parts.append(f'<text x="{LEFT + step * pitch:.1f}" y="{y + 18:g}">{words}</text>')
    return "\n".join(parts)
