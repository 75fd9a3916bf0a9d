"""The floor under a step: the bytes it must move and the operations it must do, over what the device can.

A step reads every weight once, reads and writes keys and values, and multiplies. From the trace and the
model's shape alone follows how much that is (Williams et al. 2009, the roofline). What lies between the
floor and the time that a step takes is overhead: activations, launches, bookkeeping, products of an
unfavourable shape.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from labkit.core.model import Transformer
from labkit.kernels.int8 import pick_kernel
from labkit.models.load import LoadedModel
from labkit.trace.records import StepRecord

_SCALE_BYTES = 4  # int8 weights have one fp32 scale for each output
_READ_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}  # far beyond any cache
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What a step moves (bytes) and computes (operations: a multiplication and an addition are two)."""

    bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide what a step costs.

    Attributes:
        matrices: (outputs, inputs) of each product of one layer.
        vectors: other parameters of one layer: norms and biases.
        windows: how many layers have each sliding window (None: none).
        weight_bytes: of an element of a matrix, in layers, embedding and output layer.
        value_bytes: of an element of anything else: activations, keys and values, norms.
    """

    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    matrices: tuple[tuple[int, int], ...]
    vectors: int
    windows: tuple[tuple[int | None, int], ...]
    weight_bytes: int
    value_bytes: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> Shape:
        """The shape of a model of our own code.

        Raises:
            ValueError: for any other.
        """
        module = loaded.module
        if not isinstance(module, Transformer):
            raise ValueError(
                f"the work of a step is known for models of the Llama shape, not {loaded.config.model_type}"
            )
        layers = Counter(layer.self_attn.window for layer in module.layers)
        return cls.of_config(
            loaded.config,
            tuple(layers.items()),
            weight_bytes=1 if loaded.quantization == "int8" else module.dtype.itemsize,
            value_bytes=module.dtype.itemsize,
        )

    @classmethod
    def of_config(
        cls,
        config: PreTrainedConfig,
        windows: tuple[tuple[int | None, int], ...],
        *,
        weight_bytes: int,
        value_bytes: int,
    ) -> Shape:
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or hidden // heads
        qkv = (heads + 2 * kv_heads) * dim
        biases = 0
        if config.model_type == "qwen2" or getattr(config, "attention_bias", False):
            biases += qkv
        if getattr(config, "attention_bias", False):
            biases += hidden
        if getattr(config, "mlp_bias", False):
            biases += 2 * inner + hidden
        norms = 2 * hidden + (2 * dim if config.model_type == "qwen3" else 0)
        return cls(
            hidden,
            config.vocab_size,
            heads,
            kv_heads,
            dim,
            ((qkv, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)),
            norms + biases,
            windows,
            weight_bytes,
            value_bytes,
        )

    @property
    def layers(self) -> int:
        return sum(count for _, count in self.windows)

    @property
    def layer_parameters(self) -> int:
        """Elements of the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.matrices)

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """What it takes to read one matrix."""
        scales = outputs * _SCALE_BYTES if self.weight_bytes == 1 else 0
        return outputs * inputs * self.weight_bytes + scales

    def work(self, record: StepRecord) -> Work:
        """What one step must move and compute; the rows that a static batch pads count as rows.

        Activations are not counted: in a fused step they would never leave the caches.
        """
        rows = sum(record.num_tokens) + sum(record.padding)
        if not rows:
            return Work()
        layer = sum(self.matrix_bytes(*matrix) for matrix in self.matrices) + self.vectors * self.value_bytes
        moved = self.layers * layer + self.hidden * self.value_bytes  # the last norm
        moved += rows * self.matrix_bytes(1, self.hidden)  # embeddings
        operations = 2 * self.layers * self.layer_parameters * rows
        sampling = _sampling_rows(record)
        if sampling:
            moved += self.matrix_bytes(self.vocab, self.hidden)
            operations += 2 * self.vocab * self.hidden * sampling
        token = 2 * self.kv_heads * self.head_dim * self.value_bytes  # keys and values of one layer
        for window, layers in self.windows:
            seen = read = 0
            for start, queries in zip(record.starts, record.num_tokens, strict=True):
                seen += _keys_seen(start, queries, window)
                read += _keys_read(start, queries, window)
            written = sum(record.num_tokens)
            moved += layers * token * (read + written)
            operations += layers * 4 * self.heads * self.head_dim * seen  # q k^T, and the weighted sum of v
        return Work(moved, operations)


def _sampling_rows(record: StepRecord) -> int:
    """Rows that the output layer computes: those that sample, and with them the idle seats of a batch."""
    sampled = sum(1 for tokens in record.sampled if tokens)
    padding = record.padding or ()
    idle = sum(p == 1 and not n for p, n in zip(padding, record.num_tokens, strict=False))
    return sampled + idle if sampled else 0


def _keys_seen(start: int, queries: int, window: int | None) -> int:
    """Pairs of a query and a key that it looks at, for queries at positions from `start` on."""
    end = start + queries

    def up_to(position: int) -> int:  # pairs of all queries before this position
        if window is None or position <= window:
            return position * (position + 1) // 2
        return window * (window + 1) // 2 + (position - window) * window

    return up_to(end) - up_to(start)


def _keys_read(start: int, queries: int, window: int | None) -> int:
    """Keys that a row reads, each once, however many of its queries look at it."""
    if not queries:
        return 0
    return start + queries if window is None else min(start + queries, window + queries - 1)


@dataclass(frozen=True)
class Ceiling:
    """What a device was measured to do: `bandwidth` in bytes/s, `peak` by dtype in operations/s."""

    bandwidth: float
    peak: dict[str, float]

    def seconds(self, work: Work, kind: str) -> float:
        """The least time for this work, when moving and computing overlap entirely."""
        return max(work.bytes / self.bandwidth, work.operations / self.peak[kind])

    def floor(self, works: Iterable[Work], kind: str) -> float:
        """The least time for steps that come one after the other."""
        return sum(self.seconds(work, kind) for work in works)

    def best(self, other: Ceiling) -> Ceiling:
        """The higher of two measurements: a busy moment lowers them, nothing raises them."""
        peak = {kind: max(value, other.peak.get(kind, 0.0)) for kind, value in self.peak.items()}
        return Ceiling(max(self.bandwidth, other.bandwidth), peak)


def measure_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    read_bytes: int | None = None,
    gemm_size: int | None = None,
    repeats: int = 5,
) -> Ceiling:
    """Measure a device: one big read, and one big product in this dtype (with `int8`, one of int8 as well).

    Args:
        read_bytes: the size of the read; None is far beyond the caches.
        gemm_size: rows and columns of the matrices.
        repeats: the best of so many counts, after one to warm up.
    """
    size = read_bytes or _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    n = gemm_size or _GEMM_SIZE.get(device.type, _GEMM_SIZE["cpu"])
    bandwidth = _bandwidth(size, device, repeats)
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind(0)
    peak = {_name(dtype): 2 * n**3 / _best(lambda: a @ b, device, repeats)}
    if int8:
        kernel, _ = pick_kernel(device)
        weight = torch.randint(-60, 61, (n, n), device=device, dtype=torch.int8)
        multiply = kernel(weight, torch.ones(n, 1, device=device))
        x = torch.randint(-127, 128, (n, n), device=device).float()
        peak["int8"] = 2 * n**3 / _best(lambda: multiply(x), device, repeats)
    return Ceiling(bandwidth, peak)


def _bandwidth(size: int, device: torch.device, repeats: int) -> float:
    """Bytes per second of a read; of two kernels the faster counts."""
    data = torch.ones(size // 4, device=device)
    return data.nbytes / min(_best(read, device, repeats) for read in (data.sum, data.amax))


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
