"""What one more request costs: measured over one window, said in one sentence, and never changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import SamplingParams
from labkit.trace.records import StepRecord
from labkit.views.facts.joins import KEPT, LEAST, WINDOW, Joins
from labkit.views.wire import Joined

Arrivals = Sequence[tuple[int, int, int]]  # the step before which each comes, tokens of prompt and answer


def run(arrivals: Arrivals, *, budget: int = 8, blocks: int = 200, cache: bool = False) -> list[StepRecord]:
    """A run of the real scheduler, without a model; every step takes 50 ms, and 10 ms for each token."""
    planner = Scheduler(
        BlockPool(blocks, 4, enable_prefix_caching=cache),
        max_num_seqs=min(16, budget),
        max_num_batched_tokens=budget,
    )
    coming = sorted((step, str(i), prompt, most) for i, (step, prompt, most) in enumerate(arrivals))
    records: list[StepRecord] = []
    while coming or planner.has_unfinished:
        while coming and (coming[0][0] <= len(records) or not planner.has_unfinished):
            _, name, prompt, most = coming.pop(0)
            tokens = [7] * prompt if cache else [100 + int(name)] * prompt
            planner.add(Request(name, tokens, SamplingParams(max_tokens=most)))
        plan = planner.schedule()
        ends = [
            n and s + n == len(r.token_ids)
            for r, s, n in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ]
        result = StepResult([(5,) if end else () for end in ends])
        planner.commit(plan, result)
        seconds = 0.05 + 0.01 * sum(plan.num_tokens)
        records.append(record_step(len(records), plan, result, planner, seconds=seconds))
    return records


def told(records: Sequence[StepRecord]) -> tuple[Joined, ...]:
    joins = Joins()
    for record in records:
        joins.append(record)
    return joins.rows()


def timed(records: Sequence[StepRecord], seconds: Sequence[float]) -> list[StepRecord]:
    return [replace(r, seconds=seconds[i % len(seconds)]) for i, r in enumerate(records)]


TWO = [(0, 4, 60), (0, 4, 60)]
LONG = [*TWO, (20, 30, 20)]  # its prompt is read in five chunks of six tokens


def test_the_cost_is_one_sentence_with_the_verdict_first() -> None:
    (row,) = told(run(LONG))
    assert (row.step, row.requests, row.label) == (20, ("2",), "2")
    assert row.verdict == (
        "Request 2 made the 2 others wait 1.9 times as long for each of 5 tokens, then as long as before"
    )
    # Before: two rows, 70 ms. With six tokens more, 130 ms. After: three rows, 80 ms.
    assert row.story == (
        "the gap grew from 70 to 130 ms while its prompt of 30 tokens was computed in 5 chunks "
        "(steps 20 to 24), then went back to 80 ms (noise: 70 to 80 ms); it got 12 tokens/s."
    )


def test_an_event_ends_with_its_window_and_is_then_said_for_good() -> None:
    records = run(LONG)
    begun, (early,) = told(records[:21]), told(records[: 25 + WINDOW])
    assert begun[0].verdict == "" and "is being measured" in begun[0].story
    assert told(records[: 24 + WINDOW])[0].verdict == "" and early.verdict
    assert told(records) == (early,)


def test_where_seconds_are_noise_it_is_told_in_steps() -> None:
    noisy = timed(run(LONG), [0.002, 0.03, 0.2])
    (row,) = told(noisy)
    assert row.verdict == "Request 2 cost the 2 others no step, and in seconds nothing beyond noise"
    assert row.story.startswith(
        "each got a token in every step while its prompt of 30 tokens was computed in 5"
    )
    assert row.story.endswith(" then, and steps of one size 2 to 200 ms.")


def test_one_slow_step_makes_no_verdict() -> None:
    records = timed(run(LONG), [0.01])
    spike = [replace(r, seconds=1.0 if r.step == 22 else r.seconds) for r in records]
    assert told(spike)[0].verdict.endswith("in seconds nothing beyond noise")


def test_a_second_newcomer_leaves_what_was_said_of_the_first() -> None:
    records = run([*TWO, (20, 5, 30), (40, 30, 20)])
    first, second = told(records)
    assert (first.requests, second.requests) == (("2",), ("3",))
    assert "was computed in step 20" in first.story and "(steps 40 to" in second.story
    assert first == told(records[:39])[0]


def test_those_who_join_together_share_a_line() -> None:
    (row,) = told(run([*TWO, (20, 9, 9), (20, 9, 9), (21, 9, 9)]))
    assert row.requests == ("2", "3", "4") and row.verdict.startswith("Requests 2, 3 and 4 made the 2 others")
    assert "their prompts of 27 tokens were computed in steps 20 to " in row.story
    (row,) = told(run([*TWO, *[(20, 4, 9)] * 6]))
    assert row.verdict.startswith("Requests 2, 3, 4 and 3 more ")


def test_whole_prompts_stop_the_others() -> None:
    records = run([*TWO, (20, 30, 20)])
    stopped = [
        replace(r, requests=("2",), kinds=kind, starts=(0,), num_tokens=(6,), sampled=((),), seconds=0.4)
        if (kind := "p" if 20 <= r.step <= 24 else "")
        else r
        for r in records
    ]
    (row,) = told(stopped)
    assert row.verdict == "Request 2 stopped the 2 others for 5 steps"
    assert row.story.startswith("no token for 2 s, rather than one in 70 ms, while ")


def test_what_the_prefix_cache_answers_is_said() -> None:
    (row,) = told(run([(0, 32, 60), (0, 32, 60), (30, 33, 20)], budget=40, cache=True))
    assert "its prompt of 33 tokens, 32 of them from the prefix cache, was computed in step 30" in row.story


def test_nothing_is_said_of_requests_that_join_nobody() -> None:
    assert told(run([(0, 4, 9), (0, 4, 9), (40, 4, 9)])) == ()
    assert told(run([*TWO, (LEAST - 1, 4, 9)])) == (), "too little is known of the others"


def test_the_other_one_and_the_other_many() -> None:
    (row,) = told(run([(0, 4, 60), (20, 30, 20)]))
    assert " made the other one wait " in row.verdict


requests = st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 40))


@given(st.lists(requests, min_size=1, max_size=12), st.integers(4, 24), st.sampled_from([40, 200]))
def test_any_run_is_told_once_in_steps_that_are_its_own(
    arrivals: list[tuple[int, int, int]], budget: int, blocks: int
) -> None:
    records = run(arrivals, budget=budget, blocks=blocks)
    joins, known = Joins(), {}
    for record in records:
        joins.append(record)
        for row in joins.rows():
            if row.verdict:
                assert known.setdefault(row.step, row) == row, "what was said has changed"
    rows = joins.rows()
    assert len(rows) <= KEPT and len(known) <= len({row.step for row in rows}) + 12
    named = [name for row in known.values() for name in row.requests]
    assert len(named) == len(set(named)), "a request joins once"
    for row in known.values():
        ran = {r.step: dict(zip(r.requests, r.kinds, strict=True)) for r in records}
        assert all(ran[row.step - back][name] == "d" for back in (1, 2, 3) for name in ran[row.step - back])
        assert any(kind == "d" for kind in ran[row.step - 1].values()), "it joined somebody"
        assert set(row.requests[:1]) <= {n for n, kind in ran[row.step].items() if kind in "pc"}


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=9))
def test_other_seconds_are_the_same_story_in_steps(seconds: list[float]) -> None:
    records = run([*TWO, (20, 30, 20), (40, 5, 5)])
    numbers = re.compile(r"steps? \d+(?: to \d+)?|\d+ chunks|of \d+ tokens")
    story = [(row.step, row.requests, numbers.findall(row.story)) for row in told(records)]
    again = told(timed(records, seconds))
    assert [(row.step, row.requests, numbers.findall(row.story)) for row in again] == story


@pytest.mark.parametrize(
    "seconds, said", [(0.00042, "0.42 ms"), (0.0512, "51 ms"), (0.9951, "1 s"), (12.34, "12 s")]
)
def test_times_have_two_digits(seconds: float, said: str) -> None:
    (row,) = told(timed(run(LONG), [seconds]))
    assert said in row.story
