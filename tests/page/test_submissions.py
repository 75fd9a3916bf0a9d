"""Cards, owners and the clock, without a browser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.chat import as_chat
from labkit.models.load import LoadedModel
from labkit.page.snapshot import ClientState, new_cards
from labkit.page.submissions import KEEP, MAX_SHOWN, Submissions, params_of
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits

FOUR = SamplingParams(max_tokens=4)


@pytest.fixture
def submissions(model: LoadedModel) -> Iterator[Submissions]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        yield Submissions(live)


def told(submissions: Submissions, since: int = -1, known: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What is new on the cards after number `since`, to a client that knows so many characters of some."""
    return new_cards(submissions.now(), ClientState(cards=since, unfinished=known or {}))


def finish(submissions: Submissions, *ids: str) -> None:
    for request_id in ids:
        for _ in submissions.live.stream(request_id):
            pass


def test_cards_say_what_was_asked_and_answered(submissions: Submissions) -> None:
    mine = submissions.inject("me", "hello", FOUR)
    theirs = submissions.inject("you", "world", FOUR)
    finish(submissions, mine, theirs)
    update = told(submissions)
    assert update["since"] == 2
    assert [(card["id"], card["owner"], card["prompt"]) for card in update["items"]] == [
        (mine, mark("me"), "hello"),
        (theirs, mark("you"), "world"),
    ]
    card, output = update["items"][0], submissions.live.output(mine)
    assert (card["text"], card["tokens"], card["max_tokens"]) == (output.text, 4, 4)
    assert (card["reason"], card["at"], card["length"]) == ("length", 0, len(output.text))


def test_only_the_new_end_of_a_text_is_sent_and_all_of_it_at_the_end(submissions: Submissions) -> None:
    submissions.live.pause()
    request_id = submissions.inject("me", "hello", SamplingParams(max_tokens=12))
    text, since = "", -1
    while not submissions.live.output(request_id).finished:
        before = len(submissions.live.output(request_id).token_ids)
        submissions.live.single_step()
        while len(submissions.live.output(request_id).token_ids) == before:
            pass
        update = told(submissions, since, {request_id: len(text)} if text else {})
        since = update["since"]
        for card in update["items"]:
            assert ("prompt" in card) == (not text)  # it is known by then
            assert card["at"] == (0 if card["reason"] else len(text))
            text = text[: card["at"]] + card["text"]
        assert text == submissions.live.output(request_id).text
    assert told(submissions, since, {})["items"] == []  # it has the end: nothing more to say
    assert told(submissions, since, {request_id: 3})["items"][0]["text"] == text  # it missed the end


def test_everyone_cancels_their_own_only(submissions: Submissions) -> None:
    submissions.live.pause()
    one, two, theirs = (submissions.inject(who, "hello", FOUR) for who in ("me", "me", "you"))
    submissions.cancel("you", one)
    submissions.cancel("me", two)
    submissions.cancel("you", "no such request")
    submissions.live.resume()
    finish(submissions, one, two, theirs)
    reasons = [submissions.live.output(name).finish_reason for name in (one, two, theirs)]
    assert reasons == ["length", "abort", "length"]


def test_a_visitor_who_leaves_takes_requests_and_pause_along(submissions: Submissions) -> None:
    submissions.control("me", "pause")
    mine, theirs = submissions.inject("me", "hello", FOUR), submissions.inject("you", "hello", FOUR)
    submissions.leave("somebody else")
    assert submissions.live.paused
    submissions.leave("me")
    finish(submissions, mine, theirs)
    assert submissions.live.output(mine).finish_reason == "abort"
    assert submissions.live.output(theirs).finish_reason == "length" and not submissions.live.paused


def test_the_clock(submissions: Submissions) -> None:
    submissions.control("me", "speed", 5)
    submissions.control("me", "step")
    submissions.control("me", "dance")  # not a word that it knows
    assert submissions.clock() == {"paused": True, "speed": 5, "failure": ""}
    submissions.control("me", "speed")
    assert submissions.clock()["speed"] is None
    submissions.control("you", "resume")
    assert submissions.clock() == {"paused": False, "speed": None, "failure": ""}
    for speed in (float("nan"), 0.49, 1e9):
        with pytest.raises(ValueError, match="speed must be"):
            submissions.control("me", "speed", speed)
    assert submissions.clock()["speed"] is None


def test_a_pause_stays_with_the_visitor_who_made_it(submissions: Submissions) -> None:
    for again in ("pause", "step"):
        submissions.control("me", "pause")
        submissions.control("you", again)
        submissions.leave("you")
        assert submissions.live.paused
        submissions.leave("me")
        assert not submissions.live.paused
    submissions.control("me", "pause")
    submissions.control("you", "resume")
    submissions.live.pause()  # the host does, whom no visitor takes it from
    submissions.leave("me")
    assert submissions.live.paused


def test_a_visitor_who_leaves_takes_their_speed_along(submissions: Submissions) -> None:
    submissions.live.speed = 500  # the host's choice
    submissions.control("me", "speed", 5)
    submissions.control("you", "speed", 20)
    submissions.leave("me")
    assert submissions.live.speed == 20
    submissions.leave("you")
    assert submissions.live.speed == 500
    submissions.control("me", "speed", 5)
    submissions.live.speed = 50
    submissions.leave("me")
    assert submissions.live.speed == 50


def test_a_visitor_without_a_name_decides_nothing(submissions: Submissions) -> None:
    for action in ("pause", "step", "speed"):
        submissions.control("", action, 1)
    assert submissions.clock() == {"paused": False, "speed": None, "failure": ""}
    submissions.live.pause()
    request_id = submissions.inject("", "hello", FOUR)
    submissions.control("", "resume")
    submissions.leave("")
    submissions.cancel("")
    assert submissions.live.paused
    submissions.live.resume()
    finish(submissions, request_id)
    assert submissions.live.output(request_id).finish_reason == "length"


def test_old_cards_are_forgotten_but_not_those_of_unfinished_requests(submissions: Submissions) -> None:
    one = SamplingParams(max_tokens=1)
    first = submissions.inject("me", "hello", one)
    finish(submissions, first)
    submissions.live.pause()
    running = [submissions.inject(f"visitor {i // 20}", "hello", one) for i in range(KEEP + 10)]
    ids = [card["id"] for card in told(submissions)["items"]]
    assert ids == running  # the finished one went first, and then none could
    submissions.cancel("visitor 0", running[0])
    submissions.live.resume()
    finish(submissions, *running)
    assert submissions.live.output(running[0]).finish_reason == "abort"
    last = submissions.inject("me", "hello", one)
    assert [card["id"] for card in told(submissions)["items"]] == [*running[11:], last]


def test_cards_that_nobody_knows_any_more_are_named(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64)), keep_finished=1) as live:
        submissions = Submissions(live)
        forgotten, latest = submissions.inject("me", "hello", FOUR), submissions.inject("me", "hello", FOUR)
        finish(submissions, latest)
        known = {forgotten: 3, "never heard of": 0, latest: 0}
        update = told(submissions, 2, known)
        assert [card["id"] for card in update["items"]] == [latest]
        assert set(update["gone"]) == {forgotten, "never heard of"}
        assert told(submissions)["gone"] == []  # the visitor has no such card


def test_a_prompt_beyond_measure_is_refused_unread(
    submissions: Submissions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr("labkit.page.submissions.as_chat", read)
    monkeypatch.setattr(submissions.live, "submit", read)
    with pytest.raises(ValueError, match="it has 20,001 characters, and the limit is 20,000"):
        submissions.inject("me", "x" * (Limits.prompt_chars + 1), FOUR)
    with pytest.raises(AssertionError):
        submissions.inject("me", "x" * Limits.prompt_chars, FOUR)


@pytest.mark.parametrize("length", [MAX_SHOWN, MAX_SHOWN + 1, 100_000])
def test_a_card_shows_the_beginning_of_a_long_prompt(submissions: Submissions, length: int) -> None:
    submissions.enter("", submissions.live.submit("hello", FOUR), "x" * length, 4, name="API")
    (card,) = told(submissions)["items"]
    assert card["prompt"] == ("x" * length if length == MAX_SHOWN else "x" * (MAX_SHOWN - 1) + "…")


def test_a_visitor_has_so_many_requests_under_way_and_no_more(submissions: Submissions) -> None:
    submissions.live.pause()
    ids = [submissions.inject("me", "hello", FOUR) for _ in range(Limits.requests)]
    with pytest.raises(ValueError, match=f"You have {Limits.requests} requests under way"):
        submissions.inject("me", "hello", FOUR)
    theirs = submissions.inject("you", "hello", FOUR)
    submissions.live.resume()
    finish(submissions, *ids, theirs)
    submissions.inject("me", "hello", FOUR)


def test_a_card_promises_no_more_than_the_model_can_hold(submissions: Submissions) -> None:
    submissions.live.pause()
    request_id = submissions.inject("me", "hello", SamplingParams(max_tokens=100_000))
    room = submissions.live.engine.max_model_len - len(submissions.live.output(request_id).prompt_token_ids)
    assert told(submissions)["items"][0]["max_tokens"] == room
    submissions.live.resume()
    finish(submissions, request_id)
    card = told(submissions)["items"][0]
    if card["reason"] == "length":
        assert card["tokens"] == card["max_tokens"] == room


def test_the_chat_template_is_used_unless_raw(submissions: Submissions, model: LoadedModel) -> None:
    decode = model.tokenizer.decode
    chat, raw = submissions.inject("me", "hello", FOUR), submissions.inject("me", "hello", FOUR, raw=True)
    assert decode(submissions.live.output(raw).prompt_token_ids) == "hello"
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert decode(submissions.live.output(chat).prompt_token_ids) == text
    assert as_chat(object(), "hello") == "hello"
    talk = [{"role": role, "content": role} for role in ("system", "user")]
    assert as_chat(object(), talk) == "system\n\nuser"
    assert decode(as_chat(model.tokenizer, talk)).startswith("<|im_start|>system\nsystem<|im_end|>")


@pytest.mark.parametrize("prompt", ["", " \n ", None])
def test_an_empty_prompt(submissions: Submissions, prompt: str) -> None:
    with pytest.raises(ValueError, match="The prompt is empty"):
        submissions.inject("me", prompt, FOUR)
    assert told(submissions) == {"since": 0, "items": [], "gone": [], "reset": True}


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
        submissions = Submissions(live, Limits(requests=3, queue=4))
        live.pause()
        for who in ("me", "me", "you", "you"):
            submissions.inject(who, "hello", FOUR)
        with pytest.raises(ValueError, match="The lab is full: 4 requests are under way, and 4 is the limit"):
            submissions.inject("me", "hello", FOUR)
        assert live.num_unfinished == 4
        live.resume()
        finish(submissions, "0", "1", "2", "3")
        assert live.num_unfinished == 0
        submissions.inject("me", "hello", FOUR)


def test_tokens_are_bounded(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        submissions = Submissions(live, Limits(prompt_tokens=20, answer_tokens=4))
        submissions.inject("me", "hello", FOUR)
        with pytest.raises(ValueError, match="Max tokens is 5, and the limit of this lab is 4"):
            submissions.inject("me", "hello", SamplingParams(max_tokens=5))
        for raw in (True, False):
            with pytest.raises(ValueError, match=r"it has \d+ tokens, and the limit is 20"):
                submissions.inject("me", "hello " * 30, FOUR, raw=raw)


def test_nothing_is_taken_in_before_a_restart(submissions: Submissions) -> None:
    submissions.refuses = "The engine restarts."
    with pytest.raises(ValueError, match="The engine restarts"):
        submissions.inject("me", "hello", FOUR)
    submissions.refuses = ""
    submissions.inject("me", "hello", FOUR)


def test_a_card_says_who_by_the_name_they_chose(submissions: Submissions) -> None:
    submissions.inject("me", "hello", FOUR, name="Ada")
    submissions.inject("me", "hello", FOUR)
    assert [card["name"] for card in told(submissions)["items"]] == ["Ada", ""]
