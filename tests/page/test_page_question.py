"""What one more request costs, in a real browser: the question, its answer, and what it changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from labkit.page.session import Lab
from tests.visiting import Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]

NUM_BLOCKS = 160  # six answers and a long prompt have room beside each other
LINES = ".lk-join-line"
JOINS = "document.querySelectorAll('.lk-join-line.lk-own strong').length === it"
NOTE = "It runs by itself: six answers begin, a short request joins them, then a long one."


def ask(me: Visitor) -> None:
    me.page.click(".lk-questions [data-ask=joining]")


def answered(me: Visitor, lab: Lab) -> list[str]:
    """What is said of the two newcomers, the latest first, once all is over."""
    me.until(JOINS, 2)
    wait_for(lambda: lab.session.submissions._serial == 8 and not lab.session.live.busy)
    me.until("lab.state.step === it", lab.session.live.records()[-1].step)
    return me.page.locator(LINES).all_inner_texts()


def steps_in(words: str) -> list[str]:
    return re.findall(r"steps? \d+(?: to \d+)?|(?<!each )of \d[\d,]* tokens|\d+ chunks", words)


def test_the_third_question_is_answered_in_a_box_of_its_own(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come(width=1280, height=800)
    assert me.page.is_hidden(".lk-joins")
    me.page.click("[role=tab]:has-text('Race')")
    ask(me)
    said = answered(me, lab)
    assert me.page.url.endswith("?ask=joining") and me.page.is_hidden(".lk-joins-note")
    records = lab.session.live.records()
    for line, name in zip(said, ("7", "6"), strict=True):
        read = [r for r in records if name in r.requests and r.kinds[r.requests.index(name)] in "pc"]
        tokens = sum(arrival[1] for r in records for arrival in r.arrived if arrival.request_id == name)
        assert f"Request {name} " in line and f"of {tokens:,} tokens" in line
        where = f"step {read[0].step}" if len(read) == 1 else f"(steps {read[0].step} to {read[-1].step})"
        assert where in line and ("noise" in line) and (len(read) == 1 or f"{len(read)} chunks" in line)
    bold = me.page.locator(f"{LINES} strong").all_inner_texts()
    assert all(line.strip().startswith(words) for line, words in zip(said, bold, strict=True))
    box, below = (me.page.locator(part).bounding_box() for part in (".lk-joins", "[data-picture=meters]"))
    assert box["y"] < 200 and below["y"] + below["height"] <= 800, (
        "the answer and the pictures need no scroll"
    )


def test_an_answer_stays_whatever_comes_after_it(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    ask(me)
    said = answered(me, lab)
    for request in ("0", "6", "7"):
        me.look("lab.select({ request: it })", request)
        me.until("lab.state.selected.request === it", request)
        assert me.page.locator(LINES).all_inner_texts() == said
    me.until("document.querySelector('.lk-join-line.lk-hot').dataset.request === '7'")
    other = come()
    assert other.page.locator(LINES).all_inner_texts() == said, "it is measured once, for everybody"
    me.page.reload()
    me.until("lab?.state.meta && lab.visitor()")
    me.until(JOINS, 2)
    assert me.page.locator(LINES).all_inner_texts() == said
    lab.session.live.speed = 60
    me.page.click(".lk-what >> text=Prompt")
    first = me.inject("a first one that runs for long", max_tokens=60)
    me.until("lab.state.tables.some(({ computed }) => computed > 25)")
    me.inject("and one more", max_tokens=20)
    me.until("document.querySelectorAll('.lk-join-line').length === 3")
    me.finished(first)
    lines = me.page.locator(LINES)
    assert lines.all_inner_texts()[1:] == said
    assert [("lk-own" in line.get_attribute("class")) for line in lines.all()] == [False, True, True]


def test_a_question_asked_twice_has_the_same_answer_in_steps(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    ask(me)
    first = answered(me, lab)
    records, feed = lab.session.live.records(), lab.session.feed.name
    ask(me)
    me.until("lab.state.feed !== it", feed)
    second = answered(me, lab)
    assert lab.session.live.records() == records
    assert [steps_in(line) for line in first] == [steps_in(line) for line in second]
    assert all(steps_in(line) for line in first)


def test_the_old_answer_is_gone_while_the_question_runs_again(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    ask(me)
    answered(me, lab)
    lab.session.live.speed = 20
    feed = lab.session.feed.name
    ask(me)
    me.until("lab.state.feed !== it && lab.state.steps.length > 1", feed)
    assert me.page.locator(LINES).count() == 0
    assert me.page.inner_text(".lk-joins-note").startswith(NOTE)
    lab.session.live.speed = None
    answered(me, lab)


def test_what_the_question_changed_is_put_back_with_one_click(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come(width=1280, height=800)
    lab.change({"max_num_seqs": 7})
    me.until("lab.state.meta.max_num_seqs === 7")
    assert me.page.is_hidden(".lk-put-back"), "people chose that themselves"
    ask(me)
    me.page.wait_for_selector(".lk-put-back:visible")
    said = answered(me, lab)
    assert "64 tokens a step" in me.page.locator(".lk-facts b").all_inner_texts()
    line = me.page.locator(".lk-pitch")
    assert line.evaluate("(line) => line.scrollWidth <= line.clientWidth")
    me.page.click(".lk-put-back")
    me.until("lab.state.meta.max_num_batched_tokens === 128 && lab.state.meta.max_num_seqs === 7")
    me.page.wait_for_selector(".lk-put-back", state="hidden")
    assert me.page.locator(f"{LINES}.lk-old").all_inner_texts() == said, "the answer can still be read"
    assert me.page.inner_text(".lk-joins-note") == "Before the engine was restarted:"


def test_the_question_says_what_it_takes_away(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come(width=1280, height=800)
    me.finished(me.inject("hello", max_tokens=4))
    ask(me)
    words = me.page.inner_text(".lk-question p")
    assert words == "This restarts the engine with 64 tokens a step: the pictures and 1 card go."
    me.page.click("[data-choice=leave]")
    assert me.page.locator(".lk-card").count() == 1 and lab.settings == lab.base
    ask(me)
    me.page.click("[data-choice=go]")
    answered(me, lab)
    ask(me)  # its own cards are no loss
    assert me.page.is_hidden(".lk-question")
    answered(me, lab)


def test_the_box_says_what_is_noise(come: Callable[..., Visitor], lab: Lab) -> None:
    """The feed is told of steps of its own choice."""
    me = come()
    ask(me)
    answered(me, lab)
    records = lab.session.live.records()
    lab.change({})
    feed = lab.session.feed
    me.until("lab.state.feed === it", feed.name)
    for record in records:
        feed.append(replace(record, seconds=(0.001, 0.01, 0.1)[record.step % 3]))
    me.until("document.querySelectorAll('.lk-join-line:not(.lk-old) strong').length === 2")
    for line in me.page.locator(LINES).all_inner_texts():
        assert "cost the 6 others no step, and in seconds nothing beyond noise: each got a token" in line


@pytest.mark.parametrize("width", [400, 1280])
def test_the_box_fits_any_width(come: Callable[..., Visitor], lab: Lab, width: int) -> None:
    me = come(width=width, height=800)
    ask(me)
    answered(me, lab)
    assert me.look("document.documentElement.scrollWidth") <= width
