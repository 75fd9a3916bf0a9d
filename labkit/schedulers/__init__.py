"""The schedulers by name: continuous batching, and the policies that it is compared with."""

from __future__ import annotations

from labkit.core.scheduler import Scheduler
from labkit.schedulers.naive import NaiveScheduler, UncachedScheduler
from labkit.schedulers.static import StaticScheduler
from labkit.schedulers.whole_prompts import WholePromptScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    "continuous": Scheduler,
    "static": StaticScheduler,
    "naive": NaiveScheduler,
    "uncached": UncachedScheduler,
}


def scheduler_class(name: str, *, enable_chunked_prefill: bool = True) -> type[Scheduler]:
    """Return the scheduler class of a name. A static batch is the same with and without chunked prefill."""
    policy = SCHEDULERS[name]
    if enable_chunked_prefill or policy is StaticScheduler:
        return policy
    if policy is Scheduler:
        return WholePromptScheduler
    return type(f"WholePrompt{policy.__name__}", (WholePromptScheduler, policy), {})
