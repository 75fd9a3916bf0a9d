"""Without chunked prefill a step is for whole prompts, or for running answers, and never for both."""

from __future__ import annotations

import pytest

from labkit.schedulers import scheduler_class
from labkit.schedulers.naive import NaiveScheduler
from labkit.schedulers.static import StaticScheduler
from labkit.schedulers.whole_prompts import WholePromptScheduler
from tests.core.scheduler_bench import Bench


def test_answers_wait_while_prompts_are_admitted() -> None:
    bench = Bench(blocks=60, budget=12, seats=4, chunked=False, caching=False)
    bench.add(4, 6)
    assert bench.step().kinds == "p"
    assert bench.step().kinds == "d"
    for _ in range(3):
        bench.add(8, 3)
    records = [bench.step() for _ in range(4)]
    assert [record.kinds for record in records] == ["p", "p", "p", "dddd"]
    assert records[0].blocked == ("2", "it has 8 tokens, and 4 are left of the token budget")
    bench.drain()


def test_several_prompts_share_a_step_if_all_of_them_fit() -> None:
    bench = Bench(blocks=60, budget=12, seats=4, chunked=False, caching=False)
    for length in (5, 7, 1):
        bench.add(length, 2)
    record = bench.step()
    assert (record.num_tokens, record.kinds) == ((5, 7), "pp")
    assert record.blocked == ("2", "the token budget of 12 is used up")
    bench.drain()


def test_a_step_that_preempted_admits_nobody_and_says_so() -> None:
    bench = Bench(blocks=6, size=2, seats=3, budget=12, chunked=False, caching=False)
    bench.add(4, 8)
    bench.add(3, 6)
    while not (record := bench.step()).preempted:
        assert not record.blocked
    assert record.blocked == ("1", "nobody is admitted in a step that preempted")
    bench.drain()
    assert bench.admissions == ["0", "1", "1"]


def test_a_request_that_may_not_fit_into_a_step_when_it_comes_back_is_refused() -> None:
    bench = Bench(blocks=60, budget=12, chunked=False)
    bench.add(8, 5)
    message = "prompt of 8 tokens with max_tokens 6 may have to be computed in one step of at most 12 tokens"
    with pytest.raises(ValueError, match=message):
        bench.add(8, 6)
    bench.drain()


def test_each_policy_has_its_way_without_chunks() -> None:
    assert scheduler_class("continuous", enable_chunked_prefill=False) is WholePromptScheduler
    assert scheduler_class("static", enable_chunked_prefill=False) is StaticScheduler
    naive = scheduler_class("naive", enable_chunked_prefill=False)
    assert issubclass(naive, WholePromptScheduler) and issubclass(naive, NaiveScheduler)
    assert scheduler_class("naive") is NaiveScheduler
