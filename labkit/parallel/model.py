"""A transformer whose layers are spread over the processes of a group."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from labkit.core.attention import AttentionMetadata
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.core.model import Transformer
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan, StepResult
from labkit.kernels.int8_kv import Int8KVCache, Int8KVShape, in_int8
from labkit.models.split import Part
from labkit.parallel.group import Group
from labkit.parallel.messages import Edit, Forward, Logits
from labkit.parallel.workers import Workers


class SummedLinear(nn.Module):
    """A product that is cut by its inputs: the sum over all processes is the whole one."""

    def __init__(self, linear: nn.Module, group: Group) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.linear(x))


class SplitEmbedding(nn.Module):
    """The rows of an embedding that this process has; for other tokens it adds zeros to the sum."""

    def __init__(self, table: nn.Module, tokens: range, group: Group) -> None:
        super().__init__()
        self.table, self.tokens, self.group = table, tokens, group

    def forward(self, token_ids: Tensor) -> Tensor:
        own = (token_ids >= self.tokens.start) & (token_ids < self.tokens.stop)
        x = self.table(torch.where(own, token_ids - self.tokens.start, 0))
        return self.group.all_reduce(x.masked_fill_(~own[:, None], 0), of_layer=False)


def spread(model: Transformer, part: Part, group: Group) -> None:
    """Join what this process has of a model with the parts of the others."""
    model.embed_tokens = SplitEmbedding(model.embed_tokens, part.tokens, group)
    for layer in model.layers:
        layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj, group)
        layer.mlp.down_proj = SummedLinear(layer.mlp.down_proj, group)


class MirroredKVCache(PagedKVCache):
    """This process's part of a cache. What is done to it is kept until the others are told."""

    _numbers = itertools.count()

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int) -> None:
        super().__init__(shape, num_blocks, block_size)
        self.number = next(self._numbers)
        self.edits: list[Edit] = []

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        super().copy_blocks(pairs)
        self.edits.append(("copy_blocks", list(pairs)))

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        super().clear_blocks(blocks)
        self.edits.append(("clear_blocks", list(blocks)))


class MirroredInt8KVCache(MirroredKVCache, Int8KVCache):
    """The same in 8 bits."""


@dataclass(frozen=True)
class _PartShape(KVShape):
    """The shape of this process's part of a cache."""

    forget: Callable[[int], None]
    mirrored: ClassVar[type[MirroredKVCache]] = MirroredKVCache

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        cache = self.mirrored(self, num_blocks, block_size)
        weakref.finalize(cache, self.forget, cache.number)
        return cache


class _Int8PartShape(_PartShape, Int8KVShape):
    mirrored = MirroredInt8KVCache


@in_int8.register
def _part_in_int8(shape: _PartShape) -> _Int8PartShape:
    return _Int8PartShape(**vars(shape))


class ParallelTransformer(Transformer):
    """The whole model, as the engine's process sees it: calling it makes all processes compute.

    Args:
        own: the part of this process, already spread. Its modules are taken over.
        vocab_size: the number of tokens of the whole model.
        workers: the other processes, and the group that all of them are.
    """

    def __init__(self, own: Transformer, vocab_size: int, workers: Workers) -> None:
        nn.Module.__init__(self)  # not Transformer's, which would allocate a model
        self.__dict__.update(own.__dict__)
        self.vocab_size, self.workers = vocab_size, workers

    @property
    def kv_shape(self) -> KVShape:
        """What one token needs in the part of the cache that this process has."""
        own = super().kv_shape
        return _PartShape(**vars(own), forget=self.workers.dropped.append)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: PagedKVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Return hidden states (T, hidden_size), as `Transformer.forward` does.

        Raises:
            ValueError: for a cache that another model made.
            ParallelError: if another process ended, hung or failed; the model is of no use from then on.
        """
        if not isinstance(cache, MirroredKVCache):
            raise ValueError("a parallel model needs a cache that its own kv_shape made")
        with self.workers.together():
            edits, cache.edits = cache.edits, []
            rows = [(row.start, row.num_queries, list(row.table)) for row in metadata.rows]
            where = cache.number, cache.num_blocks, cache.block_size, isinstance(cache, Int8KVCache)
            self.workers.tell(
                Forward(*where, edits, self.workers.drain(), token_ids.tolist(), positions.tolist(), rows)
            )
            return super().forward(token_ids, positions, cache, metadata)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (S, vocab_size) of hidden states (S, hidden_size). Raises as `forward` does."""
        group = self.workers.group
        with self.workers.together():
            self.workers.tell(Logits(len(hidden)))
            pieces = group.collect(self.lm_head(group.broadcast(hidden.contiguous())))
        return torch.cat(pieces, dim=-1)[:, : self.vocab_size]


class ParallelRunner(ModelRunner):
    """A model runner that also counts what the processes of its model sent to each other."""

    model: ParallelTransformer

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan, as `ModelRunner.run` does."""
        result = super().run(plan)
        result.traffic = self.model.workers.group.drain()
        return result
