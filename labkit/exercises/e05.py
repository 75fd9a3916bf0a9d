"""Exercise of notebook 05: share the token budget of a step between running answers and prompts."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.views.token_timeline import rails_of, token_rails, worst_gap
from labkit.views.token_timeline import text_twin as rails_text

Split = Callable[[int, list[int], list[int]], tuple[Sequence[int], Sequence[int]]]

BUDGET, SEATS, INJECTED_AT = 16, 8, 5
RUNNING = ((4, 30), (6, 24), (3, 27))
"""Prompt tokens and answer tokens of the requests that run when the others arrive."""
NEWCOMERS = (("long", 60, 6), ("medium", 24, 6), ("short", 8, 6))
"""Name, prompt tokens and answer tokens of those that arrive together, in this order."""


# -- 05.1 -----------------------------------------------------------------------------------------


def split_budget(budget: int, running: list[int], waiting: list[int]) -> tuple[list[int], list[int]]:
    """How many tokens each request computes in the next step.

    Args:
        budget: tokens that the step may compute, at least one for each running row.
        running: tokens that each running row misses: 1 for an answer, more in the middle of a prompt.
        waiting: tokens of each waiting prompt, in order of arrival.

    Returns:
        Tokens for each running row, and for each waiting prompt.
    """
    given = [1 if missing == 1 else 0 for missing in running]
    left = budget - sum(given)
    for row, missing in enumerate(running):
        if missing > 1:
            given[row] = min(missing, left)
            left -= given[row]
    offered = []
    for missing in waiting:
        offered.append(min(missing, left))
        left -= offered[-1]
    return given, offered


def _examine(function: Callable[..., Any]) -> None:
    for budget, running, waiting in _cases():
        _judge(budget, running, waiting, function(budget, list(running), list(waiting)))


def _cases() -> Iterator[tuple[int, list[int], list[int]]]:
    """Budget, running rows and waiting prompts, the smallest first."""
    small = [
        (budget, list(running), list(waiting))
        for budget in range(1, 7)
        for rows in range(min(budget, 3) + 1)
        for running in itertools.product((1, 2, 5), repeat=rows)
        for prompts in range(3)
        for waiting in itertools.product((1, 3, 9), repeat=prompts)
    ]
    yield from sorted(small, key=lambda case: (len(case[1]) + len(case[2]), case[0], sum(case[1] + case[2])))
    rng = random.Random(5)
    for _ in range(300):
        running = [rng.choice((1, 1, rng.randrange(2, 300))) for _ in range(rng.randrange(12))]
        waiting = [rng.randrange(1, 400) for _ in range(rng.randrange(6))]
        yield rng.randrange(max(1, len(running)), 512), running, waiting


def _judge(budget: int, running: list[int], waiting: list[int], answer: Any) -> None:
    example = f"split_budget({budget}, {running}, {waiting}) returned {answer!r}"
    shaped = (
        isinstance(answer, list | tuple)
        and len(answer) == 2
        and all(isinstance(part, list | tuple) for part in answer)
        and [len(part) for part in answer] == [len(running), len(waiting)]
        and all(type(number) is int for part in answer for number in part)
    )
    expect(
        shaped,
        "return two lists of whole numbers: one number for each running row, one for each waiting prompt",
        example,
    )
    numbers, missing = [*answer[0], *answer[1]], [*running, *waiting]
    expect(min(numbers, default=0) >= 0, "nobody can compute fewer than 0 tokens", example)
    expect(
        all(n <= most for n, most in zip(numbers, missing, strict=True)),
        "nobody computes more tokens than it misses",
        example,
    )
    total = sum(numbers)
    expect(
        total <= budget,
        f"a step computes at most the budget: {total} tokens are more than {budget}",
        example,
    )
    for row, most in enumerate(running):
        expect(
            most > 1 or answer[0][row] == 1,
            "a running row that misses one token gets it in every step, however long the prompts are",
            f"{example}: row {row} got none",
        )
    expect(
        total == min(budget, sum(missing)),
        "no part of the budget stays unused while somebody misses tokens",
        f"{example}: {total} of {budget} are used",
    )


# -- the engine -----------------------------------------------------------------------------------


def scheduler_of(split: Split) -> type[Scheduler]:
    """A `Scheduler` that asks such a function for the tokens of every step: `Engine(config, scheduler=...)`.

    Seats and pages are its own affair: the function hears of as many waiting prompts as there are seats, and
    a prompt that is given tokens, but finds too few pages, goes on waiting.
    """

    class Asking(Scheduler):
        def schedule(self) -> StepPlan:
            self.end_aborted()
            plan = StepPlan()
            self.grow(plan, [request for request in self.running if _must_grow(request)])
            rows = list(self.running)
            queue = list(self.waiting)[: 0 if plan.preempted else self.max_num_seqs - len(rows)]
            given, offered = split(
                self.max_num_batched_tokens, [_missing(r) for r in rows], [_missing(r) for r in queue]
            )
            for request, num_tokens in zip(rows, given, strict=True):
                if num_tokens:
                    self.plan_row(plan, request, num_tokens)
            for request, num_tokens in zip(queue, offered, strict=True):
                if num_tokens:
                    reason = self.try_admit(plan, request, num_tokens)
                else:
                    reason = "the split leaves it no tokens"
                if reason:
                    plan.blocked = plan.blocked or (request.request_id, reason)
                else:
                    self.plan_row(plan, request, num_tokens)
            self._say_why(plan)
            return plan

        def _say_why(self, plan: StepPlan) -> None:
            """The head of the queue waits, and not for the split."""
            head = self.waiting.peek()
            if head is not None and (plan.blocked is None or plan.blocked[0] != head.request_id):
                preempted = "nobody is admitted in a step that preempted"
                full = f"all {self.max_num_seqs} seats are taken"
                plan.blocked = (head.request_id, preempted if plan.preempted else full)

    return Asking


def _missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens


def _must_grow(request: Request) -> bool:
    return _missing(request) == 1 and (
        request.num_computed_tokens >= request.num_slots or request.shares_tail
    )


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


def run_split(split: Split | None = None) -> Engine:
    """Three answers run and three prompts arrive at once, on a model that answers the same on every machine.

    Args:
        split: how to share the budget; None leaves it to the engine's own scheduler.
    """
    config = EngineConfig(
        model=_tiny(),
        num_blocks=96,
        block_size=4,
        max_num_seqs=SEATS,
        max_num_batched_tokens=BUDGET,
        enable_prefix_caching=False,
    )
    engine = Engine(config, scheduler=scheduler_of(split) if split else None)

    def add(name: str, prompt: int, answer: int) -> None:
        token_ids = [300 + (41 * len(engine.outputs) + 13 * place) % 600 for place in range(prompt)]
        engine.add_request(token_ids, SamplingParams(max_tokens=answer, ignore_eos=True), request_id=name)

    for number, (prompt, answer) in enumerate(RUNNING):
        add(f"answer {number}", prompt, answer)
    while engine.has_unfinished:
        if len(engine.trace) == INJECTED_AT:
            for newcomer in NEWCOMERS:
                add(*newcomer)
        engine.step()
    return engine


@functools.cache
def _reference() -> Engine:
    return run_split()


def _score(engine: Engine) -> tuple[int, float, int, int]:
    """The longest gap between two tokens of an answer, in tokens computed; mean and worst TTFT; all steps."""
    gap = worst_gap(rails_of(engine.trace).values())
    by_steps = rails_of(engine.trace, "steps")
    waits = [by_steps[name].ttft or 0 for name, _, _ in NEWCOMERS]
    return int(gap), mean(waits), int(max(waits)), len(engine.trace)


def _run(function: Callable[..., Any]) -> Run:
    engine, reference = run_split(function), _reference()
    if {name: output.token_ids for name, output in engine.outputs.items()} != {
        name: output.token_ids for name, output in reference.outputs.items()
    }:
        raise Wrong("the tokens must not depend on how the budget is shared", "the engine gave other tokens")
    gap, ttft, last, steps = _score(engine)
    their_gap, their_ttft, their_last, their_steps = _score(reference)
    sentence = (
        f"Your split ran {len(engine.outputs)} requests in the engine, with an audit of every step, and the "
        f"same tokens came out. Longest gap: {gap} tokens (reference {their_gap}). First tokens of the "
        f"newcomers: after {ttft:.1f} steps on average (reference {their_ttft:.1f}), the last after {last} "
        f"({their_last}). All of it: {steps} steps ({their_steps})."
    )
    pictures = [
        (title, notebook.Picture(token_rails(one.trace), rails_text(one.trace)))
        for title, one in (("Your split:", engine), ("The reference:", reference))
    ]
    return Run(sentence, pictures)


EXERCISES: tuple[Exercise, ...] = (
    Exercise("05.1", "share out the token budget", split_budget, _examine, _run),
)
