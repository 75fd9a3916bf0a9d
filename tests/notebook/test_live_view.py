"""The live picture and the sliders of a notebook, without a notebook: messages in, messages out."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ipywidgets
import pytest

import labkit
from labkit import Engine, EngineConfig, SamplingParams, notebook
from labkit.core.scheduler import Scheduler
from labkit.models.chat import as_chat
from labkit.models.load import LoadedModel, load_model
from labkit.notebook import live_view
from labkit.notebook.host import KEEP, SLICE, Host
from labkit.notebook.live_view import GONE, HOW_TO, KEEP_OPEN, what_if
from labkit.trace.pool_state import PoolState
from labkit.views import text
from labkit.views.live_feed import WINDOW, asset

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def engine(model: LoadedModel) -> Engine:
    return Engine(EngineConfig(model=model, num_blocks=48, max_num_seqs=4))


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Page:
    """What the browser keeps of the answers, and its next question. Whatever comes goes through JSON."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.feed, self.step, self.plan, self.since = "", -1, 0, -1
        self.texts: dict[str, str] = {}
        self.reasons: dict[str, str | None] = {}

    def ask(self, deed: str, **question: Any) -> dict[str, Any]:
        return json.loads(json.dumps(self.host.answer(deed, question), allow_nan=False))

    def pull(self) -> dict[str, Any]:
        open_ = {name: len(words) for name, words in self.texts.items() if not self.reasons[name]}
        news = self.ask(
            "pull",
            feed=self.feed,
            after=self.step,
            plan=self.plan,
            cards={"since": self.since, "open": open_},
        )
        self.feed, self.step = news["pictures"]["feed"], news["pictures"]["step"]
        self.plan, self.since = news["plan"]["key"], news["cards"]["since"]
        if news["cards"]["reset"]:
            self.texts.clear()
        for card in news["cards"]["items"]:
            before = self.texts.get(card["id"], "")[: card["at"]]
            self.texts[card["id"]] = before + card["text"]
            self.reasons[card["id"]] = card["reason"]
            assert len(self.texts[card["id"]]) == card["length"]
        return news

    def until_idle(self) -> dict[str, Any]:
        news = self.pull()
        while news["busy"]:
            news = self.pull()
        return news


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page(engine: Engine) -> Page:
    return Page(Host(engine))


def state_now(engine: Engine) -> PoolState:
    return engine.trace.state(engine.trace[-1].step, after=True)


def agrees(news: dict[str, Any], engine: Engine) -> None:
    """The picture shows who holds which page as the trace has it."""
    state = state_now(engine)
    assert news["pictures"]["step"] == engine.trace[-1].step
    assert {name: table for name, _, table in news["pictures"]["tables"]} == state.tables
    assert news["pictures"]["queue"] == state.queue


# -- the conversation -----------------------------------------------------------------------------


def test_inject_and_run_to_the_end(page: Page, engine: Engine) -> None:
    first = page.pull()
    assert first["pictures"]["full"] and first["pictures"]["steps"] == [] and not first["busy"]
    assert first["wait"] is None and first["plan"] == {"key": 0}
    name = page.ask("inject", prompt="The sea is", max_tokens="12")["request"]
    news = page.until_idle()
    output = engine.outputs[name]
    assert output.finished and page.texts[name] == output.text and page.reasons[name] == "length"
    assert news["wait"] is None and news["live"] == {"paused": False, "speed": None, "failure": ""}
    agrees(news, engine)
    assert len(engine.trace) == 12


def test_an_injected_prompt_is_a_chat_message(page: Page, engine: Engine, model: LoadedModel) -> None:
    name = page.ask("inject", prompt="Why?", max_tokens=3)["request"]
    assert engine.outputs[name].prompt_token_ids == as_chat(model.tokenizer, "Why?")
    assert page.pull()["cards"]["items"][0]["prompt"] == "Why?"


def test_only_what_is_new_is_sent(page: Page, engine: Engine) -> None:
    page.ask("control", action="pause")
    name = page.ask("inject", prompt="The sea is", max_tokens="8")["request"]
    page.ask("control", action="step")
    page.pull()
    page.ask("control", action="step")
    news = page.pull()
    assert "full" not in news["pictures"] and [step[0] for step in news["pictures"]["steps"]] == [1]
    (card,) = news["cards"]["items"]
    assert card["at"] > 0 and card["at"] + len(card["text"]) == len(engine.outputs[name].text)
    again = page.pull()
    assert "steps" not in again["pictures"] and again["cards"]["items"] == []
    assert again["plan"] == {"key": page.plan}  # known: not sent again


def test_looking_steps_nothing(page: Page, engine: Engine) -> None:
    engine.add_request("from a cell", SamplingParams(max_tokens=4))
    for _ in range(3):
        news = page.pull()
        assert news["live"]["paused"] and news["wait"] is None and len(engine.trace) == 0
    assert page.host.answer("pull", {})["plan"]["plan"]["rows"][0][3] == "p"  # what the next step will do
    page.ask("control", action="resume")
    page.until_idle()
    assert not engine.has_unfinished and len(engine.trace) == 4
    engine.add_request("another", SamplingParams(max_tokens=4))
    page.pull()
    assert len(engine.trace) == 4  # it ran to the end, and that was all that was asked for


def test_pause_holds_what_is_injected_until_run(page: Page, engine: Engine) -> None:
    assert page.ask("control", action="pause")["paused"]
    page.ask("inject", prompt="one", max_tokens="5")
    assert page.pull()["live"]["paused"] and len(engine.trace) == 0
    page.ask("control", action="step")
    assert page.pull()["pictures"]["step"] == 0 and len(engine.trace) == 1
    assert not page.ask("control", action="resume")["paused"]
    page.until_idle()
    assert len(engine.trace) == 5
    page.ask("control", action="step")  # with nothing to do, nothing is done
    assert len(engine.trace) == 5


def test_an_answer_takes_a_moment_only(engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def slow() -> Any:
        clock.now += 0.4 * SLICE
        return step()

    monkeypatch.setattr(engine, "step", slow)
    page = Page(Host(engine, clock))
    page.ask("inject", prompt="The sea is", max_tokens="7")
    assert [page.pull()["pictures"]["step"] for _ in range(3)] == [2, 5, 6]
    assert not page.pull()["busy"]


def test_speed(engine: Engine, clock: Clock) -> None:
    page = Page(Host(engine, clock))
    page.ask("control", action="speed", value=2)
    page.ask("inject", prompt="The sea is", max_tokens="20")

    def at(seconds: float) -> tuple[int, int]:
        clock.now = 100 + seconds
        news = page.pull()
        return news["pictures"]["step"], news["wait"]

    assert at(0) == (0, 500)
    assert at(0.3) == (0, 200)
    assert at(0.52) == (1, 480)  # a late answer does not slow the clock down
    assert at(1.0) == (2, 500)
    assert at(60) == (3, 500)  # and a long absence is not made up for
    page.ask("control", action="speed", value=None)
    page.until_idle()
    assert len(engine.trace) == 20


@pytest.mark.parametrize("speed", [0, -1, "fast", float("nan"), True])
def test_a_speed_that_cannot_be(page: Page, speed: object) -> None:
    assert "speed must be" in page.host.answer("control", {"action": "speed", "value": speed})["error"]
    assert page.ask("control", action="resume")["speed"] is None


@pytest.mark.parametrize(
    ("prompt", "most", "words"),
    [
        ("", "5", "The prompt is empty"),
        (" \n", "5", "The prompt is empty"),
        (None, "5", "The prompt is empty"),
        ("x" * 20_001, "5", "The prompt is too long: it has 20,001 characters"),
        ("a " * 800, "5", "tokens, but max_model_len is 768"),
        ("Why?", "0", "max_tokens must be at least 1, not 0"),
        ("Why?", "-3", "max_tokens must be at least 1, not -3"),
        ("Why?", "", "Max tokens must be a whole number"),
        ("Why?", "many", "Max tokens must be a whole number"),
        ("Why?", "1.5", "Max tokens must be a whole number"),
        ("Why?", None, "Max tokens must be a whole number"),
    ],
)
def test_what_cannot_be_served_is_said_and_costs_nothing(
    page: Page, engine: Engine, prompt: object, most: object, words: str
) -> None:
    assert words in page.ask("inject", prompt=prompt, max_tokens=most)["error"]
    assert not engine.outputs and not engine.has_unfinished
    assert not page.pull()["busy"]


def test_nonsense_is_answered(page: Page) -> None:
    assert "KeyError" in page.ask("dance")["error"]
    assert "error" in page.ask("pull", after="yesterday", feed=page.pull()["pictures"]["feed"])
    assert "step -1 is not in this trace" in page.ask("look")["error"]
    assert "block must be between 0 and 47" in page.ask("look", block=99)["error"]


# -- others step the engine too -------------------------------------------------------------------


def test_steps_of_cells_are_shown(page: Page, engine: Engine) -> None:
    engine.add_request("before", SamplingParams(max_tokens=9))
    for _ in range(3):
        engine.step()
    first = page.pull()
    agrees(first, engine)
    assert [lane[0] for lane in first["pictures"]["lanes"]] == ["0"]
    page.ask("control", action="step")
    engine.step()
    news = page.pull()
    agrees(news, engine)
    assert [step[0] for step in news["pictures"]["steps"]] == [3, 4] and "full" not in news["pictures"]
    assert page.texts["0"] == engine.outputs["0"].text


def test_more_steps_than_the_picture_holds(page: Page, engine: Engine) -> None:
    page.ask("inject", prompt="a", max_tokens="3")
    page.until_idle()
    feed = page.feed
    engine.add_request("long", SamplingParams(max_tokens=WINDOW + 60, ignore_eos=True), request_id="long")
    for _ in range(WINDOW + 40):
        engine.step()
    news = page.pull()
    agrees(news, engine)
    assert news["pictures"]["full"] and page.feed != feed
    assert [step[0] for step in news["pictures"]["steps"]][-1] == engine.trace[-1].step
    assert page.texts["long"] == engine.outputs["long"].text


@pytest.mark.parametrize("steps", [5, 9, 10, 11, 21])
def test_a_trace_that_forgets(model: LoadedModel, steps: int) -> None:
    engine = Engine(EngineConfig(model=model, num_blocks=48, max_trace_steps=5))
    page = Page(Host(engine))
    engine.add_request("one", SamplingParams(max_tokens=60, ignore_eos=True))
    engine.add_request("two", SamplingParams(max_tokens=6))  # gone when the page looks again
    for _ in range(4):
        engine.step()
        agrees(page.pull(), engine)
    for _ in range(steps):
        engine.step()
    agrees(page.pull(), engine)


def test_answers_that_a_cell_took_out(page: Page, engine: Engine) -> None:
    page.ask("control", action="pause")
    name = page.ask("inject", prompt="one", max_tokens="5")["request"]
    page.pull()
    engine.outputs.pop(name)
    assert page.pull()["cards"]["gone"] == [name]


def test_the_latest_cards_only(page: Page, engine: Engine) -> None:
    for i in range(KEEP + 20):
        engine.add_request([5 + i % 7], SamplingParams(max_tokens=1))
    assert [card["id"] for card in page.pull()["cards"]["items"]] == [str(i) for i in range(20, KEEP + 20)]


def test_cancel(page: Page, engine: Engine) -> None:
    page.ask("control", action="pause")
    first, second = (page.ask("inject", prompt="Why?", max_tokens="9")["request"] for _ in range(2))
    page.pull()
    page.ask("cancel", request=first)
    assert [ended[0] for ended in page.pull()["plan"]["plan"]["ended"]] == [first]
    page.ask("control", action="step")
    page.pull()
    assert page.reasons == {first: "abort", second: None}
    page.ask("cancel", request=None)
    page.ask("control", action="resume")
    page.until_idle()
    assert page.reasons == {first: "abort", second: "abort"}
    assert engine.pool.num_free == 48


def test_a_closer_look(page: Page, engine: Engine) -> None:
    name = page.ask("inject", prompt="The sea is", max_tokens="4")["request"]
    page.until_idle()
    facts = page.ask("look", step=1)
    assert facts["rows"][0][0] == name and facts["rows"][0][3] == "d"
    words = "".join(page.ask("look", block=0, step=1)["tokens"])
    assert "The sea is" in words
    engine.outputs.pop(name)
    assert page.ask("look", block=0, step=1)["tokens"] is None


class Broken(Scheduler):
    """Loses count after a few steps."""

    def schedule(self) -> Any:
        plan = super().schedule()
        if self.running and self.running[0].num_computed_tokens > 12:
            raise RuntimeError("the seats do not add up")
        return plan


def test_a_step_that_fails_is_told_and_stops_the_clock(model: LoadedModel) -> None:
    engine = Engine(EngineConfig(model=model, num_blocks=48), scheduler=Broken)
    page = Page(Host(engine))
    page.ask("inject", prompt="The sea is", max_tokens="9")
    news = page.until_idle()
    assert news["error"] == "The step failed: RuntimeError: the seats do not add up"
    assert news["live"]["paused"] and news["wait"] is None and news["plan"] == {"key": 0}
    page.ask("control", action="step")
    assert page.pull()["error"] == news["error"]  # said again when it is tried again
    page.ask("control", action="speed", value=2)
    assert page.pull()["error"] == ""


def test_the_stop_button_of_the_notebook(page: Page, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    page.ask("inject", prompt="The sea is", max_tokens="9")
    step = engine.step

    def interrupted() -> None:
        step()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    news = page.pull()
    assert news["live"]["paused"] and not news["busy"] and news["pictures"]["step"] == 0


# -- what the notebook shows ----------------------------------------------------------------------


def test_without_a_page_it_is_text(engine: Engine) -> None:
    view = labkit.lab(engine)
    assert repr(view) == f"No steps yet: nothing has run.\n\n{HOW_TO}"
    assert view._repr_mimebundle_() == {"text/plain": repr(view)}
    exec(HOW_TO.removeprefix("Inject: ").replace(", then ", "; "), {"engine": engine, "labkit": labkit})
    assert repr(view) == f"{text.batch_timeline(engine.trace)}\n\n{HOW_TO}"
    assert view.widget is None and len(engine.trace) == 1


def test_the_text_is_the_same_in_every_run(model: LoadedModel) -> None:
    def once() -> str:
        engine = Engine(EngineConfig(model=model, num_blocks=48))
        engine.add_request("the same", SamplingParams(max_tokens=4))
        for _ in range(3):
            engine.step()
        return repr(labkit.lab(engine))

    assert once() == once()


@pytest.mark.parametrize("thing", [None, "tiny-random", SimpleNamespace(trace=None)])
def test_only_an_engine_will_do(thing: object) -> None:
    with pytest.raises(TypeError, match="lab takes an Engine, not"):
        labkit.lab(thing)  # type: ignore[arg-type]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a kernel: widgets are made, and nobody hears them."""
    monkeypatch.setattr(live_view, "_has_page", lambda: True)
    yield
    live_view.LiveView._open.clear()


def heard(view: live_view.LiveView) -> list[Any]:
    """All that a view's widget sends from now on."""
    sent: list[Any] = []
    view.widget.send = lambda content, buffers=None: sent.append((content, buffers))
    return sent


def test_a_message_and_its_answer(kernel: None, engine: Engine) -> None:
    view = labkit.lab(engine)
    sent = heard(view)
    view.widget._handle_custom_msg({"id": "v-1", "deed": "pull", "question": {}}, [])
    view.widget._handle_custom_msg({"id": "v-2", "deed": "inject", "question": {"prompt": ""}}, [])
    view.widget._handle_custom_msg("nonsense", [])
    view.widget._handle_custom_msg({"id": "v-3", "deed": "pull"}, [])
    (first, buffers), (second, _) = sent
    assert first["id"] == "v-1" and first["answer"]["pictures"]["full"] and buffers is None
    assert second == {"id": "v-2", "answer": {"error": "The prompt is empty: type something first."}}
    json.dumps(sent)


def test_the_bundle_of_a_kernel(kernel: None, engine: Engine) -> None:
    view = labkit.lab(engine)
    bundle = view._repr_mimebundle_()
    assert list(bundle) == [WIDGET_VIEW, "text/plain"]
    assert bundle[WIDGET_VIEW]["model_id"] == view.widget.model_id
    assert bundle["text/plain"] == repr(view) and view.widget.model_id not in repr(view)
    with pytest.raises(NotImplementedError):  # IPython takes the bundle then
        view._ipython_display_()


def test_on_colab_the_widget_shows_itself(
    kernel: None, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(live_view, "in_colab", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    view = labkit.lab(engine)
    view._ipython_display_()
    assert shown == [view.widget]


def test_the_page_and_the_notebook_draw_with_the_same_files(kernel: None, engine: Engine) -> None:
    script, styles = labkit.lab(engine).widget._esm, labkit.lab(engine).widget._css
    for name in ("canvas.js", "meters.js", "words.js", "side.js", "panel.js", "cards.js"):
        assert asset(name) in script
    assert json.dumps(asset("canvas.html")) in script and asset("canvas.css") in styles
    assert len(script) + len(styles) < 120_000


def test_without_anywidget_it_says_what_is_missing(
    kernel: None, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_view, "_widget_class", lambda: None)
    bundle = labkit.lab(engine)._repr_mimebundle_()
    assert list(bundle) == ["text/plain"]
    assert bundle["text/plain"].endswith("The live picture needs anywidget: pip install anywidget")


def test_old_pictures_let_go_of_their_engine(kernel: None, model: LoadedModel) -> None:
    views = [
        labkit.lab(Engine(EngineConfig(model=model, num_blocks=4, max_model_len=64)))
        for _ in range(KEEP_OPEN + 1)
    ]
    for view in views:
        assert view.widget
    assert views[0].host is None and repr(views[0]) == GONE
    assert views[0].answer({"deed": "pull", "question": {}}) == {"error": GONE}
    assert all(view.host for view in views[1:])


def from_another_thread(deed: Callable[[], object]) -> None:
    thread = threading.Thread(target=deed)
    thread.start()
    thread.join()


def test_whoever_brings_a_message_the_engine_keeps_its_thread(kernel: None, engine: Engine) -> None:
    async def cell() -> None:
        view, here = labkit.lab(engine), threading.get_ident()
        threads: list[int] = []
        view.widget.send = lambda content, buffers=None: threads.append(threading.get_ident())
        message = {"id": "v-1", "deed": "pull", "question": {}}
        from_another_thread(lambda: view.widget._handle_custom_msg(message, []))
        assert threads == []  # this cell is still running
        await asyncio.sleep(0)
        assert threads == [here]

    asyncio.run(cell())


# -- what if --------------------------------------------------------------------------------------


def drawn(pages: int) -> notebook.Picture:
    return notebook.bars({"pages": pages, "more": 2 * pages}, f"{pages} pages")


def test_what_if_without_a_page_is_the_first_result() -> None:
    shown = what_if(drawn, pages=(3, 9))
    assert repr(shown) == repr(drawn(3))
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == repr(drawn(3)) and WIDGET_VIEW not in bundle
    assert bundle["application/vnd.plotly.v1+json"]["layout"]["title"]["text"].startswith("3 pages")
    assert repr(what_if(lambda words: f"so {words}", words=["one", "two"])) == "so one"
    assert repr(what_if(lambda words: print("printed", words), words=["one", "two"])) == "printed one"


def test_what_if_begins_with_the_defaults() -> None:
    def told(seats: int = 4, share: float = 0.5, kind: str = "b", far: int = 99) -> str:
        return f"{seats} {share} {kind} {far}"

    shown = what_if(told, seats=(1, 8), share=(0.0, 1.0), kind=["a", "b"], far=(0, 10, 5))
    assert repr(shown) == "4 0.5 b 0"


@pytest.mark.parametrize(
    "choices", [(), (1,), (1, 2, 3, 4), ("a", "b"), (True, False), [], "ab", 5, (3, 3), (5, 1), (1, 5, 0)]
)
def test_what_if_ranges_that_are_none(choices: Any) -> None:
    with pytest.raises(ValueError, match=r"pages must (be a tuple|go up)"):
        what_if(drawn, pages=choices)


def test_sliders_and_lists(kernel: None) -> None:
    shown = what_if(
        lambda seats, share, kind: f"{seats} {share} {kind}",
        seats=(2, 8, 2),
        share=(0.0, 1.0, 0.25),
        kind=["a", "b"],
    )
    assert shown._repr_mimebundle_()["text/plain"] == "2 0.0 a"
    seats, share, kind = shown._controls.values()
    assert isinstance(seats, ipywidgets.IntSlider) and (seats.min, seats.max, seats.step) == (2, 8, 2)
    assert isinstance(share, ipywidgets.FloatSlider) and isinstance(kind, ipywidgets.Dropdown)
    assert not seats.continuous_update and not share.continuous_update
    assert [control.description for control in (seats, share, kind)] == ["seats", "share", "kind"]
    kind.value = "b"
    assert shown._below.outputs[0]["text"] == "2 0.0 b"


def test_a_slider_that_is_let_go_calls_the_function_once(kernel: None) -> None:
    calls: list[int] = []

    def counted(pages: int) -> notebook.Picture:
        calls.append(pages)
        print("counting", pages)
        return drawn(pages)

    shown = what_if(counted, pages=(3, 9))
    assert shown.widget and calls == [3]
    slider = shown._controls["pages"]
    slider.value = 5
    slider.value = 5
    assert calls == [3, 5]
    words, picture = shown._below.outputs
    assert words["text"] == "counting 5\n"
    assert picture["data"]["text/plain"] == repr(drawn(5))
    json.dumps(shown._below.outputs)
    assert shown._below.layout.min_height.endswith("px")


def test_what_changes_while_a_cell_runs_is_answered_with_one_call(kernel: None) -> None:
    async def cell() -> None:
        calls: list[tuple[int, int]] = []
        shown = what_if(lambda a, b: calls.append((a, b)), a=(1, 9), b=(1, 9))
        assert shown.widget

        def others() -> None:
            for value in (2, 3, 4):
                shown._controls["a"].value = shown._controls["b"].value = value

        from_another_thread(others)
        assert calls == [(1, 1)]
        await asyncio.sleep(0)
        assert calls == [(1, 1), (4, 4)]

    asyncio.run(cell())


def test_a_function_that_fails_says_so_beneath_its_slider(kernel: None) -> None:
    def fails(pages: int) -> str:
        if pages == 5:
            raise RuntimeError("five is one too many")
        return "fine"

    shown = what_if(fails, pages=(3, 9))
    assert shown.widget
    shown._controls["pages"].value = 5
    (error,) = shown._below.outputs
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "five is one too many")
    assert "in fails" in error["traceback"][1]
    assert not any("labkit/notebook/live_view.py" in line for line in error["traceback"])
    shown._controls["pages"].value = 6
    assert shown._below.outputs[0]["text"] == "fine"


def test_colab_gets_html_that_waits_for_plotly(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(live_view, "in_colab", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda thing, raw=False: shown.append(thing))
    monkeypatch.setattr("IPython.display.clear_output", lambda wait: shown.append("clear"))
    view = what_if(lambda n: notebook.bars({"</script><b>": n}, "A title"), n=(1, 3))
    view._ipython_display_()
    assert shown[0] is view.widget and shown[1] == "clear"
    html = shown[2]["text/html"]
    assert "https://cdn.plot.ly/plotly-" in html and html.count("</script") == 1
    view._controls["n"].value = 2
    assert [thing if isinstance(thing, str) else list(thing) for thing in shown[3:]] == [
        "clear",
        ["text/html", "text/plain"],
    ]
    assert shown[4]["text/html"] != html  # a place of its own


def test_no_thread_is_started(kernel: None, engine: Engine) -> None:
    before = threading.active_count()
    view = labkit.lab(engine)
    sent = heard(view)
    message = {"id": "1", "deed": "inject", "question": {"prompt": "a", "max_tokens": 2}}
    view.widget._handle_custom_msg(message, [])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (sent and sent[-1][0]["answer"].get("busy") is False):
        view.widget._handle_custom_msg({"id": "2", "deed": "pull", "question": {}}, [])
    assert threading.active_count() == before and not engine.has_unfinished
