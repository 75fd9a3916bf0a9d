"""What a file is that is no trace, as far as its first bytes tell: the reader's complaint says it."""

from __future__ import annotations

_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
}
_PERFETTO = "a trace in Perfetto's format, which ui.perfetto.dev opens: save the run as JSON Lines"
_JSON = {
    '"traceEvents"': _PERFETTO,
    '"displayTimeUnit"': _PERFETTO,
    '"nbformat"': "a notebook",
    '"cells"': "a notebook",
}
HEAD = 4096  # bytes that are looked at


def what_bytes_are(head: bytes) -> str:
    """The kind of a file that is no text, with its article; "" if the first bytes do not tell."""
    return next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), "")


def what_text_is(line: str) -> str:
    """The kind of a text whose first line is no header of a trace; "" if the line does not tell."""
    if line.lstrip().startswith("<"):
        return "a web page"
    head = line[:HEAD]
    if head.lstrip().startswith("{"):
        return next((kind for name, kind in _JSON.items() if name in head), "")
    return ""
