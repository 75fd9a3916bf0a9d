"""The replay tab: a scrubber over any trace, the lab's own, that of a past race, or a file of a visitor."""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from labkit.page.upload import MAX_BYTES, BusyError, Uploads, check_size
from labkit.trace.trace import Trace
from labkit.views import perfetto, replay_data, run_page, style
from labkit.views.assets import asset, script

MAX_UPLOADS = 16
MAX_OPENED = 32  # traces that visitors look at, each as it was when it was opened
_GONE = "This trace is no longer kept: choose another, or hand it in again."

_SCRIPTS = (*run_page.SCRIPTS, "hand_in.js")
_GLUE = """
const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 60000));
  try {
    return JSON.parse(await Promise.race([server[name](argument), late]));
  } catch (error) {
    return null;
  }
};
element.replay = labkit.replay(element.querySelector(".lkr"), ask);
labkit.handIn(element, MAX_BYTES, ask, element.replay.add);
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
        self._reading = Uploads()
        self._uploads: OrderedDict[str, tuple[Trace, int]] = OrderedDict()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._packing: dict[str, threading.Lock] = {}  # by the key of a trace that is being packed
        self._saving = threading.Semaphore(2)  # a saved file is large, and none is waited for for long

    def names(self) -> list[str]:
        """The lab's own traces."""
        return list(self._sources())

    def hand_in(self, data: bytes, sender: str = "") -> tuple[str, Trace]:
        """Keep the trace in the bytes of a file; return a key for it, which nobody can guess, and the trace.

        Raises:
            TraceError: if the file is no trace, or too large.
            BusyError: if it cannot be read yet (see `Uploads.read`).
        """
        trace = self._reading.read(data, sender)
        key = secrets.token_hex(16)
        with self._lock:
            self._uploads[key] = (trace, len(data))
            while len(self._uploads) > 1 and (
                len(self._uploads) > MAX_UPLOADS or sum(s for _, s in self._uploads.values()) > 2 * MAX_BYTES
            ):
                self._uploads.popitem(last=False)
        return key, trace

    def open(self, key: str) -> tuple[str, _Opened]:
        """A trace as it is now, and a name to ask more about it. Raises KeyError if it is no longer kept.

        Those who open the same trace at once wait for one another and share what is made; nobody waits for
        another trace.
        """
        trace = self._find(key)
        with self._lock:
            packing = self._packing.setdefault(key, threading.Lock())
        try:
            with packing:
                return self._open(trace)
        finally:
            with self._lock:
                self._packing.pop(key, None)

    def _open(self, trace: Trace) -> tuple[str, _Opened]:
        records = list(trace.records)
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

    def save(self, name: str, kind: str) -> dict[str, str]:
        """A file's name, type and text, of kind "trace", "perfetto" or "page".

        Raises:
            KeyError: as `opened` does.
            ValueError: if the trace is too large for a page.
        """
        trace = self.opened(name).trace
        with self._saving:
            if kind == "page":
                return {"name": "labkit.run.html", "type": "text/html", "text": run_page.page(trace)}
            if kind == "perfetto":
                name, lines = "labkit.perfetto.json", perfetto.lines(trace)
            else:
                name, lines = "labkit.trace.jsonl", (line + "\n" for line in trace.lines())
            return {"name": name, "type": "application/json", "text": "".join(lines)}


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
            return _answer(traces.save(_text(question, "opened"), _text(question, "kind")))
        except KeyError:
            return _answer({"error": _GONE})
        except ValueError as error:
            return _answer({"error": f"Not saved: {error}."})

    def hand_in(question: Any, request: gr.Request) -> str:
        size = _number(question, "size")
        try:
            check_size(size)
            data = base64.b64decode(_text(question, "data"), validate=True)
            key, trace = traces.hand_in(data, request.client.host if request.client else "")
        except BusyError as error:
            return _answer({"busy": str(error)})
        except ValueError as error:  # of the trace, or of what should be its bytes
            return _answer({"error": f"This file cannot be replayed. {style.label(str(error), 400)}"})
        return _answer(
            {"key": key, "name": f"File: {style.label(_text(question, 'name'), 40)}", "note": trace.note}
        )

    bare: dict[str, Any] = {"apply_default_css": False, "padding": False}
    # The browser knows server functions by their names.
    named = {"traces": names, "open": open_trace, "frames": frames_of, "save": save, "hand_in": hand_in}
    for name, function in named.items():
        function.__name__ = name
    facts = f"const MAX_BYTES = {MAX_BYTES};\n"
    return gr.HTML(
        html_template=f"<style>{asset('replay.css')}</style>{asset('hand_in.html')}{asset('replay.html')}",
        js_on_load=facts + script(*_SCRIPTS) + _GLUE,
        server_functions=list(named.values()),
        elem_id="lkr-replay",
        **bare,
    )


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
