"""Notebooks 02 and 04: a padded batch beside a flat one, and who sits on which seat."""

from __future__ import annotations

from labkit.notebook.pictures.runs import Lengths, run
from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet
from labkit.trace.trace import Trace
from labkit.views.style import color_index

TWELVE = (
    (9, 6), (13, 28), (5, 4), (12, 12), (8, 32), (14, 5), (3, 8), (10, 24), (6, 4), (11, 10), (4, 30), (7, 6),
)  # fmt: skip
"""The twelve requests of notebooks 02 and 04: tokens of prompt and answer, independent of each other."""
_SEATS = 4


def _trace(scheduler: str, count: int = len(TWELVE)) -> Trace:
    requests = [Lengths(*lengths) for lengths in TWELVE[:count]]
    sizes = {"num_blocks": 256, "block_size": 8, "max_num_seqs": _SEATS}
    return run(requests, scheduler=scheduler, **sizes).trace


def padded_and_flat(later: int = 6) -> Drawing:
    """Draw two steps of a static batch, as the rectangle that it is, beside the same tokens in one flat row.

    Args:
        later: number of the second step.
    """
    padded, flat = _trace("static", _SEATS), _trace("continuous", _SEATS)
    sheet = Sheet("A padded batch, and the same work in one flat row", 344)
    side, twin = 16.0, []
    y = 62.0
    for step in (0, later):
        rows = padded.at(step).rows
        width = max(row.num_tokens + row.padding for row in rows)
        slots, computed = width * len(rows), sum(row.num_tokens for row in rows)
        what = "reads four prompts" if step == 0 else "adds a token to the answers"
        sheet.text(MARGIN, y, f"Step {step} {what}", bold=True)
        sheet.text(MARGIN + 300, y, f"padded: {slots} slots for {computed} tokens, {slots - computed} wasted")
        twin.append(f"Step {step} {what}")
        twin.append(f"  padded: {slots} slots for {computed} tokens, {slots - computed} wasted")
        for i, row in enumerate(rows):
            top = y + 12 + i * (side + 2)
            sheet.text(MARGIN, top + 13, f"request {row.request_id}", size=12, color="faint")
            for place in range(width):
                pads = place < width - row.num_tokens
                color = "empty" if pads else color_index(row.request_id)
                sheet.box(MARGIN + 80 + place * (side + 1), top, side, side, color=color)
            twin.append(f"  request {row.request_id}  {'·' * (width - row.num_tokens)}{'█' * row.num_tokens}")
        y += 12 + len(rows) * (side + 2) + 18
        cells = [row.request_id for row in flat.at(step).rows for _ in range(row.num_tokens)]
        sheet.text(MARGIN, y + 13, "flat row", size=12, color="faint")
        for place, name in enumerate(cells):
            sheet.box(MARGIN + 80 + place * 15, y, 14, side, name, color=color_index(name), size=10)
        twin.append(f"  flat row: {''.join(cells)}, {len(cells)} slots")
        y += 50
    return sheet.drawing(
        *twin, "█ a token, · padding or an idle seat; in the flat row each token has its owner's number"
    )


def seats() -> Drawing:
    """Draw who sits on each seat in each step, in static batches and in continuous batching."""
    sheet = Sheet("Twelve requests on four seats: who sits where, step by step", 330)
    runs = {name: _trace(name) for name in ("static", "continuous")}
    pitch = (WIDTH - 2 * MARGIN - 60) / max(map(len, runs.values()))
    twin, y = [], 64.0
    for name, trace in runs.items():
        lanes = _lanes(trace)
        idle = sum(lane.count("") for lane in lanes)
        words = f"{name} batching: {len(trace)} steps, {idle} of {_SEATS * len(trace)} places empty"
        sheet.text(MARGIN, y, words, bold=True)
        twin.append(words)
        for i, lane in enumerate(lanes):
            top = y + 10 + i * 24
            sheet.text(MARGIN, top + 15, f"seat {i}", size=12, color="faint")
            begin = 0
            for end in range(1, len(lane) + 1):
                if end < len(lane) and lane[end] == lane[begin]:
                    continue
                x, width = MARGIN + 60 + begin * pitch, (end - begin) * pitch
                color = color_index(lane[begin]) if lane[begin] else "empty"
                words = lane[begin] if width > 20 else ""
                sheet.box(x, top, width - 0.5, 21, words, color=color, size=11)
                begin = end
            twin.append(f"  seat {i}  {_shown(lane)}")
        y += 10 + 4 * 24 + 30
    return sheet.drawing(*twin, "each run of steps on a seat: the request's number x steps; . is empty")


def _lanes(trace: Trace) -> list[list[str]]:
    """Say for each seat which request computes on it in each step; "" is nobody."""
    lanes: list[list[str]] = [[] for _ in range(_SEATS)]
    sitting: list[str] = [""] * _SEATS
    for record in trace:
        computing = {row.request_id for row in record.rows if row.num_tokens}
        there = set(record.requests)
        sitting = [name if name in there else "" for name in sitting]
        for name in record.requests:
            if name not in sitting:
                sitting[sitting.index("")] = name
        for lane, name in zip(lanes, sitting, strict=True):
            lane.append(name if name in computing else "")
    return lanes


def _shown(lane: list[str]) -> str:
    parts, begin = [], 0
    for end in range(1, len(lane) + 1):
        if end == len(lane) or lane[end] != lane[begin]:
            parts.append(f"{lane[begin] or '.'} x {end - begin}")
            begin = end
    return ", ".join(parts)
