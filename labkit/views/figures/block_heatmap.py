"""The block heatmap as a plotly figure: a cell per block, its owner's colour, a bar as long as it is full."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from labkit.trace.trace import Trace
from labkit.views import style
from labkit.views.facts.pool_blocks import PoolBlock, PoolBlocks, blocks_of
from labkit.views.figures.parts import PLOT_WIDTH, lay_out, no_steps, shown, swatch
from labkit.views.style import plural

_SHADES = [style.FREE, style.CACHED, style.PAPER, *(style.tint(color, 0.28) for color in style.PALETTE)]
_SHADE_OF = {"free": 0, "cached": 1, "shared": 2, "owned": 3}  # owned: plus the owner's place in the palette
_CACHED: dict[str, Any] = {
    "color": style.CACHED,
    "pattern": {"shape": "/", "size": 6, "solidity": 0.25, "fgcolor": style.PAPER, "bgcolor": style.CACHED},
}
_SHARED: dict[str, Any] = {"color": "rgba(0,0,0,0)", "line": {"color": style.SHARED, "width": 2}}
_MAX_OWNERS_NAMED = 12
_GAP = 2  # pixels


class _Grid:
    """The grid says where a block is drawn: `columns` to a row, in cells a little smaller than its pitch."""

    def __init__(self, total: int) -> None:
        self.columns = total if total <= 16 else 16 if total <= 128 else 32 if total <= 512 else 64
        self.rows = -(-total // self.columns)
        self.row_height = 44 if self.rows <= 8 else 26 if self.rows <= 16 else 18 if self.rows <= 32 else 10
        self.width = round(1 - _GAP * self.columns / PLOT_WIDTH, 3)
        self.height = round(1 - _GAP / self.row_height, 3)

    def place(self, block: PoolBlock) -> tuple[int, int]:
        return divmod(block.number, self.columns)


def block_heatmap(trace: Trace, step: int | None = None) -> go.Figure:
    """Draw who owns each block, and how full it is; see `labkit.views.block_heatmap`."""
    if step is None and not trace.records:
        return no_steps()
    pool = blocks_of(trace, trace[-1].step if step is None else step)
    grid = _Grid(len(pool.blocks))
    figure = go.Figure([_cells(pool, grid), _fill_bars(pool, grid)])
    for kind, look in (("cached", _CACHED), ("shared", _SHARED)):
        figure.add_trace(_marked_cells(pool, grid, kind, look))
    if grid.columns <= 16:
        figure.add_trace(_cell_names(pool, grid))
    figure.add_traces(_legend(pool))
    lay_out(figure, pool.headline, grid.rows * grid.row_height, entry_width=220)
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


def _cells(pool: PoolBlocks, grid: _Grid) -> go.Heatmap:
    """Draw the ground: a shade for each cell, and what its hover says."""
    shades: list[list[int | None]] = [[None] * grid.columns for _ in range(grid.rows)]
    facts = [[""] * grid.columns for _ in range(grid.rows)]
    for block in pool.blocks:
        row, column = grid.place(block)
        shade = _SHADE_OF[block.kind] + (style.color_index(block.owners[0]) if block.kind == "owned" else 0)
        shades[row][column] = shade
        facts[row][column] = _facts(block, pool.block_size)
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


def _facts(block: PoolBlock, block_size: int) -> str:
    lines = [f"<b>block {block.number}</b>: {'cached and free' if block.kind == 'cached' else block.kind}"]
    for owner, position in list(zip(block.owners, block.positions, strict=True))[:8]:
        lines.append(f"request {shown(owner)}, entry {position} of its block table")
    if len(block.owners) > 8:
        lines.append(f"and {plural(len(block.owners) - 8, 'other request')}")
    if block.kind != "free":
        lines.append(f"tokens fill {block.filled} of {plural(block_size, 'slot')}")
    if block.findable and block.owners:
        lines.append("later requests can share it")
    return "<br>".join(lines)


def _fill_bars(pool: PoolBlocks, grid: _Grid) -> go.Bar:
    """Draw a bar in each owned block, as long as it is full, with a stripe for each of its owners."""
    bars = []
    for block in pool.blocks:
        row, column = grid.place(block)
        stripe = grid.height / max(1, len(block.owners))
        length = grid.width * block.filled / pool.block_size
        for i, owner in enumerate(block.owners if block.filled else ()):
            middle = row - grid.height / 2 + (i + 0.5) * stripe
            color = style.tint(style.color_of(owner), 0.8 if block.kind == "owned" else 0.55)
            bars.append((block.number, column - grid.width / 2, length, middle, stripe, color))
    return go.Bar(
        orientation="h",
        base=[round(left, 4) for _, left, *_ in bars],
        x=[round(length, 4) for _, _, length, *_ in bars],
        y=[round(middle, 4) for *_, middle, _, _ in bars],
        width=[round(stripe, 4) for *_, stripe, _ in bars],
        customdata=[number for number, *_ in bars],
        marker={"color": [color for *_, color in bars], "line": {"width": 0}},
        hoverinfo="skip",
        showlegend=False,
        name="filled",
    )


def _marked_cells(pool: PoolBlocks, grid: _Grid, kind: str, look: dict[str, Any]) -> go.Bar:
    """Draw whole cells over the ground: a pattern says cached, an outline says shared."""
    places = [grid.place(block) for block in pool.blocks if block.kind == kind]
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


def _cell_names(pool: PoolBlocks, grid: _Grid) -> go.Scatter:
    """Write the owner and the place in its block table into each cell, if cells are large enough."""
    owned = [block for block in pool.blocks if block.owners]
    places = [grid.place(block) for block in owned]
    return go.Scatter(
        mode="text",
        x=[column for _, column in places],
        y=[row for row, _ in places],
        text=[
            f"{shown(block.owners[0], 4)}[{block.positions[0]}]"
            if block.kind == "owned"
            else f"{len(block.owners)}x"
            for block in owned
        ],
        textfont={"size": 10, "color": style.INK},
        hoverinfo="skip",
        showlegend=False,
        name="owner[entry of its block table]",
    )


def _legend(pool: PoolBlocks) -> list[go.Bar]:
    owners = list(pool.requests.items())
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
    return entries + [swatch(names[kind], looks[kind]) for kind in looks if pool.count(kind)]
