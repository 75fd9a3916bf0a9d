"""Colours and names that all views share, so that a request looks the same in every picture.

Hues are Okabe and Ito's (2008), which people with any common colour blindness can tell apart. Colour only
ever says *whose*; *what* (prefill, chunk, decode, idle, waiting, preempted) is said by shape as well.
"""

from __future__ import annotations

import zlib

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8F7A00", "#7B6FD0")
FREE = "#E7E9EE"
CACHED = "#B8BECB"
SHARED = "#22262F"
WAITING = "#9AA1AF"

# For text twins and legends: one mark per kind of work.
MARKS = {
    "prefill": "█",
    "chunk": "▓",
    "decode": "▪",
    "idle": "·",
    "waiting": "░",
    "preempted": "x",
}


def color_index(request_id: str) -> int:
    """A request's place in the palette: stable, and different for neighbours when ids count upwards."""
    number = int(request_id) if request_id.isdecimal() else zlib.crc32(request_id.encode())
    return number % len(PALETTE)


def color_of(request_id: str) -> str:
    """The hex colour of a request."""
    return PALETTE[color_index(request_id)]
