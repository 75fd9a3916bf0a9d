"""The clock that is fitted to a trace."""

from __future__ import annotations

import dataclasses
import random

import pytest

from labkit.analysis.capacity import (
    TERMS,
    FittedClock,
    StepWork,
    fit,
)
from labkit.trace.records import StepRecord

PRICES = FittedClock(step=0.03, tokens=2e-3, keys=5e-6, sampled=1e-3, rows=4e-4, pairs=2e-7)


def made_up_steps(count: int = 120, seed: int = 0) -> list[StepRecord]:
    """Steps of many shapes, without their seconds."""
    rng = random.Random(seed)
    records = []
    for step in range(count):
        rows = rng.randint(1, 24)
        num_tokens = tuple(rng.choice((1, 1, 1, rng.randint(2, 90))) for _ in range(rows))
        starts = tuple(rng.randint(0, 500) for _ in range(rows))
        sampled = tuple(rng.choice(((), (7,), (7,))) for _ in range(rows))
        names = tuple(map(str, range(rows)))
        records.append(
            StepRecord(step, names, "d" * rows, starts=starts, num_tokens=num_tokens, sampled=sampled)
        )
    return records


def timed(records: list[StepRecord], clock: FittedClock, noise: float = 0.0) -> list[StepRecord]:
    rng = random.Random(1)
    return [
        dataclasses.replace(record, seconds=clock(StepWork.of(record)) * rng.lognormvariate(0, noise))
        for record in records
    ]


@pytest.mark.parametrize("terms", [("step",), TERMS[:2], TERMS[:3], TERMS])
def test_a_fit_finds_the_prices_of_an_exact_trace(terms: tuple[str, ...]) -> None:
    clock = FittedClock(**{term: getattr(PRICES, term) for term in terms})
    found = fit(timed(made_up_steps(), clock), terms)
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(clock, term), rel=1e-6, abs=1e-15)
    assert found.error < 1e-8 and abs(found.bias) < 1e-8 and found.num_steps == 120


def test_a_fit_finds_nearly_the_prices_of_a_noisy_one_with_wild_steps_in_it() -> None:
    clock = FittedClock(step=0.03, tokens=2e-3, keys=2e-5)
    records = timed(made_up_steps(600), clock, noise=0.05)
    records = [  # every thirtieth step met a busy moment
        dataclasses.replace(record, seconds=record.seconds * 4) if record.step % 30 == 0 else record
        for record in records
    ]
    found = fit(records)
    for term in TERMS[:3]:
        assert getattr(found, term) == pytest.approx(getattr(clock, term), rel=0.1)
    assert 0.02 < found.error < 0.08
    assert found.bias < -0.05, "what the wild steps took is not in the clock, and it says so"


def test_no_price_is_negative() -> None:
    """Where steps get shorter with the keys they read, keys are free, and the rest is fitted without them."""
    base = FittedClock(step=1.0, tokens=1e-3)
    records = [
        dataclasses.replace(record, seconds=base(work) - 1e-5 * work.keys)
        for record in made_up_steps()
        for work in [StepWork.of(record)]
    ]
    found = fit(records, TERMS)
    assert found.keys == 0 and all(getattr(found, term) >= 0 for term in TERMS)
    assert found.error < 0.05


def test_a_fit_leaves_out_steps_that_computed_nothing_or_have_no_time() -> None:
    records = timed(made_up_steps(), PRICES)
    empty = StepRecord(200, seconds=5.0)
    assert fit([*records, empty, *made_up_steps(9, seed=3)]).num_steps == len(records)


@pytest.mark.parametrize(
    ("count", "terms", "complaint"),
    [
        (5, TERMS[:3], "at least 6 steps with their seconds, to fit 3 terms, not 5"),
        (50, ("step", "weather"), "terms must be some of step, tokens, keys, .*, not step, weather"),
        (50, (), "not none"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(count: int, terms: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit(timed(made_up_steps(count), PRICES), terms)


def test_a_price_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 0"):
        FittedClock(tokens=-1.0)
