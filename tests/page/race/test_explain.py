"""What a race says of itself: the numbers in its sentences are those of its traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from labkit.models.load import LoadedModel
from labkit.page.race.explain import verdict
from labkit.page.race.run import Race, run_race
from labkit.page.race.workloads import CHUNKED, COURSES, RESERVED, SETTINGS, SPECULATION, WHOLE


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
    assert (
        f"took {static.steps} steps ({static.seconds:.1f} s), continuous {continuous.steps} steps (" in seen
    )
    # A batch of six runs as long as its longest answer: requests that are done before stand idle.
    lengths = [answer for _, _, answer in COURSES["uneven"].jobs]
    batches = [lengths[:6], lengths[6:]]
    assert sum(max(batch) for batch in batches) == static.steps
    idle = sum(max(batch) - length for batch in batches for length in batch)
    assert f"stood idle {idle} times" in why
    assert f"{continuous.batch:.1f} requests rather than {static.batch:.1f}" in why
    assert other.startswith(f"One at a time (naive) took {naive.steps} steps")


def test_memory_says_what_it_saves_and_its_price(model: LoadedModel) -> None:
    ran = race(model, "pool", ("continuous", RESERVED))
    paged, reserved = ran.results
    ((seen, why),) = verdict(ran.results)
    assert numbers(seen) == [round(100 * reserved.waste), round(100 * paged.waste)]
    assert reserved.waste > paged.waste and reserved.steps > paged.steps
    assert paged.preemptions == 2 and "The price: twice a request gave its pages back" in why


def test_the_clock_is_doubted_where_it_contradicts_the_steps(model: LoadedModel) -> None:
    static, continuous = race(model, "uneven", ("static", "continuous")).results
    doubts = []
    for seconds in (1.0, 3.0):  # of continuous, which has fewer steps than static
        ((_, why),) = verdict([replace(static, seconds=2.0), replace(continuous, seconds=seconds)])
        doubts.append("The clock contradicts the steps" in why)
    assert doubts == [False, True]


def test_chunks_and_drafts(model: LoadedModel) -> None:
    ran = race(model, "long", (WHOLE, CHUNKED))
    ((seen, _),) = verdict(ran.results)
    assert [f"{result.itl_max:.2f}" for result in ran.results] == re.findall(r"\d+\.\d+", seen)
    ran = race(model, "copy", ("continuous", SPECULATION))
    plain, drafting = ran.results
    ((seen, why),) = verdict(ran.results)
    right = sum(record.total_accepted for record in drafting.trace)
    assert f"took {plain.steps} steps" in seen and why.startswith(f"{right} of {drafting.drafted} guesses")


def test_pairs_that_nobody_asks_about_have_no_verdict(model: LoadedModel) -> None:
    assert verdict(race(model, "uneven", ("naive", "continuous")).results) == []
