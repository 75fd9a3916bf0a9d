"""What the exercises share: jobs arrive at their steps, prompts differ, and answers are compared."""

from __future__ import annotations

import pytest

from labkit.exercises import Wrong
from labkit.exercises.common import (
    Job,
    answers,
    arrivals,
    expect_same_answers,
    few,
    inject,
    prompt_of,
    serve,
    tiny_engine,
)


def test_no_two_prompts_begin_alike() -> None:
    assert len({prompt_of(number, 1)[0] for number in range(500)}) == 500
    assert prompt_of(3, 5)[:2] == prompt_of(3, 2)


def test_jobs_arrive_before_their_steps_in_any_order() -> None:
    jobs = [Job(4, 3, step=2, name="late"), Job(5, 2), Job(3, 1, step=6)]
    trace = serve(tiny_engine(num_blocks=16), jobs).trace
    assert {arrival.request_id: record.step for record in trace for arrival in record.arrived} == {
        "1": 0,
        "late": 2,
        "2": 6,
    }
    assert [record.total_tokens for record in trace] == [5, 1, 4, 1, 1, 0, 3]  # one step finds nothing to do


def test_who_asks_for_arrivals_makes_the_steps() -> None:
    engine = tiny_engine(num_blocks=16)
    for step in arrivals(engine, [Job(3, 2), Job(3, 2, step=1)]):
        assert len(engine.trace) == step
        engine.step()
    assert not engine.has_unfinished and list(map(len, answers(engine).values())) == [2, 2]
    assert list(arrivals(engine, [])) == []


def test_the_first_answer_that_differs_is_shown() -> None:
    engines = [tiny_engine(num_blocks=16) for _ in range(2)]
    for engine in engines:
        inject(engine, 5, 3, "a")
        inject(engine, 4, 9, "b")
        engine.run()
    yours, reference = engines
    expect_same_answers(yours, reference, "the same tokens")
    right = few(yours.outputs["b"].token_ids)
    yours.outputs["b"].token_ids[0] += 1
    with pytest.raises(Wrong) as told:
        expect_same_answers(yours, reference, "the same tokens")
    assert str(told.value).splitlines()[:2] == ["the same tokens", "  request b"]
    assert str(told.value).endswith(f"right: {right}") and right.endswith(", ...")
