"""`EngineCore` by hand: a small model, plain attention, and requests as `labkit.Engine` makes them."""

from __future__ import annotations

from collections.abc import Sequence

from labkit import SamplingParams
from labkit.core.attention import PlainAttention
from labkit.core.block_pool import BlockPool
from labkit.core.engine_core import EngineCore
from labkit.core.request import Request, TokenReader
from labkit.core.sampler import mix
from labkit.core.scheduler import Scheduler
from labkit.models.detokenizer import IncrementalDetokenizer
from labkit.schedulers.audit import Auditor
from tests.conftest import loaded


def core_of(
    family: str = "llama",
    policy: type[Scheduler] = Scheduler,
    *,
    blocks: int = 60,
    size: int = 4,
    seats: int = 6,
    budget: int = 64,
    kv_policy: str = "paged",
    caching: bool = True,
) -> EngineCore:
    """An engine of nothing but the core, audited."""
    pool = BlockPool(blocks, size, enable_prefix_caching=caching)
    limits = dict(max_num_seqs=seats, max_num_batched_tokens=budget)
    scheduler = policy(pool, **limits, kv_policy=kv_policy)
    core = EngineCore(loaded(family).module, scheduler, PlainAttention())
    core.auditor = Auditor(scheduler, pool, budget, seats)
    return core


def request_of(
    name: str,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    number: int = 0,
    priority: int = 0,
    max_model_len: int = 512,
) -> Request:
    """A request and its children, seeded, cut and read as the engine's request of that number is."""
    seed = mix(0, number) if params.seed is None else params.seed
    first, *others = (
        Request(
            own,
            list(prompt),
            params,
            priority=priority,
            seed=mix(seed, i),
            max_len=min(len(prompt) + params.max_tokens, max_model_len),
            stop_ids=frozenset(params.stop_token_ids),
            reader=reader_of(params),
            family=name,
        )
        for i, own in enumerate([name, *(f"{name}.{k}" for k in range(1, params.n))])
    )
    first.children = others
    return first


def reader_of(params: SamplingParams) -> TokenReader | None:
    """Reads the text where a stop string is to be found in it; else tokens are enough."""
    return IncrementalDetokenizer(loaded("llama").tokenizer, params.stop) if params.stop else None
