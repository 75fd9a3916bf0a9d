"""Decoder layers whose steps between the products are one operation each (see `ops.cpp`).

At one seat a step of the plain layers spends as long on thousands of small operations as on its products.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.core.attention import AttentionMetadata, attend
from labkit.core.kv_cache import PagedKVCache
from labkit.core.model import DecoderLayer, Transformer
from labkit.kernels.cpu.build import why_not
from labkit.kernels.int8 import Int8Linear
from labkit.kernels.int8_kv import Int8KVCache

DTYPES = (torch.float32, torch.bfloat16)
_KNOWN_WRITES = (PagedKVCache.write, Int8KVCache.write)  # what `rotate_and_write` does, too


class FusedLayer(nn.Module):
    """A decoder layer that computes what the layer it is made of does, in fewer and larger operations."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self._plain = (layer,)  # not as a part: its parts are ours
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: PagedKVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Return the residual stream (T, hidden_size) after this layer, and write to the cache."""
        if type(cache).write not in _KNOWN_WRITES:  # a cache of your own decides where it writes
            return self._plain[0](x, rope, cache, metadata)
        ops, own, mlp = torch.ops.labkit_cpu, self.self_attn, self.mlp
        before, between = self.input_layernorm, self.post_attention_layernorm
        qkv = own.qkv_proj(ops.rms_norm(x, before.weight, before.eps))
        blocks, norms = cache.layers[own.layer], (None, None)
        if own.qk_norm:
            norms = (own.q_norm.weight, own.k_norm.weight)
        q = ops.rotate_and_write(qkv, *rope, blocks, metadata.slots, own.heads, *norms, before.eps)
        out = attend(q, cache, own.layer, metadata, scale=own.head_dim**-0.5, window=own.window)
        out = own.o_proj(out.reshape(len(x), -1))
        x, normed = ops.add_rms_norm(x, out, between.weight, between.eps)
        return x + mlp.down_proj(ops.silu_mul(mlp.gate_up_proj(normed)))


def fuse(model: Transformer, folder: Path, say: Callable[[str], None] | None = None) -> str | None:
    """Replace the layers of a model by fused ones. Return why that cannot be done, or None.

    Args:
        model: a model on a CPU, in one of `DTYPES`, plain or quantised.
        folder, say: what `why_not` takes.
    """
    lacking = why_not(folder, say)
    if lacking is None:
        for number, layer in enumerate(model.layers):
            model.layers[number] = FusedLayer(layer)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.scale_rows = torch.ops.labkit_cpu.scale_rows
    return lacking


def is_fused(model: object) -> bool:
    """Whether `fuse` has been here, so that attention in place can be had too."""
    return isinstance(model, Transformer) and isinstance(model.layers[0], FusedLayer)
