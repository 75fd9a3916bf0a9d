"""The page in a real browser: its scenarios, which it calls presets, its knobs and two questions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from labkit.page.scenarios import SCENARIOS, Scenario
from labkit.page.session import Lab
from tests.page.places import knob
from tests.visiting import Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


# -- scenarios ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_scenario_plays_from_its_link(
    come: Callable[..., Visitor], lab: Lab, scenario: Scenario
) -> None:
    me = come(f"?preset={scenario.name}")
    me.page.wait_for_selector(f'[data-scenario="{scenario.name}"].lk-on')
    assert me.page.inner_text(".lk-on .lk-look") == scenario.look
    assert lab.session.live.records() == (), "a link alone disturbs nobody"
    me.page.click(".lk-on .lk-play")
    wait_for(lambda: lab.session.submissions._serial == len(scenario.requests))
    words = "It plays by itself: there is nothing to press."
    me.until("document.querySelector('.lk-on .lk-changes').textContent === it", words)
    assert me.page.inner_text(".lk-on .lk-play") == "Play again"
    me.until("document.querySelectorAll('.lk-card.lk-mine').length === it", len(scenario.requests))
    wait_for(lambda: not lab.session.live.num_unfinished)
    for name, value in scenario.settings.items():
        assert lab.settings[name] == value


def test_a_link_brings_back_the_settings(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come("?preset=small&num_blocks=20&scheduler=static&model=/etc/passwd")
    me.page.click(".lk-on .lk-play")
    wait_for(lambda: lab.settings["num_blocks"] == 20 and lab.settings["scheduler"] == "static")
    wait_for(lambda: not lab.session.live.num_unfinished)
    me.until("document.querySelector('.lk-on .lk-link').href.includes('num_blocks=20')")
    link = me.page.locator(".lk-on .lk-link").get_attribute("href")
    assert "preset=small" in link and "scheduler=static" in link and "block_size" not in link
    other = come("?" + link.split("?")[1])
    other.page.wait_for_selector('[data-scenario="small"].lk-on')


def test_a_hostile_link_is_only_text(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come("?preset=<img src=x onerror=window.hacked=1>&num_blocks=9e99&scheduler=<b>")
    assert "The link asks for a preset that is not known" in me.page.inner_text("#lk-message")
    assert me.page.locator("#lk-message img").count() == 0 and me.look("window.hacked") is None
    assert lab.settings == lab.base


# -- knobs ----------------------------------------------------------------------------------------


def test_knobs_restart_the_engine_for_everyone(come: Callable[..., Visitor], lab: Lab) -> None:
    me, other = come(), come()
    assert me.page.is_disabled(".lk-apply")
    wanted = {
        "scheduler": "static",
        "kv_policy": "reserved",
        "num_blocks": 64,
        "enable_prefix_caching": False,
    }
    for name, value in wanted.items():
        knob(me, name, value)
    me.page.click(".lk-apply")
    for visitor in (me, other):
        visitor.until("lab.state.meta.scheduler === 'static' && lab.state.meta.num_blocks === 64")
        assert "64 pages" in visitor.page.inner_text(".lk-facts")
    assert {name: lab.settings[name] for name in wanted} == wanted
    me.page.click(".lk-what >> text=Prompt")
    me.finished(me.inject("hello", max_tokens=4))


def test_knobs_ask_before_they_end_what_runs(come: Callable[..., Visitor], lab: Lab) -> None:
    me, other = come(), come()
    lab.session.live.speed = 20
    request_id = other.inject("hello", max_tokens=100)
    knob(me, "max_num_seqs", 4)
    me.page.click(".lk-apply")
    me.page.wait_for_selector(".lk-question [data-choice=leave]")
    assert "1 request is under way" in me.page.inner_text(".lk-question")
    me.page.click("[data-choice=leave]")
    assert me.page.is_hidden(".lk-question") and lab.settings["max_num_seqs"] == 8
    me.page.click(".lk-apply")
    me.page.click("[data-choice=finish]")
    other.page.click(".lk-what >> text=Engine")
    other.page.wait_for_selector(".lk-question [data-choice=keep]")
    live = lab.session.live
    me.until("lab.state.meta.max_num_seqs === 4")
    assert live.output(request_id).finish_reason == "length"
    lab.session.live.speed = 20
    other.page.click(".lk-what >> text=Prompt")
    request_id = other.inject("hello", max_tokens=300)
    live = lab.session.live
    knob(me, "max_num_seqs", 3)
    me.page.click(".lk-apply")
    me.page.click("[data-choice=cancel]")
    me.until("lab.state.meta.max_num_seqs === 3")
    assert live.output(request_id).finish_reason == "abort"


def test_a_knob_that_cannot_be_is_answered_by_a_sentence(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    for name, value, message in (
        ("num_blocks", 0, "num_blocks must be between 4 and 4096, not 0"),
        ("num_blocks", 1.5, "num_blocks must be a whole number"),
        ("max_num_seqs", 200, "max_num_seqs (200) must not exceed"),
    ):
        knob(me, name, value)
        me.page.click(".lk-apply")
        me.until("document.querySelector('#lk-message p').textContent.includes(it)", message)
        me.page.click(".lk-undo")
    assert lab.settings == lab.base


# -- two questions ------------------------------------------------------------------------------


def test_two_questions_start_a_race_each(come: Callable[..., Visitor]) -> None:
    me = come(width=1280, height=800)
    seen = "document.querySelector('.lkr-verdict')?.textContent.startsWith(it)"
    labels = "[...document.querySelectorAll('#lkr-choices label:has(:checked)')]"
    chosen = f"{labels}.map((label) => label.innerText.trim()).join()"
    me.page.click("[data-course=uneven]")
    me.until(seen, "Static batching took 1.5 times as many steps as continuous batching: 62 rather than 42")
    me.until(f"{chosen} === it", "Uneven lengths,static,continuous")
    me.page.click("[data-course=pool]")
    me.until(seen, "Reserved memory took 1.4 times as many steps as paged memory (continuous): ")
    me.until(f"{chosen} === it", "A pool too small,continuous,reserved memory")
    box = me.page.locator(".lkr-verdict").bounding_box()
    last = me.page.locator(".lkr-track").last.bounding_box()
    assert box["y"] > 0 and last["y"] + last["height"] <= 800, "the answer and both pictures need no scroll"
