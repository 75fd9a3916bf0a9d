"""A run as one file: what a browser finds in it is the run, and nothing in a run becomes part of the page."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit
from labkit.trace.records import Copy
from labkit.trace.trace import Trace
from labkit.views import replay_data, run_page
from labkit.views.assets import asset, script
from labkit.views.facts.batch_timeline import Timeline
from tests.views.stories import busy, draft_run, run, story, timed, trace_of, traces

NASTY = [
    "</script><script>alert(1)</script>", "<!--<script>", "-->", "]]>", "</style>", "</title>", "<img src=x>",
    "\u2028", "\u2029", "\\u003c", "&lt;/script&gt;", "\"'`${1}", "\ud800", "\x00", "\r\n",
]  # fmt: skip
nasty = st.one_of(
    st.sampled_from(NASTY), st.text(max_size=40), st.lists(st.sampled_from(NASTY), max_size=3).map("".join)
)


class Tags(HTMLParser):
    """All tags of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(tag)

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", data))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.data.append(data)


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def kept(page: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The title, the pack and the frames in a page, as its script reads them."""
    run = json.loads(Tags(page).data[0])
    found: list[dict[str, Any]] = []
    for place, piece in run["frames"]:
        assert place == len(found)
        before: dict[int, list[int]] = {}
        for frame in unpacked(piece):
            tables = [
                (lane, n, before.get(lane, [])[:same] + rest) for lane, n, same, rest in frame["tables"]
            ]
            before = {lane: blocks for lane, _, blocks in tables}
            found.append(frame | {"tables": [list(table) for table in tables]})
    return run["title"], unpacked(run["data"]), found


def sent(trace: Trace) -> list[dict[str, Any]]:
    """All frames as a lab would send them."""
    lanes, found = replay_data.lanes_of(trace), []
    while len(found) < len(trace):
        found += replay_data.frames(trace, lanes, len(found), 7)
    return json.loads(json.dumps(found))


@settings(max_examples=40, deadline=None)
@given(st.one_of(traces(), st.integers(0, 9).map(draft_run)))
def test_a_page_holds_what_the_replay_is_sent(trace: Trace) -> None:
    _, packed, frames = kept(run_page.page(trace))
    assert packed == json.loads(json.dumps(replay_data.pack(trace)))
    assert frames == sent(trace)


def test_a_table_that_changes_where_it_begins_is_held_too() -> None:
    first, *rest = story()
    copied = dataclasses.replace(rest[0], copied=(Copy("a", 0, 5),))  # b keeps the block that both share
    trace = Trace(story().meta, [first, copied])
    assert kept(run_page.page(trace))[2] == sent(trace)
    assert [table[2] for table in sent(trace)[1]["tables"]] == [[5, 1], [0, 2]]


@settings(max_examples=80, deadline=None)
@given(title=nasty, names=st.tuples(nasty, nasty), reasons=st.tuples(nasty, nasty, nasty))
def test_nothing_in_a_run_becomes_markup_or_script(
    title: str, names: tuple[str, str], reasons: tuple[str, str, str]
) -> None:
    plain = run([(0, "a", 5, 3), (0, "b", 6, 9)])
    ids = {"a": f"a{names[0]}", "b": f"b{names[1]}"}  # two requests need two names
    trace = run([(0, ids["a"], 5, 3), (0, ids["b"], 6, 9)])
    records = [
        dataclasses.replace(
            record,
            blocked=(ids["b"], reasons[0]),
            held_back=reasons[1],
            finished=tuple(end._replace(reason=reasons[2]) for end in record.finished),
        )
        for record in trace
    ]
    trace = Trace(dataclasses.replace(trace.meta, model=reasons[0], device=reasons[1]), records)
    page = run_page.page(trace, title)
    page.encode()  # a file can hold it
    found, expected = Tags(page), Tags(run_page.page(plain))
    assert found.tags == expected.tags
    assert found.data[1] == expected.data[1] and len(found.data) == 2
    assert not set("<\u2028\u2029\r") & set(found.data[0])
    assert kept(page)[2] == sent(trace)


@settings(max_examples=80, deadline=None)
@given(nasty, nasty, nasty, st.sampled_from(["&", "<", "&amp;<b>", ">"]))
def test_the_words_for_a_reader_without_scripts_are_never_markup(
    name: str, model: str, reason: str, end: str
) -> None:
    """The headline holds numbers alone today: here it says all that a user could have written."""
    trace = run([(0, f"a{name}", 5, 3)])
    records = [dataclasses.replace(record, blocked=(f"a{name}", reason)) for record in trace]
    trace = Trace(dataclasses.replace(trace.meta, model=model), records)
    said = f"{name} asked {model}", f"{reason}{end}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timeline, "headline", property(lambda _: said))
        page = run_page.page(trace)
    (inside,) = re.findall(
        r"<noscript><p>(.*?)\. The pictures need JavaScript\.</p></noscript>", page, re.DOTALL
    )
    assert not set(inside) & set("<>\"'")
    assert not re.search(r"&(?!amp;|lt;|gt;|quot;|#x27;)", inside)
    assert html.unescape(inside) == ". ".join(said)


def test_the_scripts_and_styles_can_stand_in_a_page() -> None:
    code = script(*run_page.SCRIPTS) + asset("run_page.js")
    assert "</script" not in code.lower() and "<!--" not in code
    assert not any(
        word in code
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "fetch(", "import(")
    )
    styles = asset("live_feed.css") + asset("replay.css") + asset("run_page.css")
    assert "</style" not in styles and "url(" not in styles and "@import" not in styles
    assert "http" not in run_page.page(story()).replace("http-equiv", "")


def test_500_steps_of_32_requests_are_less_than_a_megabyte(tmp_path: Path) -> None:
    rng = random.Random(5)
    first = [(0, str(i), rng.randint(200, 1500), 500) for i in range(32)]
    trace = timed(run(first, num_blocks=6000, block_size=16, budget=4096, seats=32))
    assert len(trace) >= 500 and sum(len(record.requests) for record in trace) / len(trace) > 31
    labkit.export_html(trace, tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size < 1_000_000


# -- what is refused ------------------------------------------------------------------------------


def test_a_trace_without_steps_or_none_at_all_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with pytest.raises(ValueError, match=r"^trace holds no steps"):
        labkit.export_html(trace_of(), path)
    for wrong in ("run.jsonl", busy().records, None):
        with pytest.raises(TypeError, match=r"^trace must be a Trace, .*, not (str|list|NoneType)$"):
            labkit.export_html(wrong, path)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "no" / "run.html", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind, match="path: cannot be written") as caught:
            labkit.export_html(busy(), path)
        assert str(path) in str(caught.value)


def test_a_run_that_is_too_long_is_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"^trace is too long for a page: 0 of its 26 steps take 0 MB"):
        run_page.page(busy())


def test_an_engine_may_go_on_while_its_page_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = busy()
    growing = Trace(whole.meta, whole.records[:5], max_steps=6)
    pack = replay_data.pack

    def and_grow(trace: Trace) -> Any:
        packed = pack(trace)
        for record in whole.records[5:]:
            growing.append(record)
        return packed

    monkeypatch.setattr(replay_data, "pack", and_grow)
    _, packed, frames = kept(run_page.page(growing))
    assert [frame["step"] for frame in frames] == packed["steps"]["step"] == [0, 1, 2, 3, 4]
