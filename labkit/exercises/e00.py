"""The exercise of notebook 00: predict who computes how many tokens in the next step."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit.core.block_pool import BlockPool, InvariantError
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import (
    Job,
    arrivals,
    exactly,
    expect_same_answers,
    serve,
    timelines,
    tiny_engine,
    whole,
    without_model,
)
from labkit.trace.records import StepRecord
from labkit.views.style import plural

Plan = dict[str, int]

SIZES: dict[str, Any] = {
    "num_blocks": 32,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "enable_prefix_caching": False,
}


# -- an engine to play with ------------------------------------------------------------------------


def small_engine(**settings: Any) -> Engine:
    """A tiny engine of these `SIZES`, without a prefix cache; settings as for `tiny_engine`."""
    return tiny_engine(**(SIZES | settings))


# -- what decides a step ---------------------------------------------------------------------------


class Running(NamedTuple):
    """A request that has a seat.

    It has `known` tokens, in its prompt and its answer so far. The keys and values of `computed` of them are
    in the cache. It holds `pages` pages.
    """

    request_id: str
    known: int
    computed: int
    pages: int


class Waiting(NamedTuple):
    """A request in the queue: it has `known` tokens, no seat and no page."""

    request_id: str
    known: int


@dataclass(frozen=True)
class Facts:
    """What decides the next step of an engine.

    Attributes:
        running: the requests that run, in the order in which a step serves them: answers first, then
            prompts that are half computed.
        waiting: the requests in the queue; the first is admitted next.
        free_pages: number of pages that nobody holds.
        page_size: number of tokens that a page holds.
        budget: most tokens that a step computes.
        seats: most requests that run at once.
    """

    running: list[Running]
    waiting: list[Waiting]
    free_pages: int
    page_size: int
    budget: int
    seats: int

    def __str__(self) -> str:
        lines = [
            f"running  {name}: knows {known}, computed {computed}, holds {plural(pages, 'page')}"
            for name, known, computed, pages in self.running
        ]
        lines += [f"waiting  {w.request_id}: knows {w.known}" for w in self.waiting]
        lines.append(
            f"{plural(self.free_pages, 'page')} free, {self.page_size} tokens a page; budget {self.budget}, "
            f"seats {self.seats}"
        )
        return "\n".join(lines)


def facts_of(engine: Engine | Scheduler) -> Facts:
    """The facts of an engine, read between two steps."""
    scheduler = engine if isinstance(engine, Scheduler) else engine.scheduler
    pool = scheduler.pool
    running = sorted(scheduler.running, key=_is_prompt)  # the sort keeps the order of equals
    return Facts(
        [
            Running(r.request_id, len(r.token_ids), r.num_computed_tokens, len(pool.tables[r.request_id]))
            for r in running
        ],
        [Waiting(r.request_id, len(r.token_ids)) for r in scheduler.waiting],
        pool.num_free,
        pool.block_size,
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
    )


def _is_prompt(request: Request) -> bool:
    """Whether more than one token is still to be computed."""
    return len(request.token_ids) - request.num_computed_tokens > 1


def plan_of(record: StepRecord) -> Plan:
    """Who computes how many tokens, from a record of `Engine.step` or `Engine.preview`."""
    return dict(zip(record.requests, record.num_tokens, strict=True))


# -- 00.1 ------------------------------------------------------------------------------------------


def next_step(facts: Facts) -> Plan:
    """How many tokens each request computes in the next step, without those that compute none."""
    plan: Plan = {}
    budget, free = facts.budget, facts.free_pages
    for request in facts.running:
        if request.computed == request.pages * facts.page_size:  # its next token begins a page
            free -= 1
        if tokens := min(request.known - request.computed, budget):
            plan[request.request_id] = tokens
        budget -= tokens
    for request in facts.waiting:
        pages = -(-request.known // facts.page_size)
        kept = 1 if plan else 0
        if len(plan) == facts.seats or not budget or pages + kept > free:
            break
        plan[request.request_id] = min(request.known, budget)
        budget -= plan[request.request_id]
        free -= pages
    return plan


@dataclass(frozen=True)
class _Case:
    """A state of the engine, and the rule that it shows: these jobs, after this number of steps."""

    rule: str
    jobs: tuple[Job, ...]
    steps: int
    pages: int = 32
    budget: int = 16
    seats: int = 4


def _job(step: int, prompt: int, answer: int = 30) -> Job:
    return Job(prompt, answer, step)


_FIRST = _job(0, 5)
_CASES = (
    _Case("a running request computes the tokens that it knows and has not computed", (_FIRST,), 1),
    _Case(
        "and all of those: it computes one where it knows one more, and ten where it knows ten",
        (_job(0, 26),),
        1,
    ),
    _Case(
        "of what it knows, it computes as much as is left of the budget: no more, and no less",
        (_job(0, 40),),
        1,
    ),
    _Case("a waiting request that finds a seat, budget and pages joins the step", (_job(0, 6),), 0),
    _Case(
        "running requests come first, and then as many waiting ones join as there is room for",
        (_FIRST, _job(1, 6), _job(1, 3)),
        1,
    ),
    _Case(
        "the budget is one for the whole step: a token that one request computes is gone for the next",
        (_FIRST, _job(1, 45)),
        2,
    ),
    _Case("a newcomer computes no more than what is left of the budget", (_FIRST, _job(1, 30)), 1),
    _Case("nobody joins once the budget is used up", (_job(0, 40), _job(1, 3)), 1),
    _Case("nobody joins while all seats are taken", (_FIRST, _FIRST, _job(1, 3)), 1, seats=2),
    _Case(
        "a request that joins in this step takes a seat as well",
        (_job(0, 3), _job(0, 3), _job(0, 3)),
        0,
        seats=2,
    ),
    _Case(
        "a waiting request that finds too few free pages does not join",
        (_job(0, 20), _job(2, 14)),
        2,
        pages=8,
    ),
    _Case(
        "while anyone runs, one page more than the newcomer needs must be free",
        (_job(0, 6, 4), _job(1, 8, 4)),
        1,
        pages=4,
    ),
    _Case("where nobody runs, no page has to stay free", (_job(0, 13, 3),), 0, pages=4),
    _Case("a page that is begun is a whole page: round up", (_job(0, 6, 4), _job(1, 9, 4)), 1, pages=5),
    _Case(
        "pages that a newcomer takes are gone for the next one",
        (_job(0, 10), _job(0, 18)),
        0,
        pages=7,
        budget=64,
    ),
    _Case(
        "a request that joins in this step runs as well: from then on, one page must stay free",
        (_job(0, 8, 4), _job(0, 8, 4)),
        0,
        pages=4,
    ),
    _Case(
        "a newcomer needs pages for all its tokens, not only for those that it computes in this step",
        (_FIRST, _job(1, 23, 2)),
        1,
        pages=8,
        budget=8,
    ),
    _Case(
        "a running request takes a page before anyone joins, if its own pages are full",
        (_job(0, 4), _job(1, 11, 2)),
        1,
        pages=5,
    ),
    _Case(
        "a page that is half full takes more tokens: no new one is needed yet",
        (_job(0, 5), _job(1, 11, 2)),
        1,
        pages=6,
    ),
    _Case(
        "nobody overtakes: if the first in the queue cannot join, those behind it cannot either",
        (_job(0, 12), _job(1, 18), _job(1, 3)),
        1,
        pages=8,
    ),
)
_RUN = tuple(
    Job(prompt, answer, step)
    for step, prompt, answer in (
        (0, 9, 9), (0, 21, 6), (0, 4, 14), (2, 33, 8), (3, 5, 5), (3, 12, 10), (5, 3, 3), (5, 16, 12),
        (9, 40, 4), (12, 8, 8), (12, 7, 7), (20, 6, 5),
    )
)  # fmt: skip
_WHOLE_RUN = _Case("it must be right before every step of a whole run", _RUN, 0, pages=24)


def _engine(case: _Case, scheduler: Callable[..., Scheduler] | None = None) -> Engine:
    """An engine with the sizes of a case, and no request yet."""
    return small_engine(
        scheduler_class=scheduler,
        num_blocks=case.pages,
        max_num_batched_tokens=case.budget,
        max_num_seqs=case.seats,
    )


def _jobs(case: _Case) -> list[Job]:
    """The jobs of a case, each with a letter as its name."""
    slots = case.pages * SIZES["block_size"]
    # The pool refuses a request that it could never hold: cut the answers that would not fit.
    return [
        job._replace(answer_tokens=min(job.answer_tokens, slots - job.prompt_tokens + 1), name=name)
        for job, name in zip(case.jobs, "ABCDEFGHIJKL", strict=False)
    ]


@functools.cache
def _state(case: _Case) -> tuple[Facts, Plan]:
    """The facts of a case, and the scheduler's plan for them."""
    engine = _engine(case)
    steps = arrivals(engine, _jobs(case))
    for _ in range(case.steps):
        next(steps)
        engine.step()
    next(steps)
    return facts_of(engine), plan_of(engine.preview())


@functools.cache
def _whole_run() -> tuple[tuple[Facts, Plan], ...]:
    """The facts before every step of a whole run, and the plans."""
    engine, states = _engine(_WHOLE_RUN), []
    for _ in arrivals(engine, _jobs(_WHOLE_RUN)):
        states.append((facts_of(engine), plan_of(engine.preview())))
        engine.step()
    return tuple(states)


# States that no run comes to, or seldom: prompts that have begun, at the end of a page and of the budget.
_BY_HAND = (
    Facts([Running("A", 30, 16, 8)], [Waiting("B", 3)], 2, 4, 16, 4),
    Facts([Running("A", 30, 4, 8), Running("B", 9, 4, 3)], [Waiting("C", 3)], 20, 4, 16, 4),
)


@functools.cache
def _other_sizes() -> tuple[tuple[Facts, Plan], ...]:
    """The facts before every step of short runs with pages, budgets and seats of all sizes, and the plans.

    The scheduler needs no model for that: here every token is 0. Where those who run find too few pages it
    preempts, and such a state is no question of this exercise.
    """
    rng, states = random.Random(0), []
    for size in (1, 2, 3, 4, 5, 8, 16) * 2:
        pool = BlockPool(rng.randrange(36 // size + 2, 70 // size + 4), size, enable_prefix_caching=False)
        limits = {"max_num_seqs": rng.randrange(1, 7), "max_num_batched_tokens": rng.randrange(6, 40)}
        scheduler = Scheduler(pool, **limits)
        for number in range(9):
            prompt = [0] * rng.randrange(1, 24)
            scheduler.add(Request(f"{size}.{number}", prompt, exactly(rng.randrange(1, 12))))
        while scheduler.requests:
            facts, plan = facts_of(scheduler), scheduler.schedule()
            if not plan.preempted:
                rows = zip(plan.requests, plan.num_tokens, strict=True)
                states.append((facts, {request.request_id: count for request, count in rows}))
            scheduler.commit(plan, without_model(plan))
    return tuple(states)


def _examine(function: Callable[..., Any]) -> None:
    for number, case in enumerate(_CASES):
        facts, plan = _state(case)
        try:
            _compare(function, facts, plan, case.rule)
        except Wrong as wrong:
            if number:  # somebody who adds one rule after the other wants to see that it goes on
                wrong.example += f"\nright so far: {number} of {len(_CASES)} states"
            raise
    for facts, plan in _whole_run():
        _compare(function, facts, plan, _WHOLE_RUN.rule)
    for facts in _BY_HAND:
        rule = "a prompt that is half computed holds its pages already, and may use up the whole budget"
        _compare(function, facts, next_step(facts), rule)
    for facts, plan in _other_sizes():
        rule = "it must be right for pages of any size, any budget and any number of seats"
        _compare(function, facts, plan, rule)


def _compare(function: Callable[..., Any], facts: Facts, plan: Plan, rule: str) -> None:
    given = copy.deepcopy(facts)
    returned = function(given)
    expect(given == facts, "leave the facts as they are: work on copies of the lists", f"{facts}")
    answer = _checked(returned)
    expect(answer == plan, rule, f"{facts}\nyours:  {_words(answer)}\nengine: {_words(plan)}")
    idle = [name for name in returned if name not in answer]
    expect(not idle, "leave out those who compute nothing", f"{facts}\nyours:  {returned!r}")


def _checked(answer: object) -> Plan:
    """A learner's answer, without the requests that compute nothing."""
    counts = {name: whole(count) for name, count in answer.items()} if isinstance(answer, Mapping) else None
    if counts is None or None in counts.values():
        rule = 'return a dictionary from request id to a whole number, such as {"A": 1}'
        raise Wrong(rule, f"it returned {answer!r}")
    return {name: count for name, count in counts.items() if count}


def _words(plan: Plan) -> str:
    return ", ".join(f"{name} {count}" for name, count in plan.items()) or "nobody"


def _planned_by(function: Callable[..., Any]) -> type[Scheduler]:
    """A scheduler that runs what a function predicts."""

    class Predicted(Scheduler):
        def schedule(self) -> StepPlan:
            self.end_aborted()
            predicted, plan = _checked(function(facts_of(self))), StepPlan()
            self.grow(plan, [r for r in self.running if r.num_computed_tokens >= r.capacity])
            for request in sorted(self.running, key=_is_prompt):
                if request.request_id in predicted:
                    plan.add(request, predicted[request.request_id])
            for request in list(self.waiting):
                num_tokens = predicted.get(request.request_id)
                if num_tokens is None:
                    plan.blocked = (request.request_id, "your function left it out")
                    break
                if reason := self.try_admit(plan, request, num_tokens):
                    raise InvariantError(f"request {request.request_id!r} cannot join: {reason}")
                plan.add(request, num_tokens)
            return plan

    return Predicted


def _run_engine(scheduler: Callable[..., Scheduler] | None) -> Engine:
    """The engine after the whole run."""
    return serve(_engine(_WHOLE_RUN, scheduler), _jobs(_WHOLE_RUN))


def _run(function: Callable[..., Any]) -> Run:
    yours, own = _run_engine(_planned_by(function)), _run_engine(None)
    expect_same_answers(yours, own, "the same plans give the same answers")
    tokens = sum(len(output.token_ids) for output in yours.outputs.values())
    return Run(
        f"It predicted all {len(_CASES)} states. Then it took the scheduler's place and served "
        f"{len(_RUN)} requests in {len(yours.trace)} steps; the engine's own scheduler takes "
        f"{len(own.trace)}, and all {tokens} tokens are the same.",
        timelines({"Planned by your function": yours.trace, "Planned by labkit's scheduler": own.trace}),
    )


EXERCISES = (Exercise("00.1", "Who runs in the next step", next_step, _examine, _run),)
