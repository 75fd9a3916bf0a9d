"""What a race says of itself: the numbers in its sentences are those of its traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from labkit.models.load import LoadedModel
from labkit.page.race.explain import verdict
from labkit.page.race.noise import BUSY, LEAST, noise
from labkit.page.race.queue import pack
from labkit.page.race.run import Race, Result, run_race
from labkit.page.race.workloads import CHUNKED, COURSES, RESERVED, SETTINGS, SPECULATION, WHOLE
from labkit.trace.trace import Trace


def race(model: LoadedModel, course: str, names: Sequence[str]) -> Race:
    return run_race(
        model, COURSES[course].workload(model.tokenizer), [SETTINGS[name] for name in names], progress=None
    )


def numbers(words: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", words)]


def test_static_against_continuous(model: LoadedModel) -> None:
    ran = race(model, "uneven", ("naive", "static", "continuous"))
    naive, static, continuous = ran.results
    (seen, why), (other, _) = verdict(ran.results)
    assert numbers(seen) == [round(static.steps / continuous.steps, 1), static.steps, continuous.steps]
    assert f"{static.seconds:.1f} s against {continuous.seconds:.1f} s" in why
    # A batch of six runs as long as its longest answer: requests that are done before stand idle.
    lengths = [answer for _, _, answer in COURSES["uneven"].jobs]
    batches = [lengths[:6], lengths[6:]]
    assert sum(max(batch) for batch in batches) == static.steps
    idle = sum(max(batch) - length for batch in batches for length in batch)
    assert f"stood idle {idle} times" in why
    assert f"{continuous.batch:.1f} requests rather than {static.batch:.1f}" in why
    assert other.startswith(
        f"One request at a time (naive) took {naive.steps / static.steps:.1f} times as many"
    )


def test_memory_says_what_it_saves_and_its_price(model: LoadedModel) -> None:
    ran = race(model, "pool", ("continuous", RESERVED))
    paged, reserved = ran.results
    ((seen, why),) = verdict(ran.results)
    steps = [round(reserved.steps / paged.steps, 1), reserved.steps, paged.steps]
    assert numbers(seen) == [*steps, round(100 * reserved.waste), round(100 * paged.waste)]
    assert reserved.waste > paged.waste and reserved.steps > paged.steps
    assert paged.preemptions == 2 and "The price: twice a request gave its pages back" in why


def timed(result: Result, seconds: float) -> Result:
    """The same run on a machine on which each step takes as long."""
    records = [replace(record, seconds=seconds) for record in result.trace]
    return replace(result, seconds=seconds * len(records), trace=Trace(result.trace.meta, records))


@pytest.mark.parametrize(
    "static_step, continuous_step, said",
    [
        (1.0, 1.0, "On the clock, 62.0 s against 42.0 s."),
        (
            1.0,
            1.4,
            "62.0 s against 58.8 s: no difference beyond noise. Steps of one size differed by as much.",
        ),
        (
            1.0,
            3.0,
            "62.0 s against 126.0 s: no difference beyond noise. Steps of one size differed by as much.",
        ),
    ],
)
def test_seconds_are_trusted_no_further_than_steps_of_one_size_agree(
    model: LoadedModel, static_step: float, continuous_step: float, said: str
) -> None:
    static, continuous = race(model, "uneven", ("static", "continuous")).results
    timed_ones = [timed(static, static_step), timed(continuous, continuous_step)]
    ((seen, why),) = verdict(timed_ones)
    assert seen.startswith("Static batching took 1.5 times as many steps as continuous batching: 62 rather")
    assert said in why
    slower = continuous_step / static_step - 1
    assert noise(timed_ones) == pytest.approx(max(LEAST, slower))
    assert ("This machine was busy" in why) == (slower >= BUSY)


def test_a_clock_that_contradicts_the_steps_beyond_the_noise_is_named(model: LoadedModel) -> None:
    static, continuous = (timed(r, 1.0) for r in race(model, "uneven", ("static", "continuous")).results)
    ((_, why),) = verdict([static, replace(continuous, seconds=100.0)])
    assert "62.0 s against 100.0 s: that contradicts the steps" in why


def test_nobody_is_best_within_the_noise(model: LoadedModel) -> None:
    ran = race(model, "uneven", ("static", "continuous"))
    for step, best in ((1.0, True), (1.4, False)):  # seconds of a step of continuous, where static takes 1
        results = (timed(ran.results[0], 1.0), timed(ran.results[1], step))
        card = pack(replace(ran, results=results), "uneven")["results"][1]
        marked = {name for name, _, is_best, _ in card["numbers"] if is_best}
        assert ("Time" in marked) == ("Throughput" in marked) == best and "Steps" in marked


def test_chunks_and_drafts(model: LoadedModel) -> None:
    ran = race(model, "long", (WHOLE, CHUNKED))
    ((seen, _),) = verdict(ran.results)
    assert [f"{result.itl_max:.2f}" for result in ran.results] == re.findall(r"\d+\.\d+", seen)
    assert numbers(seen)[:2] == [result.steps for result in ran.results]
    ran = race(model, "copy", ("continuous", SPECULATION))
    plain, drafting = ran.results
    ((seen, why),) = verdict(ran.results)
    right = sum(record.total_accepted for record in drafting.trace)
    assert numbers(seen)[-2:] == [plain.steps, drafting.steps] and why.startswith(
        f"{right} of {drafting.drafted} guesses"
    )


def test_pairs_that_nobody_asks_about_have_no_verdict(model: LoadedModel) -> None:
    assert verdict(race(model, "long", ("continuous", WHOLE)).results) == []


def test_one_at_a_time_is_compared_with_what_there_is(model: LoadedModel) -> None:
    ran = race(model, "uneven", ("naive", "continuous"))
    ((seen, why),) = verdict(ran.results)
    naive, continuous = ran.results
    assert numbers(seen)[-2:] == [naive.steps, continuous.steps] and f"{continuous.batch:.1f} requests" in why
    both = verdict(race(model, "uneven", ("naive", "static", "continuous")).results)
    assert [seen.partition(" took")[0] for seen, _ in both] == [
        "Static batching",
        "One request at a time (naive)",
    ]
