"""The text twins of the figures, at most 100 columns wide: for terminals, screen readers and tests.

They state the same facts as the figures do, and say so where one column or character stands for more than one
step or block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from labkit.trace.pool_state import PoolState
from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.batch_timeline import Lane, Span, timeline_of
from labkit.views.facts.pool_blocks import PoolBlock, PoolBlocks, blocks_of
from labkit.views.facts.throughput import rates_of
from labkit.views.facts.token_timeline import CLOCKS, Clock, TokenLane, token_timeline_of
from labkit.views.style import plural

COLUMNS = 100
_LEVELS = "▁▂▃▄▅▆▇█"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# -- block heatmap --------------------------------------------------------------------------------

_FREE, _CACHED, _SHARED, _OTHER, _EMPTY = ".", "~", "*", "#", "-"


def block_heatmap(trace: Trace, step: int | None = None) -> str:
    """Show the pool's blocks during a step (None: the latest): who owns each, and how full it is.

    Raises:
        ValueError: if the trace does not hold that step.
    """
    if step is None and not trace.records:
        return style.NO_STEPS
    pool = blocks_of(trace, trace[-1].step if step is None else step)
    letters = dict(zip(pool.requests, _LETTERS, strict=False))
    lines = [*_headline(pool.headline), "", *_grid(pool, letters), "", *_owners(pool, letters)]
    return "\n".join([*lines, *_elsewhere(trace.state(pool.step))])


def _elsewhere(state: PoolState) -> list[str]:
    """Write where the requests are that have not arrived, and what the prefill engine holds."""
    lines = []
    if other := state.other_pool:
        owned = len({block for held in other.tables for block in held.blocks})
        lines.append(f"the prefill engine: {owned} of {plural(other.num_blocks, 'block')} owned")
        for name, computed, blocks in other.tables:
            known = f"{plural(computed, 'token')} in {plural(len(blocks), 'block')}"
            lines[-1] += f"; {style.label(name)} has {known}"
        lines = _wrapped(lines[0].split("; "))
    places: dict[str, list[str]] = {}
    for name, moved in state.elsewhere.items():
        places.setdefault(moved.place, []).append(style.label(name))
    named = [f"{place}: {', '.join(names[:8])}{', …' * (len(names) > 8)}" for place, names in places.items()]
    if in_flight := sum(m.amount for m in state.elsewhere.values() if m.place == "arriving"):
        named.append(f"in flight: {style.size(in_flight)}")
    return [*lines, *_wrapped(named)]


def _grid(pool: PoolBlocks, letters: dict[str, str]) -> list[str]:
    """Write a line per row of blocks, and what the characters mean."""
    total = len(pool.blocks)
    per_cell, gap = 1, ""
    kinds = f"{_SHARED} shared, {_CACHED} cached and free, {_FREE} free"
    if total <= 1024:
        columns, gap = (16, " ") if total <= 256 else (32, "")
        cells = [_letter(block, letters) + _fullness(block, pool.block_size) for block in pool.blocks]
        full = f"how full: {_EMPTY} not at all, {_LEVELS[0]} to {_LEVELS[-1]}"
        legend = [f"{columns} blocks a line; owner: a letter, {kinds}", full]
    elif total <= 4096:
        columns, cells = 64, [_letter(block, letters) for block in pool.blocks]
        legend = [f"64 blocks a line, how full is not shown; owner: a letter, {kinds}"]
    else:
        columns, per_cell = 64, -(-total // 4096)
        groups = [pool.blocks[i : i + per_cell] for i in range(0, total, per_cell)]
        cells = [_level(sum(bool(block.owners) for block in group), len(group), _FREE) for group in groups]
        legend = [
            f"each character = {per_cell} blocks: {_FREE} none owned, {_LEVELS[0]} to {_LEVELS[-1]} all"
        ]
    starts = range(0, len(cells), columns)
    width = len(str(total))
    rows = [f"block {i * per_cell:>{width}}  {gap.join(cells[i : i + columns])}" for i in starts]
    return [*rows, "", *_wrapped(legend)]


def _letter(block: PoolBlock, letters: dict[str, str]) -> str:
    if block.kind == "owned":
        return letters.get(block.owners[0], _OTHER)
    return {"free": _FREE, "cached": _CACHED, "shared": _SHARED}[block.kind]


def _fullness(block: PoolBlock, block_size: int) -> str:
    return _FREE if block.kind == "free" else _level(block.filled, block_size, _EMPTY)


def _level(part: float, whole: float, nothing: str) -> str:
    """Return a bar as high as the share, and full only if the part is the whole."""
    return _LEVELS[int(part / whole * 7)] if part > 0 else nothing


def _owners(pool: PoolBlocks, letters: dict[str, str]) -> list[str]:
    """Write which letter is whose, and who shares what."""
    named = [
        f"{letter} = {style.label(owner)} ({plural(blocks, 'block')}, {plural(tokens, 'token')})"
        for (owner, (blocks, tokens)), letter in zip(pool.requests.items(), _LETTERS, strict=False)
    ]
    lines = _wrapped(named)
    if more := len(pool.requests) - len(named):
        lines.append(f"{_OTHER} = one of {plural(more, 'other request')}")
    shared = [block for block in pool.blocks if block.kind == "shared"]
    for owners, group in _grouped(shared):
        blocks = ", ".join(map(str, group[:8])) + (", …" if len(group) > 8 else "")
        names = "".join(letters.get(owner, _OTHER) for owner in owners[:40]) + (
            "…" if len(owners) > 40 else ""
        )
        lines.append(f"{_SHARED} {plural(len(group), 'block')} ({blocks}) of {names}")
    return lines


def _grouped(shared: list[PoolBlock]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Group shared blocks by who shares them."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for block in shared:
        groups.setdefault(block.owners, []).append(block.number)
    return list(groups.items())


# -- batch timeline -------------------------------------------------------------------------------

_MARKS = {**style.MARKS, **style.DRAFT_MARKS}
_BEFORE_OTHERS = ("preempted", "prefill", "chunk", *style.DRAFT_MARKS, "decode", "idle", "waiting")


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> str:
    """Show what each request did in each step, from `first` to `last` (None: all that the trace holds).

    Raises:
        ValueError: if the trace holds no step within these limits.
    """
    timeline = timeline_of(trace, first, last)
    if timeline is None:
        return style.NO_STEPS
    names = [style.label(lane.request_id) for lane in timeline.lanes]
    name_width = max(map(style.width_of, [*names, "request"]))
    heading = f" computed generated{'  drafts right' if timeline.drafting else ''}  ends"
    tails = [_tail(lane, timeline.drafting) for lane in timeline.lanes]
    room = COLUMNS - name_width - 3 - max(map(style.width_of, [*tails, heading]))
    length = timeline.last - timeline.first + 1
    per_column = -(-length // room)
    columns = -(-length // per_column)
    lines = [*_headline(timeline.headline), ""]
    ruler = _ruler(timeline.first, columns, per_column)
    lines.append(f"{'request':<{name_width}}  {ruler} {heading}")
    for name, lane, tail in zip(names, timeline.lanes, tails, strict=True):
        pad = " " * (name_width - style.width_of(name))
        lines.append(f"{name}{pad}  {_lane_marks(lane, timeline.first, columns, per_column)} {tail}")
    marks = _MARKS if timeline.drafting else style.MARKS
    legend = [f"{mark} {what}" for what, mark in marks.items()]
    if per_column > 1:
        order = " ".join(marks[what] for what in _BEFORE_OTHERS if what in marks)
        legend.append(f"each column = {per_column} steps, and shows the first of {order} among them")
    else:
        legend.append("each column = 1 step")
    why = [f"{style.label(reason, 56)} ({plural(count, 'step')})" for reason, count in timeline.blocked[:3]]
    if len(timeline.blocked) > 3:
        why.append(f"and {plural(len(timeline.blocked) - 3, 'other reason')}")
    if why:
        why[0] = f"the head of the queue waited: {why[0]}"
    return "\n".join([*lines, "", *_wrapped(legend), *_wrapped(why)])


def _tail(lane: Lane, drafting: bool) -> str:
    """Write what stands to the right of a lane."""
    drafts = f"{f'{lane.num_accepted} of {lane.num_drafted}':>14}" if drafting else ""
    return f"{lane.num_tokens:>9}{lane.num_sampled:>10}{drafts}  {_ends(lane)}".rstrip()


def _ends(lane: Lane) -> str:
    return ", ".join(f"{style.label(end.reason)} {end.step}" for end in lane.ends[-1:])


def _ruler(first: int, columns: int, per_column: int) -> str:
    """Write step numbers over the columns, one at every tenth."""
    marks = [" "] * columns
    for column in range(0, columns, 10):
        number = str(first + column * per_column)
        if column + len(number) <= columns:
            marks[column : column + len(number)] = number
    return "".join(marks)


def _lane_marks(lane: Lane, first: int, columns: int, per_column: int) -> str:
    marks = [" "] * columns
    for what in reversed(_BEFORE_OTHERS):  # the later overwrites
        spans = [(span.first, span.last) for span in lane.spans if _what(span) == what]
        spans += [(step, step) for step in lane.preempted] if what == "preempted" else []
        for begin, end in spans:
            for column in range((begin - first) // per_column, (end - first) // per_column + 1):
                marks[column] = _MARKS[what]
    return "".join(marks)


def _what(span: Span) -> str:
    """Return the name of the mark that shows a span."""
    if not span.drafted:
        return span.kind
    share = "all" if span.accepted == span.drafted else "some" if span.accepted else "none"
    return f"drafts, {share} right"


# -- throughput -----------------------------------------------------------------------------------


def throughput(trace: Trace, *, window: float | None = None) -> str:
    """Show tokens per second (per step, if the trace has no clock), KV usage, and who runs and waits.

    Rates are means over the last `window` seconds of work, or steps if there is no clock (None: a fortieth
    of the run), and over one step at least.

    Raises:
        ValueError: if `window` is not positive.
    """
    rates = rates_of(trace, window)
    if rates is None:
        return style.NO_STEPS
    rows: list[tuple[str, Sequence[float | None], str]] = [
        (f"computed / {rates.per}", rates.computed, ",.4g"),
        (f"generated / {rates.per}", rates.generated, ",.4g"),
        ("KV usage", rates.kv_usage, ".0%"),
        ("running", rates.running, "d"),
        ("waiting", rates.waiting, "d"),
    ]
    if rates.sent:
        rows.append(("communication", rates.sending, ".0%"))
    per_column = -(-len(rates.steps) // 64)
    width = -(-len(rates.steps) // per_column)
    lines = [*_headline(rates.headline), "", f"{'':20}{'steps':<{width}}  at most"]
    for name, values, shown in rows:
        numbers = [value or 0 for value in values]
        top = max(numbers)
        means = [sum(part) / len(part) for part in _chunks(numbers, per_column)]
        lines.append(f"{name:<20}{''.join(_level(mean, top, ' ') for mean in means)}  {top:{shown}}")
    legend = [f"{_LEVELS[0]} to {_LEVELS[-1]}: above nothing to the most in that line"]
    if per_column > 1:
        legend.append(f"each column = the mean of {per_column} steps")
    return "\n".join([*lines, "", *_wrapped(legend)])


# -- token timeline -------------------------------------------------------------------------------

_WIDTH = 60  # columns of a lane


def token_timeline(trace: Trace, clock: Clock = "tokens") -> str:
    """Show when each token came out, and the longest gap of each request.

    Raises:
        ValueError: if there is no such clock.
    """
    timeline = token_timeline_of(trace, clock)
    end = max((lane.tokens[-1] for lane in timeline.lanes.values() if lane.tokens), default=0)
    if not end:
        return style.NO_STEPS
    names = {name: style.label(name) for name in timeline.lanes}
    width = max(map(style.width_of, [*names.values(), "request"]))
    lines = [timeline.headline, "", f"{'request':<{width}}  {'0':<{_WIDTH}} {'TTFT':>8} {'worst gap':>10}"]
    for name, lane in timeline.lanes.items():
        tail = f"{timeline.shown(lane.ttft):>8} {timeline.shown(lane.worst_gap):>10}"
        pad = " " * (width - style.width_of(names[name]))
        lines.append(f"{names[name]}{pad}  {_token_marks(lane, end)} {tail}")
    marks = style.MARKS
    legend = f"{marks['waiting']} waits for its first token; {marks['decode']} a token (or several)"
    scale = f"0 to {timeline.shown(end)} {CLOCKS[clock]}"
    return "\n".join([*lines, "", scale, f"{legend}; {marks['idle']} none"])


def _token_marks(lane: TokenLane, end: float) -> str:
    marks = [" "] * _WIDTH
    arrived, *places = (min(_WIDTH - 1, int(_WIDTH * time / end)) for time in (lane.arrived, *lane.tokens))
    if places:
        first, last = places[0], places[-1]
        marks[arrived:first] = style.MARKS["waiting"] * (first - arrived)
        marks[first:last] = style.MARKS["idle"] * (last - first)
    for place in places:
        marks[place] = style.MARKS["decode"]
    return "".join(marks)


# -- charts ---------------------------------------------------------------------------------------


_BAR = 40  # characters of the longest bar
_ROWS = 40  # of a table; a longer one leaves rows out


def bars(values: Mapping[str, float], title: str, unit: str, digits: int) -> str:
    """Draw one bar of text for each named value; a value below zero has no bar."""
    names = [style.label(name, 60) for name in values]
    width = max(map(style.width_of, names), default=0)
    top = max((value for value in values.values() if math.isfinite(value)), default=0)
    rows = [title, ""]
    for name, value in zip(names, values.values(), strict=True):
        share = value / top if top > 0 and math.isfinite(value) else 0
        row = [name + " " * (width - style.width_of(name)), "█" * round(_BAR * max(share, 0))]
        rows.append(f"{'  '.join(row)} {value:,.{digits}f} {unit}".rstrip())
    return "\n".join(rows)


def lines(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float | None]],
    title: str,
    x_name: str,
    y_name: str,
    digits: int,
) -> str:
    """Write a table: a column for each named series, and a row for each x, or for 40 evenly chosen ones."""
    kept: Sequence[int] = range(len(x))
    if len(x) > _ROWS:
        kept = [round(i * (len(x) - 1) / (_ROWS - 1)) for i in range(_ROWS)]
    rows = [[x_name, *(style.label(name, 40) for name in ys)]]
    for i in kept:
        shown = ("" if series[i] is None else f"{series[i]:,.{digits}f}" for series in ys.values())
        rows.append([f"{int(x[i]):,}" if float(x[i]).is_integer() else f"{x[i]:,.6g}", *shown])
    widths = [max(style.width_of(row[i]) for row in rows) for i in range(len(rows[0]))]
    left_out = f"; {len(kept)} of {len(x)} rows" if len(kept) < len(x) else ""
    return "\n".join([f"{title} ({y_name}){left_out}", "", *(_row(row, widths) for row in rows)])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    pads = (" " * (width - style.width_of(cell)) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(pad + cell for pad, cell in zip(pads, cells, strict=True)).rstrip()


def _chunks(values: Sequence[float], size: int) -> Iterable[Sequence[float]]:
    return (values[i : i + size] for i in range(0, len(values), size))


# -- words ----------------------------------------------------------------------------------------


def _headline(sentences: tuple[str, str]) -> list[str]:
    return [sentences[0], *_wrapped(sentences[1].split("; "))]


def _wrapped(parts: Iterable[str]) -> list[str]:
    """Join parts with semicolons, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}; {part}" if lines else part
        if lines and style.width_of(joined) <= COLUMNS:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines
