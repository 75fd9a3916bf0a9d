"""The replay tab: a scrubber over any trace, the lab's own, that of a past race, or a file of a visitor."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import gradio as gr

from labkit.page.upload import MAX_BYTES, read_upload
from labkit.trace.records import TraceError
from labkit.trace.trace import Trace
from labkit.views import perfetto, replay_data, style
from labkit.views.assets import asset, script

MAX_UPLOADS = 16
MAX_OPENED = 32  # traces that visitors look at, each as it was when it was opened
_GONE = "This trace is no longer kept: choose another, or hand it in again."

_GLUE = """
const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 60000));
  try {
    return JSON.parse(await Promise.race([server[name](argument), late]));
  } catch (error) {
    return null;
  }
};
const root = element.querySelector(".lkr");
element.replay = labkit.replay(root, ask);
watch("value", () => {
  const handed = props.value && JSON.parse(props.value);
  if (handed) element.replay.add(handed.key, handed.name);
});
"""
_MESSAGE = """
const line = element.querySelector("p");
watch("value", () => { line.textContent = props.value || ""; });
"""


@dataclass(frozen=True)
class _Opened:
    """A trace as it was when somebody opened it."""

    trace: Trace
    lanes: dict[str, int]
    packed: dict[str, Any]


class Traces:
    """The traces that can be replayed, and those that are being looked at. Safe to use from many threads.

    Args:
        sources: a function that gives the lab's own traces by the names under which they are shown.
    """

    def __init__(self, sources: Callable[[], Mapping[str, Trace]]) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._heavy = threading.Lock()  # one long trace is packed at a time, because the engine runs on
        self._uploads: OrderedDict[str, tuple[Trace, int]] = OrderedDict()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()

    def names(self) -> list[str]:
        """The lab's own traces."""
        return list(self._sources())

    def hand_in(self, path: str | os.PathLike[str]) -> str:
        """Keep the trace in a file, and return a key under which it is found, which nobody can guess.

        Raises:
            TraceError: if the file is no trace, or too large.
        """
        trace, size = read_upload(path), os.path.getsize(path)
        key = secrets.token_hex(16)
        with self._lock:
            self._uploads[key] = (trace, size)
            while len(self._uploads) > 1 and (
                len(self._uploads) > MAX_UPLOADS or sum(s for _, s in self._uploads.values()) > 2 * MAX_BYTES
            ):
                self._uploads.popitem(last=False)
        return key

    def open(self, key: str) -> tuple[str, _Opened]:
        """A trace as it is now, and a name to ask more about it. Raises KeyError if it is no longer kept."""
        trace = self._find(key)
        records = list(trace.records)
        with self._heavy:
            with self._lock:
                for name, opened in self._opened.items():
                    seen = opened.trace.records
                    if len(seen) == len(records) and all(a is b for a, b in zip(seen, records, strict=True)):
                        self._opened.move_to_end(name)
                        return name, opened
            still = Trace(trace.meta, records)
            opened = _Opened(still, replay_data.lanes_of(still), replay_data.pack(still))
        name = secrets.token_hex(16)
        with self._lock:
            self._opened[name] = opened
            while len(self._opened) > MAX_OPENED:
                self._opened.popitem(last=False)
        return name, opened

    def _find(self, key: str) -> Trace:
        if key.startswith("s:"):
            return self._sources()[key[2:]]
        with self._lock:
            return self._uploads[key][0]

    def opened(self, name: str) -> _Opened:
        """What `open` gave. Raises KeyError if it was forgotten since."""
        with self._lock:
            self._opened.move_to_end(name)
            return self._opened[name]

    def save(self, name: str, kind: str) -> tuple[str, str]:
        """A file's name and text, of kind "trace" or "perfetto". Raises KeyError as `opened` does."""
        trace = self.opened(name).trace
        with self._heavy:
            if kind == "perfetto":
                return "labkit.perfetto.json", "".join(perfetto.lines(trace))
            return "labkit.trace.jsonl", "".join(line + "\n" for line in trace.lines())


def build_replay_tab(sources: Callable[[], Mapping[str, Trace]]) -> gr.HTML:
    """Add the replay to the Blocks that is being built. The page must have the variables of `live_feed.css`.

    Args:
        sources: a function that gives the traces that everybody may see, by name. It is called from any
        thread
            and must be quick. The traces may grow; the replay shows each as it was when it was opened.

    Returns:
        The component that shows it.
    """
    traces = Traces(sources)

    def names(_: Any) -> str:
        return _answer([style.label(name, 60) for name in traces.names()])

    def open_trace(question: Any) -> str:
        try:
            name, opened = traces.open(_real_key(traces, _text(question, "key")))
        except KeyError:
            return _answer({"error": _GONE})
        return _answer({"opened": name, "data": opened.packed})

    def frames_of(question: Any) -> str:
        try:
            opened = traces.opened(_text(question, "opened"))
        except KeyError:
            return _answer({"gone": True})
        first, count = _number(question, "first"), _number(question, "count")
        return _answer({"frames": replay_data.frames(opened.trace, opened.lanes, first, max(1, count))})

    def save(question: Any) -> str:
        try:
            name, text = traces.save(_text(question, "opened"), _text(question, "kind"))
        except KeyError:
            return _answer({"error": _GONE})
        return _answer({"name": name, "text": text})

    def hand_in(path: str | None) -> tuple[str, Any]:
        if not path:
            return "", gr.skip()
        try:
            key = traces.hand_in(path)
        except TraceError as error:
            return f"This file cannot be replayed. {style.label(str(error), 400)}", gr.skip()
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)  # gradio's copy: what we need of it is in memory
        return "", _answer({"key": key, "name": f"File: {style.label(PurePath(path).name, 40)}"})

    bare: dict[str, Any] = {"apply_default_css": False, "padding": False}
    # The browser knows server functions by their names.
    named = {"traces": names, "open": open_trace, "frames": frames_of, "save": save}
    for name, function in named.items():
        function.__name__ = name
    with gr.Row(elem_id="lkr-hand-in", equal_height=False):
        button = gr.UploadButton(
            "Open a trace file", file_types=[".jsonl", ".json", ".txt"], size="sm", scale=0, min_width=160
        )
    message = gr.HTML(
        html_template='<p role="alert"></p>',
        js_on_load=_MESSAGE,
        elem_id="lkr-message",
        **bare,
    )
    view = gr.HTML(
        html_template=f"<style>{asset('replay.css')}</style>{asset('replay.html')}",
        js_on_load=script("live_feed.js", "regions.js", "replay_data.js", "replay.js") + _GLUE,
        server_functions=list(named.values()),
        elem_id="lkr-replay",
        **bare,
    )
    button.upload(
        hand_in, button, [message, view], show_progress="hidden", concurrency_limit=2, api_name=False
    )
    return view


def _real_key(traces: Traces, key: str) -> str:
    """The key of a trace whose name may have been shortened for display."""
    if not key.startswith("s:"):
        return key
    return next((f"s:{name}" for name in traces.names() if style.label(name, 60) == key[2:]), key)


def _answer(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _text(question: Any, name: str) -> str:
    """A field of what a browser asks, which may be anything."""
    value = question.get(name) if isinstance(question, dict) else None
    return value if isinstance(value, str) else ""


def _number(question: Any, name: str) -> int:
    value = question.get(name) if isinstance(question, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0
