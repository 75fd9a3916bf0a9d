"""Static batching: a batch runs until its last member is done, and then the next one starts."""

from __future__ import annotations

from typing import Any

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler


class StaticScheduler(Scheduler):
    """Runs batches that are padded to their longest member, each until its last member is done.

    Prompts are padded on the left, so that all members reach their first token in the same step; each step
    computes as many columns of the padded batch as the budget allows. A finished member's seat stays in the
    batch, and computes padding.
    """

    forks = False
    uses_prefix_cache = False  # its rows compute the same columns, and a hit would put one ahead

    def __init__(self, pool: BlockPool, **limits: Any) -> None:
        super().__init__(pool, **limits)
        self._batch: list[Request] = []

    def schedule(self) -> StepPlan:
        self.end_aborted()
        plan = StepPlan()
        if not self.running:
            while (request := self.waiting.peek()) is not None:
                reason = self.try_admit(plan, request, budget=1)
                if reason:
                    plan.blocked = (request.request_id, reason)
                    break
            self._batch = list(self.running)
        if self.running:
            self._plan_columns(plan)
        if not plan.blocked and (request := self.waiting.peek()) is not None:
            plan.blocked = (request.request_id, "the batch runs until its last member is done")
        return plan

    def _plan_columns(self, plan: StepPlan) -> None:
        missing = [len(r.token_ids) - r.num_computed_tokens for r in self.running]
        width = max(missing)
        if width == 1:
            self.grow(plan, [r for r in self.running if r.num_computed_tokens >= r.capacity])
        columns = min(width, self.max_num_batched_tokens // len(self._batch))
        for member in self._batch:
            num_tokens = 0
            if member.status == "running":
                after = width - columns  # columns still to come after this step
                num_tokens = max(0, len(member.token_ids) - member.num_computed_tokens - after)
            plan.add(member, num_tokens)
            plan.padding.append(columns - num_tokens)
            # An idle seat goes through the output layer, too: that is part of what a static batch costs.
            plan.num_idle += columns == 1 and not num_tokens
