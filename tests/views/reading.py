"""How tests read a figure: its drawn parts, and its texts as a reader sees them."""

from __future__ import annotations

import html
import re

import plotly.graph_objects as go


def named(figure: go.Figure, name: str) -> go.Bar | None:
    """Find the drawn (not legend) trace of that name."""
    found = [part for part in figure.data if part.name == name and part.x != (None,)]
    return found[0] if found else None


def bars(figure: go.Figure, name: str) -> list[tuple[int, int, float, str]]:
    """Return (row, first step, length, facts) of each bar of a kind."""
    part = named(figure, name)
    columns = (part.y, part.base, part.x, part.customdata) if part else [()] * 4
    return [(y, base + 0.5, x, facts) for y, base, x, facts in zip(*columns, strict=True)]


def cells(figure: go.Figure) -> list[tuple[int, str]]:
    """Return (shade, facts) of each block."""
    grid = named(figure, "blocks")
    shades = [shade for row in grid.z for shade in row]
    facts = [fact for row in grid.customdata for fact in row]
    return [(shade, fact) for shade, fact in zip(shades, facts, strict=True) if shade is not None]


def words(marked_up: str) -> str:
    """Return what a reader sees of a plotly text."""
    return html.unescape(re.sub(r"<[^>]*>", "", marked_up.replace("<br>", "; ")))


def strings(value: object) -> list[str]:
    """Return all strings within a piece of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [s for item in value for s in strings(item)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )
