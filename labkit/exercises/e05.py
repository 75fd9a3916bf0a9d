"""The exercise of notebook 05: the largest chunk of a prompt that keeps a promise to running answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from labkit import notebook
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import Job, expect_same_answers, serve, tiny_engine, whole
from labkit.trace.records import StepRecord

Split = Callable[[int, list[int], list[int]], tuple[Sequence[int], Sequence[int]]]
Chunk = Callable[..., int]
"""Called with the arguments of `chunk_size`."""


class Clock(NamedTuple):
    """What a step takes, in microseconds: a fixed part, and one for each token and each key that is read."""

    fixed: int
    per_token: int
    per_key: int

    def step(self, answers: Sequence[int], computed: int, chunk: int) -> int:
        """The time of a step with a token for each answer, and a chunk of a prompt.

        Args:
            answers: number of keys that the token of each answer reads.
            computed: number of tokens of the prompt before the chunk.
            chunk: number of tokens in the chunk; each reads all keys before it, and its own.
        """
        keys = sum(answers) + chunk * computed + chunk * (chunk + 1) // 2
        return self.fixed + self.per_token * (len(answers) + chunk) + self.per_key * keys


# -- 05.1 -----------------------------------------------------------------------------------------


def chunk_size(answers: Sequence[int], computed: int, missing: int, promise: int, clock: Clock) -> int:
    """How many tokens of a prompt the next step computes, so that it ends within the promise.

    Args:
        answers: number of keys that the next token of each running answer reads.
        computed: number of tokens of the prompt that have been computed.
        missing: number of its tokens that have not; at least 1.
        promise: most microseconds that a step may take while anybody writes an answer.
        clock: what a step takes.
    """
    if not answers:
        return missing
    chunk = 1
    while chunk < missing and clock.step(answers, computed, chunk + 1) <= promise:
        chunk += 1
    return chunk


class Case(NamedTuple):
    """What a function is asked: the arguments of `chunk_size`."""

    answers: tuple[int, ...]
    computed: int
    missing: int
    promise: int
    clock: Clock


def _examine(function: Callable[..., Any]) -> None:
    for case, rule in _cases():
        given = list(case.answers)
        answer = function(given, *case[1:])
        told = (
            f"answers {list(case.answers)}, computed {case.computed}, missing {case.missing}, promise "
            f"{case.promise}, {case.clock}\nyours: {answer!r}"
        )
        expect(tuple(given) == case.answers, "leave the list of answers as it is: work on a copy", told)
        if (number := whole(answer)) is None:
            raise Wrong("return a whole number of tokens", told)
        expect(number >= 1, "the prompt goes on in every step: return at least 1", told)
        expect(number <= case.missing, "no more tokens than the prompt still misses", told)
        right = chunk_size(*case)
        times = ", ".join(
            f"{chunk}: {case.clock.step(case.answers, case.computed, chunk)}"
            for chunk in sorted({number, right, min(right + 1, case.missing)})
        )
        expect(
            number == right, rule, f"{told}\nright: {right}\nmicroseconds of a step with a chunk of {times}"
        )


def _cases() -> Iterator[tuple[Case, str]]:
    """What a function is asked, the simplest first, each with the rule that it shows."""
    tokens = Clock(100, 10, 0)  # keys cost nothing
    rule = "where nobody writes an answer, the promise binds nobody: compute all that the prompt misses"
    yield Case((), 0, 50, 200, tokens), rule
    rule = "a step takes its fixed part, and a part for each token of the chunk and of each answer"
    yield Case((5,), 0, 50, 165, tokens), rule
    yield Case((5, 8, 2), 0, 50, 195, tokens), rule
    yield Case((5, 8), 0, 4, 1000, tokens), "no more tokens than the prompt still misses"
    yield Case((5, 8), 0, 50, 180, tokens), "a step that takes exactly as long as the promise keeps it"
    rule = "where even one token is too many, compute one all the same: a prompt must not stand still"
    yield Case((5, 8), 0, 50, 90, tokens), rule
    yield Case((5, 8), 0, 50, 125, tokens), rule
    keys = Clock(100, 10, 1)
    rule = "the token of an answer reads the keys of its whole text, and they take time too"
    yield Case((60, 40), 0, 1, 229, keys), rule
    yield Case((60, 40), 0, 9, 253, keys), rule
    rule = "each token of the chunk reads the keys of the whole prompt before the chunk"
    yield Case((10,), 90, 9, 330, keys), rule
    yield Case((10,), 300, 9, 1100, keys), rule
    rule = "a token reads the keys before it in its own chunk, and its own: 1 + 2 + ... + n for n tokens"
    yield Case((10,), 0, 90, 500, keys), rule
    yield Case((10,), 7, 90, 5000, keys), rule
    rule = "it must be right for every clock, promise and prompt"
    rng = random.Random(5)
    for turn in range(400):
        clock = Clock(rng.randrange(3000), rng.randrange(1, 400), rng.choice((0, 1, 1, rng.randrange(20))))
        answers = tuple(rng.randrange(1, 500) for _ in range(rng.choice((1, 2, 4, rng.randrange(12)))))
        computed, missing = rng.choice((0, rng.randrange(900))), rng.randrange(1, 300)
        promise = clock.step(answers, computed, rng.randrange(1, 1 + missing))  # kept to the microsecond
        yield Case(answers, computed, missing, promise - turn % 3, clock), rule


# -- the engine -----------------------------------------------------------------------------------

CLOCK, PROMISE = Clock(fixed=2000, per_token=200, per_key=1), 10_000
"""Of the run in the engine. A key costs as much beside a token as with far longer texts on a real model."""
JOBS = (*(Job(20, 90, name=f"answer {i}") for i in range(4)), Job(600, 4, step=6, name="long"))
FIXED = 12
"""The largest budget that, kept in every step of that run, keeps the promise."""
_MOST = 1024  # tokens in a step: more than any chunk


def keeping(chunk: Chunk, promise: int = PROMISE, clock: Clock = CLOCK) -> type[Scheduler]:
    """A scheduler that chooses the token budget of each step anew, for `Engine(config, scheduler=...)`.

    Each answer gets its token, and the prompt that is next gets as many as a function says, at most what the
    engine's own budget leaves.

    Args:
        chunk: called in each step in which a prompt is computed, as `chunk_size` is.
        promise: most microseconds of a step, by this clock.
        clock: what a step takes.
    """

    class Keeping(Scheduler):
        def schedule(self) -> StepPlan:
            self.end_aborted()
            most = self.max_num_batched_tokens
            self.max_num_batched_tokens = self._budget(most)
            try:
                return super().schedule()
            finally:
                self.max_num_batched_tokens = most

        def _budget(self, most: int) -> int:
            answers = [request for request in self.running if _missing(request) == 1]
            prompts = [request for request in self.running if _missing(request) > 1]
            head = prompts[0] if prompts else self.waiting.peek()
            if head is None:
                return most
            keys = [len(request.token_ids) for request in answers]
            num_tokens = chunk(keys, head.num_computed_tokens, _missing(head), promise, clock)
            return min(most, len(answers) + int(num_tokens))

    return Keeping


def microseconds(record: StepRecord, clock: Clock = CLOCK) -> int:
    """What a step took by a clock."""
    rows = list(zip(record.starts, record.num_tokens, strict=True))
    keys = sum(count * start + count * (count + 1) // 2 for start, count in rows)
    return clock.fixed + clock.per_token * sum(record.num_tokens) + clock.per_key * keys


def longest_step(engine: Engine) -> int:
    """The longest step in which somebody wrote an answer beside others, in microseconds."""
    return max(microseconds(record) for record in engine.trace if len(record.requests) > 1)


def first_token_of(engine: Engine, name: str) -> int:
    """Microseconds from a request's arrival to its first token."""
    records = list(engine.trace)
    came = next(i for i, record in enumerate(records) if name in {each.request_id for each in record.arrived})
    said = next(i for i, r in enumerate(records) if any(x.request_id == name and x.sampled for x in r.rows))
    return sum(map(microseconds, records[came : said + 1]))


def run_chunks(chunk: Chunk | None = None, budget: int = _MOST) -> Engine:
    """Run four answers and a long prompt with tiny-random: with this function, or one budget throughout."""
    return serve(
        tiny_engine(
            scheduler_class=keeping(chunk) if chunk else None,
            num_blocks=1024,
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            enable_prefix_caching=False,
        ),
        JOBS,
    )


def _run(function: Callable[..., Any]) -> Run:
    engine, fixed = run_chunks(function), run_chunks(budget=FIXED)
    expect_same_answers(engine, fixed, "the answers must not depend on the size of the chunks")
    longest = longest_step(engine)
    expect(longest <= PROMISE, "in the engine, every step keeps the promise", f"one took {longest}")
    ttft, theirs = (first_token_of(run, "long") / 1000 for run in (engine, fixed))
    sentence = (
        f"In the engine, no step took longer than {longest / 1000:.1f} ms, and {PROMISE / 1000:.0f} were "
        f"promised. The prompt of {JOBS[-1].prompt_tokens} tokens had its first token after {ttft:.0f} ms; "
        f"with {FIXED} tokens in each step, the largest fixed budget that keeps the promise, it takes "
        f"{theirs:.0f} ms."
    )
    runs = {"your chunks": engine, f"a budget of {FIXED}": fixed, "a budget of 40": run_chunks(budget=40)}
    steps = range(max(len(run.trace) for run in runs.values()))
    times = {
        name: [microseconds(run.trace[i]) / 1000 if i < len(run.trace) else None for i in steps]
        for name, run in runs.items()
    }
    title = f"A promise of {PROMISE / 1000:.0f} ms, and a prompt of {JOBS[-1].prompt_tokens} tokens"
    picture = notebook.lines(list(steps), times, title, x_name="step", y_name="milliseconds")
    return Run(
        sentence, [("How long each step takes:", picture), ("Your run:", notebook.timeline(engine.trace))]
    )


# -- a rule that shares out a step ----------------------------------------------------------------


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


EXERCISES: tuple[Exercise, ...] = (
    Exercise("05.1", "chunks that keep a promise", chunk_size, _examine, _run),
)
