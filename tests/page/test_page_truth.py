"""What the page says and draws agrees with itself: status and cards, marks and log, names, pages."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from labkit.models.chat import beginning
from labkit.page.session import Lab
from tests.page.places import CELL, SQUARE
from tests.visiting import Visitor

pytest_plugins = ["tests.visiting_fixtures"]

STATUS = "document.querySelector('.lk-summary').textContent"
ROWS = """(() => {
  const { clientWidth: width, clientHeight: height } = lab.show.canvases.timeline;
  const [pending, request] = it, selected = request ? { request } : {};
  const state = { ...lab.state, pending, hover: {}, selected };
  const rows = lab.laneRows(state, width, height);
  const middles = [...lab.labelled(state, rows)].map((row) => Math.max(6, (row + 0.5) * rows.pitch));
  return middles.sort((a, b) => a - b);
})()"""
INK = """(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 60, height: 12 });
  const ctx = canvas.getContext("2d"), rows = [...Array(12).keys()];
  lab.drawEnd(ctx, { paper: "#fff", ink: "#000" }, 30, 0, 12);
  const { data } = ctx.getImageData(0, 0, 60, 12);
  const columns = [...Array(60).keys()].filter((x) => rows.some((y) => data[4 * (60 * y + x) + 3]));
  return [columns[0], columns.at(-1)];
})()"""


def test_the_status_counts_as_the_cards_do(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    lab.session.live.pause()
    for i in range(3):
        me.inject(f"request {i}", max_tokens=4)
    me.until("document.querySelectorAll('.lk-card[data-status=waiting]').length === 3")
    me.until(f"{STATUS}.includes('0 running, 3 waiting')")
    lab.session.live.single_step()
    me.until(f"{STATUS} .startsWith('Now, after step 0: 3 running, 0 waiting')")
    me.until("document.querySelectorAll('.lk-card[data-status=running]').length === 3")
    me.inject("one more", max_tokens=4)
    me.until(f"{STATUS}.includes('3 running, 1 waiting')")
    lab.session.live.resume()
    me.until(f"{STATUS}.includes('0 running, 0 waiting')")


def test_the_status_names_the_step_that_is_looked_at(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    me.finished(me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=24))
    me.until(f"{STATUS}.startsWith('Now, after step 23: 0 running, 0 waiting, 0 of 96 pages in use')")
    me.page.mouse.click(*me.look(CELL.replace("STEP", "3")))
    me.until("lab.state.past?.step === 3")
    pages = len(me.look("lab.state.past.tables[0].blocks"))
    said = f"Step 3, looked back at: 1 ran, 0 waited, {pages} of 96 pages in use"
    assert me.page.inner_text(".lk-summary").startswith(said)
    me.page.keyboard.press("Escape")
    me.until(f"{STATUS}.startsWith('Now, after step 23: ')")


def test_a_request_ends_inside_the_step_that_the_log_names(come: Callable[..., Visitor]) -> None:
    me = come()
    request_id = me.inject("hello", max_tokens=12)
    me.finished(request_id)
    me.page.click("[data-side=log]") if me.page.is_visible("[data-side=log]") else None
    step = int(me.page.locator(".lk-log [data-kind=finish] .lk-when").inner_text())
    assert me.look("lab.state.lanes.get(it).ended", request_id) == step
    assert me.look(INK) == [23, 29], "the mark's right side is the end of its step"


@pytest.mark.parametrize("count", [3, 12, 24, 40])
def test_names_of_rows_never_touch(come: Callable[..., Visitor], count: int) -> None:
    me = come(width=1280, height=800)
    rows = [{"request": str(i), "label": str(i), "color": 0, "prompt_tokens": 0} for i in range(count)]
    for selected in ("", "1", str(count - 1)):
        places = me.look(ROWS, [rows, selected])
        assert len(places) >= min(count, 3)
        assert all(below - above >= 11 for above, below in pairwise(places))


def test_a_page_of_the_beginning_of_every_chat_says_so(come: Callable[..., Visitor], lab: Lab) -> None:
    model = lab.session.live.engine.model
    first, second = beginning(model.tokenizer), model.tokenizer.encode("<|im_start|>user\nhello")
    assert first and first == second[: len(first)]
    lab.change({"block_size": 4})
    me = come()
    lab.session.live.pause()
    me.inject("The quick brown fox", max_tokens=4)
    lab.session.live.single_step()
    me.until("lab.state.tables.length === 1")
    shared, own = me.look("[lab.state.tables[0].blocks[0], lab.state.tables[0].blocks.at(-1)]")
    for block, whether in ((shared, len(first) >= 4), (own, False)):
        me.page.mouse.click(*me.look(SQUARE, block))
        me.until("document.querySelector('.lk-step-title').textContent === it", f"Page {block}")
        me.page.wait_for_selector(".lk-token")
        words = "chat template, shared: every chat here begins with it"
        assert (words in me.page.inner_text(".lk-step-lead")) == whether
    lab.session.live.resume()
