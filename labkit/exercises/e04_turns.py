"""A bonus exercise of notebook 04: whose request is next, so that nobody who asks much crowds out the others.

The rule is the virtual token counter of Sheng et al. 2024 (https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any, Protocol

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, expect
from labkit.exercises.common import Job, expect_same_answers, serve, timelines, tiny_engine
from labkit.views.facts.token_timeline import token_timeline_of


class Turns(Protocol):
    """What a learner writes: see `FairTurns`."""

    def arrived(self, user: str, present: list[str]) -> None: ...

    def computed(self, user: str, tokens: int) -> None: ...

    def choose(self, users: list[str]) -> str: ...


class FairTurns:
    """A counter of computed tokens for each user; the one with the lowest counter is next."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}

    def arrived(self, user: str, present: list[str]) -> None:
        """A user who had no request has one now.

        Args:
            user: their name.
            present: those who have requests, running or waiting. Whoever comes back begins at the lowest
                counter of these, so that nobody saves turns up.
        """
        counts = [self.counters.get(other, 0) for other in present]
        self.counters[user] = max([self.counters.get(user, 0), *([min(counts)] if counts else [])])

    def computed(self, user: str, tokens: int) -> None:
        """A step computes tokens of a user's requests."""
        self.counters[user] = self.counters.get(user, 0) + tokens

    def choose(self, users: list[str]) -> str:
        """Whose request gets the next seat: of users with equal counters, the first in the list."""
        return min(users, key=lambda user: self.counters.get(user, 0))


# -- 04.2 ------------------------------------------------------------------------------------------

Event = tuple[str, Any, Any]
"""What happens: ("arrived", user, present), ("computed", user, tokens) or ("choose", users, None)."""


def _examine(kind: Callable[[], Turns]) -> None:
    for number, (events, rule) in enumerate(_stories()):
        # Other people in each story, so that what one object remembers of another does no harm.
        named = [(what, _renamed(first, number), _renamed(second, number)) for what, first, second in events]
        _tell(kind(), named, rule)
    rule = "two schedulers know nothing of each other: make what you count in `__init__`"
    one, other = kind(), kind()
    _tell(one, [("arrived", "ann", ()), ("computed", "ann", 9)], rule)
    bob = [("arrived", "bob", ()), ("computed", "bob", 1)]
    _tell(other, [*bob, ("arrived", "ann", ("bob",)), ("choose", ("ann", "bob"), None)], rule)


def _renamed(thing: Any, number: int) -> Any:
    """The names in an event, with the number of their story."""
    if isinstance(thing, str):
        return f"{thing}{number}"
    return tuple(_renamed(each, number) for each in thing) if isinstance(thing, tuple) else thing


def _tell(turns: Turns, events: Sequence[Event], rule: str) -> None:
    """Tell what happens, to a learner's object and to the reference, and compare what they choose."""
    right, told = FairTurns(), []
    for what, first, second in events:
        if what == "computed":
            told.append(f"computed({first!r}, {second})")
            turns.computed(first, second)
            right.computed(first, second)
            continue
        given = list(second if what == "arrived" else first)
        kept = list(given)
        if what == "arrived":
            told.append(f"arrived({first!r}, {given})")
            turns.arrived(first, given)
            right.arrived(first, kept)
        else:
            told.append(f"choose({given})")
            answer, should = turns.choose(given), right.choose(kept)
            example = "\n".join([*told[-12:], f"yours: {answer!r}", f"right: {should!r}"])
            expect(isinstance(answer, str) and answer in kept, "choose one of the users in the list", example)
            expect(answer == should, rule, example)
        expect(given == kept, "leave the lists as they are: work on copies", "\n".join(told[-12:]))


def _stories() -> Iterator[tuple[list[Event], str]]:
    """What happens, the shortest story first, each with the rule that it shows."""
    ann, bob, both = ("arrived", "ann", ()), ("arrived", "bob", ("ann",)), ("choose", ("ann", "bob"), None)
    turned = ("choose", ("bob", "ann"), None)
    yield [ann, bob, both, turned], "of users with equal counters, the first in the list is next"
    rule = "the one whose requests have computed the fewest tokens is next"
    yield [ann, bob, ("computed", "ann", 5), both, turned], rule
    yield [ann, bob, ("computed", "ann", 5), ("computed", "bob", 7), both, turned], rule
    rule = "tokens add up, step by step"
    yield [ann, bob, *[("computed", "ann", 1)] * 3, ("computed", "bob", 2), both], rule
    rule = "who comes when others have computed much begins at the lowest counter of those who are there"
    late = [ann, ("computed", "ann", 50), bob, turned, ("computed", "bob", 1), both, turned]
    yield late, rule
    cid = ("arrived", "cid", ("ann", "bob"))
    all_three = ("choose", ("ann", "bob", "cid"), None)
    yield (
        [ann, bob, ("computed", "ann", 9), ("computed", "bob", 4), cid, ("computed", "cid", 2), all_three],
        rule,
    )
    rule = "who comes back keeps their counter where it is higher: going away is no way to be forgiven"
    yield [ann, bob, ("computed", "bob", 9), ("arrived", "bob", ("ann",)), both, turned], rule
    rule = "where nobody else is there, the counter stays as it is"
    yield [ann, bob, ("computed", "ann", 9), ("computed", "bob", 4), ann, bob, turned], rule
    rule = "it must be right for any number of users, in any order"
    rng = random.Random(42)
    for _ in range(150):
        names = rng.sample(["ann", "bob", "cid", "dee", "eve", "fay", "gus", "hal"], rng.randrange(2, 8))
        here: list[str] = []
        events: list[Event] = []
        for _ in range(rng.randrange(5, 60)):
            away = [name for name in names if name not in here]
            move = rng.random()
            if away and (not here or move < 0.2):
                user = rng.choice(away)
                events.append(("arrived", user, tuple(rng.sample(here, len(here)))))
                here.append(user)
            elif move < 0.6:
                events.append(("computed", rng.choice(here), rng.choice((1, 1, 1, rng.randrange(1, 40)))))
            elif move < 0.7:
                here.remove(rng.choice(here))
            else:
                events.append(("choose", tuple(rng.sample(here, rng.randrange(1, len(here) + 1))), None))
        yield events, rule


# -- in the engine --------------------------------------------------------------------------------

JOBS = (
    *(Job(12, 16, name=f"ann {i}") for i in range(12)),
    *(Job(6, 8, step=4 + 12 * i, name=f"bob {i}") for i in range(5)),
)
"""Ann sends all that she has at once; Bob sends a short request now and then."""


def fair(kind: Callable[[], Turns]) -> type[Scheduler]:
    """A scheduler that asks whose request gets the next seat, for `Engine(config, scheduler=...)`.

    The user is the first word of a request's name. Requests of one user keep their order.
    """

    class Fair(Scheduler):
        def __init__(self, pool: BlockPool, **limits: Any) -> None:
            super().__init__(pool, **limits)
            self._turns = kind()

        def add(self, request: Request) -> None:
            present = list(dict.fromkeys(map(_user, self.requests.values())))
            super().add(request)
            if _user(request) not in present:
                self._turns.arrived(_user(request), present)

        def schedule(self) -> StepPlan:
            plan = super().schedule()
            for request, count in zip(plan.requests, plan.num_tokens, strict=True):
                self._turns.computed(_user(request), count)
            return plan

        def plan_waiting(self, plan: StepPlan, budget: int) -> None:
            while heads := self._heads():
                request = heads[self._turns.choose(list(heads))]
                if reason := self.try_admit(plan, request, budget):
                    plan.blocked = (self.waiting.peek().request_id, reason)  # it holds for all who wait
                    return
                budget -= self.plan_row(plan, request, budget)

        def _heads(self) -> dict[str, Request]:
            """The first waiting request of each user."""
            heads: dict[str, Request] = {}
            for request in self.waiting:
                heads.setdefault(_user(request), request)
            return heads

    return Fair


def _user(request: Request) -> str:
    return request.request_id.partition(" ")[0]


def run_turns(kind: Callable[[], Turns] | None = None) -> Engine:
    """Run `JOBS` on two seats with tiny-random; None leaves the order to the engine."""
    sizes = dict(num_blocks=64, block_size=8, max_num_seqs=2, max_num_batched_tokens=32)
    scheduler = fair(kind) if kind else None
    return serve(tiny_engine(scheduler_class=scheduler, enable_prefix_caching=False, **sizes), JOBS)


def mean_ttft(engine: Engine, user: str) -> float:
    """The mean number of steps to the first token of a user's requests."""
    timeline = token_timeline_of(engine.trace, "steps")
    return mean(timeline[job.name].ttft or 0 for job in JOBS if job.name.startswith(user))


def _run(kind: Callable[[], Turns]) -> Run:
    engine, reference = run_turns(kind), run_turns()
    expect_same_answers(engine, reference, "the answers must not depend on whose turn it is")
    yours, theirs = ({user: mean_ttft(run, user) for user in ("ann", "bob")} for run in (engine, reference))
    sentence = (
        f"In the engine, with two seats: Bob's first tokens came after {yours['bob']:.1f} steps on average, "
        f"and after {theirs['bob']:.1f} in order of arrival. Ann's came after {yours['ann']:.1f} "
        f"({theirs['ann']:.1f})."
    )
    pictures = timelines({"With your turns:": engine.trace, "In order of arrival:": reference.trace})
    return Run(sentence, pictures)


TURNS = Exercise("04.2", "fair turns (bonus)", FairTurns, _examine, _run)
