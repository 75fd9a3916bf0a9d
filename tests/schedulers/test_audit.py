"""The auditor keeps books of its own: what is broken is named, at the step that broke it."""

from __future__ import annotations

import dataclasses

import pytest

from labkit.core.block_pool import BlockPool, InvariantError
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.schedulers.audit import check_pool
from labkit.trace.records import Arrival, Blocks, Copy, Finish
from tests.core.scheduler_bench import Bench


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda pool: pool.ref_counts.__setitem__(0, 2), "reference count 2, but it is in 1 tables"),
        (lambda pool: pool.free.append(0), "block 0 is in 2 of"),
        (lambda pool: pool.free.pop(), "is in 0 of"),
        (lambda pool: pool.free.append(pool.free[-1]), "in the free list twice"),
        (lambda pool: pool.tables["a"].append(0), "holds a block twice"),
        (
            lambda pool: (pool.tables.update(b=[1]), pool.ref_counts.__setitem__(1, 2)),
            "2 owners, but nobody shared it",
        ),
    ],
)
def test_a_broken_pool_is_found_out(breakage, message: str) -> None:
    pool = BlockPool(6, 2)
    pool.allocate("a", 2)
    check_pool(pool)
    breakage(pool)
    with pytest.raises(InvariantError, match=message):
        check_pool(pool)


def two_rows() -> Bench:
    """Two answers that decode, in the middle of a block."""
    bench = Bench(blocks=10, size=4, seats=2, budget=12, caching=False)
    bench.add(5, 4)
    bench.add(5, 4)
    bench.step()
    return bench


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda plan, pool: plan.failed.update({"0": "no"}), "request '0' was promised a page, and no"),
        (lambda plan, pool: plan.num_tokens.__setitem__(0, 12), "over budget: the plan computes 13 tokens"),
        (lambda plan, pool: plan.add(plan.requests[0], 1), "over seats: the plan runs 3 requests on 2 seats"),
        (
            lambda plan, pool: plan.requests.__setitem__(1, plan.requests[0]),
            "request '0' is in the plan twice",
        ),
        (lambda plan, pool: plan.starts.__setitem__(1, 4), "'1' has computed 5 of 6 .* compute 1 from 4 on"),
        (lambda plan, pool: plan.drafts.update({0: (1, 1)}), "'0' guesses before it has computed all"),
        (lambda plan, pool: pool.tables["1"].pop(), "request '1' computes token 5 but its 1 pages end at 4"),
        (
            lambda plan, pool: pool.tables["1"].__setitem__(1, 99),
            "block 99 of request '1' is not in the pool",
        ),
        (
            lambda plan, pool: pool.tables["1"].__setitem__(1, pool.tables["0"][1]),
            "two owners: request '0' writes to block 1, which request '1' holds",
        ),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused_before_it_runs(breakage, message: str) -> None:
    bench = two_rows()
    plan = bench.scheduler.schedule()
    bench.auditor.check_plan(plan)
    breakage(plan, bench.pool)
    with pytest.raises(InvariantError, match=message):
        bench.auditor.check_plan(plan)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("taken", (("0", (1,)),), "step 1: block 1 was handed to request '0' while request '0' holds it"),
        ("taken", (("0", (7,)),), "step 1: request '0' should hold blocks .*7], not"),
        ("finished", (("0", "length", (0,)),), "request '0' held blocks .* and gave back .0."),
        ("copied", (("0", 1, 8),), "step 1: request '0' should hold blocks .*8.* not"),
        ("arrived", (("9", 1, 1, 0, ""),), "step 1: forgotten request: '9' was not finished, but is gone"),
    ],
)
def test_a_record_that_is_not_what_happened_is_found_out(field: str, value: tuple, message: str) -> None:
    bench = two_rows()
    kinds = dict(taken=Blocks, finished=Finish, copied=Copy, arrived=Arrival)
    plan = bench.scheduler.schedule()
    result = StepResult([(1,), (1,)])
    bench.scheduler.commit(plan, result)
    record = record_step(1, plan, result, bench.scheduler)
    with pytest.raises(InvariantError, match=message):
        changed = tuple(kinds[field](*entry) for entry in value)
        bench.auditor.check_record(dataclasses.replace(record, **{field: changed}))


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda pool: pool.free.pop(), "step 1: leak: 6 blocks have no owner, but 5 count as free"),
        (
            lambda pool: pool.free.append(0),
            "step 1: double free: 6 blocks have no owner, but 7 count as free",
        ),
        (
            lambda pool: pool.tables["0"].reverse(),
            "step 1: request '0' should hold blocks .0, 1., not .1, 0.",
        ),
    ],
)
def test_a_pool_that_disagrees_with_the_books_is_found_out_after_the_step(breakage, message: str) -> None:
    bench = two_rows()
    breakage(bench.pool)
    plan = bench.scheduler.schedule()
    result = StepResult([(1,), (1,)])
    bench.scheduler.commit(plan, result)
    with pytest.raises(InvariantError, match=message):
        bench.auditor.check_record(record_step(1, plan, result, bench.scheduler))
