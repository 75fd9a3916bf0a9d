"""The files of `static/`: markup, styles and scripts, as text for a page or a widget."""

from __future__ import annotations

from pathlib import Path

from labkit.views import wire


def asset(name: str) -> str:
    """The text of one file, such as `live_feed.css`."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def script(*names: str) -> str:
    """Several JavaScript files as one, after the names of all rows that a browser is sent."""
    return wire.javascript() + "".join(map(asset, names))
