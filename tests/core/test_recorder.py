"""A record says what was planned, what came of it, and who came and went since the last one."""

from __future__ import annotations

from labkit.core.plan import Changes, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams
from labkit.trace.records import Admission, Arrival, Blocks, Finish, Priority, StepRecord
from tests.core.scheduler_bench import Bench


def test_every_field_of_a_step() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=12)
    bench.add(9, 3)
    bench.add(5, 1, priority=2)
    bench.add(2, 1, priority=3)
    bench.scheduler.set_priority("2", 4)
    plan = bench.scheduler.schedule()
    result = StepResult([(7,), ()])
    bench.scheduler.commit(plan, result)
    record = record_step(3, plan, result, bench.scheduler, time=1.5, seconds=0.5)
    assert record == StepRecord(
        3,
        requests=("0", "1"),
        kinds="pc",
        starts=(0, 0),
        num_tokens=(9, 3),
        sampled=((7,), ()),
        arrived=(Arrival("0", 9, 3), Arrival("1", 5, 1, 2), Arrival("2", 2, 1, 3)),
        reprioritised=(Priority("2", 4),),
        admitted=(Admission("0", 0, (), 9), Admission("1", 0, (), 5)),
        taken=(Blocks("0", (0, 1, 2)), Blocks("1", (3, 4))),
        published=(0, 1),
        waiting=1,
        blocked=("2", "all 2 seats are taken"),
        free_blocks=15,
    )
    assert (record.time, record.seconds) == (1.5, 0.5)
    assert bench.scheduler.changes == Changes(), "each change is recorded once"
    assert bench.pool.drain_changes() == {"published": (), "evicted": ()}
    plan = bench.scheduler.schedule()
    result = StepResult([(8,), (9,)])
    bench.scheduler.commit(plan, result)
    record = record_step(4, plan, result, bench.scheduler)
    assert record.finished == (Finish("1", "length", (3, 4)),)
    assert not (record.arrived or record.reprioritised or record.admitted)


def test_what_nothing_happened_to_is_left_out() -> None:
    bench = Bench("static", seats=2)
    bench.add(3, 2)
    bench.add(3, 2)
    record = bench.step()
    assert record.padding == () and record.drafted == ()  # and not zeros for each row
    bench = Bench(seats=2)
    bench.add(3, 4)
    bench.add(3, 4)
    bench.step()
    bench.scheduler.running[0].drafts = (1, 1)
    plan = bench.scheduler.schedule()
    assert record_step(1, plan, StepResult([(1,), (1,)]), bench.scheduler).drafted == ((1, 1), ())


def test_a_head_of_the_queue_that_the_plan_could_not_know_has_a_reason_too() -> None:
    bench = Bench(seats=2, blocks=30)
    bench.add(3, 4, n=2)
    plan = bench.scheduler.schedule()
    result = StepResult([(), ()], errors={0: "made up", 1: "made up"})
    bench.scheduler.add(Request("late", [1], SamplingParams()))
    bench.scheduler.commit(plan, result)
    record = record_step(0, plan, result, bench.scheduler)
    assert record.blocked == ("late", "it joined the queue when this step was over")
    assert record.waiting == 1
