"""A bound on the time of a step, kept by its token budget.

A long prompt beside running answers makes each of their tokens wait for a chunk of it. How long a chunk takes
depends on the machine and on what else is in the step, so no number of tokens is right everywhere. The steps
that were run give the prices of a step, of a token and of a key, and the budget of the next step is what the
bound then leaves.
"""

from __future__ import annotations

import statistics
from collections import deque

from labkit.analysis.capacity.clock import FittedClock, fit
from labkit.analysis.roofline import StepWork
from labkit.core.scheduler import Scheduler
from labkit.trace.records import StepRecord

_MARGIN = 0.9  # of the bound is planned for: no two steps take the same time
_GROWTH = 2  # a budget is at most so many times the tokens of a step that was seen
_KEPT = 8  # steps of each size that prices are fitted to
_EVERY = 16  # steps between two fits, once there are enough
_RECENT = 5  # steps that say whether the machine has become slower since


class StepBound:
    """Sets a scheduler's token budget before each step, so that the step takes no longer than a bound.

    Answers that run get their tokens all the same, and beside them there are always `least` tokens for
    prompts, so that these get on. Where that alone takes longer than the bound, steps do. So does one
    in which a newcomer finds a long prompt in the prefix cache: its keys are not known before.

    Args:
        scheduler: the scheduler whose `max_num_batched_tokens` is set, never above what it is now.
        seconds: the bound.
        least: the tokens that prompts always get.
    """

    def __init__(self, scheduler: Scheduler, seconds: float, least: int = 16) -> None:
        self.seconds, self.most, self._least = seconds, scheduler.max_num_batched_tokens, least
        self._scheduler = scheduler
        self._seen: dict[int, deque[StepRecord]] = {}  # by the power of two that their tokens reach
        self._clock: FittedClock | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)  # what steps took over what was expected
        self._until_fit = 0
        self._set(self._least)

    def after_step(self, record: StepRecord) -> None:
        """Learn what a step took, and set the budget of the next one."""
        work = StepWork.of(record)
        if not work.tokens:
            return
        if self._clock:
            self._recent.append(record.seconds / max(self._clock(work), 1e-9))
        self._seen.setdefault(work.tokens.bit_length(), deque(maxlen=_KEPT)).append(record)
        self._until_fit -= 1
        # Steps of one size do not tell what a step costs and what its tokens do.
        if self._until_fit <= 0 and len(self._seen) > 1:
            samples = [each for some in self._seen.values() for each in some]
            if len(samples) > 5:
                self._clock = fit(samples)
                self._recent.clear()
                self._until_fit = min(_EVERY, len(samples) // 2)
        left = self.seconds * _MARGIN
        if self._clock is None:  # a step with a fixed part never takes more than its share of tokens
            self._set(int(work.tokens * min(_GROWTH, left / max(record.seconds, 1e-9))))
            return
        slower = max(1.0, statistics.median(self._recent)) if self._recent else 1.0
        keys = sum(request.num_computed_tokens for request in self._scheduler.running)
        price = self._clock.tokens + self._clock.keys  # a new token is read as a key, too
        left = left / slower - self._clock.step - self._clock.keys * keys
        largest = max(StepWork.of(each).tokens for each in self._seen[max(self._seen)])
        self._set(int(min(left / price if price else self.most, _GROWTH * largest)))

    def _set(self, budget: int) -> None:
        running = self._scheduler.running
        answers = sum(len(request.token_ids) - request.num_computed_tokens == 1 for request in running)
        self._scheduler.max_num_batched_tokens = min(self.most, max(budget, answers + self._least))
