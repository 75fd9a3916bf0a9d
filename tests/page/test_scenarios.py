"""Each scenario shows what it says, within the limits of everybody else."""

from __future__ import annotations

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.scenarios import SCENARIOS, Scenario
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits
from tests.waiting import wait_for

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_scenario_plays_to_its_end_and_shows_what_it_says(own: Lab, scenario: Scenario) -> None:
    assert own.play("me", scenario.name) == {"done": True}
    for name, value in scenario.settings.items():
        assert own.settings[name] == value
    live, submissions = own.session.live, own.session.submissions
    wait_for(lambda: submissions._serial == len(scenario.requests) and not live.num_unfinished)
    records = live.records()
    reasons = {finish.reason for record in records for finish in record.finished}
    assert reasons <= ({"length", "stop"} if scenario.talk else {"length"})
    trace = live.engine.trace
    if scenario.name == "uneven":
        assert max(len(record.requests) for record in records) == 4
        assert sum(bool(record.admitted) for record in records) > 4
    if scenario.name == "long":
        mixed = [record for record in records if "c" in record.kinds and "d" in record.kinds]
        assert len(mixed) > 3 and records[0].arrived and max(r.total_tokens for r in records) == 64
        assert [len(record.arrived) for record in records if record.arrived][-1] == 1
    if scenario.name in ("system", "chat"):
        assert trace.prefix_hit_rate > 0.5
    if scenario.name == "small":
        assert sum(len(record.preempted) for record in records) > 0
    if scenario.name == "copy":
        assert live.engine.speculator and max(len(record.requests) for record in records) == 1
    if scenario.name == "burst":
        assert len(records[0].arrived) + len(records[1].arrived) >= 16
        assert max(record.waiting for record in records) >= 8


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_scenario_played_twice_tells_the_same_story_in_steps(own: Lab, scenario: Scenario) -> None:
    stories = []
    for _ in range(2):
        assert own.play("me", scenario.name) == {"done": True}
        wait_for(
            lambda: own.session.submissions._serial == len(scenario.requests) and not own.session.live.busy
        )
        stories.append(own.session.live.records())
    assert stories[0] == stories[1], "what a first run left in the prefix cache answered for the second"


def test_a_question_asked_again_has_its_own_settings_again(own: Lab) -> None:
    own.play("me", "long", anew=True)
    own.change({"scheduler": "static", "max_num_batched_tokens": 256}, running="cancel")
    own.play("me", "long")
    assert (own.settings["scheduler"], own.settings["max_num_batched_tokens"]) == ("static", 256)
    own.play("me", "long", anew=True, running="cancel")
    assert (own.settings["scheduler"], own.settings["max_num_batched_tokens"]) == ("continuous", 64)


def test_what_a_scenario_changes_is_known_before_and_what_was_chosen_after(own: Lab) -> None:
    assert own.status()["changes"]["long"] == {"max_num_batched_tokens": 64}
    own.change({"max_num_seqs": 6})
    own.play("me", "long")
    status = own.status()
    assert status["played_after"] == -1 and status["chosen"]["max_num_seqs"] == 6
    assert status["chosen"]["max_num_batched_tokens"] == own.base["max_num_batched_tokens"] != 64
    own.change(status["chosen"], running="cancel")
    assert own.settings == status["chosen"] and own.status()["played_after"] is None


def test_with_locked_settings_a_scenario_plays_on_the_engine_that_there_is(own: Lab) -> None:
    session = own.session
    own.set_open("knobs", False)
    for _ in range(2):
        assert own.play("me", "uneven")["done"]
        wait_for(lambda: not session.live.busy)
    assert own.session is session and own.status()["played_after"] > 0


def test_a_scenario_played_again_keeps_the_knobs_that_were_turned(own: Lab) -> None:
    own.play("me", "uneven")
    assert own.settings["max_num_seqs"] == 4
    own.change({"scheduler": "static", "max_num_seqs": 6}, running="cancel")
    own.play("me", "uneven")
    assert (own.settings["scheduler"], own.settings["max_num_seqs"]) == ("static", 6)
    live = own.session.live
    wait_for(lambda: not live.num_unfinished)
    assert any("i" in record.kinds for record in live.records()), "a static batch has idle rows"
    own.play("me", "burst")
    assert (own.settings["scheduler"], own.settings["max_num_seqs"]) == ("static", 16)


def test_a_link_may_bring_settings(own: Lab) -> None:
    own.play("me", "small", {"num_blocks": 30, "scheduler": "static"})
    assert (own.settings["num_blocks"], own.settings["scheduler"]) == (30, "static")


def test_a_scenario_asks_before_it_restarts_what_runs(own: Lab) -> None:
    own.session.live.pause()
    own.session.submissions.inject("me", "hello", LONG)
    assert own.play("me", "small") == {"ask": 1} and own.status()["played"] == ""
    assert own.play("me", "small", running="cancel") == {"done": True} and own.status()["played"] == "small"


def test_scenarios_are_bounded_like_everything_else(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=128))) as live:
        own = Lab(live, limits=Limits(requests=8, queue=20))
        with pytest.raises(ValueError, match="needs 32 requests, and the lab takes 20 of all"):
            own.play("me", "burst", {"max_num_seqs": 5})
        assert own.session.live is live  # nothing ended for it
        for name in ("no such preset", None, 7):
            with pytest.raises(ValueError, match="There is no preset"):
                own.play("me", name)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="this engine holds 64 at most"):
            own.play("me", "long", {"num_blocks": 4})
        own.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_scenario_plays_under_the_limits_of_a_class(model: LoadedModel, scenario: Scenario) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=256))) as live:
        own = Lab(live, limits=Limits(requests=2, answer_tokens=4, prompt_tokens=8), knobs=False)
        own.session.live.pause()
        assert own.play("me", scenario.name)["done"]
        wait_for(lambda: own.session.live.num_unfinished)
        with pytest.raises(ValueError, match=r"2 is the limit: wait until (all of yours|some) have ended"):
            for _ in range(3):
                own.play("me", scenario.name)
        own.play("you", scenario.name)
        own.close()
