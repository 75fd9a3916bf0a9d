"""The replay tab in a real browser, and what it answers to requests that are made in other ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labkit.page import replay_tab
from labkit.page.replay_tab import Traces, build_replay_tab
from labkit.page.upload import MAX_BYTES
from labkit.trace.records import TraceError
from labkit.trace.trace import Trace
from labkit.views import perfetto
from labkit.views.assets import asset
from labkit.views.facts.pool_blocks import blocks_of
from tests.tabs import HOSTILE, Looker, browser, served  # noqa: F401
from tests.views.stories import busy, draft_story, run, story, timed

TRACES = {
    "A busy one": busy(),
    "The story": story(),
    HOSTILE: run([(0, HOSTILE, 5, 3), (0, "b", 6, 9)]),
    "Drafts": draft_story(),
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(lambda: build_replay_tab(lambda: TRACES)) as address:
        yield address


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Looker]]:  # noqa: F811
    people: list[Looker] = []

    def arrive(**options: Any) -> Looker:
        people.append(Looker(browser, address, "replay", **options))
        people[-1].until("document.querySelector('.lkr').dataset.drawn")
        return people[-1]

    yield arrive
    for person in people:
        person.context.close()
    assert [problem for person in people for problem in person.problems] == []


def agrees(me: Looker, trace: Trace, step: int) -> None:
    """The page shows a step as the trace has it."""
    me.until("document.querySelector('.lkr').dataset.drawn === String(arg)", step)
    pool = blocks_of(trace, step)
    owners = me.look(
        "[...it.state.past.owners].map(([block, list]) => "
        "[block, list.map(({ request, filled }) => [it.data().lanes[request].name, filled])])"
    )
    assert {block: [name for name, _ in found] for block, found in owners} == {
        block.number: list(block.owners) for block in pool.blocks if block.owners
    }
    words = me.page.inner_text(".lkr-now")
    assert words.startswith(f"Step {step}: ") and f"{pool.owned} of " in words
    waiting, usage = trace.at(step).waiting, round(100 * pool.owned / trace.meta.num_blocks)
    meters = me.page.get_attribute('[data-picture="meters"]', "aria-label")
    assert f"wasted: {usage}%; running, waiting: " in meters and meters.endswith(f", {waiting}")


# -- looking --------------------------------------------------------------------------------------


def test_scrub_with_the_keyboard(visit: Callable[..., Looker]) -> None:
    me, trace = visit(), TRACES["A busy one"]
    agrees(me, trace, 0)
    me.page.focus(".lkr-scrub")
    for step in range(1, 12):
        me.page.keyboard.press("ArrowRight")
        agrees(me, trace, step)
    me.page.keyboard.press("ArrowLeft")
    agrees(me, trace, 10)
    me.page.keyboard.press("End")
    agrees(me, trace, trace[-1].step)
    me.page.keyboard.press("Home")
    agrees(me, trace, 0)
    assert me.page.get_attribute(".lkr-scrub", "aria-valuetext") == "step 0"


def test_buttons_play_and_pause(visit: Callable[..., Looker]) -> None:
    me, trace = visit(), TRACES["A busy one"]
    me.page.click(".lkr-forward")
    agrees(me, trace, 1)
    me.page.click(".lkr-last")
    agrees(me, trace, trace[-1].step)
    me.page.select_option(".lkr-speed", "60")
    me.page.click(".lkr-play")  # at the end it begins anew
    me.until("it.where() > 0 && it.where() < arg", trace[-1].step)
    me.page.click(".lkr-play")
    step = me.look("it.where()")
    me.page.wait_for_timeout(120)
    assert me.look("it.where()") == step
    agrees(me, trace, step)
    me.page.keyboard.press("Escape")
    me.page.click(".lkr-play")
    me.until("document.querySelector('.lkr-play').textContent === 'Play'")
    agrees(me, trace, trace[-1].step)


def test_click_on_the_pictures_to_go_there(visit: Callable[..., Looker]) -> None:
    me, trace = visit(), TRACES["A busy one"]
    box = me.page.locator('[data-picture="strip"]').bounding_box()
    me.page.mouse.click(box["x"] + box["width"] - 10, box["y"] + 20)
    agrees(me, trace, trace[-1].step)
    me.page.mouse.click(box["x"] + 50, box["y"] + 20)
    agrees(me, trace, 0)


def test_queue_reasons_events_and_block_tables(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.page.select_option(".lkr-source", "s:The story")
    me.until("it.where() === 3")
    agrees(me, TRACES["The story"], 3)
    assert me.page.inner_text(".lkr-queue").split("\n") == ["b", "no seat"]
    assert "arrives with 7 prompt tokens" in me.page.inner_text(".lkr-events")
    me.page.click(".lkr-forward")
    agrees(me, TRACES["The story"], 4)
    tables = me.page.inner_text(".lkr-tables").split()
    assert "chunk," in tables and "".join(tables).endswith("5inthecache02")
    assert me.page.inner_text(".lkr-queue") == "Nobody waits."
    me.page.click(".lkr-forward")
    agrees(me, TRACES["The story"], 5)
    assert "preempted, gives 2 pages back" in me.page.inner_text(".lkr-events")
    assert "3 steps" not in me.page.inner_text(".lkr-headline")


def test_drafts_are_told_where_somebody_drafts(visit: Callable[..., Looker]) -> None:
    me = visit()
    assert me.page.is_hidden(".lkr-drafts") and "drafted" not in me.page.inner_text(".lkr")
    me.page.select_option(".lkr-source", "s:Drafts")
    me.until("it.where() === 0 && it.data().drafting")
    assert me.page.is_visible(".lkr-drafts")
    assert "10 drafted, 5 of them right" in me.page.inner_text(".lkr-headline")
    me.page.click(".lkr-forward")
    agrees(me, TRACES["Drafts"], 1)
    assert me.page.inner_text(".lkr-now").endswith("1 generated: 4 drafted, 0 of them right.")
    assert "5 tokens: 4 drafted, 0 of them right" in me.page.inner_text(".lkr-tables")
    assert "gives 1 page back, because its drafts were wrong" in me.page.inner_text(".lkr-events")
    me.page.click(".lkr-last")
    agrees(me, TRACES["Drafts"], 5)
    assert me.page.inner_text(".lkr-now").endswith("2 tokens computed, 2 generated.")
    assert "1 of 2 rows draft nothing" in me.page.inner_text(".lkr-events")


def test_hover_marks_a_request(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.page.locator(".lkr-tables .lkr-who").first.hover()
    assert me.look("it.state.hover.request") == 0
    me.page.mouse.move(0, 0)
    assert me.look("it.state.hover.request") is None


def test_names_stay_text(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.until("document.querySelector('.lkr-source').options.length === arg", len(TRACES))
    me.page.select_option(".lkr-source", index=2)
    me.until("it.data().lanes.length === 2")
    me.until("document.querySelector('.lkr-tables').textContent.includes('<img')")
    me.no_markup()


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light"), (1920, "dark")])
def test_it_fits_any_width_light_and_dark(visit: Callable[..., Looker], width: int, scheme: str) -> None:
    me = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert me.look("document.documentElement.scrollWidth") <= width
    painted = me.look(
        "(() => { const c = document.querySelector('[data-picture=\"lanes\"]');"
        "const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(new Uint32Array(data.buffer)).size; })()"
    )
    assert painted > 10


# -- files ----------------------------------------------------------------------------------------


def test_saved_files_come_back(visit: Callable[..., Looker], tmp_path: Path) -> None:
    me, trace = visit(), TRACES["A busy one"]
    with me.page.expect_download() as got:
        me.page.click('[data-save="trace"]')
    assert got.value.suggested_filename == "labkit.trace.jsonl"
    got.value.save_as(tmp_path / "back.jsonl")
    assert Trace.load(tmp_path / "back.jsonl") == trace
    with me.page.expect_download() as got:
        me.page.click('[data-save="perfetto"]')
    got.value.save_as(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads("".join(perfetto.lines(trace)))
    me.page.set_input_files("#lkr-hand-in input[type=file]", tmp_path / "back.jsonl")
    me.until("document.querySelector('.lkr-source').selectedOptions[0]?.text === 'File: back.jsonl'")
    me.until("it.data().count === arg", len(trace))
    agrees(me, trace, 0)
    assert me.page.is_hidden("#lkr-message")


def test_a_bad_file_gets_a_sentence_and_changes_nothing(visit: Callable[..., Looker], tmp_path: Path) -> None:
    me = visit()
    cases = {
        "picture.json": (b"\x89PNG\xff\xfe", "the file is a picture"),
        "page.json": (HOSTILE.encode(), "the file is a web page"),
        "empty.jsonl": (b"", "The file is empty."),
        "bent.jsonl": ("\n".join(story().lines())[:-9].encode() + b"\n", "line 5: not JSON"),
        "large.jsonl": (b" " * (MAX_BYTES + 1), "and the limit is 16 MiB"),
    }
    for name, (data, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        me.page.set_input_files("#lkr-hand-in input[type=file]", tmp_path / name)
        me.until("document.querySelector('#lkr-message p').textContent.includes(arg)", said)
        assert me.page.inner_text("#lkr-message").startswith("This file cannot be replayed. ")
    assert me.look("document.querySelector('.lkr-source').options.length") == len(TRACES)
    me.page.click(".lkr-forward")
    agrees(me, TRACES["A busy one"], 1)
    me.no_markup()


def test_a_file_whose_last_line_is_torn_off_is_shown_with_a_note(
    visit: Callable[..., Looker], tmp_path: Path
) -> None:
    me = visit()
    (tmp_path / "torn.jsonl").write_text("\n".join(story().lines())[:-9])
    me.page.set_input_files("#lkr-hand-in input[type=file]", tmp_path / "torn.jsonl")
    me.until("it.data().count === 3 && document.querySelector('#lkr-message p').textContent.includes('torn')")


def test_two_people_hand_in_the_same_file(visit: Callable[..., Looker], tmp_path: Path) -> None:
    people = [visit(), visit()]
    story().save(tmp_path / "same.jsonl")
    for me in people:
        me.page.set_input_files("#lkr-hand-in input[type=file]", tmp_path / "same.jsonl")
    for me in people:
        me.until("document.querySelector('.lkr-source').selectedOptions[0]?.text === 'File: same.jsonl'")
        agrees(me, story(), 3)


def test_a_good_file_with_hostile_names(visit: Callable[..., Looker], tmp_path: Path) -> None:
    me = visit()
    path = tmp_path / "x.jsonl"
    TRACES[HOSTILE].save(path)
    me.page.set_input_files("#lkr-hand-in input[type=file]", path)
    me.until("it.data().lanes.length === 2")
    me.until("document.querySelector('.lkr-tables').textContent.includes('<img')")
    me.no_markup()


# -- without a browser ----------------------------------------------------------------------------


def test_a_growing_trace_stands_still_while_it_is_looked_at() -> None:
    whole = busy()
    growing = Trace(whole.meta, whole.records[:5], max_steps=6)
    traces = Traces(lambda: {"now": growing})
    name, opened = traces.open("s:now")
    assert traces.open("s:now")[0] == name, "two people who look at the same share it"
    for record in whole.records[5:]:
        growing.append(record)
    assert growing[0].step > 0 and len(traces.opened(name).trace) == 5
    again, later = traces.open("s:now")
    assert again != name and len(later.packed["steps"]["step"]) == len(growing)
    assert opened.packed["steps"]["step"] == [0, 1, 2, 3, 4]


def written(trace: Trace) -> bytes:
    return "\n".join(trace.lines()).encode()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_tab, "MAX_OPENED", 2)
    monkeypatch.setattr(replay_tab, "MAX_UPLOADS", 2)
    traces = Traces(dict)
    keys, names = [], []
    for seed in range(3):
        keys.append(traces.hand_in(written(timed(run([(0, str(seed), 5, 3)]))))[0])
        names.append(traces.open(keys[-1])[0])
    assert len(set(keys)) == 3 and all(len(key) == 32 for key in keys)
    with pytest.raises(KeyError):
        traces.opened(names[0])
    with pytest.raises(KeyError):
        traces.open(keys[0])
    assert traces.opened(names[2]) and traces.open(keys[1])
    monkeypatch.setattr(replay_tab, "MAX_BYTES", 1)
    traces.hand_in(written(story()))
    assert len(traces._uploads) == 1 and not traces._packing


def test_a_bad_file_leaves_nothing() -> None:
    traces = Traces(dict)
    with pytest.raises(TraceError):
        traces.hand_in(b"{}")
    assert not traces._uploads


def test_nobody_waits_for_the_trace_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = Traces(lambda: TRACES)
    begun, go_on = threading.Event(), threading.Event()
    pack = replay_tab.replay_data.pack

    def slow(trace: Trace) -> Any:
        if len(trace) == len(TRACES["The story"]):
            begun.set()
            assert go_on.wait(60)
        return pack(trace)

    monkeypatch.setattr(replay_tab.replay_data, "pack", slow)
    found: list[str] = []
    same = [threading.Thread(target=lambda: found.append(traces.open("s:The story")[0])) for _ in range(2)]
    for thread in same:
        thread.start()
    assert begun.wait(60) and traces.open("s:A busy one") and not found
    go_on.set()
    for thread in same:
        thread.join()
    assert len(found) == 2 and len(set(found)) == 1, "those who want the same share it"


@pytest.mark.parametrize(
    "junk", [None, 5, "text", [], {}, {"key": 5, "opened": [], "first": "x", "count": -1}]
)
def test_nonsense_is_answered(junk: Any) -> None:
    import gradio as gr

    with gr.Blocks():
        view = build_replay_tab(lambda: TRACES)
    answers = [json.loads(getattr(view, name)(junk)) for name in ("open", "frames", "save")]
    assert ["error" in answers[0], answers[1] == {"gone": True}, "error" in answers[2]] == [True] * 3
    assert len(json.loads(view.traces(junk))) == len(TRACES)
    sender = SimpleNamespace(client=None)
    assert "cannot be replayed" in json.loads(view.hand_in(junk, sender))["error"]
    assert "cannot be replayed" in json.loads(view.hand_in({"size": 4, "data": "=é"}, sender))["error"]


def test_the_files_of_both_tabs_are_safe_to_put_into_a_template() -> None:
    names = ("replay_data.js", "race.js", "replay.js", "hand_in.js", "race.html", "replay.html", "replay.css")
    for name in (*names, "hand_in.html"):
        text = asset(name)
        if name.endswith(".js"):
            assert not any(mark in text for mark in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval("))
        else:  # gradio reads these as templates
            assert not any(mark in text for mark in ("{{", "${", "`", "\\"))
