"""The exercise of notebook 00: foretell who computes how many tokens in the next step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool, InvariantError
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.trace.records import StepRecord
from labkit.views.style import plural

Plan = dict[str, int]

SIZES: dict[str, Any] = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}


# -- an engine to play with ------------------------------------------------------------------------


class Job(NamedTuple):
    """A request: the step before which it arrives, and the tokens of its prompt and of its answer."""

    step: int
    prompt: int
    answer: int


def small_engine(
    *,
    scheduler_class: Callable[..., Scheduler] | None = None,
    pool: Callable[..., BlockPool] | None = None,
    **settings: Any,
) -> Engine:
    """An engine of these `SIZES`, whose model knows nothing and gives the same tokens on every machine.

    Args:
        scheduler_class, pool: classes of your own, as for `Engine`.
        settings: other fields of `EngineConfig`, and other sizes.
    """
    config = EngineConfig(model=_tiny(), enable_prefix_caching=False, **(SIZES | settings))
    return Engine(config, scheduler=scheduler_class, pool=pool)


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


def inject(engine: Engine, prompt_tokens: int, answer_tokens: int, request_id: str | None = None) -> str:
    """Hand in a request of such lengths; no two begin alike."""
    first = 300 + 50 * len(engine.outputs)
    prompt = list(range(first, first + prompt_tokens))
    params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
    return engine.add_request(prompt, params, request_id=request_id)


def serve(engine: Engine, jobs: Sequence[tuple[int, int, int]]) -> Engine:
    """Hand in each job before its step, and step until all are done."""
    last = max(step for step, _, _ in jobs)
    step = 0
    while step <= last or engine.has_unfinished:
        for when, prompt_tokens, answer_tokens in jobs:
            if when == step:
                inject(engine, prompt_tokens, answer_tokens)
        engine.step()
        step += 1
    return engine


# -- what decides a step ---------------------------------------------------------------------------


class Running(NamedTuple):
    """A request that has a seat.

    `known` counts its tokens, those of the prompt and those generated; `computed` of them have their keys
    and values in the cache; it holds so many `pages`.
    """

    request_id: str
    known: int
    computed: int
    pages: int


class Waiting(NamedTuple):
    """A request in the queue: it has no seat and no page, and `known` tokens."""

    request_id: str
    known: int


@dataclass(frozen=True)
class Facts:
    """What decides the next step of an engine.

    Attributes:
        running: in the order in which a step serves them: answers first, then prompts half computed.
        waiting: the next to be admitted first.
        free_pages: pages that nobody holds.
        page_size: tokens to a page.
        budget: tokens that a step computes at most.
        seats: requests that run at once at most.
    """

    running: tuple[Running, ...]
    waiting: tuple[Waiting, ...]
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
    """The facts of an engine as it stands between two steps."""
    scheduler = engine if isinstance(engine, Scheduler) else engine.scheduler
    pool = scheduler.pool
    running = sorted(scheduler.running, key=_is_prompt)  # the sort keeps the order of equals
    return Facts(
        tuple(
            Running(r.request_id, len(r.token_ids), r.num_computed_tokens, len(pool.table(r.request_id)))
            for r in running
        ),
        tuple(Waiting(r.request_id, len(r.token_ids)) for r in scheduler.waiting),
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
    """Tokens that each request computes in the next step; those that compute none may be left out."""
    plan: Plan = {}
    budget, free = facts.budget, facts.free_pages
    for request in facts.running:
        if request.computed == request.pages * facts.page_size:  # its next token begins a page
            free -= 1
        plan[request.request_id] = min(request.known - request.computed, budget)
        budget -= plan[request.request_id]
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
    """A state of the engine, and the rule that it shows: the jobs, after so many steps."""

    rule: str
    jobs: tuple[Job, ...]
    steps: int
    pages: int = 32
    budget: int = 16
    seats: int = 4


def _job(step: int, prompt: int, answer: int = 30) -> Job:
    return Job(step, prompt, answer)


_FIRST = _job(0, 5)
_CASES = (
    _Case("a running request computes the tokens that it knows and has not computed", (_FIRST,), 1),
    _Case("a step computes no more tokens than its budget", (_job(0, 40),), 1),
    _Case("a waiting request that finds a seat, budget and pages joins the step", (_job(0, 6),), 0),
    _Case(
        "running requests go before waiting ones, and waiting ones join as many as there is room for",
        (_FIRST, _job(1, 6), _job(1, 3)),
        1,
    ),
    _Case(
        "the budget is one for the whole step: what some compute is gone for those after them",
        (_FIRST, _job(1, 45)),
        2,
    ),
    _Case("a newcomer computes no more than what is left of the budget", (_FIRST, _job(1, 30)), 1),
    _Case("nobody joins once the budget is used up", (_job(0, 40), _job(1, 3)), 1),
    _Case("nobody joins while all seats are taken", (_FIRST, _FIRST, _job(1, 3)), 1, seats=2),
    _Case("who joins in this step takes a seat as well", (_job(0, 3), _job(0, 3), _job(0, 3)), 0, seats=2),
    _Case("who waits needs pages, or does not join", (_job(0, 20), _job(2, 14)), 2, pages=8),
    _Case(
        "while anyone runs, one page more than the newcomer needs must be free",
        (_job(0, 6, 4), _job(1, 8, 4)),
        1,
        pages=4,
    ),
    _Case("where nobody runs, no page need be kept free", (_job(0, 13, 3),), 0, pages=4),
    _Case("a page that is begun is a whole page", (_job(0, 6, 4), _job(1, 9, 4)), 1, pages=5),
    _Case(
        "pages that a newcomer takes are gone for the next one",
        (_job(0, 10), _job(0, 18)),
        0,
        pages=7,
        budget=64,
    ),
    _Case(
        "who joins in this step runs as well: from then on, one page must be kept free",
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
        "a running request takes a page before anyone joins, if the token it computes lies past those it has",
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
    _Case("nobody overtakes: if the next in the queue cannot join, nor can those behind",
          (_job(0, 12), _job(1, 18), _job(1, 3)), 1, pages=8),
)  # fmt: skip
_RUN = tuple(
    Job(*numbers)
    for numbers in (
        (0, 9, 9), (0, 21, 6), (0, 4, 14), (2, 33, 8), (3, 5, 5), (3, 12, 10), (5, 3, 3), (5, 16, 12),
        (9, 40, 4), (12, 8, 8), (12, 7, 7), (20, 6, 5),
    )
)  # fmt: skip
_WHOLE_RUN = _Case("it must hold before every step of a whole run", _RUN, 0, pages=24)


def _engine(case: _Case, scheduler: Callable[..., Scheduler] | None = None) -> Engine:
    """An engine with the sizes of a case, which no request has reached yet."""
    return small_engine(
        scheduler_class=scheduler,
        num_blocks=case.pages,
        max_num_batched_tokens=case.budget,
        max_num_seqs=case.seats,
    )


def _arrive(engine: Engine, jobs: Iterable[Job], step: int) -> None:
    """Hand in the jobs that arrive before a step, each under a letter."""
    for number, job in enumerate(jobs):
        if job.step == step:
            # No request may ever need more than the pool has: some answers are cut to what fits.
            fits = engine.pool.num_blocks * engine.pool.block_size - job.prompt + 1
            inject(engine, job.prompt, min(job.answer, fits), "ABCDEFGHIJKL"[number])


@functools.cache
def _state(case: _Case) -> tuple[Facts, Plan]:
    """The facts of a case, and what the scheduler makes of them."""
    engine = _engine(case)
    for step in range(case.steps + 1):
        _arrive(engine, case.jobs, step)
        if step < case.steps:
            engine.step()
    return facts_of(engine), plan_of(engine.preview())


@functools.cache
def _whole_run() -> tuple[tuple[Facts, Plan], ...]:
    """The facts before every step of a whole run, and the plans."""
    engine, states, step = _engine(_WHOLE_RUN), [], 0
    while step < len(_RUN) or engine.has_unfinished:
        _arrive(engine, _RUN, step)
        states.append((facts_of(engine), plan_of(engine.preview())))
        engine.step()
        step += 1
    return tuple(states)


def _examine(function: Callable[..., Any]) -> None:
    for case in _CASES:
        _compare(function, *_state(case), case.rule)
    for facts, plan in _whole_run():
        _compare(function, facts, plan, _WHOLE_RUN.rule)


def _compare(function: Callable[..., Any], facts: Facts, plan: Plan, rule: str) -> None:
    answer = _checked(function(facts))
    expect(answer == plan, rule, f"{facts}\nyours:  {_words(answer)}\nengine: {_words(plan)}")


def _checked(answer: object) -> Plan:
    """A learner's answer without those that compute nothing."""
    whole = isinstance(answer, Mapping) and all(
        isinstance(count, int) and not isinstance(count, bool) for count in answer.values()
    )
    if not whole:
        raise Wrong('return a dictionary from request id to a whole number, such as {"A": 1}', repr(answer))
    return {request_id: count for request_id, count in answer.items() if count}


def _words(plan: Plan) -> str:
    return ", ".join(f"{name} {count}" for name, count in plan.items()) or "nobody"


def _planned_by(function: Callable[..., Any]) -> type[Scheduler]:
    """A scheduler that runs what a function foretells."""

    class Foretold(Scheduler):
        def schedule(self) -> StepPlan:
            self.end_aborted()
            foretold, plan = _checked(function(facts_of(self))), StepPlan()
            growing = [r for r in self.running if r.num_computed_tokens >= r.num_slots]
            self.grow(plan, growing)
            for request in sorted(self.running, key=_is_prompt):
                if request.request_id in foretold:
                    plan.add(request, foretold[request.request_id])
            for request in list(self.waiting):
                if request.request_id not in foretold:
                    plan.blocked = (request.request_id, "your function left it out")
                    break
                if reason := self.try_admit(plan, request, foretold[request.request_id]):
                    raise InvariantError(f"request {request.request_id!r} cannot join: {reason}")
                plan.add(request, foretold[request.request_id])
            return plan

    return Foretold


def _serve_run(scheduler: Callable[..., Scheduler] | None) -> Engine:
    """The whole run through an engine."""
    engine, step = _engine(_WHOLE_RUN, scheduler), 0
    while step < len(_RUN) or engine.has_unfinished:
        _arrive(engine, _RUN, step)
        engine.step()
        step += 1
    return engine


def _run(function: Callable[..., Any]) -> Run:
    yours, own = _serve_run(_planned_by(function)), _serve_run(None)
    tokens = [[out.token_ids for out in engine.outputs.values()] for engine in (yours, own)]
    expect(tokens[0] == tokens[1], "the same plans give the same answers")
    steps = [len(engine.trace) for engine in (yours, own)]
    return Run(
        f"It foretold all {len(_CASES)} states. Then it took the scheduler's place and served "
        f"{len(_RUN)} requests in {steps[0]} steps; the engine's own scheduler takes {steps[1]}, and all "
        f"{sum(map(len, tokens[0]))} tokens are the same.",
        [
            ("Planned by your function", notebook.timeline(yours.trace)),
            ("Planned by labkit's scheduler", notebook.timeline(own.trace)),
        ],
    )


EXERCISES = (Exercise("00.1", "Who runs in the next step", next_step, _examine, _run),)
