"""The exercises of notebook 04: decide in each step who computes how much. The engine does the rest."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit.core.block_pool import BlockPool, InvariantError
from labkit.core.plan import StepPlan
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import (
    JOBS,
    Job,
    answers,
    exactly,
    serve,
    timelines,
    tiny_engine,
    whole,
    without_model,
)
from labkit.exercises.e04_turns import TURNS
from labkit.schedulers.audit import Auditor
from labkit.trace.trace import Trace
from labkit.views.style import plural


class Ticket(NamedTuple):
    """What a schedule knows of a request.

    It has `known` tokens, in its prompt and its answer so far. The keys and values of `computed` of them are
    in the cache. A waiting request has computed nothing, or has lost it when it was preempted.
    """

    name: str
    known: int
    computed: int

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 for a request that writes its answer."""
        return self.known - self.computed


Rows = Sequence[tuple[str, int]]
Schedule = Callable[[list[Ticket], list[Ticket], int, int, int, int], Rows]


@dataclass(frozen=True)
class Situation:
    """What a schedule is called with: who runs and who waits, in order of arrival, and the limits."""

    running: tuple[Ticket, ...]
    waiting: tuple[Ticket, ...]
    seats: int
    budget: int
    free_pages: int
    page_size: int

    def ask(self, function: Callable[..., Any]) -> list[tuple[str, int]]:
        """Call a schedule, and return its rows if they keep to the rules.

        Raises:
            Wrong: they break a rule; the message names it.
        """
        running, waiting = list(self.running), list(self.waiting)
        rows = function(running, waiting, self.seats, self.budget, self.free_pages, self.page_size)
        if (tuple(running), tuple(waiting)) != (self.running, self.waiting):
            raise Wrong("leave the two lists as they are: they are the engine's", str(self))
        return _Ruling(self, rows).check()

    def pages(self, ticket: Ticket) -> int:
        """Pages that a request takes when it is admitted."""
        return -(-ticket.known // self.page_size)

    def __str__(self) -> str:
        def told(tickets: Iterable[Ticket]) -> str:
            return ", ".join(f"{t.name} ({t.computed} of {t.known})" for t in tickets) or "nobody"

        return (
            f"running (computed of known): {told(self.running)}\nwaiting: {told(self.waiting)}\n"
            f"seats {self.seats}, budget {self.budget}, "
            f"free pages {self.free_pages} of {self.page_size} tokens each"
        )


def schedule(
    running: list[Ticket], waiting: list[Ticket], seats: int, budget: int, free_pages: int, page_size: int
) -> list[tuple[str, int]]:
    """The engine's own policy: decode, then prompts that have begun, then the queue while there is room."""
    rows = []
    for ticket in sorted(running, key=lambda t: t.missing > 1):  # stable: decode first
        if tokens := min(ticket.missing, budget):
            rows.append((ticket.name, tokens))
            budget -= tokens
    taken = len(running)
    for ticket in waiting:
        pages = -(-ticket.known // page_size)
        kept = 1 if taken else 0  # so that those who run can grow
        if taken == seats or budget == 0 or pages + kept > free_pages:
            break
        tokens = min(ticket.known, budget)
        rows.append((ticket.name, tokens))
        taken, budget, free_pages = taken + 1, budget - tokens, free_pages - pages
    return rows


# -- the rules -------------------------------------------------------------------------------------


class _Ruling:
    """Decides whether the rows of a schedule keep to the rules.

    Args:
        situation: what the schedule was called with.
        rows: what it returned.
    """

    def __init__(self, situation: Situation, rows: Any) -> None:
        self.situation, self.rows = situation, rows

    def check(self) -> list[tuple[str, int]]:
        rows = self._read()
        tokens = dict(rows)
        self._check_limits(tokens)
        self._check_decode(tokens)
        self._check_order(tokens)
        self._check_refill(tokens)
        return rows

    def _expect(self, condition: bool, rule: str, detail: str) -> None:
        # Called thousands of times, and few calls break a rule: write the example for those alone.
        if not condition:
            raise Wrong(rule, f"{self.situation}\nyours: {self.rows!r}\n{detail}")

    def _read(self) -> list[tuple[str, int]]:
        """The rows as pairs of a request that is there and a number of tokens that it misses."""
        shape = "return a list of pairs: a name, and how many tokens that request computes"
        try:
            rows = [(name, tokens) for name, tokens in self.rows]
        except (TypeError, ValueError):
            raise Wrong(shape, f"{self.situation}\nyours: {self.rows!r}") from None
        there = {t.name: t for t in (*self.situation.running, *self.situation.waiting)}
        for name, tokens in rows:
            pair = isinstance(name, str) and whole(tokens) is not None
            self._expect(pair, shape, f"{(name, tokens)!r} is not such a pair")
            self._expect(name in there, "schedule only requests that run or wait", f"there is no {name!r}")
            self._expect(
                1 <= tokens <= there[name].missing,
                "a request computes at least one token, and no more than it misses",
                f"{name} misses {there[name].missing}, and you give it {tokens}",
            )
        rows = [(name, int(tokens)) for name, tokens in rows]
        names = [name for name, _ in rows]
        for name in names:
            self._expect(
                names.count(name) == 1,
                "each request has one row in a step",
                f"{name} has {names.count(name)}",
            )
        return rows

    def _check_limits(self, tokens: dict[str, int]) -> None:
        at, total = self.situation, sum(tokens.values())
        self._expect(
            total <= at.budget,
            "a step never computes more tokens than its budget",
            f"{total} tokens, the budget is {at.budget}",
        )
        admitted = self._admitted(tokens)
        seated = len(at.running) + len(admitted)
        self._expect(
            seated <= at.seats or not admitted,
            "a running request keeps its seat: admit only as many as there are free seats",
            f"{len(at.running)} run, you admit {len(admitted)}, and there are {plural(at.seats, 'seat')}",
        )
        pages = sum(map(at.pages, admitted))
        self._expect(
            pages <= at.free_pages,
            "an admitted request takes pages for all tokens that it knows: as many must be free",
            f"{_names(admitted)} would take {plural(pages, 'page')}, and {at.free_pages} are free",
        )

    def _check_decode(self, tokens: dict[str, int]) -> None:
        for ticket in self.situation.running:
            self._expect(
                ticket.missing > 1 or ticket.name in tokens,
                "decode goes first: an answer that is being written gets its token in every step",
                f"{ticket.name} misses one token, and gets none",
            )

    def _check_order(self, tokens: dict[str, int]) -> None:
        """First come, first served: nobody is passed over, and nobody waits beside unused tokens."""
        at = self.situation
        prompts = [t for t in at.running if t.missing > 1]
        later = [*prompts, *at.waiting]
        for i, ticket in enumerate(later):
            short = ticket.missing - tokens.get(ticket.name, 0)
            behind = [t for t in later[i + 1 :] if t.name in tokens]
            self._expect(
                not short or not behind,
                "first come, first served: nobody may overtake",
                f"{ticket.name} still misses {plural(short, 'token')}, and you give some to "
                f"{_names(behind[:1])}, which came later",
            )
        left = at.budget - sum(tokens.values())
        for ticket in [t for t in later if t in prompts or t.name in tokens]:
            short = ticket.missing - tokens.get(ticket.name, 0)
            self._expect(
                not short or not left,
                "a request that has a seat gets what is left of the budget, as far as it needs it",
                f"{ticket.name} still misses {plural(short, 'token')}, and {left} of the budget are left",
            )

    def _check_refill(self, tokens: dict[str, int]) -> None:
        at, admitted = self.situation, self._admitted(tokens)
        queue = [t for t in at.waiting if t.name not in tokens]
        seated, left = len(at.running) + len(admitted), at.budget - sum(tokens.values())
        if not queue or seated >= at.seats or not left:
            return
        free, need = at.free_pages - sum(map(at.pages, admitted)), at.pages(queue[0])
        # A schedule may keep pages free for those that run, but at most one for each.
        self._expect(
            need + seated > free,
            "a free seat is refilled at once",
            f"{queue[0].name} waits without a reason: {plural(at.seats - seated, 'seat')} and "
            f"{plural(left, 'token')} are left, and of {plural(free, 'free page')} it takes {need}, which "
            "leaves one for each request that runs",
        )

    def _admitted(self, tokens: dict[str, int]) -> list[Ticket]:
        return [t for t in self.situation.waiting if t.name in tokens]


def _names(tickets: Sequence[Ticket]) -> str:
    return ", ".join(t.name for t in tickets)


# -- into the engine -------------------------------------------------------------------------------


class LearnersScheduler(Scheduler):
    """A scheduler whose decisions a learner's function makes. Pages, seats and preemption stay here.

    A running answer that needs another page gets it before the function is called; where none is free, the
    newest requests are preempted until one is.

    Args:
        decide: the function, called once in each step with the arguments of `schedule`.
    """

    def __init__(self, pool: BlockPool, *, decide: Schedule, **limits: Any) -> None:
        pool.enable_prefix_caching = False
        super().__init__(pool, **limits)
        self.watermark = 0  # the function decides how many pages stay free for growth
        self._decide = decide

    def schedule(self) -> StepPlan:
        self.end_aborted()
        plan = StepPlan()
        growing = [r for r in self.running if r.num_computed_tokens >= r.capacity]
        self.grow(plan, growing)
        if not self.requests:
            return plan
        rows = self._situation().ask(self._decide)
        wanted = dict(rows)
        for request in [r for r in self.waiting if r.request_id in wanted]:
            if reason := self.try_admit(plan, request, wanted[request.request_id]):
                raise InvariantError(f"request {request.request_id!r} cannot join: {reason}")
        for name, num_tokens in rows:
            plan.add(self.requests[name], num_tokens)
        if (head := self.waiting.peek()) is not None:
            full = len(self.running) >= self.max_num_seqs
            plan.blocked = (head.request_id, "all seats are taken" if full else "the schedule let it wait")
        return plan

    def _situation(self) -> Situation:
        return Situation(
            tuple(map(_ticket, self.running)),
            tuple(map(_ticket, self.waiting)),
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.pool.num_free,
            self.pool.block_size,
        )


def _ticket(request: Request) -> Ticket:
    return Ticket(request.request_id, len(request.token_ids), request.num_computed_tokens)


def run_jobs(
    jobs: Sequence[Job] = JOBS, decide: Schedule | None = None, **config: Any
) -> tuple[Trace, dict[str, list[int]]]:
    """Run jobs in the real engine, with tiny-random, which gives the same tokens on every machine.

    Args:
        jobs: the requests.
        decide: a schedule; None leaves the decisions to the engine.
        config: fields of `EngineConfig`, in place of 4 seats, and of a budget and pages that never run out.

    Returns:
        The trace, and the tokens of each answer by the request's name.
    """
    sizes = {"max_num_seqs": 4, "num_blocks": 256, "block_size": 8, "enable_prefix_caching": False} | config
    scheduler = functools.partial(LearnersScheduler, decide=decide) if decide else None
    engine = serve(tiny_engine(scheduler_class=scheduler, **sizes), jobs)
    return engine.trace, answers(engine)


# -- 04.1 ------------------------------------------------------------------------------------------


def _situations() -> list[Situation]:
    """What a schedule is asked, the smallest situation first."""

    def situation(running: str, waiting: str, *limits: int) -> Situation:
        return Situation(_tickets(running, "abcd"), _tickets(waiting, "wxyz"), *limits)

    return [  # running and waiting as "known/computed"; seats, budget, free pages, page size
        situation("", "3/0", 1, 8, 8, 4),
        situation("4/3", "", 1, 8, 8, 4),
        situation("4/3", "3/0", 1, 8, 8, 4),  # no seat
        situation("4/3", "3/0", 2, 8, 8, 4),  # a seat is free
        situation("4/3 7/6 5/4", "", 4, 8, 0, 4),
        situation("4/3 7/6", "9/0", 3, 3, 8, 4),  # one token is left for the queue
        situation("", "9/0", 2, 4, 8, 4),  # a prompt longer than the budget
        situation("9/4", "", 2, 4, 8, 4),  # its next chunk
        situation("9/4 4/3", "", 2, 4, 8, 4),  # decode goes first
        situation("9/4 4/3", "3/0", 3, 4, 8, 4),  # nothing is left for the queue
        situation("9/4 9/2", "", 2, 8, 8, 4),  # a chunk for the second
        situation("", "3/0 3/0 3/0", 2, 8, 8, 4),  # two of three
        situation("", "3/0 6/0 3/0", 3, 8, 8, 4),  # the second gets what is left
        situation("", "20/0 3/0", 2, 32, 4, 4),  # too few pages for the first: nobody overtakes
        situation("", "8/0", 2, 32, 2, 4),  # just enough
        situation("4/3", "9/0", 2, 32, 2, 4),  # too few
        situation("4/3", "5/0 5/0", 3, 32, 3, 4),  # pages for one of them
        situation("4/3", "9/0 2/0", 3, 32, 6, 4),
        situation("8/7 6/5", "12/0", 4, 4, 8, 4),  # two tokens of the budget are left
        situation("9/4 9/2", "", 2, 4, 8, 4),  # nothing is left for the second
        situation("30/4", "", 2, 32, 8, 4),  # a long chunk
        situation("4/3", "20/0", 2, 16, 8, 8),  # other pages
    ]


def _by_chance() -> Iterable[Situation]:
    """Situations with pages, budgets and seats of all sizes."""
    rng = random.Random(41)
    for _ in range(400):
        seats = rng.randrange(1, 7)
        known = [rng.randrange(1, 40) for _ in range(rng.randrange(seats + 1))]
        running = [Ticket("abcdef"[i], n, rng.choice((n - 1, rng.randrange(n)))) for i, n in enumerate(known)]
        waiting = [Ticket(name, rng.randrange(1, 40), 0) for name in "uvwxyz"[: rng.randrange(6)]]
        sizes = rng.randrange(seats, 60), rng.randrange(30), rng.choice((1, 2, 3, 4, 8, 16))
        yield Situation(tuple(running), tuple(waiting), seats, *sizes)


def _tickets(text: str, names: str) -> tuple[Ticket, ...]:
    parts = zip(names, text.split(), strict=False)
    return tuple(Ticket(name, *map(int, part.split("/"))) for name, part in parts)


def _workloads() -> Iterable[tuple[list[Job], dict[str, int]]]:
    """Jobs and sizes of the engine, from roomy to tight."""
    rng = random.Random(4)
    roomy = {"seats": 4, "budget": 64, "pages": 64, "page_size": 4}
    yield list(JOBS), roomy
    for sizes in (roomy, roomy | {"budget": 6}, roomy | {"pages": 14}, roomy | {"budget": 5, "pages": 12}):
        for seats in (1, 4, 5):
            jobs = [Job(rng.randrange(1, 24), rng.randrange(1, 24), rng.randrange(0, 30)) for _ in range(12)]
            yield jobs, sizes | {"seats": seats}


def _play(decide: Callable[..., Any], jobs: Sequence[Job], sizes: dict[str, int]) -> None:
    """Serve jobs as the engine does, but without a model: a schedule never sees its tokens."""
    pool = BlockPool(sizes["pages"], sizes["page_size"])
    limits = {"max_num_seqs": sizes["seats"], "max_num_batched_tokens": sizes["budget"]}
    scheduler = LearnersScheduler(pool, decide=decide, **limits)
    auditor, step = Auditor(scheduler, pool, sizes["budget"], sizes["seats"]), 0
    todo = sorted(((job.step, i) for i, job in enumerate(jobs)))
    while todo or scheduler.has_unfinished:
        while todo and todo[0][0] <= step:
            i = todo.pop(0)[1]
            scheduler.add(Request(str(i), [0] * jobs[i].prompt_tokens, exactly(jobs[i].answer_tokens)))
        plan = scheduler.schedule()
        auditor.check_plan(plan)
        result = without_model(plan)
        scheduler.commit(plan, result)
        auditor.check_record(record_step(step, plan, result, scheduler))
        step += 1


def _examine(function: Callable[..., Any]) -> None:
    for situation in [*_situations(), *_by_chance()]:
        situation.ask(function)
    for jobs, sizes in _workloads():
        _play(function, jobs, sizes)


SMALL = {"num_blocks": 10, "block_size": 8, "max_num_batched_tokens": 16}


def _run(function: Callable[..., Any]) -> Run:
    trace, tokens = run_jobs(JOBS, function, **SMALL)
    reference, expected = run_jobs(JOBS, schedule, **SMALL)
    static, _ = run_jobs(JOBS, scheduler="static", **SMALL)
    rule = "the answers must not depend on the schedule"
    expect(
        tokens == expected, rule, "with your schedule the engine gave other tokens than with the reference"
    )
    return Run(
        f"In the engine, {len(JOBS)} requests: yours {_score(trace)}; reference {_score(reference)}; "
        f"static batching needs {len(static)} steps. The same {sum(map(len, tokens.values()))} tokens.",
        timelines({"Your schedule:": trace, "The reference:": reference}),
    )


def _score(trace: Trace) -> str:
    pages = max(trace.meta.num_blocks - record.free_blocks for record in trace)
    preempted = sum(len(record.preempted) for record in trace)
    return f"{len(trace)} steps, at most {pages} pages, {plural(preempted, 'preemption')}"


EXERCISES: tuple[Exercise, ...] = (
    Exercise("04.1", "write schedule()", schedule, _examine, _run),
    TURNS,
)
