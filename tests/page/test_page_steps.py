"""The page in a real browser: what it says of a step, a block and a request."""

from __future__ import annotations

import re
from collections.abc import Callable

from labkit.page.session import Lab
from tests.page.places import CELL, SQUARE, knob, step_words
from tests.visiting import Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


# -- the next step, and keys ----------------------------------------------------------------------


def test_the_next_step_is_shown_before_it_runs(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    live = lab.session.live
    me.page.keyboard.press("Space")
    me.page.wait_for_selector(".lk-paused")
    request_id = me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=30)
    me.until("lab.state.plan?.rows.length === 1")
    assert me.page.inner_text(".lk-step-title") == "Next: step 0" and live.records() == ()
    pages = me.look("lab.state.plan.rows[0].taken")
    words = step_words(me)[0]
    assert (
        words.startswith(f"{request_id} gets a seat: prefill,") and f"+ {len(pages)} pages: 0\u2013" in words
    )
    assert "The next step lets it in: prefill" in me.card(request_id).inner_text()
    me.page.evaluate("document.activeElement.blur()")
    me.page.keyboard.press("ArrowRight")  # runs it
    me.until("lab.state.step === 0 && lab.state.plan?.step === 1")
    assert sorted(me.look("[...lab.state.owners.keys()]")) == pages, "it took other pages than it said"
    assert "decode, 1 token" in step_words(me)[0]
    me.page.keyboard.press("Space")
    me.until("!lab.live.paused")
    me.finished(request_id)
    me.until("lab.state.plan === null")


def test_keys_move_through_steps_and_requests(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    ids = [me.inject("hello", max_tokens=5) for _ in range(2)]
    for request_id in ids:
        me.finished(request_id)
    me.page.evaluate("document.activeElement.blur()")
    me.page.keyboard.press("ArrowDown")
    assert me.look("lab.state.selected.request") == ids[0]
    assert "lk-hot" in me.card(ids[0]).get_attribute("class")
    me.page.keyboard.press("ArrowDown")
    assert me.look("lab.state.selected.request") == ids[1]
    me.page.keyboard.press("ArrowLeft")
    last = me.look("lab.state.step")
    me.until("lab.state.selected.step === it", last)
    me.page.keyboard.press("ArrowLeft")
    me.until("lab.state.past?.step === it", last - 1)
    me.page.keyboard.press("Escape")
    me.until("lab.state.past === null")
    assert me.look("lab.state.selected") == {}
    me.page.fill("#lk-prompt textarea", "a")
    me.page.press("#lk-prompt textarea", "Space")
    assert me.page.input_value("#lk-prompt textarea") == "a " and not lab.session.live.paused


# -- one step, one page, one request --------------------------------------------------------------


def test_a_cell_of_the_timeline_shows_its_step(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    request_id = me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=24)
    me.finished(request_id)
    me.until("lab.state.owners.size === 0")
    me.page.mouse.click(*me.look(CELL.replace("STEP", "3")))
    me.until("lab.state.past?.step === 3")
    assert me.page.inner_text(".lk-step-title") == "Step 3"
    tables = me.look("lab.state.past.tables")
    assert [table["request"] for table in tables] == [request_id]
    words = step_words(me)[0]
    token = lab.session.live.engine.model.tokenizer.decode([lab.session.live.output(request_id).token_ids[3]])
    assert f"decode, 1 token → “{token.strip()}" in words.replace("“ ", "“")
    assert f"{len(tables[0]['blocks'])} pages" in words
    assert "Pages as they were in step 3" in me.page.inner_text(".lk-back")
    owned = "[...Array(96).keys()].filter((b) => lab.blockKind(lab.state, b) === 'owned')"
    assert me.look(owned) == tables[0]["blocks"]
    me.page.click(".lk-back button")
    me.until("lab.state.past === null")
    assert me.look(owned) == []
    assert me.page.is_hidden(".lk-back")


def test_a_page_shows_owners_and_tokens(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    lab.session.live.pause()
    request_id = me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=24)
    lab.session.live.single_step()
    me.until("lab.state.tables.length === 1")
    block = me.look("lab.state.tables[0].blocks[1]")
    me.page.mouse.click(*me.look(SQUARE, block))
    me.page.wait_for_selector(".lk-token")
    assert me.page.inner_text(".lk-step-title") == f"Page {block}"
    filled = me.look("lab.state.owners.get(it)[0].filled", block)
    assert f"{request_id} block 1 of its table, {filled} of 16 tokens filled" in step_words(me)[0]
    tokens = lab.session.live.output(request_id).prompt_token_ids[16 : 16 + filled]
    shown = me.page.locator(".lk-token").evaluate_all("all => all.map((e) => e.textContent)")
    decode = lab.session.live.engine.model.tokenizer.decode
    assert shown == [decode([token]).replace("\n", "↵") or "·" for token in tokens]
    assert me.look("lab.state.selected") == {"block": block, "request": request_id}
    me.page.mouse.move(0, 0)
    me.page.mouse.move(*me.look(SQUARE, block))
    me.until("document.querySelector('.lk-tip').textContent.includes(it)", decode(tokens).split()[-1])
    me.page.keyboard.press("Escape")
    assert me.page.inner_text(".lk-step-title").startswith("Next:")
    lab.session.live.resume()
    me.finished(request_id)
    me.until("lab.state.owners.size === 0")
    me.page.mouse.click(*me.look(SQUARE, block))
    me.until("document.querySelector('.lk-step-lead').textContent.startsWith('Only cached')")
    assert f"Held last by request {request_id}, as page 1 of its table" in me.page.inner_text(".lk-step-lead")


def test_a_request_that_waits_says_why_with_numbers(come: Callable[..., Visitor], lab: Lab) -> None:
    lab.change({"num_blocks": 8, "max_num_seqs": 4})
    me = come()
    lab.session.live.pause()
    first, second = me.inject("word " * 60, max_tokens=40), me.inject("hello " * 60, max_tokens=40)
    third = me.inject("hello", max_tokens=40)
    for _ in range(2):
        lab.session.live.single_step()
    me.until("lab.state.step === 1 && lab.state.plan?.step === 2")
    me.until("document.querySelectorAll('.lk-card[data-status=waiting]').length > 0")
    head = me.card(second).locator(".lk-why")
    assert head.inner_text().startswith("Waits, first in line: it needs ")
    assert re.search(r"it needs \d+ pages and 1 for growth, and \d+ are free", head.inner_text())
    assert (
        me.card(third)
        .locator(".lk-why")
        .inner_text()
        .startswith(f"Waits, number 2 of 2. Request {second} is before it: it needs")
    )
    assert me.card(first).locator(".lk-why").inner_text() == ""


def test_a_preempted_request_says_where_its_pages_went(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    me.page.click(".lk-what >> text=Presets")
    me.page.click("text=A pool too small")
    lab.session.live.speed = 40
    me.page.click(".lk-on .lk-play")
    wait_for(lambda: lab.settings["num_blocks"] == 24)
    live = lab.session.live
    wait_for(lambda: any(record.preempted for record in live.records()))
    live.pause()
    me.page.wait_for_selector(".lk-card[data-status=preempted]")
    words = me.page.locator(".lk-card[data-status=preempted] .lk-why").first.inner_text()
    assert words.startswith("Preempted in step ") and "went to older requests. Waits" in words
    entry = me.page.locator('.lk-log [data-kind="preempt"]').first
    assert "is preempted: gives" in entry.inner_text()
    step = int(entry.locator(".lk-when").inner_text())
    entry.locator("button").click()
    me.page.wait_for_selector(f".lk-step-title:text-is('Step {step}')")
    assert any("preempted: gave" in line for line in step_words(me))
    assert int(me.page.inner_text("[data-number=preemptions] dd")) > 0


def test_the_log_and_the_numbers(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    for _ in range(2):
        me.finished(me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=24))
    me.until("document.querySelectorAll('.lk-log [data-kind=finish]').length === 2")
    kinds = me.page.locator(".lk-log > li").evaluate_all("all => all.map((e) => e.dataset.kind)")
    assert kinds[::-1] == ["arrive", "admit", "finish", "arrive", "admit", "hit", "finish"]
    words = {
        item.get_attribute("data-number"): item.locator("dd").inner_text()
        for item in me.page.locator("[data-number]").all()
    }
    assert list(words) == ["rate", "usage", "waste", "ttft", "itl", "hits", "preemptions", "drafts"]
    assert me.page.locator(".lk-drafts").count() == 2
    assert me.page.locator(".lk-drafts:visible").count() == 0, "nobody drafts here"
    assert words["hits"] == f"{round(100 * lab.session.live.engine.trace.prefix_hit_rate)}%"
    assert words["ttft"].endswith((" ms", " s")) and words["itl"].endswith((" ms", " s"))
    me.page.hover('[data-number="waste"]')
    assert me.page.inner_text(".lk-tip").startswith("Waste: the share of the slots")
    me.page.focus('[data-number="ttft"]')
    assert me.page.inner_text(".lk-tip").startswith("Time to first token")


# -- speculation ----------------------------------------------------------------------------------


def test_drafts_are_shown_where_an_engine_speculates(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    knob(me, "speculative", "ngram")
    me.page.click(".lk-apply")
    me.until("lab.state.speculative === 'ngram'")
    assert lab.settings["speculative"] == "ngram"
    assert me.page.locator(".lk-drafts:visible").count() == 2
    assert "n-gram drafts" in me.page.inner_text(".lk-facts")
    assert me.page.inner_text("[data-number=drafts] dd") == "\u2013"
    me.page.click(".lk-what >> text=Prompt")
    me.finished(me.inject("again and again and again and again and again and again", max_tokens=40))
    me.until("lab.state.owners.size === 0")
    engine = lab.session.live.engine
    rows = [(record.step, row) for record in engine.trace for row in record.rows if row.drafted]
    right = sum(row.num_accepted for _, row in rows)
    drafted = sum(len(row.drafted) for _, row in rows)
    assert me.page.inner_text("[data-number=drafts] dd") == f"{round(100 * right / drafted)}%"
    me.page.hover("[data-number=drafts]")
    assert me.page.inner_text(".lk-tip").startswith("The share of drafted tokens that were right")
    step, row = rows[0]
    me.page.mouse.move(*me.look(CELL.replace("STEP", str(step))))
    said = f"{len(row.drafted)} drafted, {row.num_accepted} of them right"
    assert f"computed: {said}" in me.page.inner_text(".lk-tip").replace("\n", " ")
    me.page.mouse.click(*me.look(CELL.replace("STEP", str(step))))
    me.until("lab.state.past?.step === it", step)
    assert f"tokens: {said}" in step_words(me)[0]
    tokens = me.page.locator(".lk-guesses .lk-token")
    struck = tokens.evaluate_all("all => all.map((e) => e.tagName === 'S')")
    assert struck == [place >= row.num_accepted for place in range(len(row.drafted))]
    decode = engine.model.tokenizer.decode
    shown = tokens.evaluate_all("all => all.map((e) => e.textContent)")
    assert shown == [decode([token]).replace("\n", "↵") or "·" for token in row.drafted]
    returned = sum(len(record.returned) for record in engine.trace)
    assert me.page.locator('.lk-log [data-kind="return"]').count() == returned


def test_a_bar_is_as_thick_as_drafts_were_right(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    ink = """((share) => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 20, height: 100 });
      const ctx = canvas.getContext("2d");
      lab.drawSpan(ctx, {}, "d", "#0072B2", 0, 0, 20, 100, share);
      const alpha = ctx.getImageData(10, 0, 1, 100).data.filter((_, i) => i % 4 === 3);
      return [alpha.filter((a) => a === 255).length, alpha.filter((a) => a > 0 && a < 255).length];
    })(it ?? undefined)"""
    assert me.look(ink) == [40, 0], "as without drafts"
    assert [me.look(ink, share) for share in (0, 0.5, 1)] == [[40, 40], [60, 20], [80, 0]]
