"""The three views as text, at most 100 columns wide: for terminals, screen readers, and tests.

They state the same numbers as the figures do, and say so where a column or a character stands for more
than one step or block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.pool_picture import Page, Pages, pages_of
from labkit.views.style import plural
from labkit.views.timeline import Lane, Span, rates_of, timeline_of

COLUMNS = 100
_NO_STEPS = "No steps yet: nothing has run."
_LEVELS = "▁▂▃▄▅▆▇█"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# -- block heatmap --------------------------------------------------------------------------------

_FREE, _CACHED, _SHARED, _OTHER, _EMPTY = ".", "~", "*", "#", "-"


def block_heatmap(trace: Trace, step: int | None = None) -> str:
    """The pool's blocks during a step (None: the latest): who owns each, and how full it is.

    Raises:
        ValueError: if the trace does not hold that step.
    """
    if step is None and not trace.records:
        return _NO_STEPS
    pages = pages_of(trace, trace[-1].step if step is None else step)
    letters = dict(zip(pages.requests, _LETTERS, strict=False))
    return "\n".join([*_headline(pages.headline), "", *_grid(pages, letters), "", *_owners(pages, letters)])


def _grid(pages: Pages, letters: dict[str, str]) -> list[str]:
    """A line per row of blocks, and what the characters mean."""
    total = len(pages.pages)
    per_cell, gap = 1, ""
    kinds = f"{_SHARED} shared, {_CACHED} cached and free, {_FREE} free"
    if total <= 1024:
        columns, gap = (16, " ") if total <= 256 else (32, "")
        cells = [_letter(page, letters) + _fullness(page, pages.block_size) for page in pages.pages]
        full = f"how full: {_EMPTY} not at all, {_LEVELS[0]} to {_LEVELS[-1]}"
        legend = [f"{columns} blocks a line; owner: a letter, {kinds}", full]
    elif total <= 4096:
        columns, cells = 64, [_letter(page, letters) for page in pages.pages]
        legend = [f"64 blocks a line, how full is not shown; owner: a letter, {kinds}"]
    else:
        columns, per_cell = 64, -(-total // 4096)
        groups = [pages.pages[i : i + per_cell] for i in range(0, total, per_cell)]
        cells = [_level(sum(bool(page.owners) for page in group), len(group), _FREE) for group in groups]
        legend = [
            f"each character = {per_cell} blocks: {_FREE} none owned, {_LEVELS[0]} to {_LEVELS[-1]} all"
        ]
    starts = range(0, len(cells), columns)
    width = len(str(total))
    rows = [f"block {i * per_cell:>{width}}  {gap.join(cells[i : i + columns])}" for i in starts]
    return [*rows, "", *_wrapped(legend)]


def _letter(page: Page, letters: dict[str, str]) -> str:
    if page.kind == "owned":
        return letters.get(page.owners[0], _OTHER)
    return {"free": _FREE, "cached": _CACHED, "shared": _SHARED}[page.kind]


def _fullness(page: Page, block_size: int) -> str:
    return _FREE if page.kind == "free" else _level(page.filled, block_size, _EMPTY)


def _level(part: float, whole: float, nothing: str) -> str:
    """A bar as high as the share: full only if the part is the whole."""
    return _LEVELS[int(part / whole * 7)] if part > 0 else nothing


def _owners(pages: Pages, letters: dict[str, str]) -> list[str]:
    """Which letter is whose, and who shares what."""
    named = [
        f"{letter} = {style.label(owner)} ({plural(blocks, 'block')}, {plural(tokens, 'token')})"
        for (owner, (blocks, tokens)), letter in zip(pages.requests.items(), _LETTERS, strict=False)
    ]
    lines = _wrapped(named)
    if more := len(pages.requests) - len(named):
        lines.append(f"{_OTHER} = one of {plural(more, 'other request')}")
    shared = [page for page in pages.pages if page.kind == "shared"]
    for owners, group in _grouped(shared):
        blocks = ", ".join(map(str, group[:8])) + (", …" if len(group) > 8 else "")
        names = "".join(letters.get(owner, _OTHER) for owner in owners[:40]) + (
            "…" if len(owners) > 40 else ""
        )
        lines.append(f"{_SHARED} {plural(len(group), 'block')} ({blocks}) of {names}")
    return lines


def _grouped(shared: list[Page]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Shared blocks by who shares them."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for page in shared:
        groups.setdefault(page.owners, []).append(page.block)
    return list(groups.items())


# -- batch timeline -------------------------------------------------------------------------------

_MARKS = {**style.MARKS, **style.DRAFT_MARKS}
_BEFORE_OTHERS = ("preempted", "prefill", "chunk", *style.DRAFT_MARKS, "decode", "idle", "waiting")


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> str:
    """What each request did in each step, from step `first` to step `last` (None: all that the trace holds).

    Raises:
        ValueError: if the trace holds no step within these limits.
    """
    timeline = timeline_of(trace, first, last)
    if timeline is None:
        return _NO_STEPS
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
    """What stands to the right of a lane."""
    drafts = f"{f'{lane.num_accepted} of {lane.num_drafted}':>14}" if drafting else ""
    return f"{lane.num_tokens:>9}{lane.num_sampled:>10}{drafts}  {_ends(lane)}".rstrip()


def _ends(lane: Lane) -> str:
    return ", ".join(f"{style.label(end.reason)} {end.step}" for end in lane.ends[-1:])


def _ruler(first: int, columns: int, per_column: int) -> str:
    """Step numbers over the columns, one at every tenth."""
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
    """By which mark a span is shown."""
    if not span.drafted:
        return span.kind
    share = "all" if span.accepted == span.drafted else "some" if span.accepted else "none"
    return f"drafts, {share} right"


# -- throughput -----------------------------------------------------------------------------------


def throughput(trace: Trace, *, window: float | None = None) -> str:
    """Tokens per second (per step, if the trace has no clock), KV usage, and requests running and waiting.

    Rates are means over the last `window` seconds of work, or steps if there is no clock (None: a fortieth
    of the run), and over one step at least.

    Raises:
        ValueError: if `window` is not positive.
    """
    rates = rates_of(trace, window)
    if rates is None:
        return _NO_STEPS
    rows = [
        (f"computed / {rates.per}", rates.computed, ",.4g"),
        (f"generated / {rates.per}", rates.generated, ",.4g"),
        ("KV usage", rates.kv_usage, ".0%"),
        ("running", rates.running, "d"),
        ("waiting", rates.waiting, "d"),
    ]
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


# -- charts ---------------------------------------------------------------------------------------


_BAR = 40  # characters of the longest bar
_ROWS = 40  # of a table; a longer one leaves out rows


def bars(values: Mapping[str, float], title: str, unit: str, digits: int) -> str:
    """One bar of text for each named value; its length says nothing below zero."""
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
    """A table: a column for each named series, and a row for each x, or for 40 evenly chosen ones."""
    kept = range(len(x))
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
    """Parts joined by semicolons, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}; {part}" if lines else part
        if lines and style.width_of(joined) <= COLUMNS:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines
