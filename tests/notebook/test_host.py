"""The picture of a notebook's engine without a notebook: questions in, answers out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.scheduler import Scheduler
from labkit.models.chat import as_chat
from labkit.models.load import LoadedModel
from labkit.notebook.host import KEEP, SLICE, Host
from labkit.trace.pool_state import PoolState
from labkit.views.live_feed import WINDOW
from labkit.views.wire import Ended, Lane, RanRow, Step, Table
from tests.models.tokenizers_of_all_kinds import model_with


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Page:
    """What the browser keeps of the answers, and its next question. Everything goes through JSON."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.feed, self.step, self.plan, self.since = "", -1, 0, -1
        self.texts: dict[str, str] = {}
        self.reasons: dict[str, str | None] = {}

    def ask(self, name: str, **question: Any) -> dict[str, Any]:
        return json.loads(json.dumps(self.host.answer(name, question), allow_nan=False))

    def pull(self) -> dict[str, Any]:
        unfinished = {name: len(words) for name, words in self.texts.items() if not self.reasons[name]}
        update = self.ask(
            "pull",
            feed=self.feed,
            step=self.step,
            plan=self.plan,
            cards=self.since,
            unfinished=unfinished,
        )
        self.feed, self.step = update["pictures"]["feed"], update["pictures"]["step"]
        self.plan, self.since = update["plan"]["key"], update["cards"]["since"]
        if update["cards"]["reset"]:
            self.texts.clear()
        for card in update["cards"]["items"]:
            before = self.texts.get(card["id"], "")[: card["at"]]
            self.texts[card["id"]] = before + card["text"]
            self.reasons[card["id"]] = card["reason"]
            assert len(self.texts[card["id"]]) == card["length"]
        return update

    def until_idle(self) -> dict[str, Any]:
        update = self.pull()
        while update["busy"]:
            update = self.pull()
        return update


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page(engine: Engine) -> Page:
    return Page(Host(engine))


def state_now(engine: Engine) -> PoolState:
    return engine.trace.state(engine.trace[-1].step, after=True)


def agrees(update: dict[str, Any], engine: Engine) -> None:
    """The picture shows who holds which page as the trace has it."""
    state = state_now(engine)
    assert update["pictures"]["step"] == engine.trace[-1].step
    tables = [Table(*table) for table in update["pictures"]["tables"]]
    assert {table.request: table.blocks for table in tables} == state.tables
    assert update["pictures"]["queue"] == state.queue


# -- the conversation -----------------------------------------------------------------------------


def test_inject_and_run_to_the_end(page: Page, engine: Engine) -> None:
    first = page.pull()
    assert first["pictures"]["full"] and first["pictures"]["steps"] == [] and not first["busy"]
    assert first["wait"] is None and first["plan"] == {"key": 0}
    name = page.ask("inject", prompt="The sea is", max_tokens="12")["request"]
    update = page.until_idle()
    output = engine.outputs[name]
    assert output.finished and page.texts[name] == output.text and page.reasons[name] == "length"
    assert update["wait"] is None and update["live"] == {"paused": False, "speed": None, "failure": ""}
    agrees(update, engine)
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
    update = page.pull()
    assert "full" not in update["pictures"] and [
        Step(*step).step for step in update["pictures"]["steps"]
    ] == [1]
    (card,) = update["cards"]["items"]
    assert card["at"] > 0 and card["at"] + len(card["text"]) == len(engine.outputs[name].text)
    again = page.pull()
    assert "steps" not in again["pictures"] and again["cards"]["items"] == []
    assert again["plan"] == {"key": page.plan}  # known: not sent again


def test_looking_steps_nothing(page: Page, engine: Engine) -> None:
    engine.add_request("from a cell", SamplingParams(max_tokens=4))
    for _ in range(3):
        update = page.pull()
        assert update["live"]["paused"] and update["wait"] is None and len(engine.trace) == 0
    assert page.host.answer("pull", {})["plan"]["plan"]["rows"][0].kind == "p"  # what the next step will do
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
        update = page.pull()
        return update["pictures"]["step"], update["wait"]

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
    assert "error" in page.ask("pull", step="yesterday", feed=page.pull()["pictures"]["feed"])
    assert "step -1 is not in this trace" in page.ask("look")["error"]
    assert "block must be between 0 and 47" in page.ask("look", block=99)["error"]


# -- others step the engine too -------------------------------------------------------------------


def test_steps_of_cells_are_shown(page: Page, engine: Engine) -> None:
    engine.add_request("before", SamplingParams(max_tokens=9))
    for _ in range(3):
        engine.step()
    first = page.pull()
    agrees(first, engine)
    assert [Lane(*lane).request for lane in first["pictures"]["lanes"]] == ["0"]
    page.ask("control", action="step")
    engine.step()
    update = page.pull()
    agrees(update, engine)
    assert [Step(*step).step for step in update["pictures"]["steps"]] == [3, 4] and "full" not in update[
        "pictures"
    ]
    assert page.texts["0"] == engine.outputs["0"].text


def test_more_steps_than_the_picture_holds(page: Page, engine: Engine) -> None:
    page.ask("inject", prompt="a", max_tokens="3")
    page.until_idle()
    feed = page.feed
    engine.add_request("long", SamplingParams(max_tokens=WINDOW + 60, ignore_eos=True), request_id="long")
    for _ in range(WINDOW + 40):
        engine.step()
    update = page.pull()
    agrees(update, engine)
    assert update["pictures"]["full"] and page.feed != feed
    assert [Step(*step).step for step in update["pictures"]["steps"]][-1] == engine.trace[-1].step
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
    assert [Ended(*ended).request for ended in page.pull()["plan"]["plan"]["ended"]] == [first]
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
    row = RanRow(*facts["rows"][0])
    assert row.request == name and row.kind == "d"
    words = "".join(page.ask("look", block=0, step=1)["tokens"])
    assert "The sea is" in words
    engine.outputs.pop(name)
    assert page.ask("look", block=0, step=1)["tokens"] is None


def test_a_closer_look_at_tokens_that_begin_with_a_space() -> None:
    engine = Engine(EngineConfig(model=model_with("llama 2"), block_size=16), say=None)
    page = Page(Host(engine))
    page.ask("inject", prompt="hello world cat", max_tokens="4")
    page.until_idle()
    assert "".join(page.ask("look", block=0, step=0)["tokens"]).endswith("hello world cat")


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
    update = page.until_idle()
    assert update["error"] == "The step failed: RuntimeError: the seats do not add up"
    assert update["live"]["paused"] and update["wait"] is None and update["plan"] == {"key": 0}
    page.ask("control", action="step")
    assert page.pull()["error"] == update["error"]  # said again when it is tried again
    page.ask("control", action="speed", value=2)
    assert page.pull()["error"] == ""


def test_the_stop_button_of_the_notebook(page: Page, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    page.ask("inject", prompt="The sea is", max_tokens="9")
    step = engine.step

    def interrupted() -> None:
        step()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    update = page.pull()
    assert update["live"]["paused"] and not update["busy"] and update["pictures"]["step"] == 0
