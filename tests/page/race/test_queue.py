"""One race at a time: who may start and stop it, what others see, and what the cards say."""

from __future__ import annotations

import json
import time

import pytest

from labkit.models.load import LoadedModel
from labkit.page.race import queue
from labkit.page.race.queue import BusyError, RaceTrack
from labkit.page.race.workloads import COURSES
from labkit.trace.trace import Trace
from tests.page.race.slow_race import SlowRace
from tests.waiting import wait_for

THREE = ["naive", "static", "continuous"]


@pytest.fixture
def kept() -> dict[str, Trace]:
    return {}


@pytest.fixture
def track(model: LoadedModel, kept: dict[str, Trace]) -> RaceTrack:
    return RaceTrack(model, kept.__setitem__)


def test_a_race_from_start_to_cards(track: RaceTrack, kept: dict[str, Trace]) -> None:
    me = track.start("uneven", ["continuous", "static", "naive"])
    assert track.status(me)["mine"] and track.status(me)["running"]
    wait_for(lambda: not track.status(me)["running"])
    status = track.status(me)
    assert (status["race"], status["failure"], status["mine"]) == (1, "", False)
    wait_for(lambda: len(kept) == 3)
    assert list(kept) == [f"Race 1, Uneven lengths: {name}" for name in THREE]
    race, packed = track.latest(), json.loads(json.dumps(track.packed(1)))
    assert race and packed["check"]["same"] and packed["race"] == 1
    for result, card in zip(race.results, packed["results"], strict=True):
        numbers = {name: (text, best) for name, text, best, _ in card["numbers"]}
        assert numbers["Steps"][0] == str(result.steps)
        assert numbers["Time"][0] == f"{result.seconds:.2f} s"
        assert numbers["Waste inside pages"][0] == f"{result.waste:.0%}"
        assert numbers["Padding"][0] == f"{result.padding} slots"
        assert "Drafted" not in numbers
        assert card["generated"] == 169 and card["data"]["steps"]["step"] == list(range(result.steps))
    best = [[name for name, _, best, _ in card["numbers"] if best] for card in packed["results"]]
    assert "Steps" in best[2] and "Steps" not in best[0] + best[1]
    assert "Preemptions" not in [*best[0], *best[1], *best[2]], "nobody is best where all are alike"


def test_drafts_are_on_the_cards_where_somebody_drafts(track: RaceTrack) -> None:
    me = track.start("copy", list(COURSES["copy"].settings))
    wait_for(lambda: not track.status(me)["running"])
    race, packed = track.latest(), json.loads(json.dumps(track.packed(1)))
    plain, drafting = ({name: text for name, text, *_ in card["numbers"]} for card in packed["results"])
    assert (plain["Drafted"], plain["Drafts right"]) == ("0 tokens", "-")
    result = race.results[1]
    assert drafting["Drafted"] == f"{result.drafted:,} tokens" and result.drafted > 0
    assert drafting["Drafts right"] == f"{result.acceptance:.0%}"
    assert packed["check"]["same"] and "drafted" in packed["results"][1]["data"]["steps"]
    assert "drafted" not in packed["results"][0]["data"]["steps"]


def test_one_at_a_time_and_the_others_are_told_how_far_it_is(
    track: RaceTrack, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRace(monkeypatch)
    me = track.start("uneven", THREE)
    wait_for(lambda: track.status(me)["progress"])
    with pytest.raises(BusyError, match="Uneven lengths, static, 40% done"):
        track.start("pool", THREE)
    for other in ("", "guess"):
        status = track.status(other)
        assert status["running"] and not status["mine"] and status["progress"]["step"] == 17
        assert not track.stop(other)
    slow.go.set()
    wait_for(lambda: not track.status(me)["running"])
    assert track.status(me)["failure"] == "The race could not be run. static: no"
    assert track.status("guess")["failure"] == track.status("")["failure"] == ""
    assert track.status(me)["race"] == 0 and track.packed(0) is None and track.latest() is None


def test_lanes_are_told_from_the_first_step(track: RaceTrack, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a race runs, each setting has what it has drawn so far, and what a recorded race has drawn."""
    seen = []
    monkeypatch.setattr(
        track, "_advance", lambda progress: seen.append(json.loads(json.dumps(track.lanes())))
    )
    assert track.lanes() == {"tracks": []}
    me = track.start("uneven", THREE)
    wait_for(lambda: not track.status(me)["running"])
    assert track.lanes() == {"tracks": []}
    steps = [
        [len(t["data"]["steps"]["step"]) if t["data"] else None for t in told["tracks"]] for told in seen
    ]
    race = track.latest()
    lengths = [result.steps for result in race.results]
    assert steps[:2] == [[0, None, None], [1, None, None]], "before the first step, and after it"
    assert (
        sorted(steps, key=lambda counts: [count or 0 for count in counts]) == steps and steps[-1] == lengths
    )
    assert [track["name"] for track in seen[0]["tracks"]] == THREE
    assert [len(track["recorded"]["steps"]["step"]) for track in seen[0]["tracks"]] == lengths
    assert all(told["title"] == "Uneven lengths" for told in seen)


def test_what_was_not_recorded_is_drawn_without(track: RaceTrack, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowRace(monkeypatch)
    track.start("copy", list(COURSES["copy"].settings))
    assert [told["recorded"] for told in track.lanes()["tracks"]] == [None, None]


def test_its_starter_stops_it(track: RaceTrack, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowRace(monkeypatch)
    me = track.start("uneven", THREE)
    assert track.stop(me)
    wait_for(lambda: not track.status(me)["running"])
    assert track.status(me)["failure"] == "The race was stopped in static, after 17 steps."
    assert not track.stop(me) and track.start("uneven", THREE) != me


def test_a_race_whose_starter_is_gone_ends(track: RaceTrack, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowRace(monkeypatch)
    monkeypatch.setattr(queue, "LEASE", 0.3)
    me = track.start("uneven", THREE)
    for _ in range(4):  # heard of, it goes on
        time.sleep(0.15)
        assert track.status(me)["running"]
    wait_for(lambda: not track.status("somebody else")["running"])


def test_a_bug_says_no_more_than_its_kind(track: RaceTrack, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowRace(monkeypatch, KeyError("/secret/path")).go.set()
    me = track.start("uneven", THREE)
    wait_for(lambda: not track.status(me)["running"])
    assert track.status(me)["failure"] == "The race failed: KeyError."


@pytest.mark.parametrize(
    ("course", "settings", "said"),
    [
        ("nothing", THREE, "Choose a workload"),
        ("uneven", ["naive", "rm -rf"], "Choose settings from the list"),
        ("uneven", ["naive"], "Choose two or three settings: 1 cannot race"),
        ("uneven", ["naive", "naive"], "1 cannot race"),
        ("uneven", [*THREE, "whole prompts"], "4 cannot race"),
        ("uneven", [], "0 cannot race"),
    ],
)
def test_bad_choices(track: RaceTrack, course: str, settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        track.start(course, settings)
    assert not track.status("")["running"]


def test_old_races_are_forgotten(track: RaceTrack, kept: dict[str, Trace]) -> None:
    for _ in range(queue.KEPT + 1):
        me = track.start("pool", list(COURSES["pool"].settings))
        wait_for(lambda me=me: not track.status(me)["running"])
    assert track.packed(1) is None and track.packed(2) and track.status("")["race"] == queue.KEPT + 1
