"""The ablations of the ladder: each is the one below it and one thing more, by the engine's own switches.

In the notebook and on the command line an ablation is called a rung.
"""

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
class Ablation:
    """An engine with some of its features switched on.

    Attributes:
        adds: What it adds to the one below, in half a sentence.
        engine: The switches of `EngineConfig`.
        weights: The switches of `load_model`.
        device: The only type of device that it can run on (None: any).
        exact: Whether its tokens must be those of all others, in fp32.
        alone: Whether it answers one request at a time, so that a few requests say as much as many.
    """

    name: str
    adds: str
    engine: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    exact: bool = True
    alone: bool = False


# Name, what it adds, and the switches that it turns on top of those below.
_STEPS: tuple[tuple[Ablation, dict[str, Any]], ...] = (
    (
        Ablation("no cache", "each token computes all before it once more", alone=True),
        {"scheduler": "uncached", "kv_policy": "reserved", "attention_backend": "sdpa", "cuda_graphs": False}
        | {"fused_projections": False, "packed_weights": False, "cpu_kernels": False},
    ),
    (
        Ablation("KV cache", "keys and values are kept, so each token is computed once", alone=True),
        {"scheduler": "naive"},
    ),
    (
        Ablation("static batching", "the weights are read once for many requests"),
        {"scheduler": "static"},
    ),
    (
        Ablation("continuous batching", "requests join and leave at every step"),
        {"scheduler": "continuous", "enable_chunked_prefill": False},
    ),
    (
        Ablation("paged KV cache", "pages are taken as tokens come, so more requests fit"),
        {"kv_policy": "paged"},
    ),
    (
        Ablation("mixed prefill, decode", "prompts are computed beside decode, in one forward pass"),
        {"enable_chunked_prefill": True},
    ),
    (
        Ablation("fused projections", "q, k and v in one product, gate and up in another"),
        {"fused_projections": True},
    ),
    (
        Ablation("packed weights", "weights lie in the order in which the CPU reads them", device="cpu"),
        {"packed_weights": True},
    ),
    (
        Ablation("CPU kernels", "one operation between two products; pages are read in place", device="cpu"),
        {"cpu_kernels": True, "attention_backend": "auto"},
    ),
    (
        Ablation("CUDA graphs", "a decode step is launched as a whole", device="cuda"),
        {"cuda_graphs": True},
    ),
    (
        Ablation("paged attention", "a kernel of its own reads pages where they lie", device="cuda"),
        {"attention_backend": "triton"},
    ),
    (
        Ablation("int8", "weights and activations of 8 bits: a quarter of fp32's bytes", exact=False),
        {"quantization": "int8"},
    ),
)
_WEIGHTS = ("fused_projections", "packed_weights", "cpu_kernels", "quantization")  # switches of `load_model`
NAMES = tuple(ablation.name for ablation, _ in _STEPS)


def ablations_for(device: str, names: Sequence[str] | None = None) -> list[Ablation]:
    """The ablations for a type of device, or those with these names, in the ladder's order.

    Raises:
        ValueError: If a name is unknown or not for this device, or there are no names.
    """
    ablations = []
    switches: dict[str, Any] = {}
    for ablation, more in _STEPS:
        if ablation.device in (None, device):
            switches |= more
            engine = {key: value for key, value in switches.items() if key not in _WEIGHTS}
            weights = {key: value for key, value in switches.items() if key in _WEIGHTS}
            ablations.append(dataclasses.replace(ablation, engine=engine, weights=weights))
    if names is None:
        return ablations
    here = [ablation.name for ablation in ablations]
    for name in names:
        if name not in here:
            known = ", ".join(map(repr, here))
            raise ValueError(f"there is no rung {name!r} on {device}; there is {known}")
    if not names:
        raise ValueError("a ladder needs a rung")
    return [ablation for ablation in ablations if ablation.name in names]


@dataclass(frozen=True)
class Sizes:
    """What all ablations run with: blocks in the pool, seats, and tokens of a step."""

    num_blocks: int
    seats: int
    budget: int

    @classmethod
    def of(cls, jobs: Sequence[Job], seats: int, budget: int) -> Sizes:
        """Sizes for a workload.

        The pool holds what half of the seats reserve for requests of the mean length: enough to run, and so
        little that it matters whether blocks are taken as tokens come. The budget holds any request, because
        without chunked prefill a prompt must fit into one step.
        """
        blocks = [-(-(len(job.prompt) + job.max_tokens) // _BLOCK_SIZE) for job in jobs]
        half = math.ceil(sum(blocks) / len(blocks) * seats / 2)
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        return cls(max(half, max(blocks) + 1), seats, max(budget, seats, longest))

    def config(self, ablation: Ablation, loaded: LoadedModel) -> EngineConfig:
        """The configuration of an ablation's engine."""
        return EngineConfig(
            model=loaded,
            block_size=_BLOCK_SIZE,
            num_blocks=self.num_blocks,
            max_num_seqs=self.seats,
            max_num_batched_tokens=self.budget,
            **ablation.engine,
        )
