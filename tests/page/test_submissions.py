"""Cards, owners and the clock, without a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.chat import as_chat
from labkit.models.load import LoadedModel, load_model
from labkit.page.submissions import KEEP, Desk, params_of
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits

FOUR = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def desk(model: LoadedModel) -> Iterator[Desk]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        yield Desk(live)


def finish(desk: Desk, *ids: str) -> None:
    for request_id in ids:
        for _ in desk.live.stream(request_id):
            pass


def test_cards_say_what_was_asked_and_answered(desk: Desk) -> None:
    mine = desk.inject("me", "hello", FOUR)
    theirs = desk.inject("you", "world", FOUR)
    finish(desk, mine, theirs)
    news = desk.cards().since(-1, {})
    assert news["since"] == 2
    assert [(card["id"], card["owner"], card["prompt"]) for card in news["items"]] == [
        (mine, mark("me"), "hello"),
        (theirs, mark("you"), "world"),
    ]
    card, output = news["items"][0], desk.live.output(mine)
    assert (card["text"], card["tokens"], card["max_tokens"]) == (output.text, 4, 4)
    assert (card["reason"], card["at"], card["length"]) == ("length", 0, len(output.text))


def test_only_the_new_end_of_a_text_is_sent_and_all_of_it_at_the_end(desk: Desk) -> None:
    desk.live.pause()
    request_id = desk.inject("me", "hello", SamplingParams(max_tokens=12))
    text, since = "", -1
    while not desk.live.output(request_id).finished:
        before = len(desk.live.output(request_id).token_ids)
        desk.live.single_step()
        while len(desk.live.output(request_id).token_ids) == before:
            pass
        news = desk.cards().since(since, {request_id: len(text)} if text else {})
        since = news["since"]
        for card in news["items"]:
            assert ("prompt" in card) == (not text)  # it is known by then
            assert card["at"] == (0 if card["reason"] else len(text))
            text = text[: card["at"]] + card["text"]
        assert text == desk.live.output(request_id).text
    assert desk.cards().since(since, {})["items"] == []  # it has the end: nothing more to say
    assert desk.cards().since(since, {request_id: 3})["items"][0]["text"] == text  # it missed the end


def test_everyone_cancels_their_own_only(desk: Desk) -> None:
    desk.live.pause()
    one, two, theirs = (desk.inject(who, "hello", FOUR) for who in ("me", "me", "you"))
    desk.cancel("you", one)
    desk.cancel("me", two)
    desk.cancel("you", "no such request")
    desk.live.resume()
    finish(desk, one, two, theirs)
    reasons = [desk.live.output(name).finish_reason for name in (one, two, theirs)]
    assert reasons == ["length", "abort", "length"]


def test_whoever_leaves_takes_requests_and_pause_along(desk: Desk) -> None:
    desk.control("me", "pause")
    mine, theirs = desk.inject("me", "hello", FOUR), desk.inject("you", "hello", FOUR)
    desk.leave("somebody else")
    assert desk.live.paused
    desk.leave("me")
    finish(desk, mine, theirs)
    assert desk.live.output(mine).finish_reason == "abort"
    assert desk.live.output(theirs).finish_reason == "length" and not desk.live.paused


def test_the_clock(desk: Desk) -> None:
    desk.control("me", "speed", 5)
    desk.control("me", "step")
    desk.control("me", "dance")  # not a word that it knows
    assert desk.clock() == {"paused": True, "speed": 5, "failure": ""}
    desk.control("me", "speed")
    assert desk.clock()["speed"] is None
    desk.control("you", "resume")
    assert desk.clock() == {"paused": False, "speed": None, "failure": ""}
    for speed in (float("nan"), 0.49, 1e9):
        with pytest.raises(ValueError, match="speed must be"):
            desk.control("me", "speed", speed)
    assert desk.clock()["speed"] is None


def test_a_pause_stays_with_whoever_made_it(desk: Desk) -> None:
    for again in ("pause", "step"):
        desk.control("me", "pause")
        desk.control("you", again)
        desk.leave("you")
        assert desk.live.paused
        desk.leave("me")
        assert not desk.live.paused
    desk.control("me", "pause")
    desk.control("you", "resume")
    desk.live.pause()  # the host does, whom no visitor takes it from
    desk.leave("me")
    assert desk.live.paused


def test_whoever_leaves_takes_their_speed_along(desk: Desk) -> None:
    desk.live.speed = 500  # the host's choice
    desk.control("me", "speed", 5)
    desk.control("you", "speed", 20)
    desk.leave("me")
    assert desk.live.speed == 20
    desk.leave("you")
    assert desk.live.speed == 500
    desk.control("me", "speed", 5)
    desk.live.speed = 50
    desk.leave("me")
    assert desk.live.speed == 50


def test_whoever_has_no_name_decides_nothing(desk: Desk) -> None:
    for action in ("pause", "step", "speed"):
        desk.control("", action, 1)
    assert desk.clock() == {"paused": False, "speed": None, "failure": ""}
    desk.live.pause()
    request_id = desk.inject("", "hello", FOUR)
    desk.control("", "resume")
    desk.leave("")
    desk.cancel("")
    assert desk.live.paused
    desk.live.resume()
    finish(desk, request_id)
    assert desk.live.output(request_id).finish_reason == "length"


def test_old_cards_are_forgotten_but_not_those_of_unfinished_requests(desk: Desk) -> None:
    one = SamplingParams(max_tokens=1)
    first = desk.inject("me", "hello", one)
    finish(desk, first)
    desk.live.pause()
    running = [desk.inject(f"visitor {i // 20}", "hello", one) for i in range(KEEP + 10)]
    ids = [card["id"] for card in desk.cards().since(-1, {})["items"]]
    assert ids == running  # the finished one went first, and then none could
    desk.cancel("visitor 0", running[0])
    desk.live.resume()
    finish(desk, *running)
    assert desk.live.output(running[0]).finish_reason == "abort"
    last = desk.inject("me", "hello", one)
    assert [card["id"] for card in desk.cards().since(-1, {})["items"]] == [*running[11:], last]


def test_cards_that_nobody_knows_any_more_are_named(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64)), keep_finished=1) as live:
        desk = Desk(live)
        forgotten, latest = desk.inject("me", "hello", FOUR), desk.inject("me", "hello", FOUR)
        finish(desk, latest)
        known = {forgotten: 3, "never heard of": 0, latest: 0}
        news = desk.cards().since(2, known)
        assert [card["id"] for card in news["items"]] == [latest]
        assert set(news["gone"]) == {forgotten, "never heard of"}
        assert desk.cards().since(-1, {})["gone"] == []  # the visitor has no such card


def test_a_prompt_beyond_measure_is_refused_unread(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr("labkit.page.submissions.as_chat", read)
    monkeypatch.setattr(desk.live, "submit", read)
    with pytest.raises(ValueError, match="it has 20,001 characters, and the limit is 20,000"):
        desk.inject("me", "x" * (Limits.prompt_chars + 1), FOUR)
    with pytest.raises(AssertionError):
        desk.inject("me", "x" * Limits.prompt_chars, FOUR)


def test_a_visitor_has_so_many_requests_under_way_and_no_more(desk: Desk) -> None:
    desk.live.pause()
    ids = [desk.inject("me", "hello", FOUR) for _ in range(Limits.requests)]
    with pytest.raises(ValueError, match=f"You have {Limits.requests} requests under way"):
        desk.inject("me", "hello", FOUR)
    theirs = desk.inject("you", "hello", FOUR)
    desk.live.resume()
    finish(desk, *ids, theirs)
    desk.inject("me", "hello", FOUR)


def test_a_card_promises_no_more_than_the_model_can_hold(desk: Desk) -> None:
    desk.live.pause()
    request_id = desk.inject("me", "hello", SamplingParams(max_tokens=100_000))
    room = desk.live.engine.max_model_len - len(desk.live.output(request_id).prompt_token_ids)
    assert desk.cards().since(-1, {})["items"][0]["max_tokens"] == room
    desk.live.resume()
    finish(desk, request_id)
    card = desk.cards().since(-1, {})["items"][0]
    if card["reason"] == "length":
        assert card["tokens"] == card["max_tokens"] == room


def test_the_chat_template_is_used_unless_raw(desk: Desk, model: LoadedModel) -> None:
    decode = model.tokenizer.decode
    chat, raw = desk.inject("me", "hello", FOUR), desk.inject("me", "hello", FOUR, raw=True)
    assert decode(desk.live.output(raw).prompt_token_ids) == "hello"
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert decode(desk.live.output(chat).prompt_token_ids) == text
    assert as_chat(object(), "hello") == "hello"
    talk = [{"role": role, "content": role} for role in ("system", "user")]
    assert as_chat(object(), talk) == "system\n\nuser"
    assert decode(as_chat(model.tokenizer, talk)).startswith("<|im_start|>system\nsystem<|im_end|>")


@pytest.mark.parametrize("prompt", ["", " \n ", None])
def test_an_empty_prompt(desk: Desk, prompt: str) -> None:
    with pytest.raises(ValueError, match="The prompt is empty"):
        desk.inject("me", prompt, FOUR)
    assert desk.cards().since(-1, {}) == {"since": 0, "items": [], "gone": []}


def test_numbers_of_a_form() -> None:
    assert params_of(64.0, 0.5, 0.9, 3.0) == SamplingParams(64, temperature=0.5, top_p=0.9, seed=3)
    for seed, number in ((None, None), ("", None), (" ", None), (" 7 ", 7), ("-7", -7), (7, 7)):
        assert params_of(1, 0, 1, seed).seed == number
    for numbers, message in (
        ((0, 0, 1, None), "max_tokens must be at least 1"),
        ((None, 0, 1, None), "max_tokens must be a whole number, not None"),
        ((1.5, 0, 1, None), "max_tokens must be a whole number, not 1.5"),
        ((8, float("nan"), 1, None), "temperature must be a number, not nan"),
        ((8, None, 1, None), "temperature must be a number"),
        ((8, 0, 2, None), "top_p must be between"),
        ((8, 0, 1, 0.5), "seed must be a whole number"),
        ((8, 0, 1, "lucky"), "seed must be a whole number, not 'lucky'"),
        ((8, 0, 1, "9" * 5000), "seed must be a whole number"),
        ((8, 0, 1, "9" * 19), "seed must be between"),
    ):
        with pytest.raises(ValueError, match=message):
            params_of(*numbers)


def test_the_queue_of_all_visitors_is_bounded(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        desk = Desk(live, Limits(requests=3, queue=4))
        live.pause()
        for who in ("me", "me", "you", "you"):
            desk.inject(who, "hello", FOUR)
        with pytest.raises(ValueError, match="The lab is full: 4 requests are under way, and 4 is the limit"):
            desk.inject("me", "hello", FOUR)
        assert live.num_unfinished == 4
        live.resume()
        finish(desk, "0", "1", "2", "3")
        assert live.num_unfinished == 0
        desk.inject("me", "hello", FOUR)


def test_tokens_are_bounded(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        desk = Desk(live, Limits(prompt_tokens=20, answer_tokens=4))
        desk.inject("me", "hello", FOUR)
        with pytest.raises(ValueError, match="Max tokens is 5, and the limit of this lab is 4"):
            desk.inject("me", "hello", SamplingParams(max_tokens=5))
        for raw in (True, False):
            with pytest.raises(ValueError, match=r"it has \d+ tokens, and the limit is 20"):
                desk.inject("me", "hello " * 30, FOUR, raw=raw)


def test_nothing_is_taken_in_before_a_restart(desk: Desk) -> None:
    desk.refuses = "The engine restarts."
    with pytest.raises(ValueError, match="The engine restarts"):
        desk.inject("me", "hello", FOUR)
    desk.refuses = ""
    desk.inject("me", "hello", FOUR)


def test_a_card_says_who_by_the_name_they_chose(desk: Desk) -> None:
    desk.inject("me", "hello", FOUR, name="Ada")
    desk.inject("me", "hello", FOUR)
    assert [card["name"] for card in desk.cards().since(-1, {})["items"]] == ["Ada", ""]
