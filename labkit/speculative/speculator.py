"""Speculative decoding: draft tokens, check them all in one step, keep those that are right. No tensors here.

A step reads all weights, whether it computes one token of an answer or five. So a row may carry drafts of
what comes next (Leviathan et al. 2023; Chen et al. 2023). The model chooses after each of them as it would
have anyway, with the noise of that place, and a draft is right if it is what the model chose. So answers are
those without speculation, greedy or sampled, whoever drafts (compare Daliri et al. 2024). What changes is how
many steps there are and what one costs: `Speculator` drafts where that pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from labkit.core.engine_core import first_line
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.sampling_params import check_number
from labkit.trace.records import StepRecord

_PRIOR = 0.6  # chance that a draft is right, before any was checked
_WEIGHT = 2.0  # checks that a prior counts for
_MARGIN = 1.25  # by which the chance must exceed the price: a batch ends with its slowest row, drafts or not
_FADE = 0.85  # what an earlier check of the same request still counts
_FADE_ALL = 0.98
_PATIENCE = 32  # tokens without a draft before one is tried again; doubles each time that it was in vain
_MOST_PATIENCE = 1024


class Drafter(Protocol):
    """Whoever has an idea of what comes next."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Drafts for each of these requests, at most so many; none where there is no idea."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is gone, or has lost its pages."""
        ...


class NgramDrafter:
    """Drafts what followed when the last few tokens were last seen, in the prompt or in the answer.

    The longest such n-gram counts, and of its places the most recent (prompt lookup, Saxena 2023). Text that
    is copied, edited or repeated is guessed well, and other text is not guessed at all.

    Args:
        longest, shortest: n-grams, in tokens; at least one, and the longest not below the shortest.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        check_number("shortest", shortest, 1, 1000, whole=True)
        check_number("longest", longest, shortest, 1000, whole=True)
        self._sizes = range(longest, shortest - 1, -1)
        # For each request, how many of its tokens are read, and what place followed an n-gram last.
        self._seen: dict[str, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        return [self._draft(request, count) for request, count in wanted]

    def _draft(self, request: Request, count: int) -> tuple[int, ...]:
        tokens = request.token_ids
        read, places = self._seen.get(request.request_id, (1, {}))
        for place in range(read, len(tokens)):
            for size in self._sizes:
                if size <= place:
                    places[tuple(tokens[place - size : place])] = place
        self._seen[request.request_id] = len(tokens), places
        for size in self._sizes:
            place = places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                drafts = tokens[place : place + count]
                while len(drafts) < count:  # the copy runs into itself, as in "ha ha ha"
                    drafts.append(drafts[place - len(tokens)])
                return tuple(drafts)
        return ()

    def forget(self, request_id: str) -> None:
        self._seen.pop(request_id, None)


@dataclass(frozen=True)
class StepCosts:
    """What steps take, in seconds, or in any unit.

    Args:
        base: a step in which something is drafted, without its tokens.
        token: each token of a step.
        plain_base: a step in which nothing is (on a GPU, a captured graph).
        draft_base, draft_token: the same of the model that drafts, which takes a step for each place.
    """

    base: float
    token: float
    plain_base: float
    draft_base: float = 0.0
    draft_token: float = 0.0

    def price(self, rows: int) -> float:
        """What a draft costs, in tokens made in the same time: so often must it be right."""
        drafting = self.draft_base + self.draft_token * rows
        return (self.token * rows + drafting) / (self.base + self.token * rows)

    def pays(self, rows: int, drafts: Sequence[int], gains: Iterable[float]) -> bool:
        """Whether a step of so many rows, with these drafts and what they bring, makes more of its time."""
        drafting = max(drafts) * (self.draft_base + self.draft_token * len(drafts))
        slow = self.base + self.token * (rows + sum(drafts)) + drafting
        return (rows + sum(gains)) / slow > rows / (self.plain_base + self.token * rows)


class Speculator:
    """Gives requests drafts for the next step, as many as pay.

    With n rows, a draft pays if the chance that it is right clearly exceeds `StepCosts.price(n)`. The chance
    is estimated from what became of the drafts before, of this request and of all, and falls with each place.

    Args:
        drafter: has the ideas.
        most: drafts of a request in a step.
        costs: None: always draft as many as may be.

    Attributes:
        costs: may be replaced.
    """

    def __init__(self, drafter: Drafter, most: int, costs: StepCosts | None = None) -> None:
        self.drafter = drafter
        self.most = most
        self.costs = costs
        self._all = _Odds(_FADE_ALL)
        self._odds: dict[str, _Odds] = {}

    def propose(self, plan: StepPlan, result: StepResult, running: Sequence[Request]) -> str:
        """Learn from a step that is committed, and draft for the next; returns why there are not more drafts.

        Without drafts, answers are the same: a fault here ends nobody.
        """
        for request_id, _ in plan.preempted:
            self.forget(request_id)
        self.learn(plan, result)
        try:
            return self.draft(running)
        except Exception as error:
            return f"nobody drafts: {first_line(error)}"

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """What became of the drafts in a step, once it is committed."""
        for row, drafts in plan.drafts.items():
            request = plan.requests[row]
            if request.status != "running":  # it has ended, maybe in the middle of drafts that were right
                continue
            right = len(result.sampled[row]) - 1
            self._all.add(right, right < len(drafts))
            self._of(request).add(right, right < len(drafts))

    def draft(self, running: Iterable[Request]) -> str:
        """Give drafts to the requests that decode; says why not all of them have as many as may be."""
        rows = [r for r in running if len(r.token_ids) - r.num_computed_tokens == 1]
        price = _MARGIN * self.costs.price(len(rows)) if self.costs and rows else 0.0
        wanted: list[tuple[Request, int]] = []
        gains: list[float] = []
        chances: list[float] = []
        for request in rows:
            request.drafts = ()
            limit = min(self.most, request.max_len - len(request.token_ids) - 1)
            count, chance = self._count(request, price)
            if min(count, limit) > 0:
                wanted.append((request, min(count, limit)))
                gains.append(sum(chance**place for place in range(1, wanted[-1][1] + 1)))
            elif limit > 0:
                chances.append(chance)
        why = _why(len(rows), price, chances)
        if not wanted:
            return why
        if self.costs and not self.costs.pays(len(rows), [count for _, count in wanted], gains):
            return f"nobody drafts: with drafts, a step of {len(rows)} rows would take too much longer"
        for (request, _), drafts in zip(wanted, self.drafter.propose(wanted), strict=True):
            request.drafts = drafts
        return why

    def forget(self, request_id: str) -> None:
        """The request is gone, or has lost its pages."""
        self.drafter.forget(request_id)
        self._odds.pop(request_id, None)

    def _count(self, request: Request, price: float) -> tuple[int, float]:
        """How many drafts to ask for, and the chance that the first is right, or is hoped to be."""
        if not self.costs:
            return self.most, 1.0
        odds = self._of(request)
        chance = odds.chance(self._all.chance(_PRIOR))
        count = 0
        while count < self.most and chance ** (count + 1) > price:
            count += 1
        if count:
            odds.patience, odds.skipped = _PATIENCE, 0
        elif price < 1:  # things may have changed: try once in a while
            odds.skipped += 1
            if odds.skipped >= odds.patience:
                odds.patience, odds.skipped = min(2 * odds.patience, _MOST_PATIENCE), 0
                return 1, 1.0
        return count, chance

    def _of(self, request: Request) -> _Odds:
        return self._odds.setdefault(request.request_id, _Odds(_FADE))


class _Odds:
    """How often a draft was right when all before it were, with what is long ago counting less."""

    __slots__ = ("fade", "patience", "right", "skipped", "wrong")

    def __init__(self, fade: float) -> None:
        self.fade = fade
        self.right = self.wrong = 0.0
        self.patience, self.skipped = _PATIENCE, 0

    def add(self, right: int, wrong: int) -> None:
        self.right = self.right * self.fade + right
        self.wrong = self.wrong * self.fade + wrong

    def chance(self, prior: float) -> float:
        return (self.right + _WEIGHT * prior) / (self.right + self.wrong + _WEIGHT)


def _why(rows: int, price: float, chances: Sequence[float]) -> str:
    if not chances:
        return ""
    if price >= 1:
        return f"nobody drafts: in a step of {rows} rows a draft costs more than it can bring"
    low, high = f"{min(chances):.0%}", f"{max(chances):.0%}"
    theirs = low if low == high else f"{low} to {high}"
    return (
        f"{len(chances)} of {rows} rows draft nothing: a draft pays if it is right {price:.0%} of the time, "
        f"and theirs are {theirs}"
    )


def acceptance(records: Iterable[StepRecord]) -> list[tuple[int, int]]:
    """For each place among the drafts of a row, how many were checked there and how many were right."""
    counts: list[list[int]] = []
    for record in records:
        for row in record.rows if record.drafted else ():
            while len(counts) < len(row.drafted):
                counts.append([0, 0])
            for place in range(len(row.drafted)):
                counts[place][0] += 1
                counts[place][1] += place < row.num_accepted
    return [(checked, right) for checked, right in counts]
