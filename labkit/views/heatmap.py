"""The block heatmap as a plotly figure. See `labkit.views.figures` for what all figures keep to."""

from __future__ import annotations

import plotly.graph_objects as go

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.figures import lay_out, nothing, shown, swatch
from labkit.views.pool_picture import Page, Pages, pages_of
from labkit.views.style import plural

_SHADES = [style.FREE, style.CACHED, style.PAPER, *(style.tint(color, 0.28) for color in style.PALETTE)]
_SHADE_OF = {"free": 0, "cached": 1, "shared": 2, "owned": 3}  # owned: plus the owner's place in the palette
_CACHED = {
    "color": style.CACHED,
    "pattern": {"shape": "/", "size": 6, "solidity": 0.25, "fgcolor": style.PAPER, "bgcolor": style.CACHED},
}
_SHARED = {"color": "rgba(0,0,0,0)", "line": {"color": style.SHARED, "width": 2}}
_MAX_OWNERS_NAMED = 12
_GAP, _PLOT_WIDTH = 2, 930  # pixels; the width that a notebook gives


class _Grid:
    """Where blocks are drawn: `columns` a row, cells a little smaller than the pitch of the grid."""

    def __init__(self, total: int) -> None:
        self.columns = total if total <= 16 else 16 if total <= 128 else 32 if total <= 512 else 64
        self.rows = -(-total // self.columns)
        self.row_height = 44 if self.rows <= 8 else 26 if self.rows <= 16 else 18 if self.rows <= 32 else 10
        self.width = round(1 - _GAP * self.columns / _PLOT_WIDTH, 3)
        self.height = round(1 - _GAP / self.row_height, 3)

    def place(self, page: Page) -> tuple[int, int]:
        return divmod(page.block, self.columns)


def block_heatmap(trace: Trace, step: int | None = None) -> go.Figure:
    """See `labkit.views.block_heatmap`."""
    if step is None and not trace.records:
        return nothing("No steps yet: nothing has run.")
    pages = pages_of(trace, trace[-1].step if step is None else step)
    grid = _Grid(len(pages.pages))
    figure = go.Figure([_cells(pages, grid), _fill_bars(pages, grid)])
    for kind, look in (("cached", _CACHED), ("shared", _SHARED)):
        figure.add_trace(_marked_cells(pages, grid, kind, look))
    if grid.columns <= 16:
        figure.add_trace(_cell_names(pages, grid))
    figure.add_traces(_legend(pages))
    lay_out(figure, pages.headline, grid.rows * grid.row_height, entry_width=220)
    figure.update_layout(barmode="overlay")
    ticks = list(range(0, grid.columns, max(1, grid.columns // 16)))
    figure.update_xaxes(
        range=[-0.5, grid.columns - 0.5], tickvals=ticks, ticktext=[f"+{tick}" for tick in ticks]
    )
    ticks = list(range(0, grid.rows, -(-grid.rows // 16)))
    figure.update_yaxes(
        range=[grid.rows - 0.5, -0.5],
        tickvals=ticks,
        ticktext=[f"block {tick * grid.columns}" for tick in ticks],
    )
    return figure


def _cells(pages: Pages, grid: _Grid) -> go.Heatmap:
    """The ground: a shade for each cell, and what its hover says."""
    shades: list[list[int | None]] = [[None] * grid.columns for _ in range(grid.rows)]
    facts = [[""] * grid.columns for _ in range(grid.rows)]
    for page in pages.pages:
        row, column = grid.place(page)
        shade = _SHADE_OF[page.kind] + (style.color_index(page.owners[0]) if page.kind == "owned" else 0)
        shades[row][column] = shade
        facts[row][column] = _facts(page, pages.block_size)
    edges = [[(i + edge) / len(_SHADES), shade] for i, shade in enumerate(_SHADES) for edge in (0, 1)]
    return go.Heatmap(
        z=shades,
        zmin=-0.5,
        zmax=len(_SHADES) - 0.5,
        colorscale=edges,
        showscale=False,
        xgap=_GAP,
        ygap=_GAP,
        customdata=facts,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        name="blocks",
    )


def _facts(page: Page, block_size: int) -> str:
    lines = [f"<b>block {page.block}</b>: {'cached and free' if page.kind == 'cached' else page.kind}"]
    for owner, position in list(zip(page.owners, page.positions, strict=True))[:8]:
        lines.append(f"request {shown(owner)}, entry {position} of its block table")
    if len(page.owners) > 8:
        lines.append(f"and {plural(len(page.owners) - 8, 'other request')}")
    if page.kind != "free":
        lines.append(f"tokens fill {page.filled} of {plural(block_size, 'slot')}")
    if page.findable and page.owners:
        lines.append("later requests can share it")
    return "<br>".join(lines)


def _fill_bars(pages: Pages, grid: _Grid) -> go.Bar:
    """A bar in each owned block, as long as the block is full; owners who share one have a stripe each."""
    bars = []
    for page in pages.pages:
        row, column = grid.place(page)
        stripe = grid.height / max(1, len(page.owners))
        length = grid.width * page.filled / pages.block_size
        for i, owner in enumerate(page.owners if page.filled else ()):
            middle = row - grid.height / 2 + (i + 0.5) * stripe
            color = style.tint(style.color_of(owner), 0.8 if page.kind == "owned" else 0.55)
            bars.append((page.block, column - grid.width / 2, length, middle, stripe, color))
    return go.Bar(
        orientation="h",
        base=[round(left, 4) for _, left, *_ in bars],
        x=[round(length, 4) for _, _, length, *_ in bars],
        y=[round(middle, 4) for *_, middle, _, _ in bars],
        width=[round(stripe, 4) for *_, stripe, _ in bars],
        customdata=[block for block, *_ in bars],
        marker={"color": [color for *_, color in bars], "line": {"width": 0}},
        hoverinfo="skip",
        showlegend=False,
        name="filled",
    )


def _marked_cells(pages: Pages, grid: _Grid, kind: str, look: dict[str, object]) -> go.Bar:
    """Whole cells over the ground: a pattern says cached, an outline says shared."""
    places = [grid.place(page) for page in pages.pages if page.kind == kind]
    return go.Bar(
        orientation="h",
        base=[column - grid.width / 2 for _, column in places],
        x=[grid.width] * len(places),
        y=[row for row, _ in places],
        width=grid.height,
        marker=look,
        hoverinfo="skip",
        showlegend=False,
        name=kind,
    )


def _cell_names(pages: Pages, grid: _Grid) -> go.Scatter:
    """The owner and the place in its block table, where cells are large enough to read it."""
    owned = [page for page in pages.pages if page.owners]
    places = [grid.place(page) for page in owned]
    return go.Scatter(
        mode="text",
        x=[column for _, column in places],
        y=[row for row, _ in places],
        text=[
            f"{shown(page.owners[0], 4)}[{page.positions[0]}]"
            if page.kind == "owned"
            else f"{len(page.owners)}x"
            for page in owned
        ],
        textfont={"size": 10, "color": style.INK},
        hoverinfo="skip",
        showlegend=False,
        name="owner[entry of its block table]",
    )


def _legend(pages: Pages) -> list[go.Bar]:
    owners = list(pages.requests.items())
    named = owners if len(owners) <= _MAX_OWNERS_NAMED else owners[: _MAX_OWNERS_NAMED - 1]
    entries = [
        swatch(
            f"{shown(owner, 10)}: {plural(blocks, 'block')}, {plural(tokens, 'token')}",
            {"color": style.color_of(owner)},
        )
        for owner, (blocks, tokens) in named
    ]
    if others := len(owners) - len(named):
        entries.append(swatch(f"and {others} more: point at a block", {"color": "rgba(0,0,0,0)"}))
    looks = {"shared": _SHARED, "cached": _CACHED, "free": {"color": style.FREE}}
    names = {"shared": "shared (3x: by 3 requests)", "cached": "cached and free", "free": "free"}
    return entries + [swatch(names[kind], looks[kind]) for kind in looks if pages.count(kind)]
