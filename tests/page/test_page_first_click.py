"""The first minutes on the page: what it says it is, the tour, links that ask, and room for the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from labkit.page.session import Lab
from tests.visiting import Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]

PLACE = "lab.tour.place()"
# Clicks the third question as soon as it does something.
EARLY = """
const early = setInterval(() => {
  const page = [...document.querySelectorAll("#lk-live *")].find((e) => e.labkit)?.labkit;
  if (!page) return;
  clearInterval(early);
  document.querySelector("[data-ask=joining]").click();
}, 1);
"""
COUNT = """() => {
  window.flown = 0;
  new MutationObserver((changes) => {
    const added = changes.flatMap(({ addedNodes }) => [...addedNodes]);
    window.flown += added.filter(({ className }) => className === "lk-flying").length;
  }).observe(document.body, { childList: true });
}"""


def knob(me: Visitor, name: str, value: Any) -> None:
    me.page.fill(f".lk-knob [name={name}]", str(value))


def form(me: Visitor) -> list[str]:
    return [me.page.input_value(field) for field in ("#lk-prompt textarea", "#lk-max-tokens input")]


# -- the tour -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1280, 800), (400, 800)])
def test_the_tour_goes_through_five_steps_on_the_real_page(
    come: Callable[..., Visitor], lab: Lab, size: tuple[int, int]
) -> None:
    me = come(width=size[0], height=size[1])
    me.fill("my own words", 33)
    lab.session.live.speed = 100.0
    assert me.look(PLACE) == -1, "nobody asked for it"
    me.page.click(".lk-tour-start")
    for place in range(5):
        me.until(f"{PLACE} === it", place)
        box = me.page.locator(".lk-tour").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
        assert me.page.locator(".lk-toured").count() == 1
        if place in (0, 3):  # it goes on once the visitor has done it
            me.page.locator("#lk-inject").evaluate("(button) => button.click()")
        elif place < 4:
            me.page.keyboard.press("Enter")
    me.page.locator(".lk-pause").evaluate("(button) => button.click()")
    me.until("document.querySelector('.lk-tour h2').textContent.endsWith('\\u2713')")
    assert me.page.locator(".lk-card.lk-mine").count() == 3
    runs = [set(record.requests) for record in lab.session.live.records()]
    assert any({"1", "2"} <= together for together in runs), "the second joins while the first runs"
    me.page.click(".lk-tour-next")
    me.until(f"{PLACE} === -1 && !document.querySelector('.lk-toured, .lk-tour')")
    assert form(me) == ["my own words", "33"]
    lab.session.live.resume()


@pytest.mark.parametrize(
    "pace, most, tokens", [(0.0005, None, 1500), (0.05, None, 200), (2.0, None, 120), (0.05, 64, 64)]
)
def test_the_first_answer_of_the_tour_is_long_enough_on_any_machine(
    come: Callable[..., Visitor], pace: float, most: int | None, tokens: int
) -> None:
    me = come(width=1280, height=800)
    me.look(
        "Object.assign(lab.state, { steps: [{ seconds: it[0] }, { seconds: it[0] }], most: it[1] })",
        [pace, most],
    )
    me.page.click(".lk-tour-start")
    for place in range(3):
        me.until(f"{PLACE} === it", place)
        me.page.keyboard.press("ArrowRight")
    me.until(f"{PLACE} === 3")
    assert form(me)[1] == str(tokens)
    me.page.keyboard.press("Escape")
    assert form(me) == ["", "64"], "what the tour wrote is gone"


def test_the_form_is_as_it_was_after_a_reload(come: Callable[..., Visitor]) -> None:
    me = come()
    me.fill("my own words", 33, 0.5)
    me.page.wait_for_function("sessionStorage.getItem('labkit-form')?.includes('0.5')")
    me.page.reload()
    me.until("lab?.state.meta && lab.visitor()")
    me.until("document.querySelector('#lk-prompt textarea').value === 'my own words'")
    assert form(me) == ["my own words", "33"] and me.page.input_value("#lk-temperature input") == "0.5"
    assert form(come()) == ["", "64"], "another visitor begins anew"


def test_the_tour_is_offered_once_and_its_keys_are_its_own(come: Callable[..., Visitor]) -> None:
    me = come(width=1280, height=800)
    assert me.page.is_visible(".lk-tour-no")
    me.page.click(".lk-tour-start")
    me.page.keyboard.press("ArrowRight")
    me.until(f"{PLACE} === 1")
    me.page.keyboard.press("ArrowLeft")
    me.until(f"{PLACE} === 0")
    me.page.keyboard.press("Escape")
    me.until(f"{PLACE} === -1")
    assert me.page.is_hidden(".lk-tour-no") and me.look("document.activeElement.className") == "lk-tour-start"
    me.page.reload()
    me.until("lab?.state.meta && lab.visitor()")
    assert me.page.is_hidden(".lk-tour-no") and me.page.is_visible(".lk-tour-start")


def test_whoever_declines_the_tour_is_not_asked_again(come: Callable[..., Visitor]) -> None:
    me = come(width=1280, height=800)
    me.page.click(".lk-tour-no")
    me.page.reload()
    me.until("lab?.state.meta && lab.visitor()")
    assert me.page.is_hidden(".lk-tour-no") and me.look(PLACE) == -1


# -- what it is, and what it runs with ------------------------------------------------------------


def test_the_line_under_the_name_is_whole_and_says_what_was_changed(
    come: Callable[..., Visitor], lab: Lab
) -> None:
    lab.change({"max_num_seqs": 3, "scheduler": "static", "kv_policy": "reserved"})
    me = come(width=1280, height=800)
    said = "static · reserved memory · 3 seats · "
    me.until("document.querySelector('.lk-facts').textContent.startsWith(it)", said)
    assert me.page.locator(".lk-facts b").all_inner_texts() == ["static", "reserved memory", "3 seats"]
    for part in (".lk-sentence", ".lk-facts"):
        line = me.page.locator(part)
        assert line.evaluate("(line) => line.scrollWidth <= line.clientWidth")
        assert line.evaluate("(line) => line.getBoundingClientRect().right <= innerWidth")
    line, below = (me.page.locator(part).bounding_box() for part in (".lk-pitch", "#lk-what"))
    assert line["y"] + line["height"] <= below["y"] + 1, "it covers nothing"
    lab.change(lab.base)
    me.until("document.querySelector('.lk-facts b') === null")


def test_undo_is_there_when_there_is_something_and_reset_goes_back_to_the_start(
    come: Callable[..., Visitor], lab: Lab
) -> None:
    me = come()
    me.page.click("[data-what=knobs]")
    assert me.page.is_hidden(".lk-undo") and me.page.is_hidden(".lk-reset")
    knob(me, "max_num_seqs", 5)
    assert me.page.is_visible(".lk-undo") and me.page.is_hidden(".lk-reset")
    me.page.click(".lk-undo")
    assert me.page.is_hidden(".lk-undo") and me.page.input_value(".lk-knob [name=max_num_seqs]") == "8"
    knob(me, "max_num_seqs", 5)
    me.page.click(".lk-apply")
    me.until("lab.state.meta.max_num_seqs === 5")
    me.page.click(".lk-reset")
    me.until("lab.state.meta.max_num_seqs === 8")
    assert lab.settings == lab.base
    me.until("document.querySelector('.lk-reset').hidden")


# -- room, rows and tokens ------------------------------------------------------------------------


def test_a_preset_that_plays_leaves_half_of_the_column_to_the_answers(
    come: Callable[..., Visitor], lab: Lab
) -> None:
    me = come(width=1280, height=800)
    me.page.click("[data-what=scenarios]")
    me.page.click("[data-scenario=burst] .lk-scenario")
    me.page.click("[data-scenario=burst] .lk-play")
    me.until("document.querySelectorAll('.lk-card').length === 32")
    assert me.page.locator("#lk-what li:visible").count() == 1
    box = me.page.locator(".lk-cards").bounding_box()
    assert box["height"] >= 0.45 * 800 and box["y"] + box["height"] <= 800
    assert me.page.url.endswith("?preset=burst")
    me.page.click(".lk-all")
    assert me.page.locator("#lk-what li:visible").count() == 7
    wait_for(lambda: not lab.session.live.busy)


def test_requests_have_a_row_before_a_step_has_seen_them(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    lab.session.live.pause()
    ids = [me.inject(f"request {i}", max_tokens=4) for i in range(3)]
    me.until("lab.state.pending.map(({ request }) => request).join() === it", ",".join(ids))
    timeline = "document.querySelector('[data-picture=timeline]')"
    rows = f"lab.laneRows(lab.state, {timeline}.clientWidth, {timeline}.clientHeight).shown"
    assert me.look(f"{rows}.map((lane) => lane.request)")[-3:] == ids
    lab.session.live.resume()
    for request_id in ids:
        me.finished(request_id)
    me.until("lab.state.pending.length === 0")


@pytest.mark.parametrize("motion, dots", [("no-preference", True), ("reduce", False)])
def test_a_token_is_seen_going_into_its_page(
    come: Callable[..., Visitor], lab: Lab, motion: str, dots: bool
) -> None:
    me = come(reduced_motion=motion)
    me.page.evaluate(COUNT)
    lab.session.live.pause()
    request_id = me.inject("one two three four", max_tokens=6)
    for _ in range(3):
        step = me.look("lab.state.step")
        me.page.wait_for_timeout(400)  # slower than full speed
        lab.session.live.single_step()
        me.until("lab.state.step > it", step)
        me.until("lab.state.drawn === lab.state.step")
        (landed,) = me.look("lab.state.landed")
        table = lab.session.feed.frame().tables[0]
        last = table.computed - 1
        assert landed["request"] == request_id == table.request
        assert (landed["block"], landed["slot"]) == (table.blocks[last // 16], last % 16)
    assert (me.look("window.flown") > 0) == dots
    lab.session.live.resume()
    me.finished(request_id)


# -- links ----------------------------------------------------------------------------------------


def test_a_link_asks_a_question_and_a_reload_does_not_ask_it_again(come: Callable[..., Visitor]) -> None:
    me = come("?ask=memory")
    seen = "document.querySelector('.lkr-verdict')?.textContent.startsWith('Reserved memory took 1.4 times')"
    me.until(seen)
    assert me.page.url.endswith("?ask=memory")
    found = "[...document.querySelectorAll('#lkr-race *')].find((e) => e.race)?.race"
    number = me.look(f"{found}.shown()")
    me.page.reload()
    me.until(seen)
    assert me.look(f"{found}.shown()") == number and not me.look(f"{found}.status().running")


def test_a_link_that_plays_a_preset_waits_until_the_page_is_known(
    come: Callable[..., Visitor], lab: Lab
) -> None:
    me = come("?ask=joining")
    me.until("document.querySelectorAll('.lk-card.lk-mine').length >= 6")
    assert not me.page.inner_text("#lk-message").strip() and me.page.url.endswith("?ask=joining")
    wait_for(lambda: lab.session.submissions._serial == 8 and not lab.session.live.busy)


def test_a_click_before_the_page_is_known_is_not_lost(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    me.page.add_init_script(EARLY)
    me.page.reload()
    me.until("document.querySelectorAll('.lk-card.lk-mine').length >= 6")
    wait_for(lambda: not lab.session.live.busy)


def test_the_address_follows_the_tab(come: Callable[..., Visitor]) -> None:
    me = come()
    me.page.click("[role=tab]:has-text('Race')")
    assert me.page.url.endswith("?tab=race")
    me.page.goto(me.page.url)
    me.page.wait_for_selector("#lkr-choices:visible")
    me.page.click("[role=tab]:has-text('Live')")
    me.page.wait_for_selector("#lk-live:visible")
    assert "?" not in me.page.url


def test_an_answer_and_a_link_can_be_copied(come: Callable[..., Visitor]) -> None:
    me = come(permissions=["clipboard-read", "clipboard-write"])
    request_id = me.inject("something to copy", max_tokens=5)
    answer = me.finished(request_id)
    me.card(request_id).locator(".lk-copy").click()
    me.until("document.querySelector('.lk-card .lk-copy').textContent === 'Copied'")
    assert me.page.evaluate("navigator.clipboard.readText()") == answer
    me.page.click("[data-what=scenarios]")
    me.page.click("[data-scenario=chat] .lk-scenario")
    me.page.click("[data-scenario=chat] .lk-copy")
    me.until("document.querySelector('[data-scenario=chat] .lk-copy').textContent === 'Copied'")
    assert me.page.evaluate("navigator.clipboard.readText()").endswith("?preset=chat")
