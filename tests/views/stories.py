"""Traces that many tests share: stories with known facts, and runs of real schedulers without a model."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from hypothesis import strategies as st

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams
from labkit.schedulers import SCHEDULERS
from labkit.trace.records import Admission, Arrival, Blocks, Finish, StepRecord, TraceMeta
from labkit.trace.trace import Trace

HOSTILE = [
    "<b>bold</b>", "<img src=x onerror=alert(1)>", "&lt;", "$x^2$", "%{x}", "2024-01-01", "1e5", "0x10", "",
    "line\nbreak\t\x07\u202e", "日本語の長い名前です" * 3, "a" * 300, "9" * 5000, "\ud800", "a\u0301" * 20,
]  # fmt: skip
WHY = "1 of 2 rows draft nothing: a draft pays if it is right 30% of the time, and theirs are {}"


def record(
    step: int, rows: Sequence[tuple[str, str, int, int, tuple[int, ...]]] = (), **fields
) -> StepRecord:
    """Make a record from rows of (request, kind letter, start, tokens, sampled)."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return StepRecord(step, columns[0], "".join(columns[1]), *columns[2:], **fields)


def trace_of(*records: StepRecord, num_blocks: int = 8, block_size: int = 4) -> Trace:
    return Trace(TraceMeta(num_blocks, block_size, 4, 32), records)


def story() -> Trace:
    """Request a computes its prompt; b shares its first block, is preempted, and comes back."""
    return trace_of(
        record(
            3, [("a", "p", 0, 6, (50,))], published=(0,), waiting=1, blocked=("b", "no seat"), free_blocks=6,
            arrived=(Arrival("a", 6, 3), Arrival("b", 7, 2)), admitted=(Admission("a"),),
            taken=(Blocks("a", (0, 1)),),
        ),
        record(
            4, [("a", "d", 6, 1, (51,)), ("b", "c", 4, 1, ())], free_blocks=5,
            admitted=(Admission("b", 4, (0,)),), taken=(Blocks("b", (2,)),),
        ),
        record(
            5, [("a", "d", 7, 1, (52,))], preempted=(Blocks("b", (0, 2)),), waiting=1, free_blocks=8,
            blocked=("b", "no page"), finished=(Finish("a", "length", (0, 1)),),
        ),
        record(
            6, [("b", "p", 4, 3, (60,))], admitted=(Admission("b", 4, (0,)),), taken=(Blocks("b", (3,)),),
            free_blocks=8, finished=(Finish("b", "stop", (0, 3)),),
        ),
    )  # fmt: skip


def run(
    jobs: Sequence[tuple[int, str, int, int]],
    *,
    scheduler: str = "continuous",
    kv_policy: str = "paged",
    num_blocks: int = 16,
    block_size: int = 4,
    budget: int = 12,
    seats: int = 4,
    aborts: Sequence[tuple[int, str]] = (),
) -> Trace:
    """Let a real scheduler serve jobs of (arrival step, id, prompt length, max tokens), without a model."""
    limits = {"max_num_seqs": seats, "max_num_batched_tokens": budget}
    engine = SCHEDULERS[scheduler](BlockPool(num_blocks, block_size), **limits, kv_policy=kv_policy)
    trace = Trace(TraceMeta(num_blocks, block_size, seats, budget, scheduler, kv_policy))
    jobs = sorted(jobs)
    for step in range(2000):
        while jobs and (jobs[0][0] <= step or not engine.has_unfinished):
            _, name, prompt, answer = jobs.pop(0)
            engine.add(Request(name, list(range(prompt)), SamplingParams(max_tokens=answer)))
        for when, name in aborts:
            if when == step:
                engine.abort(name)
        if not engine.has_unfinished:
            return trace
        plan = engine.schedule()
        ends = [start + n for start, n in zip(plan.starts, plan.num_tokens, strict=True)]
        reached = [end == len(r.token_ids) for r, end in zip(plan.requests, ends, strict=True)]
        done = [r.status == "running" and full for r, full in zip(plan.requests, reached, strict=True)]
        result = StepResult([(100 + step,) if ends else () for ends in done])
        engine.commit(plan, result)
        trace.append(record_step(step, plan, result, engine))
    raise RuntimeError("the scheduler does not come to an end")


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sizes = st.tuples(st.integers(0, 6), st.integers(1, 14), st.integers(1, 18))
    jobs = [
        (when, str(i), *rest) for i, (when, *rest) in enumerate(draw(st.lists(sizes, min_size=1, max_size=9)))
    ]
    return run(
        jobs,
        scheduler=draw(st.sampled_from(list(SCHEDULERS))),
        kv_policy=draw(st.sampled_from(["paged", "reserved"])),
        num_blocks=draw(st.sampled_from([8, 9, 300])),
        budget=draw(st.sampled_from([4, 9, 64])),
        aborts=draw(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("0123")), max_size=2)),
    )


def timed(trace: Trace, step: float = 0.01) -> Trace:
    """Put the steps on a clock: a hundredth of a second each, and a second of rest before every tenth."""
    clock, records = 0.0, []
    for place, record in enumerate(trace):
        clock += step + (place % 10 == 9)
        fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
        records.append(StepRecord(**{**fields, "time": clock, "seconds": step}))
    return Trace(trace.meta, records)


def busy() -> Trace:
    """Serve requests of uneven length from a pool too small for them, with chunks and one abort."""
    jobs = [(0, str(i), 3 + 2 * i, 14 - i) for i in range(6)] + [(5, "late", 10, 4)]
    return timed(run(jobs, num_blocks=10, budget=8, aborts=[(9, "4")]))


def sent(trace: Trace) -> Trace:
    """Let the processes of a model send 100 bytes for each token in layers, and 7 elsewhere."""
    records = [
        dataclasses.replace(
            r, sent_in_layers=100 * r.total_tokens, sent_elsewhere=7 * r.total_tokens, sending=r.seconds / 4
        )
        for r in trace
    ]
    return Trace(trace.meta, records)


def with_times(trace: Trace, times: Sequence[tuple[float, float]]) -> Trace:
    """Give each step the time at which it ends and the seconds that it takes."""
    records = [dataclasses.replace(r, time=t, seconds=s) for r, (t, s) in zip(trace, times, strict=True)]
    return Trace(trace.meta, records)


# -- with drafts ----------------------------------------------------------------------------------


def draft_story() -> Trace:
    """Five of a's ten drafts are right: none of the first four, then all, all, and some. b has no drafts."""
    records = [
        StepRecord(
            0, ("a",), "p", (0,), (5,), ((50,),), arrived=(Arrival("a", 5, 11),), admitted=(Admission("a"),),
            taken=(Blocks("a", (0, 1)),), free_blocks=6,
        ),
        StepRecord(
            1, ("a",), "d", (5,), (5,), ((60,),), drafted=((51, 52, 53, 54),), taken=(Blocks("a", (2,)),),
            returned=(Blocks("a", (2,)),), free_blocks=6,
        ),
        StepRecord(
            2, ("a",), "d", (6,), (3,), ((61, 62, 63),), drafted=((61, 62),), taken=(Blocks("a", (2,)),),
            free_blocks=5,
        ),
        StepRecord(
            3, ("a", "b"), "dp", (9, 0), (3, 3), ((64, 65, 66), (80,)), drafted=((64, 65), ()),
            arrived=(Arrival("b", 3, 3),), admitted=(Admission("b"),), taken=(Blocks("b", (4,)),),
            free_blocks=4,
        ),
        StepRecord(
            4, ("a", "b"), "dd", (12, 3), (3, 1), ((67, 68), (81,)), drafted=((67, 70), ()),
            taken=(Blocks("a", (3,)),), held_back=WHY.format("15%"), free_blocks=3,
        ),
        StepRecord(
            5, ("a", "b"), "dd", (14, 4), (1, 1), ((69,), (82,)), held_back=WHY.format("12% to 13%"),
            taken=(Blocks("b", (5,)),), free_blocks=8,
            finished=(Finish("a", "length", (0, 1, 2, 3)), Finish("b", "length", (4, 5))),
        ),
    ]  # fmt: skip
    return Trace(TraceMeta(8, 4, 4, 32), records)


def draft_run(seed: int) -> Trace:
    """Let a real scheduler, short of blocks, serve requests that draft anything; luck says what is right."""
    rng = random.Random(seed)
    pool = BlockPool(14, 4)
    scheduler = SCHEDULERS["continuous"](pool, max_num_seqs=4, max_num_batched_tokens=20)
    trace = Trace(TraceMeta(14, 4, 4, 20))
    for i in range(8):
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 9))]
        scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens=rng.randint(5, 20))))
    for step in range(1000):
        if not scheduler.has_unfinished:
            return trace
        plan = scheduler.schedule()
        sampled: list[tuple[int, ...]] = []
        for row, request in enumerate(plan.requests):
            drafts = plan.drafts.get(row, ())
            known = plan.starts[row] + plan.num_tokens[row] - len(drafts) == len(request.token_ids)
            right = rng.choice([0, len(drafts), rng.randint(0, len(drafts))])
            sampled.append((*drafts[:right], 200 + step) if known else ())
        result = StepResult(sampled)
        scheduler.commit(plan, result)
        trace.append(record_step(step, plan, result, scheduler))
        for request in scheduler.running:
            room = request.max_len - len(request.token_ids) - 1
            if len(request.token_ids) - request.num_computed_tokens == 1 and room > 0:
                count = rng.choice([0, 1, min(4, room), min(4, room)])
                request.drafts = tuple(range(100, 100 + min(count, room)))
    raise RuntimeError("the scheduler does not come to an end")
