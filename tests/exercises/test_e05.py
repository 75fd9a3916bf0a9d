"""Exercise 05.1: chunks that break a promise, and right ones; and schedulers that a rule plugs into."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.config import EngineConfig
from labkit.core.block_pool import InvariantError
from labkit.engine import Engine
from labkit.exercises.common import Job, serve, tiny_engine
from labkit.exercises.e05 import (
    FIXED,
    PROMISE,
    Clock,
    Split,
    chunk_size,
    first_token_of,
    keeping,
    longest_step,
    microseconds,
    run_chunks,
    scheduler_of,
)
from labkit.sampling_params import SamplingParams
from labkit.views.facts.token_timeline import token_timeline_of
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

Answer = tuple[list[int], list[int]]

# -- right ----------------------------------------------------------------------------------------


def test_the_solution_in_the_notebook_keeps_the_promise_and_beats_every_fixed_budget() -> None:
    verdict = assert_accepted("05.1", function_from(solution("05", "05.1"), "chunk_size"))
    assert "no step took longer than 10.0 ms" in verdict.text
    assert "after 435 ms; with 12 tokens in each step" in " ".join(verdict.text.split())
    assert "it takes 537 ms" in verdict.text and len(verdict.pictures) == 2


def test_the_stub_is_open() -> None:
    def chunk_size(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
        raise NotImplementedError

    assert_open("05.1", chunk_size)


@given(
    clock=st.builds(Clock, st.integers(0, 3000), st.integers(1, 300), st.integers(0, 20)),
    answers=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    prompt=st.tuples(st.integers(0, 500), st.integers(1, 200)),
    promise=st.integers(0, 200_000),
)
def test_no_larger_chunk_keeps_the_promise(
    clock: Clock, answers: list[int], prompt: tuple[int, int], promise: int
) -> None:
    computed, missing = prompt
    chunk = chunk_size(answers, computed, missing, promise, clock)
    assert 1 <= chunk <= missing
    assert chunk == 1 or clock.step(answers, computed, chunk) <= promise
    assert chunk == missing or clock.step(answers, computed, chunk + 1) > promise


@given(st.lists(st.integers(1, 50), max_size=5), st.integers(0, 60), st.integers(1, 40))
def test_the_clock_counts_every_key_that_is_read(answers: list[int], computed: int, chunk: int) -> None:
    counted = Clock(0, 0, 1).step(answers, computed, chunk)
    assert counted == sum(answers) + sum(computed + place for place in range(1, chunk + 1))


# -- wrong: each for its own reason ---------------------------------------------------------------


def nothing_if_too_much(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    chunk = chunk_size(answers, computed, missing, promise, clock)
    return chunk if clock.step(answers, computed, chunk) <= promise or not answers else 0


def always_bound(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size(answers or [0], computed, missing, promise, clock)


def more_than_it_misses(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size(answers, computed, 1000, promise, clock) if answers else missing


def no_keys(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size(answers, computed, missing, promise, clock._replace(per_key=0))


def answers_read_nothing(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size([0] * len(answers), computed, missing, promise, clock)


def as_at_its_start(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size(answers, 0, missing, promise, clock)


def strictly(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    return chunk_size(answers, computed, missing, promise - 1, clock)


def a_fraction(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> float:
    return float(chunk_size(answers, computed, missing, promise, clock))


def appends(answers: list[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    chunk = chunk_size(answers, computed, missing, promise, clock)
    answers.append(computed)
    return chunk


@pytest.mark.parametrize(
    ("wrong", "fragment"),
    [
        (nothing_if_too_much, "the prompt goes on in every step"),
        (always_bound, "where nobody writes an answer, the promise binds nobody"),
        (more_than_it_misses, "no more tokens than the prompt still misses"),
        (no_keys, "the token of an answer reads the keys of its whole text"),
        (answers_read_nothing, "the token of an answer reads the keys of its whole text"),
        (as_at_its_start, "the keys of the whole prompt before the chunk"),
        (strictly, "a step that takes exactly as long as the promise keeps it"),
        (a_fraction, "return a whole number of tokens"),
        (appends, "leave the list of answers as it is"),
    ],
)
def test_wrong_ones_are_refused_for_their_own_reason(wrong: Any, fragment: str) -> None:
    verdict = assert_refused("05.1", wrong, fragment)
    assert "promise" in verdict.text and "Clock(" in verdict.text


# -- the promise, in the engine -------------------------------------------------------------------


def test_chunks_shrink_as_the_prompt_grows_and_every_step_takes_about_as_long() -> None:
    engine = run_chunks(chunk_size)
    rows = [
        (r, row) for r in engine.trace for row in r.rows if row.request_id == "long" and row.num_tokens > 1
    ]
    *chunks, _ = [row.num_tokens for _, row in rows]  # the last one is what is left
    assert chunks == sorted(chunks, reverse=True) and chunks[0] > 3 * chunks[-1]
    steps = [microseconds(record) for record, _ in rows[:-1]]
    assert min(steps) > 0.9 * PROMISE and max(steps) <= PROMISE


def test_the_largest_fixed_budget_that_keeps_the_promise_is_slower() -> None:
    fixed, larger, ours = run_chunks(budget=FIXED), run_chunks(budget=FIXED + 1), run_chunks(chunk_size)
    assert longest_step(fixed) <= PROMISE < longest_step(larger)
    assert first_token_of(ours, "long") < first_token_of(fixed, "long")


def test_two_prompts_that_come_together_keep_it_too() -> None:
    sizes = dict(num_blocks=400, block_size=4, max_num_seqs=8, max_num_batched_tokens=512)
    engine = tiny_engine(scheduler_class=keeping(chunk_size), **sizes)
    serve(engine, [Job(9, 60), Job(9, 50), Job(150, 5, step=4), Job(120, 5, step=4), Job(7, 5, step=5)])
    assert longest_step(engine) <= PROMISE
    assert all(output.finish_reason == "length" for output in engine.outputs.values())


# -- a rule that shares out a step ----------------------------------------------------------------


def in_turn(budget: int, missing: list[int], order: list[int]) -> list[int]:
    given = [0] * len(missing)
    for place in order:
        given[place] = min(missing[place], budget)
        budget -= given[place]
    return given


def cut(numbers: list[int], running: list[int]) -> Answer:
    return numbers[: len(running)], numbers[len(running) :]


def shortest_first(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    order = sorted(range(len(missing)), key=lambda i: missing[i])
    return cut(in_turn(budget, missing, order), running)


def evenly(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    given = [int(i < len(running) and most == 1) for i, most in enumerate(missing)]
    while sum(given) < min(budget, sum(missing)):
        poorest = min((i for i in range(len(missing)) if given[i] < missing[i]), key=lambda i: given[i])
        given[poorest] += 1
    return cut(given, running)


def prompts_first(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    order = sorted(range(len(missing)), key=lambda i: -missing[i])
    return cut(in_turn(budget, missing, order), running)


def all_of_it(budget: int, running: list[int], waiting: list[int]) -> Answer:
    return running, waiting


def split_budget(budget: int, running: list[int], waiting: list[int]) -> Answer:
    """First come, first served: the engine's own rule."""
    missing = [*running, *waiting]
    order = sorted(range(len(missing)), key=lambda i: i >= len(running) or missing[i] > 1)
    return cut(in_turn(budget, missing, order), running)


ANSWERS = [Job(length, 30, name=f"answer {length}") for length in (4, 6, 3)]
NEWCOMERS = [Job(length, 6, step=5, name=f"prompt {length}") for length in (60, 24, 8)]


def run_split(split: Split | None = None) -> Engine:
    sizes = dict(num_blocks=96, block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
    scheduler = scheduler_of(split) if split else None
    return serve(
        tiny_engine(scheduler_class=scheduler, enable_prefix_caching=False, **sizes), [*ANSWERS, *NEWCOMERS]
    )


def test_the_rule_of_the_engine_plans_as_the_engine_does() -> None:
    ours, theirs = run_split(split_budget), run_split()
    for one, other in zip(ours.trace, theirs.trace, strict=True):
        assert one.rows == other.rows


def test_a_plan_that_gives_prompts_the_budget_first_is_right_and_slow() -> None:
    slow, quick = run_split(prompts_first), run_split()
    assert {n: o.token_ids for n, o in slow.outputs.items()} == {
        n: o.token_ids for n, o in quick.outputs.items()
    }
    assert token_timeline_of(slow.trace).worst_gap > 2 * token_timeline_of(quick.trace).worst_gap


def test_the_audit_stops_a_split_that_spends_too_much() -> None:
    with pytest.raises(InvariantError, match="over budget"):
        run_split(all_of_it)


def tight(split: Split, *, seats: int = 3, num_blocks: int = 16, n: int = 1) -> Engine:
    config = EngineConfig(
        "tiny-random", device="cpu", num_blocks=num_blocks, block_size=4, max_num_seqs=seats,
        max_num_batched_tokens=8, audit=True,
    )  # fmt: skip
    engine = Engine(config, scheduler_of(split))
    for number in range(6):
        params = SamplingParams(max_tokens=20, ignore_eos=True, n=n, temperature=float(n > 1), seed=number)
        engine.add_request([300 + number * 7 + i for i in range(9 + number)], params)
    while engine.has_unfinished:
        engine.step()
        if engine.scheduler.waiting:
            engine.preview()
    return engine


@pytest.mark.parametrize("split", [split_budget, shortest_first, evenly])
def test_it_holds_when_pages_and_seats_are_short(split: Split) -> None:
    engine = tight(split)
    assert sum(len(record.preempted) for record in engine.trace) > 0
    reasons = {record.blocked[1].split(",")[0] for record in engine.trace if record.blocked}
    assert any("seats" in reason or "pages" in reason for reason in reasons)
    assert all(output.finish_reason == "length" for output in engine.outputs.values())
    roomy = tight(split_budget, seats=8, num_blocks=200)
    for name, output in roomy.outputs.items():
        assert engine.outputs[name].token_ids == output.token_ids


def test_several_answers_to_one_prompt_work_too() -> None:
    engine = tight(split_budget, n=2, num_blocks=60)
    assert len(engine.outputs) == 12
    assert all(output.finish_reason == "length" for output in engine.outputs.values())


def test_a_request_that_is_left_without_tokens_waits_and_says_so() -> None:
    engine = run_split(split_budget)
    names = [job.name for job in NEWCOMERS]
    assert (names[1], "the split leaves it no tokens") in [record.blocked for record in engine.trace]
