"""Speculative decoding: draft tokens, check them all in one step, keep the accepted ones. No tensors here.

A step reads all weights, whether it computes one token of an answer or five. So a row may carry drafts of the
next tokens (Leviathan et al. 2023; Chen et al. 2023). In each place the model chooses a token as it would
without drafts, with the noise of that place, and a draft is accepted if it is that token. So no drafter
changes an answer, greedy or sampled (compare Daliri et al. 2024). It only changes how many steps there are
and what each costs: `Speculator` drafts where that pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.outputs import in_one_line
from labkit.speculative.drafter import Drafter
from labkit.trace.records import StepRecord

_PRIOR = 0.6  # the chance that a draft is accepted, before any was checked
_WEIGHT = 2.0  # how many checks the prior is worth
_MARGIN = 1.25  # the chance must exceed the price by this factor: a batch ends with its slowest row
_FADE = 0.85  # the weight of an earlier check of the same request, one check later
_FADE_ALL = 0.98  # the same among the checks of all requests
_PATIENCE = 32  # tokens without a draft before one is tried again; it doubles each time
_MOST_PATIENCE = 1024


@dataclass(frozen=True)
class StepCosts:
    """What steps cost, in seconds or any other unit.

    Args:
        base: the cost of a step with drafts, without its tokens.
        token: the cost of each token of a step.
        plain_base: the cost of a step without drafts (on a GPU, a captured graph), without its tokens.
        draft_base, draft_token: the same costs of the model that drafts, which takes a step for each place.
    """

    base: float
    token: float
    plain_base: float
    draft_base: float = 0.0
    draft_token: float = 0.0

    def price(self, rows: int) -> float:
        """Return how many tokens could be made in a draft's time: so often must it be accepted to pay."""
        drafting = self.draft_base + self.draft_token * rows
        return (self.token * rows + drafting) / (self.base + self.token * rows)

    def pays(self, rows: int, drafts: Sequence[int], gains: Iterable[float]) -> bool:
        """Return whether a step of so many rows makes more tokens per second with these drafts and gains."""
        drafting = max(drafts) * (self.draft_base + self.draft_token * len(drafts))
        slow = self.base + self.token * (rows + sum(drafts)) + drafting
        return (rows + sum(gains)) / slow > rows / (self.plain_base + self.token * rows)


class Speculator:
    """Gives requests drafts for the next step, as many as pay.

    With n rows, a draft pays if its chance to be accepted clearly exceeds `StepCosts.price(n)`. The chance is
    estimated from earlier drafts of this request and of all, and falls with each place.

    Args:
        drafter: the drafter, which proposes the tokens.
        most: the most drafts that a request has in a step.
        costs: the cost of steps; None always drafts as many as possible. It may be replaced later.
    """

    def __init__(self, drafter: Drafter, most: int, costs: StepCosts | None = None) -> None:
        self.drafter = drafter
        self.most = most
        self.costs = costs
        self._all = _Odds(_FADE_ALL)
        self._odds: dict[str, _Odds] = {}

    def propose(self, plan: StepPlan, result: StepResult, running: Sequence[Request]) -> str:
        """Learn from a committed step, and draft for the next; return why there are not more drafts.

        Answers do not depend on drafts, so an error in the drafter ends no request.
        """
        for request_id, _ in plan.preempted:
            self.forget(request_id)
        self.learn(plan, result)
        try:
            return self.draft(running)
        except Exception as error:
            return f"nobody drafts: {in_one_line(error)}"

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Count which drafts of a committed step were accepted."""
        for row, drafts in plan.drafts.items():
            request = plan.requests[row]
            forced = request.form is not None and set(request.form.allowed[: len(drafts)]) == {1}
            if request.status != "running" or forced:  # it has ended, or nobody has guessed
                continue
            accepted = len(result.sampled[row]) - 1
            self._all.add(accepted, accepted < len(drafts))
            self._of(request).add(accepted, accepted < len(drafts))

    def draft(self, running: Iterable[Request]) -> str:
        """Give drafts to the requests that decode; return why some have fewer than possible, or ""."""
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
        """Drop what is kept of a request that has ended or was preempted."""
        self.drafter.forget(request_id)
        self._odds.pop(request_id, None)

    def _count(self, request: Request, price: float) -> tuple[int, float]:
        """Return how many drafts to ask for, and the chance that the first is accepted."""
        if not self.costs:
            return self.most, 1.0
        odds = self._of(request)
        chance = odds.chance(self._all.chance(_PRIOR))
        count = 0
        while count < self.most and chance ** (count + 1) > price:
            count += 1
        if count:
            odds.patience, odds.skipped = _PATIENCE, 0
        elif price < 1:  # the text may have changed: try once in a while
            odds.skipped += 1
            if odds.skipped >= odds.patience:
                odds.patience, odds.skipped = min(2 * odds.patience, _MOST_PATIENCE), 0
                return 1, 1.0
        return count, chance

    def _of(self, request: Request) -> _Odds:
        return self._odds.setdefault(request.request_id, _Odds(_FADE))


class _Odds:
    """How often a draft was accepted after all before it were; older checks count less.

    `skipped` counts tokens without a draft, and `patience` says after how many of them one is tried again.
    """

    __slots__ = ("accepted", "fade", "patience", "rejected", "skipped")

    def __init__(self, fade: float) -> None:
        self.fade = fade
        self.accepted = self.rejected = 0.0
        self.patience, self.skipped = _PATIENCE, 0

    def add(self, accepted: int, rejected: int) -> None:
        self.accepted = self.accepted * self.fade + accepted
        self.rejected = self.rejected * self.fade + rejected

    def chance(self, prior: float) -> float:
        return (self.accepted + _WEIGHT * prior) / (self.accepted + self.rejected + _WEIGHT)


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
    """Return, for each place among the drafts of a row, how many were checked and how many accepted there."""
    counts: list[list[int]] = []
    for record in records:
        for row in record.rows if record.drafted else ():
            while len(counts) < len(row.drafted):
                counts.append([0, 0])
            for place in range(len(row.drafted)):
                counts[place][0] += 1
                counts[place][1] += place < row.num_accepted
    return [(checked, accepted) for checked, accepted in counts]
