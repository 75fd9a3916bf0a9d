"""A run as one file: a web page with its replay, which needs neither labkit nor a server nor a network.

The scripts that draw are those of the replay on labkit's own page. The run lies in the file as compressed
text, so nothing in a trace can become markup or a script, and a policy in the page lets no other script run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.trace.records import printable
from labkit.trace.trace import Trace
from labkit.views import replay_data
from labkit.views.assets import asset, script
from labkit.views.wire import ReplayFrame

SCRIPTS = ("live_feed.js", "regions.js", "communication.js", "meters.js", "replay_data.js", "replay.js")
TITLE = "A run of labkit"
MAX_BYTES = 100_000_000  # of all steps before they are compressed: seconds to write, and a few megabytes then
_HOW_TO = "Each step of a real engine, as it recorded it. Keys: left and right, Home and End, space to play."


def export_html(trace: Trace, path: str | os.PathLike[str], *, title: str = TITLE) -> None:
    """Write a run as one web page: the replay with its pictures, its words and its keys.

    The page opens from a disk, from any web server, and in the frame of a learning platform.

    Args:
        trace: the run, such as `engine.trace` or `Trace.load("run.jsonl")`.
        path: the file to write, such as "run.html"; what it held before is lost.
        title: the heading of the page.

    Raises:
        TypeError: if `trace` is no trace.
        ValueError: if `trace` holds no steps, or more than fit in a page.
        OSError: if `path` cannot be written.
    """
    text = page(trace, title)
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OSError(error.errno, f"path: cannot be written ({error.strerror})", str(path)) from None


def page(trace: Trace, title: str = TITLE) -> str:
    """Return the text of that page. Raises TypeError and ValueError as `export_html` does."""
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace must be a Trace, such as engine.trace or Trace.load(path), not {type(trace).__name__}"
        )
    trace = Trace(trace.meta, list(trace.records))  # an engine may go on meanwhile
    if not trace.records:
        raise ValueError("trace holds no steps: let the engine run first")
    packed, code, title = replay_data.pack(trace), script(*SCRIPTS) + asset("run_page.js"), printable(title)
    looks = "".join(map(asset, ("live_feed.css", "replay.css", "run_page.css")))
    run = json.dumps({"title": title, "data": _compressed(_as_json(packed)), "frames": _frames(trace)})
    run = run.replace("<", "\\u003c")  # the title is as the user wrote it
    told = html.escape(". ".join(filter(None, packed["headline"])))
    rules = f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(looks)}'"
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{rules}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{looks}</style>
</head>
<body>
<main>
<header><h1>{html.escape(title)}</h1><p>{_HOW_TO}</p></header>
<noscript><p>{told}. The pictures need JavaScript.</p></noscript>
{asset("replay.html")}</main>
<script type="application/json" id="lk-run">{run}</script>
<script>{code}</script>
</body>
</html>
"""


def _frames(trace: Trace) -> list[tuple[int, str]]:
    """Return the frames of all steps in compressed pieces, each after the place of its first step."""
    lanes, pieces, place, size = replay_data.lanes_of(trace), [], 0, 0
    while frames := replay_data.frames(trace, lanes, place, replay_data.MAX_FRAMES):
        text = _as_json(_without_repeats(frames))
        size += len(text)
        if size > MAX_BYTES:
            most = f"{MAX_BYTES / 1e6:.0f} MB before they are compressed"
            raise ValueError(f"trace is too long for a page: {place} of its {len(trace)} steps take {most}")
        pieces.append((place, _compressed(text)))
        place += len(frames)
    return pieces


def _without_repeats(frames: list[ReplayFrame]) -> list[dict[str, Any]]:
    """Return frames whose tables leave out, and count, the blocks that they had in the frame before."""
    known: dict[str | int, Sequence[int]] = {}
    shorter = []
    for frame in frames:  # most tables have grown by a block or not at all
        tables = []
        for request, computed, blocks in frame["tables"]:
            before = known.get(request, [])
            same = len(before) if blocks[: len(before)] == before else 0
            tables.append((request, computed, same, blocks[same:]))
        known = {table.request: table.blocks for table in frame["tables"]}
        shorter.append({**frame, "tables": tables})
    return shorter


def _as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _compressed(text: str) -> str:
    """Return a text compressed, in letters that mean nothing in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _hash(text: str) -> str:
    """Return the name under which a policy lets an inline script or style be."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
