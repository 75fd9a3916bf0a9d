"""The rungs of the ladder: each is the one below it and one thing more, by the engine's own switches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.analysis.workload import Job
from labkit.config import EngineConfig
from labkit.models.load import LoadedModel

_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Rung:
    """A step up.

    Attributes:
        adds: what it adds to the rung below, in half a sentence.
        engine: switches of `EngineConfig`.
        weights: switches of `load_model`.
        device: the only type of device that it is for (None: any).
        exact: whether its tokens must be those of all others, in fp32.
        alone: whether it answers one request at a time, so that a few requests say as much as many.
    """

    name: str
    adds: str
    engine: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    exact: bool = True
    alone: bool = False


# Name, what it adds, and the switches that it turns on top of those below.
_STEPS: tuple[tuple[Rung, dict[str, Any]], ...] = (
    (
        Rung("no cache", "each token computes all before it once more", alone=True),
        {"scheduler": "uncached", "kv_policy": "reserved", "attention_backend": "sdpa", "cuda_graphs": False}
        | {"fused_projections": False, "packed_weights": False},
    ),
    (
        Rung("KV cache", "keys and values are kept, so each token is computed once", alone=True),
        {"scheduler": "naive"},
    ),
    (
        Rung("static batching", "the weights are read once for many requests"),
        {"scheduler": "static"},
    ),
    (
        Rung("continuous batching", "requests join and leave at every step"),
        {"scheduler": "continuous", "enable_chunked_prefill": False},
    ),
    (
        Rung("paged KV cache", "pages are taken as tokens come, so more requests fit"),
        {"kv_policy": "paged"},
    ),
    (
        Rung("mixed prefill, decode", "prompts are computed beside decode, in one forward pass"),
        {"enable_chunked_prefill": True},
    ),
    (
        Rung("fused projections", "q, k and v in one product, gate and up in another"),
        {"fused_projections": True},
    ),
    (
        Rung("packed weights", "weights lie in the order in which the CPU reads them", device="cpu"),
        {"packed_weights": True},
    ),
    (
        Rung("CUDA graphs", "a decode step is launched as a whole", device="cuda"),
        {"cuda_graphs": True},
    ),
    (
        Rung("paged attention", "a kernel of its own reads pages where they lie", device="cuda"),
        {"attention_backend": "triton"},
    ),
    (
        Rung("int8", "weights and activations of 8 bits: a quarter of fp32's bytes", exact=False),
        {"quantization": "int8"},
    ),
)
_WEIGHTS = ("fused_projections", "packed_weights", "quantization")  # switches of `load_model`
NAMES = tuple(rung.name for rung, _ in _STEPS)


def rungs_for(device: str, names: Sequence[str] | None = None) -> list[Rung]:
    """The rungs for a type of device, or those of these names, in the ladder's order.

    Raises:
        ValueError: for an unknown name, one that this device has not, or none at all.
    """
    rungs = []
    switches: dict[str, Any] = {}
    for rung, more in _STEPS:
        if rung.device in (None, device):
            switches |= more
            engine = {key: value for key, value in switches.items() if key not in _WEIGHTS}
            weights = {key: value for key, value in switches.items() if key in _WEIGHTS}
            rungs.append(dataclasses.replace(rung, engine=engine, weights=weights))
    if names is None:
        return rungs
    here = [rung.name for rung in rungs]
    for name in names:
        if name not in here:
            known = ", ".join(map(repr, here))
            raise ValueError(f"there is no rung {name!r} on {device}; there is {known}")
    if not names:
        raise ValueError("a ladder needs a rung")
    return [rung for rung in rungs if rung.name in names]


@dataclass(frozen=True)
class Sizes:
    """What all rungs run with: pages in the pool, seats, tokens to a step."""

    num_blocks: int
    seats: int
    budget: int

    @classmethod
    def of(cls, jobs: Sequence[Job], seats: int, budget: int) -> Sizes:
        """Sizes for a workload.

        The pool holds what half of the seats reserve for requests of the mean length: enough to run, and
        little enough for it to matter that pages are taken as tokens come. The budget holds any request, so
        that a prompt fits into one step also where it must.
        """
        pages = [-(-(len(job.prompt) + job.max_tokens) // _BLOCK_SIZE) for job in jobs]
        half = math.ceil(sum(pages) / len(pages) * seats / 2)
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        return cls(max(half, max(pages) + 1), seats, max(budget, seats, longest))

    def config(self, rung: Rung, loaded: LoadedModel) -> EngineConfig:
        """How to build the engine of a rung."""
        return EngineConfig(
            model=loaded,
            block_size=_BLOCK_SIZE,
            num_blocks=self.num_blocks,
            max_num_seqs=self.seats,
            max_num_batched_tokens=self.budget,
            **rung.engine,
        )
