"""Colours, marks and words that all views share, so that a request looks the same in every picture.

The hues are those of Okabe and Ito (2008), which people with any common colour blindness can tell apart.
Colour only ever says *whose*; shape says as well *what* it is (prefill, chunk, decode, idle, waiting,
preempted).
"""

from __future__ import annotations

import html
import unicodedata
import zlib
from typing import Any

from labkit.trace.records import Moved, printable

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7B6FD0", "#8F7A00")
FREE = "#E7E9EE"
CACHED = "#B8BECB"
SHARED = "#22262F"
WAITING = "#9AA1AF"
INK = "#22262F"
FAINT_INK = "#5B6270"
PAPER = "#FFFFFF"

NO_STEPS = "No steps yet: nothing has run."  # what a picture of an empty trace says

# Text twins have one mark per kind of work.
MARKS = {
    "prefill": "█",
    "chunk": "▓",
    "decode": "▪",
    "idle": "·",
    "waiting": "░",
    "preempted": "x",
}
# A decode with drafts has a mark for what became of them.
DRAFT_MARKS = {
    "drafts, some right": "◈",
    "drafts, all right": "◆",
    "drafts, none right": "◇",
}

# A plotly template as plain data, so that nothing here needs plotly. The paper is white, because then dark
# ink stays readable on a dark web page.
TEMPLATE: dict[str, Any] = {
    "layout": {
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
            "size": 12,
            "color": INK,
        },
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "title": {
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"l": 14, "t": 14},
            "font": {"size": 15},
        },
        "margin": {"l": 20, "r": 20, "t": 70, "b": 20},
        "hoverlabel": {"align": "left", "bgcolor": PAPER, "bordercolor": INK, "font": {"color": INK}},
        "legend": {
            "orientation": "h",
            "x": 0.01,
            "y": 0,
            "xref": "container",
            "yref": "container",
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
            "font": {"color": FAINT_INK},
        },
        "xaxis": {"zeroline": False, "showgrid": False, "ticks": "", "automargin": True},
        "yaxis": {"zeroline": False, "showgrid": False, "ticks": "", "automargin": True},
    }
}


def color_index(request_id: str) -> int:
    """Return a request's place in the palette: a stable one, and another for the next id that counts up."""
    if request_id.isdecimal():
        return int(request_id[-9:]) % len(PALETTE)  # its last digits: Python refuses very long numbers
    return zlib.crc32(request_id.encode(errors="replace")) % len(PALETTE)


def color_of(request_id: str) -> str:
    """Return the hex colour of a request."""
    return PALETTE[color_index(request_id)]


def tint(color: str, share: float) -> str:
    """Mix a hex colour with white, so that `share` of it is left."""
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - value)):02X}" for value in channels)


def width_of(text: str) -> int:
    """Count the columns that a text takes in a terminal: wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def label(request_id: str, width: int = 16) -> str:
    """Return a name for display: one printable line of at most `width` columns, cut in the middle."""
    text = printable(request_id) or '""'
    if width_of(text) <= width:
        return text
    head, tail = "", ""
    for i in range(len(text)):  # take from both ends in turn: ids often differ at the end only
        grown = (head + text[i // 2], tail) if i % 2 else (head, text[-1 - i // 2] + tail)
        if width_of("".join(grown)) > width - 1:
            break
        head, tail = grown
    return head + "…" + tail


def escape(text: str) -> str:
    """Return a text that plotly shows as it is, without markup, and without formulas if MathJax is loaded."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def plural(count: float, noun: str) -> str:
    """Return a count and its noun, in the plural where it is due."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Return a number of bytes in words: 1,234 is 1.23 kB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}" if count < 999.5 else f"{count:,.0f} {units[0]}"


def moved_words(moved: Moved) -> str:
    """Say in words where a request goes whose prompt another engine computes."""
    if moved.place == "unsent":
        return f"waits to be sent to the prefill engine: {plural(moved.amount, 'prompt token')}"
    if moved.place == "there":
        return f"is sent to the prefill engine: {plural(moved.amount, 'prompt token')}"
    return f"its pages leave the prefill engine: {size(moved.amount)}"


def drafts(drafted: int, accepted: int) -> str:
    """Say in words what became of drafts."""
    return f"{drafted} drafted, {accepted} of them right"
