"""The exercise of notebook 05: share the token budget of a step between running answers and prompts."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, expect
from labkit.exercises.common import Job, expect_same_answers, rails, serve, tiny_engine, whole
from labkit.views.facts.token_timeline import token_timeline_of

Split = Callable[[int, list[int], list[int]], tuple[Sequence[int], Sequence[int]]]

BUDGET, SEATS, INJECTED_AT = 16, 8, 5
RUNNING = (Job(4, 30), Job(6, 24), Job(3, 27))
"""The requests that write their answers when the others arrive."""
NEWCOMERS = (
    Job(60, 6, step=INJECTED_AT, name="long"),
    Job(24, 6, step=INJECTED_AT, name="medium"),
    Job(8, 6, step=INJECTED_AT, name="short"),
)
"""The requests that arrive together, in this order."""


# -- 05.1 -----------------------------------------------------------------------------------------


def split_budget(budget: int, running: list[int], waiting: list[int]) -> tuple[list[int], list[int]]:
    """How many tokens each request computes in the next step.

    Args:
        budget: most tokens that the step computes; at least one for each running row.
        running: the tokens that each running row misses: 1 for an answer, more in the middle of a prompt.
        waiting: the tokens of each waiting prompt, in order of arrival.

    Returns:
        The tokens for each running row, and for each waiting prompt.
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
        given = list(running), list(waiting)
        answer = function(budget, *given)
        told = f"split_budget({budget}, {running}, {waiting})"
        expect(given == (running, waiting), "leave the two lists as they are: work on copies", told)
        _judge(budget, running, waiting, answer)


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
        and all(whole(number) is not None for part in answer for number in part)
    )
    expect(
        shaped,
        "return two lists of whole numbers: one number for each running row, one for each waiting prompt",
        example,
    )
    numbers, missing = [*answer[0], *answer[1]], [*running, *waiting]
    expect(min(numbers, default=0) >= 0, "a number of tokens is 0 or more", example)
    expect(
        all(n <= most for n, most in zip(numbers, missing, strict=True)),
        "no request computes more tokens than it misses",
        example,
    )
    total = sum(numbers)
    expect(
        total <= budget,
        f"a step never computes more tokens than its budget: {total} are more than {budget}",
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
        "no part of the budget stays unused while a request misses tokens",
        f"{example}: {total} of {budget} are used",
    )


# -- the engine -----------------------------------------------------------------------------------


def scheduler_of(split: Split) -> type[Scheduler]:
    """A scheduler that asks a function for the tokens of every step, for `Engine(config, scheduler=...)`.

    The scheduler itself looks after seats and pages: the function is told of as many waiting prompts as there
    are free seats, and a prompt that gets tokens but finds too few free pages goes on waiting.
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
            given, offered = ([int(number) for number in part] for part in (given, offered))
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
            """Say why the head of the queue waits, if it is not because of the split."""
            head = self.waiting.peek()
            if head is not None and (plan.blocked is None or plan.blocked[0] != head.request_id):
                preempted = "nobody is admitted in a step that preempted"
                full = f"all {self.max_num_seqs} seats are taken"
                plan.blocked = (head.request_id, preempted if plan.preempted else full)

    return Asking


def _missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens


def _must_grow(request: Request) -> bool:
    return _missing(request) == 1 and (request.num_computed_tokens >= request.capacity or request.shares_tail)


def run_split(split: Split | None = None) -> Engine:
    """Run three answers and three prompts that arrive later, with tiny-random.

    Args:
        split: shares the budget; None leaves it to the engine's own scheduler.
    """
    engine = tiny_engine(
        scheduler_class=scheduler_of(split) if split else None,
        num_blocks=96,
        block_size=4,
        max_num_seqs=SEATS,
        max_num_batched_tokens=BUDGET,
        enable_prefix_caching=False,
    )
    running = [job._replace(name=f"answer {number}") for number, job in enumerate(RUNNING)]
    return serve(engine, [*running, *NEWCOMERS])


@functools.cache
def _reference() -> Engine:
    return run_split()


def _score(engine: Engine) -> tuple[int, float, int, int]:
    """The longest gap between two tokens of an answer, in computed tokens; mean and worst TTFT; all steps."""
    gap = token_timeline_of(engine.trace).worst_gap
    by_steps = token_timeline_of(engine.trace, "steps")
    waits = [by_steps[job.name].ttft or 0 for job in NEWCOMERS]
    return int(gap), mean(waits), int(max(waits)), len(engine.trace)


def _run(function: Callable[..., Any]) -> Run:
    engine, reference = run_split(function), _reference()
    expect_same_answers(engine, reference, "the answers must not depend on how the budget is shared")
    gap, ttft, last, steps = _score(engine)
    their_gap, their_ttft, their_last, their_steps = _score(reference)
    sentence = (
        f"Your split ran {len(engine.outputs)} requests in the engine, with an audit of every step, and the "
        f"same tokens came out. Longest gap: {gap} tokens (reference {their_gap}). First tokens of the "
        f"newcomers: after {ttft:.1f} steps on average (reference {their_ttft:.1f}), the last after {last} "
        f"({their_last}). All of it: {steps} steps ({their_steps})."
    )
    return Run(sentence, rails({"Your split:": engine.trace, "The reference:": reference.trace}))


EXERCISES: tuple[Exercise, ...] = (
    Exercise("05.1", "share out the token budget", split_budget, _examine, _run),
)
