"""Exercises of notebook 02: count idle seats, and form batches that leave fewer of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from labkit import notebook
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import JOBS, Job, answers, exactly, prompt_of, real, timelines, tiny_engine
from labkit.schedulers.static import StaticScheduler
from labkit.trace.records import StepRecord
from labkit.trace.trace import Trace
from labkit.views.style import plural

SEATS = 4

Batches = list[list[str]]


# -- the engine ------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job], *, batches: Batches | None = None, seats: int = SEATS, **config: Any
) -> tuple[Trace, dict[str, list[int]]]:
    """Run jobs in the real engine, with tiny-random, which gives the same tokens on every machine.

    Args:
        jobs: the requests; all of them arrive before the first step.
        batches: names of the jobs of each static batch, in the order of the batches; None leaves them to
            the scheduler.
        seats: `max_num_seqs`.
        config: other fields of `EngineConfig`.

    Returns:
        The trace, and the tokens of each answer by the job's name.
    """
    sizes = {"num_blocks": 256, "block_size": 8, "enable_prefix_caching": False} | config
    place = {name: i for i, batch in enumerate(batches or []) for name in batch}
    scheduler = functools.partial(_Grouped, place=place) if batches is not None else None
    engine = tiny_engine(scheduler_class=scheduler, max_num_seqs=seats, **sizes)
    for number, job in enumerate(jobs):
        engine.add_request(
            prompt_of(number, job.prompt_tokens),
            exactly(job.answer_tokens),
            request_id=job.name,
            # The queue is in order of priority: here the number of the batch.
            priority=place.get(job.name, 0),
        )
    return engine.run(), answers(engine)


class _Grouped(StaticScheduler):
    """Static batching with given batches.

    Args:
        place: the number of each request's batch, by its name.
    """

    def __init__(self, pool: BlockPool, *, place: dict[str, int], **limits: Any) -> None:
        super().__init__(pool, **limits)
        self._place = place

    def try_admit(self, plan: StepPlan, request: Request, budget: int) -> str | None:
        if self.running and self._place[request.request_id] != self._place[self.running[0].request_id]:
            return "its batch comes later"
        return super().try_admit(plan, request, budget)


# -- 02.1 ------------------------------------------------------------------------------------------


def idle_share(records: Sequence[StepRecord], seats: int) -> float:
    """The share of the seats, over all steps, that computed nothing; 0 if there are no steps."""
    busy = sum(row.num_tokens > 0 for record in records for row in record.rows)
    return 1 - busy / (seats * len(records)) if records else 0.0


def _records(*steps: Sequence[tuple[int, int]]) -> list[StepRecord]:
    """Steps from (tokens, padding) for each row."""
    records = []
    for number, rows in enumerate(steps):
        kinds = "".join("i" if not tokens else "p" if not number else "d" for tokens, _ in rows)
        names = tuple("abcdefgh"[: len(rows)])
        tokens, padding = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
        start = (0,) * len(rows)
        sampled = tuple((7,) if count else () for count in tokens)
        records.append(StepRecord(number, names, kinds, start, tokens, sampled, padding))
    return records


# The rule, the rows of each step as (tokens, padding), the seats, and the idle ones counted by hand.
_BY_HAND: tuple[tuple[str, tuple[tuple[tuple[int, int], ...], ...], int, int], ...] = (
    ("a seat whose request computes a token is busy", (((1, 0),),), 1, 0),
    ("a row that computes nothing but padding is an idle seat", (((1, 0), (0, 1)),), 2, 1),
    (
        "a prompt fills its seat for one step, however many tokens it has",
        (((6, 0), (6, 0)), ((1, 0), (0, 1))),
        2,
        1,
    ),
    (
        "a prompt that is padded on its left is computed all the same: its seat is busy",
        (((6, 0), (2, 4)),),
        2,
        0,
    ),
    ("a seat that nobody took is idle as well: divide by all the seats", (((3, 0),), ((1, 0),)), 4, 6),
    (
        "while the first chunks of a long prompt are computed, the seat of a short one is idle",
        (((4, 0), (0, 4)), ((4, 0), (3, 1)), ((1, 0), (1, 0)), ((1, 0), (0, 1))),
        2,
        2,
    ),
    ("in a step without any row, all seats are idle", (((3, 0),), (), ((1, 0),)), 2, 4),
)


def _examine_share(function: Callable[..., Any]) -> None:
    for rule, steps, seats, idle in _BY_HAND:
        records = _records(*steps)
        told = f"{_told(records)}\nseats = {seats}, so {idle} of {seats * len(records)} are idle"
        _compare(function, records, seats, idle / (seats * len(records)), rule, told)
    _compare(function, [], 3, 0.0, "if there are no steps, the share is 0", "records = [], seats = 3")
    rng = random.Random(21)
    for _ in range(30):
        seats = rng.randrange(1, 9)
        taken = [rng.randrange(seats + 1) for _ in range(rng.randrange(2, 6))]
        records = _records(*([(rng.randrange(3), rng.randrange(3)) for _ in range(rows)] for rows in taken))
        rule, told = "it must be right for any number of seats", f"{_told(records)}\nseats = {seats}"
        _compare(function, records, seats, idle_share(records, seats), rule, told)
    for name in ("static", "continuous"):
        records = list(run_jobs(JOBS, scheduler=name)[0].records)
        share = idle_share(records, SEATS)
        rule = "the share must be right for the trace of a real run as well"
        _compare(function, records, SEATS, share, rule, f"{name} batching of the jobs")


def _compare(
    function: Callable[..., Any],
    records: list[StepRecord],
    seats: int,
    expected: float,
    rule: str,
    told: str,
) -> None:
    given = list(records)
    returned = function(given, seats)
    expect(given == records, "leave the records as they are: they belong to the engine's trace", told)
    got = real(returned)
    if got is None:
        raise Wrong("return a number from 0 to 1", f"it returned {returned!r}")
    expect(got <= 1, "a share is a number from 0 to 1, not a percentage", f"{told}\nyours: {got:g}")
    expect(abs(got - expected) < 1e-6, rule, f"{told}\nyours: {got:.3f}\nright: {expected:.3f}")


def _told(records: Sequence[StepRecord]) -> str:
    """Records as text, one line for each step."""
    lines = []
    for record in records:
        rows = [f"{row.request_id} {row.num_tokens} + {row.padding}" for row in record.rows]
        lines.append(f"step {record.step}, tokens + padding of each row: {', '.join(rows)}")
    return "\n".join(lines)


def _run_share(function: Callable[..., Any]) -> Run:
    shares = {
        name: float(function(list(run_jobs(JOBS, scheduler=name)[0].records), SEATS))
        for name in ("static", "continuous")
    }
    picture = notebook.bars(
        {name: 100 * share for name, share in shares.items()}, "Idle seats", unit="%", digits=1
    )
    sentence = (
        f"On {SEATS} seats, static batching of the {len(JOBS)} requests leaves {shares['static']:.1%} idle, "
        f"continuous batching {shares['continuous']:.1%}."
    )
    return Run(sentence, [("What it finds:", picture)])


# -- 02.2 ------------------------------------------------------------------------------------------


def make_batches(jobs: Sequence[Job], seats: int) -> Batches:
    """Puts the longest answers together: no other batches need fewer steps."""
    names = [job.name for job in sorted(jobs, key=lambda job: -job.answer_tokens)]
    return [names[i : i + seats] for i in range(0, len(names), seats)]


def in_order(jobs: Sequence[Job], seats: int) -> Batches:
    """Batches in order of arrival."""
    names = [job.name for job in jobs]
    return [names[i : i + seats] for i in range(0, len(names), seats)]


def steps_of(batches: Batches, jobs: Sequence[Job]) -> int:
    """Steps that batches take, if one step reads the prompts of a batch.

    Each batch takes as many steps as its longest answer has tokens.
    """
    answers = {job.name: job.answer_tokens for job in jobs}
    return sum(max(answers[name] for name in batch) for batch in batches if batch)


def _lists() -> list[tuple[list[Job], int]]:
    """Lists of jobs and numbers of seats, the smallest first."""
    answers: list[tuple[tuple[int, ...], int]] = [
        ((), 2),
        ((3,), 1),
        ((3,), 4),
        ((2, 5), 2),
        ((5, 2, 5), 1),
        ((1, 6, 1, 6), 2),
        ((6, 6, 1), 2),
        ((4, 4, 4, 4, 4), 2),
        ((6, 1, 1, 5, 2, 9, 3), 3),
    ]
    rng = random.Random(2)
    answers += [(tuple(rng.randrange(1, 40) for _ in range(10 + 3 * i)), 2 + i) for i in range(6)]
    lists = [
        ([Job(4 + i % 3, n, name="abcdefghijklmnopqrstuvwxyz"[i]) for i, n in enumerate(row)], seats)
        for row, seats in answers
    ]
    return [*lists, *_sorted_by_chance(), (list(JOBS), SEATS)]


def _sorted_by_chance() -> Iterator[tuple[list[Job], int]]:
    """Lists whose order of arrival happens to be the best one: whoever sorts by something else needs more."""
    rng = random.Random(22)
    for _ in range(40):
        seats, count = rng.randrange(2, 6), rng.randrange(4, 15)
        lengths = sorted((rng.randrange(1, 130) for _ in range(count)), reverse=True)
        batches = [lengths[i : i + seats] for i in range(0, count, seats)]
        full = [batch for batch in batches if len(batch) == seats]
        rng.shuffle(full)
        arrived = [length for batch in [*full, *batches[len(full) :]] for length in batch]
        names = rng.sample("abcdefghijklmnopqrstuvwxyz", count)
        yield [Job(rng.randrange(1, 99), n, name=name) for n, name in zip(arrived, names, strict=True)], seats


def _shuffled() -> Iterator[tuple[list[Job], int]]:
    """The notebook's requests in another order and under other names."""
    rng = random.Random(23)
    for _ in range(5):
        jobs = [job._replace(name=f"r{job.name}") for job in rng.sample(JOBS, len(JOBS))]
        if steps_of(in_order(jobs, SEATS), jobs) > steps_of(make_batches(jobs, SEATS), jobs):
            yield jobs, SEATS


def _examine_batches(function: Callable[..., Any]) -> None:
    fewer = [(list(JOBS), SEATS), *_shuffled()]
    for jobs, seats in [*_lists(), *fewer[1:]]:
        given = list(jobs)
        returned = function(given, seats)
        expect(given == jobs, "leave the list of jobs as it is: work on a copy", _shown(jobs, seats))
        batches = _valid(returned, jobs, seats)
        yours, theirs = steps_of(batches, jobs), steps_of(in_order(jobs, seats), jobs)
        told = (
            f"{_shown(jobs, seats)}: your batches {batches} need {yours} steps, "
            f"batches in order of arrival need {theirs}"
        )
        expect(
            yours <= theirs, "your batches must never need more steps than batches in order of arrival", told
        )
        expect(
            yours < theirs or (jobs, seats) not in fewer,
            "for the notebook's requests, in any order, yours must need fewer steps than batches in order of "
            "arrival",
            told,
        )


def _valid(batches: Any, jobs: Sequence[Job], seats: int) -> Batches:
    """A learner's batches without the empty ones, if they keep to the rules."""
    shown = _shown(jobs, seats)
    returned = batches
    batches = list(batches) if _listed(batches) else [batches]
    if not all(map(_listed, batches)):
        raise Wrong("return a list of batches, each a list of names", f"it returned {returned!r}")
    batches = [list(batch) for batch in batches]
    names = [name for batch in batches for name in batch]
    known = {job.name for job in jobs}
    for name in names:
        expect(
            isinstance(name, str) and name in known,
            "a batch holds names of requests, and nothing else",
            f"{shown}: your batches {batches} hold {name!r}",
        )
        expect(
            names.count(name) == 1,
            "no request may stand in two places: it would be answered twice",
            f"{shown}: your batches {batches} hold {name!r} {names.count(name)} times",
        )
    for job in jobs:
        expect(
            job.name in names,
            "every request must be in a batch, or it is never answered",
            f"{shown}: your batches {batches} do not hold {job.name!r}",
        )
    for batch in batches:
        expect(
            len(batch) <= seats,
            "a batch has at most as many requests as there are seats",
            f"{shown}: your batch {batch} has {len(batch)} requests",
        )
    return [batch for batch in batches if batch]


def _listed(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _shown(jobs: Sequence[Job], seats: int) -> str:
    return (
        f"answers {', '.join(f'{job.name}: {job.answer_tokens}' for job in jobs)} on {plural(seats, 'seat')}"
    )


def _run_batches(function: Callable[..., Any]) -> Run:
    ways = {
        "your batches": _valid(function(list(JOBS), SEATS), JOBS, SEATS),
        "in order of arrival": in_order(JOBS, SEATS),
        "reference": make_batches(JOBS, SEATS),
    }
    runs = {name: run_jobs(JOBS, batches=batches) for name, batches in ways.items()}
    expect(
        all(tokens == runs["reference"][1] for _, tokens in runs.values()),
        "the answer to a request must not depend on its batch",
        "with your batches the engine gave other tokens than in order of arrival",
    )
    said = [
        f"{name} {len(trace)} steps, {idle_share(trace.records, SEATS):.1%} of the seats idle"
        for name, (trace, _) in runs.items()
    ]
    return Run(
        f"In the engine: {'; '.join(said)}. The same tokens each time.",
        timelines({"Your batches:": runs["your batches"][0], "Reference:": runs["reference"][0]}),
    )


EXERCISES: tuple[Exercise, ...] = (
    Exercise("02.1", "count the idle seats", idle_share, _examine_share, _run_share),
    Exercise("02.2", "batches with fewer idle seats", make_batches, _examine_batches, _run_batches),
)
