"""One request at a time: with what its cache holds, or anew for each token."""

from __future__ import annotations

import pytest

from tests.core.scheduler_bench import Bench


@pytest.mark.parametrize("kind", ["naive", "uncached"])
def test_one_request_runs_at_a_time_in_the_order_of_the_queue(kind: str) -> None:
    bench = Bench(kind, blocks=40, seats=4, budget=12)
    names = [bench.add(3, 3, priority=priority) for priority in (0, 0, -1)]
    bench.drain()
    assert all(len(record.requests) == 1 for record in bench.trace)
    assert bench.admissions == [names[2], names[0], names[1]]


@pytest.mark.parametrize("kind", ["naive", "uncached"])
def test_the_answers_of_n_come_one_after_the_other(kind: str) -> None:
    bench = Bench(kind, blocks=40, size=4)
    bench.add(9, 2, n=3)
    bench.drain()
    assert bench.admissions == ["0", "0.1", "0.2"]
    assert not any(record.copied for record in bench.trace), "nobody forks"
    cached = [admission.num_cached_tokens for record in bench.trace for admission in record.admitted]
    assert cached == ([0, 8, 8] if kind == "naive" else [0, 0, 0])


def test_with_a_cache_a_token_costs_a_token_and_without_one_the_whole_text() -> None:
    computed = {}
    for kind in ("naive", "uncached"):
        bench = Bench(kind, blocks=40, budget=12)
        bench.add(5, 4)
        bench.drain()
        computed[kind] = [record.num_tokens for record in bench.trace]
    assert computed == {"naive": [(5,), (1,), (1,), (1,)], "uncached": [(5,), (6,), (7,), (8,)]}


def test_without_a_cache_a_long_text_takes_several_steps_for_each_token() -> None:
    bench = Bench("uncached", blocks=40, seats=1, budget=4)
    bench.add(5, 2)
    bench.drain()
    assert [record.num_tokens for record in bench.trace] == [(4,), (1,), (4,), (2,)]
    assert [record.sampled for record in bench.trace] == [((),), ((1,),), ((),), ((1,),)]
    assert len(bench.trace[0].taken) == 1, "its maximum is taken when it is admitted"
    assert not any(record.taken for record in bench.trace[1:])
