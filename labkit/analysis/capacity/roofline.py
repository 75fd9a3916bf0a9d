"""A step's least time on a GPU that one does not have: from its data sheet and the sizes of a model.

Either the bytes that a step moves or the operations that it does take longer (Williams et al. 2009, the
roofline). No kernel reaches both peaks, so this is a floor, and what it says of capacity a ceiling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.analysis.capacity.clock import StepWork
from labkit.sampling_params import check_number


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says.

    Attributes:
        flops: peak of dense half precision products on tensor cores, in operations/s (a multiplication and
            an addition are two).
        bandwidth: of its memory, in bytes/s.
        memory: in bytes.
        source: where these numbers stand.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "memory"):
            check_number(field, getattr(self, field), 1, math.inf)


# NVIDIA's data sheets, by their numbers. Where one gives a peak with sparsity alone, half of it stands here:
# that of dense matrices. (For the T4's memory, the Turing white paper has 320 GB/s.)
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 65e12, 300e9, 16e9, "NVIDIA T4, data sheet 951643: 65 TFLOPS mixed precision, 300 GB/s"),
        Gpu("L4", 121e12, 300e9, 24e9, "NVIDIA L4, data sheet 2595652: 242 TFLOPS with sparsity, 300 GB/s"),
        Gpu("A100", 312e12, 2039e9, 80e9, "NVIDIA A100 80GB SXM, data sheet 2188504: 312 TFLOPS, 2,039 GB/s"),
        Gpu(
            "H100",
            989.5e12,
            3350e9,
            80e9,
            "NVIDIA H100 SXM, data sheet 2287922: 1,979 TFLOPS with sparsity, 3.35 TB/s",
        ),
    )
}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder that decide what a step costs.

    Attributes:
        heads: of queries, in each layer.
        kv_heads: of keys and values, in each layer.
        weight_bytes: of one parameter: 2 in half precision, 1 in eight bits.
        kv_value_bytes: of one number in the KV cache.
    """

    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: float = 2
    kv_value_bytes: float = 2

    def __post_init__(self) -> None:
        for field in ("parameters", "layers", "heads", "kv_heads", "head_dim"):
            check_number(field, getattr(self, field), 1, math.inf, whole=True)
        for field in ("weight_bytes", "kv_value_bytes"):
            check_number(field, getattr(self, field), 0.1, 8)

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return self.parameters * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_value_bytes


# From the configurations that their makers publish.
MODELS = {
    "smollm2-135m": ModelSize(134_515_008, layers=30, heads=9, kv_heads=3, head_dim=64),
    "llama-3.1-8b": ModelSize(8_030_261_248, layers=32, heads=32, kv_heads=8, head_dim=128),
}


@dataclass(frozen=True)
class Roofline:
    """A clock for a model on a GPU: `max(bytes / bandwidth, operations / peak) + overhead`.

    A step reads all weights once and the keys and values that its rows look at, and writes those of its
    tokens. Each token multiplies with every parameter. Activations stay in the caches.

    Args:
        overhead: seconds that every step takes besides: launches, scheduling, sampling.
    """

    gpu: Gpu
    model: ModelSize
    overhead: float = 0.0

    def __post_init__(self) -> None:
        check_number("overhead", self.overhead, 0, math.inf)

    def bytes(self, work: StepWork) -> float:
        """What a step moves."""
        return self.model.bytes + self.model.kv_bytes_per_token * (work.keys + work.tokens)

    def operations(self, work: StepWork) -> float:
        """What a step computes: products with weights, queries with keys, and weighted sums of values."""
        model = self.model
        return (
            2 * model.parameters * work.tokens + 4 * model.layers * model.heads * model.head_dim * work.pairs
        )

    def __call__(self, work: StepWork) -> float:
        moving, computing = self.bytes(work) / self.gpu.bandwidth, self.operations(work) / self.gpu.flops
        return max(moving, computing) + self.overhead

    def bound(self, work: StepWork) -> str:
        """What such a step waits for: "bandwidth" or "compute"."""
        computing = self.operations(work) / self.gpu.flops
        return "compute" if computing > self.bytes(work) / self.gpu.bandwidth else "bandwidth"

    def num_blocks(self, block_size: int = 16, share: float = 0.9) -> int:
        """Pages of the KV cache that fit beside the weights into this share of the memory.

        Raises:
            ValueError: if not even one does.
        """
        check_number("block_size", block_size, 1, math.inf, whole=True)
        check_number("share", share, 0, 1)
        left = share * self.gpu.memory - self.model.bytes
        blocks = int(left // (block_size * self.model.kv_bytes_per_token))
        if blocks < 1:
            raise ValueError(
                f"the weights take {self.model.bytes / 1e9:.1f} GB, and {share:.0%} of a {self.gpu.name} is "
                f"{share * self.gpu.memory / 1e9:.1f} GB: no page of the KV cache fits"
            )
        return blocks
