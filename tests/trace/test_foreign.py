"""Files that are no trace, or not quite: the complaint says what they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.trace import jsonl
from labkit.trace.records import StepRecord, TraceError, TraceMeta
from labkit.trace.trace import Trace
from labkit.views import perfetto
from tests.views.stories import HOSTILE, busy, story

TEXT = "".join(line + "\n" for line in story().lines())
NOTEBOOK = {"cells": [{"source": ["1"]}], "metadata": {}, "nbformat": 4}

FOREIGN: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(TEXT.encode()), "the file is a gzip archive: unpack it first"),
    "zip": (b"PK\x03\x04\xff\xfe", "the file is a zip archive"),
    "UTF-16": (TEXT.encode("utf-16"), "the file is UTF-16 text: save it as UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "the file is a picture"),
    "Perfetto": ("".join(perfetto.lines(story())).encode(), "the file is a trace in Perfetto's format"),
    "a notebook": (json.dumps(NOTEBOOK).encode(), "the file is a notebook"),
    "a notebook over lines": (json.dumps(NOTEBOOK, indent=1).encode(), "JSON over several lines, a notebook"),
    "a web page": (b"<!doctype html>\n<p>", "the file is a web page"),
    "two runs": ((TEXT + TEXT).encode(), "line 6: another run begins here, and a file holds one"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_something_else(tmp_path: Path, name: str) -> None:
    data, said = FOREIGN[name]
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(TraceError) as caught:
        Trace.load(tmp_path / "file")
    assert said in str(caught.value)


def test_the_mark_at_the_beginning_of_utf_8_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert Trace.load(tmp_path / "file") == story()
    assert Trace.from_lines(("\ufeff" + TEXT).splitlines()) == story()


@given(st.integers(len(TEXT.splitlines()[0]) + 1, len(TEXT)))
def test_a_file_that_was_cut_anywhere_is_read_up_to_there(end: int) -> None:
    cut = TEXT[:end]
    trace = Trace.from_lines(cut.splitlines(keepends=True))
    whole = cut.count("\n") - 1
    torn = cut.splitlines()[-1] if not cut.endswith("\n") else ""
    if torn and torn == TEXT.splitlines()[whole + 1]:  # only the end of the line is missing
        whole, torn = whole + 1, ""
    assert trace.records == story().records[:whole]
    assert trace.note == (jsonl.TORN if torn else "")


def test_only_the_last_line_may_be_torn() -> None:
    first, second, *rest = TEXT.splitlines(keepends=True)
    with pytest.raises(TraceError, match="line 2: not JSON"):
        Trace.from_lines([first, second[:-9] + "\n", *rest])
    with pytest.raises(TraceError, match="line 1: not JSON"):
        Trace.from_lines([first[:-9]])


HEAD = json.loads(TEXT.splitlines()[0])
WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a step that takes for ever": (
        lambda head, step: step.update(seconds=1e308),
        "seconds: 1e[+]308 is no time",
    ),
    "a time before the beginning": (lambda head, step: step.update(time=-1.0), "time: -1.0 is no time"),
    "fewer blocks than none": (
        lambda head, step: step.update(free_blocks=-1),
        "free_blocks must be between 0",
    ),
    "more blocks than all": (
        lambda head, step: step.update(free_blocks=10**9),
        "between 0 and 8, not 1000000000",
    ),
    "a prompt of less than nothing": (lambda head, step: step.update(arrived=[["x", -1, 1]]), "is negative"),
    "a hit of less than nothing": (lambda head, step: step.update(admitted=[["x", -1]]), "is negative"),
    "true for a version": (lambda head, step: head.update(version=True), "version True is not one"),
    "a version to come": (
        lambda head, step: head.update(version=2),
        "version 2 is not one this labkit reads",
    ),
    "a field to come": (
        lambda head, step: step.update(soon=1),
        "unknown field 'soon': a newer labkit may have",
    ),
    "an endless pool": (
        lambda head, step: head.update(num_blocks=2**40),
        "num_blocks must be at most 1,048,576",
    ),
    "endless blocks": (lambda head, step: head.update(block_size=2**40), "block_size must be at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_would_break_something_later(name: str) -> None:
    change, said = WRONG[name]
    head, step = dict(HEAD), {"step": 0}
    change(head, step)
    with pytest.raises(TraceError, match=said):
        Trace.from_lines([json.dumps(head), json.dumps(step)])


def test_what_an_engine_writes_is_accepted() -> None:
    assert Trace.from_lines(busy().lines()) == busy()
    late = Trace(TraceMeta(4, 2, 1, 8, started=4e9), [StepRecord(0, time=4e9, seconds=4e9, free_blocks=4)])
    assert Trace.from_lines(late.lines()) == late


@pytest.mark.parametrize("name", HOSTILE)
def test_why_says_nothing_that_a_terminal_obeys(name: str) -> None:
    from tests.views.stories import run

    trace = run([(0, "first", 5, 9), (0, name, 6, 3), (0, "\x1b[2J", 6, 3)], seats=1)
    for step in (trace[0].step, trace[-1].step):
        for request_id in ("first", name, "\x1b[2J", "\x1b]0;gone\x07"):
            assert trace.why(request_id, step).isprintable()
