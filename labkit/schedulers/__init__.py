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


def scheduler_class(policy: str | type[Scheduler], *, enable_chunked_prefill: bool = True) -> type[Scheduler]:
    """The scheduler of a name, or one of your own; without chunked prefill, as it admits whole prompts.

    A static batch knows one way alone.
    """
    own = SCHEDULERS[policy] if isinstance(policy, str) else policy
    if enable_chunked_prefill or own is StaticScheduler:
        return own
    if own is Scheduler:
        return WholePromptScheduler
    return type(f"WholePrompt{own.__name__}", (own, WholePromptScheduler), {})  # what it overrides, stays
