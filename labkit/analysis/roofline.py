"""What a step must move and compute, and the least time that takes: the roofline (Williams et al. 2009).

A step reads every weight once, reads and writes keys and values, and multiplies. How much of each there is
follows from the step's rows (`StepWork`) and the sizes of the model: all of them (`Shape`), or the few that
a maker publishes (`ModelSize`). A device moves bytes and computes at the same time, so the slower of the two
sets the least time; what a step takes beyond it is overhead: activations, launches, bookkeeping, products of
an unfavourable shape. What devices can do is in `devices.py`. No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from labkit.sampling_params import check_number
from labkit.trace.records import StepRecord

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from labkit.models.load import LoadedModel

_SCALE_BYTES = 4  # int8 weights have one fp32 scale for each output


@dataclass(frozen=True)
class Work:
    """What a step moves (bytes) and computes (operations: a multiplication and an addition are two)."""

    bytes: float = 0
    operations: float = 0

    def seconds(self, bandwidth: float, peak: float) -> float:
        """Return the least time for it, with so many bytes and operations per second."""
        return max(self.bytes / bandwidth, self.operations / peak)

    def bound(self, bandwidth: float, peak: float) -> str:
        """Return what limits it: "bandwidth" or "compute"."""
        return "compute" if self.operations / peak > self.bytes / bandwidth else "bandwidth"


@dataclass(frozen=True)
class Traffic:
    """What each process of a model sends in a step (bytes), and in how many exchanges with the others.

    Attributes:
        in_layers: The bytes of two all-reduces in each layer.
        elsewhere: The bytes of embeddings and logits, which all go through the first process.
    """

    in_layers: float = 0
    elsewhere: float = 0
    exchanges: int = 0

    def seconds(self, bandwidth: float, latency: float) -> float:
        """Return the least time for it, with so many bytes per second and seconds for each exchange."""
        return (self.in_layers + self.elsewhere) / bandwidth + self.exchanges * latency


# -- the rows of a step ---------------------------------------------------------------------------


class StepWork(NamedTuple):
    """What a step has to do, counted from its rows.

    Attributes:
        rows: The number of requests in the batch.
        tokens: The number of tokens computed, including those that a static batch pads.
        sampled: The number of places that go through the output layer: one of each row that samples, and one
            for each of its drafts.
        keys: The number of tokens whose keys and values are read; each row reads its own once.
        pairs: The number of pairs of a query and a key that it looks at: quadratic in a prompt.
    """

    rows: int
    tokens: int
    sampled: int
    keys: int
    pairs: int

    @classmethod
    def of(cls, record: StepRecord) -> StepWork:
        """Return the work of a recorded step."""
        padding = sum(record.padding)
        sampled = sum(1 for tokens in record.sampled if tokens) + sum(map(len, record.drafted))
        work = cls.of_rows(record.starts, record.num_tokens, sampled)
        return work._replace(tokens=work.tokens + padding) if padding else work

    @classmethod
    def of_rows(cls, starts: Sequence[int], num_tokens: Sequence[int], sampled: int) -> StepWork:
        """Return the work of rows that compute `num_tokens[i]` tokens from position `starts[i]` on."""
        rows = len(num_tokens) - num_tokens.count(0)
        tokens = sum(num_tokens)
        keys = sum(starts) + tokens
        if rows != len(num_tokens):  # idle seats read nothing
            keys = sum(start + count for start, count in zip(starts, num_tokens, strict=True) if count)
        # A query at position p looks at p + 1 keys.
        pairs = sum(map(mul, starts, num_tokens)) + (sum(map(mul, num_tokens, num_tokens)) + tokens) // 2
        return cls(rows, tokens, sampled, keys, pairs)


def keys_read(start: int, queries: int, window: int | None) -> int:
    """Return how many keys a row reads, each once, even if several queries look at it."""
    if not queries:
        return 0
    return start + queries if window is None else min(start + queries, window + queries - 1)


def pairs_seen(start: int, queries: int, window: int | None) -> int:
    """Return how many pairs of a query and a key that it sees there are, with queries from `start` on."""

    def up_to(position: int) -> int:  # pairs of all queries before this position
        if window is None or position <= window:
            return position * (position + 1) // 2
        return window * (window + 1) // 2 + (position - window) * window

    return up_to(start + queries) - up_to(start)


# -- the sizes of a model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """All sizes of a model of our own code that decide what a step costs.

    Attributes:
        matrices: The (outputs, inputs) of each product of one layer.
        vectors: The number of other parameters of one layer: norms and biases.
        windows: Each sliding window (None: no window), with the number of layers that have it.
        weight_bytes: The size of an element of a matrix, in layers, embedding and output layer.
        value_bytes: The size of any other number: activations, keys and values, norms.
        int8_kv: Whether keys and values are in 8 bits instead, each with a scale.
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
    int8_kv: bool = False

    @classmethod
    def of(cls, loaded: LoadedModel, kv_cache_dtype: str | None = None) -> Shape:
        """Return the shape of a loaded model, with the KV cache that `EngineConfig` names so.

        Raises:
            ValueError: If the model is not of our own code.
        """
        from labkit.core.model import Transformer  # here, so that data sheets can be read without torch

        module = loaded.module
        if not isinstance(module, Transformer):
            raise ValueError(
                f"the work of a step is known for models of the Llama shape, not {loaded.config.model_type}"
            )
        layers = Counter(layer.self_attn.window for layer in module.layers)
        shape = cls.of_config(
            loaded.config,
            tuple(layers.items()),
            weight_bytes=1 if loaded.quantization == "int8" else module.dtype.itemsize,
            value_bytes=module.dtype.itemsize,
        )
        return replace(shape, int8_kv=kv_cache_dtype == "int8")

    @classmethod
    def of_config(
        cls,
        config: PreTrainedConfig,
        windows: tuple[tuple[int | None, int], ...],
        *,
        weight_bytes: int,
        value_bytes: int,
    ) -> Shape:
        """Return the shape of an architecture, with its windows and the sizes of its numbers."""
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
        """The number of layers."""
        return sum(count for _, count in self.windows)

    @property
    def layer_parameters(self) -> int:
        """The number of elements in the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.matrices)

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """Return the size of one matrix, with its scales."""
        scales = outputs * _SCALE_BYTES if self.weight_bytes == 1 else 0
        return outputs * inputs * self.weight_bytes + scales

    def work(self, record: StepRecord) -> Work:
        """Return what a step must move and compute. The rows that a static batch pads count as rows.

        Activations are not counted: in a fused step they would never leave the caches.
        """
        step = StepWork.of(record)
        if not step.tokens:
            return Work()
        layer = sum(self.matrix_bytes(*matrix) for matrix in self.matrices) + self.vectors * self.value_bytes
        moved = self.layers * layer + self.hidden * self.value_bytes  # the last norm
        moved += step.tokens * self.matrix_bytes(1, self.hidden)  # embeddings
        operations = 2 * self.layers * self.layer_parameters * step.tokens
        if step.sampled:
            moved += self.matrix_bytes(self.vocab, self.hidden)
            operations += 2 * self.vocab * self.hidden * (step.sampled + _idle_seats(record))
        vector = self.head_dim + _SCALE_BYTES if self.int8_kv else self.head_dim * self.value_bytes
        kv_bytes = 2 * self.kv_heads * vector  # of one token in one layer
        written = sum(record.num_tokens)
        for window, layers in self.windows:
            rows = list(zip(record.starts, record.num_tokens, strict=True))
            keys = sum(keys_read(start, queries, window) for start, queries in rows)
            pairs = sum(pairs_seen(start, queries, window) for start, queries in rows)
            moved += layers * kv_bytes * (keys + written)
            operations += layers * 4 * self.heads * self.head_dim * pairs  # q k^T, and the weighted sum of v
        return Work(moved, operations)


def _idle_seats(record: StepRecord) -> int:
    """Count the idle seats of a static batch, which go through the output layer like rows that sample."""
    return sum(p == 1 and not n for p, n in zip(record.padding, record.num_tokens, strict=False))


@dataclass(frozen=True)
class ModelSize:
    """The few sizes of a decoder that its maker publishes.

    Attributes:
        heads: The number of query heads in each layer.
        kv_heads: The number of heads of keys and values in each layer.
        weight_bytes: The size of one parameter: 2 in half precision, 1 in eight bits.
        kv_value_bytes: The size of one number in the KV cache; 1 + 4 / head_dim in eight bits, with scales.
        hidden, vocab: The numbers of a token's state, and of tokens; only processes that share it need them.
        activation_bytes: The size of one number of a state.
    """

    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: float = 2
    kv_value_bytes: float = 2
    hidden: int = 0
    vocab: int = 0
    activation_bytes: float = 2

    def __post_init__(self) -> None:
        for field in ("parameters", "layers", "heads", "kv_heads", "head_dim"):
            check_number(field, getattr(self, field), 1, math.inf, whole=True)
        for field in ("hidden", "vocab"):
            check_number(field, getattr(self, field), 0, math.inf, whole=True)
        for field in ("weight_bytes", "kv_value_bytes", "activation_bytes"):
            check_number(field, getattr(self, field), 0.1, 8)

    @property
    def bytes(self) -> float:
        """The size of all weights."""
        return self.parameters * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """What one token needs in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_value_bytes

    def work(self, step: StepWork, processes: int = 1) -> Work:
        """Return what a step moves and computes: each token multiplies with every parameter.

        Of several `processes` that share the model it is the part of one: of that with the most KV heads,
        because a head is never cut.
        """
        most = -(-self.kv_heads // processes) / self.kv_heads
        moved = self.bytes / processes + most * self.kv_bytes_per_token * (step.keys + step.tokens)
        products = 2 * self.parameters * step.tokens
        attention = 4 * self.layers * self.heads * self.head_dim * step.pairs  # q k^T, and the sum of v
        return Work(moved, (products + attention) / processes)

    def traffic(self, step: StepWork, processes: int) -> Traffic:
        """Return what each of several processes sends in a step, as labkit's send it (see `labkit.parallel`).

        An all-reduce in a ring sends 2 (p - 1) / p of the tensor (Patarasuk and Yuan 2009). There is one for
        the embeddings, and two in each layer: after attention and after the MLP. Then the first process sends
        the states of tokens that sample, and gets from each other one its part of their logits.
        """
        if processes == 1 or not step.tokens:
            return Traffic()
        state, others = self.hidden * self.activation_bytes, processes - 1
        all_reduce = step.tokens * state * 2 * others / processes
        piece = -(-self.vocab // processes) * self.activation_bytes
        logits = step.sampled * (state + piece) * others
        return Traffic(
            2 * self.layers * all_reduce, all_reduce + logits, 2 * self.layers + (3 if step.sampled else 1)
        )


# From the configurations that their makers publish.
MODELS = {
    "smollm2-135m": ModelSize(
        134_515_008, layers=30, heads=9, kv_heads=3, head_dim=64, hidden=576, vocab=49_152
    ),
    "llama-3.1-8b": ModelSize(
        8_030_261_248, layers=32, heads=32, kv_heads=8, head_dim=128, hidden=4096, vocab=128_256
    ),
}
