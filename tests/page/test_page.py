"""The page in a real browser: people who type, click and look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import app
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from tests.visiting import FIND, HOSTILE, Visitor, free_port
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


# -- injecting ------------------------------------------------------------------------------------


def test_inject_by_hand_and_watch(
    visit: Callable[..., Visitor], live: AsyncEngine, model: LoadedModel
) -> None:
    me = visit()
    live.pause()
    begin = len(live.records())
    request_id = me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=12)
    assert me.card(request_id).get_attribute("data-status") == "waiting"
    assert me.look("lab.state.owners.size") == 0
    seen = [""]
    for step in range(3):
        live.single_step()
        me.until("lab.state.step === it", begin + step)
        me.until(f"{TOKENS}.startsWith(it)", f"{step + 1} /")
        seen.append(me.text(request_id))
        assert seen[-1].startswith(seen[-2]) and len(seen[-1]) > len(seen[-2])
        owners = me.look("[...lab.state.owners.values()].flat().map((owner) => owner.request)")
        assert owners and set(owners) == {request_id}
        spans = me.look("lab.state.lanes.get(it).spans", request_id)
        assert [span["kind"] for span in spans] == ["p", "d"][: step + 1]
        assert (spans[0]["first"], spans[-1]["last"]) == (begin, begin + step)
    assert "1 running" in me.page.inner_text(".lk-summary")
    live.resume()
    text = me.finished(request_id)
    me.until("lab.state.owners.size === 0")
    output = live.output(request_id)
    assert text == output.text and me.look(TOKENS) == "12 / 12"
    assert output.token_ids == solo(model, output.prompt_token_ids, SamplingParams(max_tokens=12))
    assert "0 running, 0 waiting, 0 of 48 pages in use" in me.page.inner_text(".lk-summary")


TOKENS = "document.querySelector('.lk-card .lk-tokens').textContent"  # of the newest card


def solo(model: LoadedModel, prompt: list[int], params: SamplingParams) -> list[int]:
    engine = Engine(EngineConfig(model=model, num_blocks=48))
    engine.add_request(prompt, params, request_id="solo")
    while engine.has_unfinished:
        engine.step()
    return engine.outputs["solo"].token_ids


def test_inject_eight(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me = visit()
    me.fill(max_tokens=40)
    me.page.click("#lk-inject-8")
    me.until("document.querySelectorAll('.lk-card.lk-mine').length === 8")
    ids = me.look("[...document.querySelectorAll('.lk-card.lk-mine')].map((card) => card.dataset.request)")
    assert [int(name) for name in ids] == sorted(map(int, ids), reverse=True)  # the newest is on top
    for request_id in ids:
        assert me.finished(request_id) == live.output(request_id).text
    assert len({len(live.output(request_id).token_ids) for request_id in ids}) > 4


def test_examples_settings_and_chat(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me = visit()
    me.page.click("text=Why is the sky blue?")
    assert me.page.input_value("#lk-prompt textarea").startswith("Why is the sky blue?")
    with_template = me.inject("hello", max_tokens=2)
    me.page.click("#lk-more >> text=More")
    me.page.check("#lk-more input[type=checkbox]")
    without = me.inject("hello", max_tokens=2)
    decode = live.engine.model.tokenizer.decode
    assert decode(live.output(without).prompt_token_ids) == "hello"
    assert decode(live.output(with_template).prompt_token_ids).startswith("<|im_start|>user\nhello<|im_end|>")
    me.page.fill("#lk-prompt textarea", "by keyboard")
    me.page.press("#lk-prompt textarea", "Shift+Enter")
    me.until("document.querySelector('.lk-card .lk-prompt').textContent === 'by keyboard'")


def test_bad_input_is_answered_by_a_sentence(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me = visit()
    for prompt, max_tokens, temperature, message in (
        ("   ", 8, 0, "The prompt is empty"),
        ("hello", 0, 0, "max_tokens must be at least 1, not 0"),
        ("hello", "", 0, "max_tokens must be a whole number, not None"),
        ("hello", 1.5, 0, "max_tokens must be a whole number, not 1.5"),
        ("hello", 8, -1, "temperature must be between 0 and 100"),
        ("word " * 800, 8, 0, "but max_model_len is 768"),
        (HOSTILE, -1, 0, "max_tokens must be at least 1, not -1"),
    ):
        me.fill(prompt, max_tokens, temperature)
        me.page.click("#lk-inject")
        me.until("document.querySelector('#lk-message p').textContent.includes(it)", message)
    me.page.click("#lk-inject-8")
    assert me.page.locator(".lk-mine").count() == 0
    me.inject("hello")
    me.until("document.querySelector('#lk-message p').textContent === ''")


def test_what_is_typed_stays_text(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me = visit()
    live.pause()
    request_id = me.inject(HOSTILE, max_tokens=4)
    live.submit("hello", SamplingParams(max_tokens=4), request_id=HOSTILE)  # a name is typed by somebody, too
    live.single_step()
    me.until("lab.state.tables.length === 2")
    prompt = me.card(request_id).locator(".lk-prompt")
    assert prompt.evaluate("element => element.textContent") == HOSTILE
    me.page.mouse.move(*me.look(ROW_OF, HOSTILE))
    tip = me.page.locator(".lk-tip")
    assert HOSTILE in tip.evaluate("element => element.textContent")
    assert tip.locator("*").count() == tip.locator("> div").count()
    live.resume()
    me.finished(request_id)
    assert me.page.locator(".lk-card :is(img, b), .lk-tip :is(img, b), #lk-message img").count() == 0
    assert me.look("window.hacked") is None


# The latest step of a request's row in the timeline, in the window's coordinates.
ROW_OF = """(() => {
  const canvas = lab.show.canvases.timeline, { x, y, width, height } = canvas.getBoundingClientRect();
  let column = width - 1, row = 1;
  while (column > 0 && lab.stepAt(lab.state, width, column) !== lab.state.step) column -= 1;
  while (row < height && lab.laneAt(lab.state, width, height, row)?.request !== it) row += 1;
  return [x + column, y + row];
})()"""


# -- looking --------------------------------------------------------------------------------------


def test_hover_names_block_and_request_and_marks_both(
    visit: Callable[..., Visitor], live: AsyncEngine
) -> None:
    me = visit()
    live.pause()
    request_id = me.inject("The quick brown fox jumps over the lazy dog.", max_tokens=40)
    live.single_step()
    me.until("lab.state.tables.length === 1")
    computed, blocks = me.look("(({ computed, blocks }) => [computed, blocks])(lab.state.tables[0])")
    me.page.mouse.move(*me.look(CELL_OF, blocks[0]))
    tip = me.page.inner_text(".lk-tip")
    assert tip.splitlines()[:3] == [
        f"Page {blocks[0]}: owned",
        f"request {request_id}, page 0 of its block table",
        f"{min(16, computed)} of 16 tokens filled",
    ]
    assert me.look("lab.state.hover.request") == request_id
    assert "lk-hot" in me.card(request_id).get_attribute("class")
    me.page.mouse.move(*me.look(ROW_OF, request_id))
    assert "prefill:" in me.page.inner_text(".lk-tip")
    me.card(request_id).hover()
    assert me.look("lab.state.hover") == {"request": request_id} and me.page.is_hidden(".lk-tip")
    me.page.hover('canvas[data-picture="meters"]', position={"x": 50, "y": 20})
    assert "tokens computed" in me.page.inner_text(".lk-tip")
    me.page.mouse.move(0, 0)
    assert me.look("lab.state.hover") == {} and me.page.is_hidden(".lk-tip")


# The middle of a page in the heatmap, in the window's coordinates.
CELL_OF = """(() => {
  const canvas = lab.show.canvases.pages, { x, y, width, height } = canvas.getBoundingClientRect();
  for (let row = 4; row < height; row += 4)
    for (let column = 0; column < width; column += 4)
      if (lab.blockAt(lab.state, width, height, column, row) === it) return [x + column + 3, y + row + 3];
})()"""


def test_pictures_are_drawn_and_follow_the_theme(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me = visit(device_scale_factor=2, color_scheme="dark")
    live.pause()
    request_id = me.inject("hello", max_tokens=8)
    live.single_step()
    me.until("lab.state.tables.length === 1")
    me.until("lab.state.drawn === lab.state.step")
    color = me.look(
        "lab.colorOf(lab.state, lab.themeOf(document.querySelector('.lk'), lab.state), it)", request_id
    )
    for name in ("pages", "timeline"):
        assert me.look(f"({HAS_COLOR})(lab.show.canvases.{name}, it)", color), name
        assert me.look(f"lab.show.canvases.{name}.width === 2 * lab.show.canvases.{name}.clientWidth")
    assert color != me.look(
        "lab.state.palette[lab.state.lanes.get(it).color]", request_id
    )  # lighter: it is dark
    me.page.emulate_media(color_scheme="light")
    assert (
        me.page.locator('canvas[data-picture="pages"]')
        .get_attribute("aria-label")
        .startswith("Pages of the KV cache. Now, after step")
    )


HAS_COLOR = """(canvas, hex) => {
  const want = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) if (want.every((value, k) => data[i + k] === value)) return true;
  return false;
}"""


@pytest.mark.parametrize("width", [400, 1280, 1920])
def test_nothing_is_cut_off(visit: Callable[..., Visitor], live: AsyncEngine, width: int) -> None:
    me = visit(width=width, height=800)
    live.pause()
    me.fill("word " * 40, max_tokens=4)
    me.page.click("#lk-inject-8")
    me.until("document.querySelectorAll('.lk-card.lk-mine').length === 8")
    live.single_step()
    me.page.wait_for_selector("#lk-page[data-side=step]")
    if width < 1600:
        me.page.click(".lk-switch >> text=Requests")
    assert me.look("document.documentElement.scrollWidth") <= width
    if width > 400:
        assert me.look("document.documentElement.scrollHeight") <= 800
        for selector in ("#lk-inject", ".lk-card", *(f'canvas[data-picture="{name}"]' for name in PICTURES)):
            box = me.page.locator(selector).first.bounding_box()
            assert box["y"] >= 0 and box["y"] + min(box["height"], 60) <= 800, selector


PICTURES = ("pages", "timeline", "meters")


# -- the clock, and other people ------------------------------------------------------------------


def test_pause_step_resume_and_speed(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me, other = visit(), visit()
    me.page.click(".lk-pause")
    other.page.wait_for_selector(".lk-paused")  # it is one engine
    begin = len(live.records())
    request_id = me.inject("hello", max_tokens=6)
    me.page.click(".lk-step")
    me.until("lab.state.step === it", begin)
    other.page.select_option(".lk-speed", "10")
    me.until("lab.live.speed === 10")
    assert live.speed == 10
    other.page.click(".lk-pause")  # which says "Run" now
    me.finished(request_id)
    assert not live.paused
    other.page.select_option(".lk-speed", "")
    me.until("lab.live.speed === null")


def test_cancel(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me, other = visit(), visit()
    live.speed = 20
    one, two, three = (me.inject("hello", max_tokens=500) for _ in range(3))
    theirs = other.inject("world", max_tokens=500)
    me.page.wait_for_selector(f'.lk-card[data-request="{theirs}"]')
    assert me.card(theirs).locator(".lk-cancel").count() == 0  # only they can
    me.card(two).locator(".lk-cancel").click()
    me.finished(two, "abort")
    assert not live.output(one).finished and not live.output(three).finished
    me.page.click(".lk-cancel-all")
    me.finished(one, "abort")
    me.finished(three, "abort")
    assert not live.output(theirs).finished
    other.card(theirs).locator(".lk-cancel").click()
    other.finished(theirs, "abort")
    me.until("lab.state.owners.size === 0")


def test_two_visitors_share_one_engine(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    me, other = visit(), visit()
    live.pause()
    mine, theirs = me.inject("hello", max_tokens=6), other.inject("world", max_tokens=6)
    live.single_step()
    for visitor, own in ((me, mine), (other, theirs)):
        visitor.until("lab.state.tables.length === 2")
        visitor.page.wait_for_selector(f'.lk-card[data-request="{theirs}"]')
        owned = visitor.look("[...document.querySelectorAll('.lk-mine')].map((card) => card.dataset.request)")
        assert owned == [own]
    me.page.check(".lk-filter")
    assert me.card(mine).is_visible() and me.card(theirs).is_hidden()
    me.page.uncheck(".lk-filter")
    live.resume()
    for visitor in (me, other):
        assert visitor.finished(mine) == live.output(mine).text
        assert visitor.finished(theirs) == live.output(theirs).text


def test_a_closed_page_takes_its_requests_and_its_pause_along(
    visit: Callable[..., Visitor], live: AsyncEngine
) -> None:
    me, other = visit(), visit()
    live.speed = 20
    mine, theirs = me.inject("hello", max_tokens=500), other.inject("world", max_tokens=500)
    me.page.click(".lk-pause")
    wait_for(lambda: live.paused)
    me.page.close()
    wait_for(lambda: live.output(mine).finish_reason == "abort")
    other.finished(mine, "abort")
    assert not live.paused and not live.output(theirs).finished


def test_cards_that_the_lab_has_forgotten_are_closed(
    visit: Callable[..., Visitor], live: AsyncEngine
) -> None:
    me = visit()
    live.pause()
    request_id = me.inject("hello", max_tokens=5)
    wait_for(lambda: request_id in live.engine.outputs)
    with live._changed:  # as after hundreds of other requests, in a tab that nobody looked at
        del live._answers[request_id]
    assert me.finished(request_id, "gone") == ""
    me.page.wait_for_selector(".lk-cancel-all", state="hidden")
    assert me.card(request_id).locator(".lk-cancel").count() == 0


def test_cards_of_running_requests_stay_on_the_page(visit: Callable[..., Visitor], live: AsyncEngine) -> None:
    shown = visit().page.evaluate(MANY_CARDS)
    assert shown == {"all": 100, "mine": ["own"], "running": 1, "oldest other": "4"}


# Cards beyond what a page keeps: the oldest one runs, the next is one's own, and all but the first are done.
MANY_CARDS = f"""() => {{
  {FIND}
  const root = document.querySelector("#lk-requests .lk-cards").cloneNode(true);
  root.querySelector(".lk-list").replaceChildren();
  const cards = lab.cards(root, () => null, (item) => item.mine);
  const state = {{ ...lab.createState(), palette: ["#000000"] }};
  const rest = {{ label: "", color: 0, prompt: "", max_tokens: 1, tokens: 1, at: 0, text: "", length: 0 }};
  const item = (id, mine, reason) => ({{ ...rest, id, mine, reason }});
  const items = [item("running", false, null), item("own", true, "length")];
  for (let i = 0; i < 102; i++) items.push(item(String(i), false, "length"));
  const update = {{ reset: false, since: 1, items, gone: [] }};
  cards.answer({{ cards: update, pictures: {{}} }}, state, {{ redraw() {{}} }});
  const left = [...cards.byId].filter(([, card]) => !card.mine && card.reason);
  return {{
    all: root.querySelectorAll(".lk-card").length,
    mine: [...cards.byId].filter(([, card]) => card.mine).map(([id]) => id),
    running: [...cards.byId.values()].filter((card) => !card.reason).length,
    "oldest other": left[0][0],
  }};
}}"""


def test_a_closed_page_listens_no_more(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=48))) as live:
        demo = app.launch(live, share=False, server_port=free_port(), quiet=True)
        wait_for(lambda: len(live._subscriptions) == 2)
        demo.close(verbose=False)
        wait_for(lambda: not live._subscriptions)


def test_the_first_look_a_broken_engine_and_a_server_that_is_gone(
    browser: Any, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=48))) as live:
        demo = app.launch(live, share=False, server_port=port, quiet=True)
        me = Visitor(browser.new_context(), f"http://127.0.0.1:{port}")
        assert me.page.inner_text(".lk-summary") == "Idle. 48 pages of 16 tokens, all free; 32 seats."
        assert [line.is_visible() for line in me.page.locator(".lk-empty").all()] == [True] * 2
        assert "tiny-random · float32 on cpu" in me.page.inner_text(".lk-facts")
        me.inject("hello", max_tokens=2)
        me.until("lab.state.steps.length > 0")
        assert [line.is_visible() for line in me.page.locator(".lk-empty").all()] == [False] * 2
        wait_for(lambda: not live.busy)
        monkeypatch.setattr(live.engine, "step", lambda: 1 / 0)
        request_id = me.inject("hello")
        me.finished(request_id, "error")
        me.page.wait_for_selector(".lk-failure")
        assert "ZeroDivisionError: division by zero" in me.page.inner_text(".lk-failure")
        me.page.click("#lk-inject")
        me.page.wait_for_selector("#lk-message p:not(:empty)")
        assert "the engine failed" in me.page.inner_text("#lk-message")
        assert me.problems == []
        demo.close(verbose=False)
        me.page.wait_for_selector(".lk-lost")
        me.context.close()
