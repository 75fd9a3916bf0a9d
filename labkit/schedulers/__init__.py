"""The schedulers by name: continuous batching, and the policies that it is compared with."""

from __future__ import annotations

from collections.abc import Callable

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


def scheduler_class(
    policy: str | Callable[..., Scheduler], *, enable_chunked_prefill: bool = True
) -> Callable[..., Scheduler]:
    """Return the scheduler class of a name, or your own; without chunked prefill, if that is switched off.

    A static batch is the same with and without chunked prefill.

    Raises:
        ValueError: if chunked prefill is off, and what you pass is no class that could inherit that.
    """
    own = SCHEDULERS[policy] if isinstance(policy, str) else policy
    if enable_chunked_prefill or own is StaticScheduler:
        return own
    if own is Scheduler:
        return WholePromptScheduler
    if not isinstance(own, type):
        raise ValueError("enable_chunked_prefill must be True for a scheduler that is not a class")
    return type(f"WholePrompt{own.__name__}", (own, WholePromptScheduler), {})  # what it overrides, stays
