"""One request at a time, as a loop over `generate` does it, with a KV cache and without."""

from __future__ import annotations

from typing import Any

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan, StepResult
from labkit.core.scheduler import Scheduler


class NaiveScheduler(Scheduler):
    """Runs one request at a time."""

    forks = False

    def __init__(self, pool: BlockPool, **limits: Any) -> None:
        super().__init__(pool, **{**limits, "max_num_seqs": 1})


class UncachedScheduler(NaiveScheduler):
    """Runs one request at a time without a KV cache: each token computes the whole text before it again."""

    uses_prefix_cache = False

    def __init__(self, pool: BlockPool, **limits: Any) -> None:
        super().__init__(pool, **{**limits, "kv_policy": "reserved"})

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        super().commit(plan, result)
        for request, sampled in zip(plan.requests, result.sampled, strict=True):
            if sampled:
                request.num_computed_tokens = 0  # forget all, so the next step computes all
