"""Files that people hand in: good ones come back as they were, all others cost little and get a sentence."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from labkit.page import upload
from labkit.page.upload import BusyError, Uploads, read_upload
from labkit.trace.pool_state import PoolState
from labkit.trace.records import TraceError
from labkit.trace.trace import Trace
from tests.views.stories import run

HEAD = {
    "format": "labkit-trace",
    "version": 1,
    "num_blocks": 8,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
}


def written(*lines: Any, head: dict[str, Any] = HEAD) -> bytes:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in (head, *lines))
    return "".join(text + "\n" for text in texts).encode()


def step(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"step": number, **fields}


def test_a_good_file_comes_back(tmp_path: Path) -> None:
    trace = run([(i, str(i), 5 + i, 9) for i in range(6)])
    trace.save(tmp_path / "run.jsonl")
    assert read_upload((tmp_path / "run.jsonl").read_bytes()) == trace


BAD: dict[str, tuple[Any, str]] = {
    "empty": (b"", "The file is empty."),
    "a picture": (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a trace: the file is a picture"),
    "latin-1": (b"caf\xe9", "not UTF-8"),
    "zeros": (b"\0" * 1000, "line 1: not JSON"),
    "a page": (b"<!doctype html><script>alert(1)</script>", "not a trace: the file is a web page"),
    "another format": (b'{"format": "other"}', 'the first line must say "format": "labkit-trace"'),
    "a list": (b"[1, 2]", "expected an object"),
    "deep": (b"[" * 100_000, "line 1: not JSON"),
    "no steps": (json.dumps(HEAD).encode(), "holds no steps"),
    "no newline for long": (b"{" + b" " * (upload.MAX_LINE + 1), "line 1: longer than 128 KiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_trace(name: str) -> None:
    data, said = BAD[name]
    with pytest.raises(TraceError) as caught:
        read_upload(data)
    assert said in str(caught.value)


ROW = {"requests": ["a"], "kinds": "p", "starts": [0], "num_tokens": [4], "sampled": [[1]]}
LINES: dict[str, tuple[list[Any], str]] = {
    "no pages": ([step(**ROW)], "line 2: request 'a' computes token 3 but holds blocks for 0 only"),
    "a page of no pool": ([step(taken=[["a", [8]]])], "line 2: block 8 is outside the pool of 8"),
    "more pages than there are": (
        [step(taken=[["a", [0] * 9]])],
        "line 2: more blocks than the pool has (8)",
    ),
    "bit by bit": (
        [step(i, taken=[["a", [0] * 3]]) for i in range(3)],
        "line 4: a request holds more blocks than the pool has (8)",
    ),
    "steps go back": ([step(3), step(3)], "line 3: step 3 does not come after step 3"),
    "not a number": (['{"step": 0, "time": NaN}'], "line 2: time: nan is no time"),
    "endless": (['{"step": 0, "seconds": 1e999}'], "line 2: seconds: inf is no time"),
    "a huge time": ([step(time=10**400)], "line 2: time: a number is too large"),
    "a huge step": ([step(10**30)], "line 2: step: a number is too large"),
    "digits": (['{"step": ' + "9" * 5000 + "}"], "line 2: not JSON"),
    "an unknown field": ([step(evil=1)], "line 2: unknown field 'evil'"),
    "a truncated line": (['{"step": 0, "requests": ["a"'], "line 2: not JSON"),
    "a copy of nothing": ([step(copied=[["a", 0, 1]])], "line 2: copies a block that its request does not"),
    "text for a number": ([step("0")], "line 2: step: unexpected value '0'"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_trace_with_a_broken_step(name: str) -> None:
    lines, said = LINES[name]
    with pytest.raises(TraceError) as caught:
        read_upload(written(*lines))
    assert said in str(caught.value)


def test_a_complaint_is_short_whatever_it_quotes() -> None:
    with pytest.raises(TraceError) as caught:
        read_upload(written(step("x" * 100_000)))
    assert len(str(caught.value)) == 300


def test_a_pool_beyond_all_measure() -> None:
    with pytest.raises(TraceError, match="16,384 pages"):
        read_upload(written(step(), head={**HEAD, "num_blocks": 10**6}))


def test_a_large_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_read", lambda data: pytest.fail("it was read"))
    with pytest.raises(TraceError, match=r"The file has 17.0 MiB, and the limit is 16 MiB"):
        read_upload(bytes(upload.MAX_BYTES + 2**20))


SHARED = [["a", 0, [0] * 4]]
COPIES = [["a", 0, 0]] * 2


@pytest.mark.parametrize(
    ("limit", "lines", "said"),
    [
        ("MAX_STEPS", [step(i) for i in range(4)], "more than 3 steps"),
        ("MAX_REQUESTS", [step(arrived=[[str(i), 1, 1] for i in range(4)])], "more than 3 requests"),
        ("MAX_AT_ONCE", [step(arrived=[[str(i), 1, 1] for i in range(4)])], "or 3 at once"),
        ("MAX_ENTRIES", [step(admitted=SHARED)], "share more pages than"),
        ("MAX_WORK", [step(i, admitted=[[str(i), 0, [0]]]) for i in range(3)], "share more pages than"),
        ("MAX_WORK", [step(taken=[["a", [0]]], copied=COPIES)], "share more pages than"),
        ("MAX_SECONDS", [step()], "takes more than -1 seconds"),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: str, lines: list[Any], said: str) -> None:
    data = written(*lines)
    read_upload(data)
    monkeypatch.setattr(upload, limit, -1.0 if limit == "MAX_SECONDS" else 3)
    with pytest.raises(TraceError, match=said):
        read_upload(data)


def test_a_pool_that_is_full_in_every_step_is_within_the_limits() -> None:
    assert upload.MAX_WORK >= upload.MAX_STEPS * upload.MAX_PAGES


def test_copies_that_each_look_through_a_full_table_are_counted_before_they_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies at the end of a full block table: each has to look through all of it."""
    steps: list[int] = []
    count = PoolState.begin
    monkeypatch.setattr(PoolState, "begin", lambda state, record: (steps.append(1), count(state, record))[1])
    monkeypatch.setattr(upload, "MAX_WORK", 100_000)
    taken = [step(0, taken=[["a", [0] * 500]]), step(1, taken=[["a", [1]]])]
    copies = [["a", 1 + i % 2, 2 - i % 2] for i in range(20)]
    head = {**HEAD, "num_blocks": 512}
    data = written(*taken, *(step(2 + i, copied=copies) for i in range(100)), head=head)
    with pytest.raises(TraceError, match="share more pages"):
        read_upload(data)
    assert len(steps) == 2 + 100_000 // (501 + 4 * 20 * 501) + 1


def test_a_file_of_one_sender_is_read_at_a_time_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads, begun, go_on = Uploads(), threading.Event(), threading.Event()
    trace = run([(0, "a", 5, 3)])

    def read(data: bytes) -> Trace:
        begun.set()
        assert not data or go_on.wait(60)
        return trace

    monkeypatch.setattr(upload, "read_upload", read)
    first = threading.Thread(target=uploads.read, args=(b"slow", "one"))
    first.start()
    assert begun.wait(60)
    with pytest.raises(BusyError, match="try again"):
        uploads.read(b"", "one")
    assert uploads.read(b"", "another") is trace
    monkeypatch.setattr(upload, "MAX_READERS", 1)
    with pytest.raises(BusyError):
        uploads.read(b"", "another")
    go_on.set()
    first.join()
    assert uploads.read(b"", "one") is trace and not uploads._senders


def test_cut_and_bent_files_never_raise_anything_else() -> None:
    rng = random.Random(5)
    text = "\n".join(run([(i, str(i), 5, 6) for i in range(4)], num_blocks=9).lines())
    outcomes = []
    for _ in range(150):
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b'0129[]{}",:x\n-')
        try:
            cut = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
            outcomes.append(isinstance(read_upload(bytes(cut)), Trace))
        except TraceError as error:
            outcomes.append(False)
            assert str(error)
    assert any(outcomes) and not all(outcomes)
