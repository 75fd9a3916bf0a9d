"""The decoder-only transformer: tokens in, logits out, with its keys and values in a paged cache.

Read it top to bottom. It serves the models of the Llama shape: Llama, SmolLM2, TinyLlama, Mistral, Qwen2,
Qwen2.5 and Qwen3. There is no batch dimension: the tokens of a step lie one after the other in a flattened
batch of T tokens from all its requests, and only attention knows where one request ends and the next begins.
Weights come from `labkit/models/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.core.attention import AttentionMetadata, attend
from labkit.core.kv_cache import KVShape, PagedKVCache

Rope = tuple[Tensor, Tensor]  # cosines and sines, as `apply_rotary` takes them


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What differs between models of the Llama shape; sizes have the names they have in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than query heads if several of those share one
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    qkv_bias: bool  # whether the product for queries, keys and values adds a bias; likewise below
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # whether each head's query and key are normalised, as in Qwen3
    windows: tuple[int | None, ...]  # for each layer, how many tokens a query sees at most; None: all before
    inv_freq: Tensor  # rotary frequencies (head_dim / 2,), in radians per position, fp32
    rope_scaling: float  # a factor of cosines and sines; 1, except in models stretched for long texts
    tie_word_embeddings: bool  # whether the output layer is the embedding table


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # In half precision transformers rounds before the weight is multiplied in, and so do we.
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Su et al. 2021) over a paged cache."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, shape.windows[layer]
        self.head_dim, self.qk_norm = shape.head_dim, shape.qk_norm
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        # Queries, keys and values in one product: x is read once, and one kernel is launched, not three.
        fused = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(shape.hidden_size, fused, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=shape.o_bias)
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, cache: PagedKVCache, metadata: AttentionMetadata) -> Tensor:
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # (T, heads + 2 * kv_heads, head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm:
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rotary(qk, *rope).split((self.heads, self.kv_heads), dim=1)
        # Write first, then read: a token attends to itself and to its neighbours in this step, too.
        cache.write(self.layer, k, v, metadata.slots)
        out = attend(q, cache, self.layer, metadata, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(out.reshape(len(x), -1))  # (T, heads, head_dim) to (T, hidden_size)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), with gate and up in one product."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (T, intermediate_size) each
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention mixes tokens, and the MLP works on each alone; both add to the residual stream x."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rope: Rope, cache: PagedKVCache, metadata: AttentionMetadata) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, metadata)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only transformer. It allocates its weights, and `labkit/models/` fills them.

    `forward` returns the hidden states of a flattened batch. `logits` is a method of its own because the
    output layer is the widest product of all, and only rows that are sampled need it.
    """

    def __init__(self, shape: ModelShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape, self.vocab_size = shape, shape.vocab_size
        self.max_model_len = shape.max_position_embeddings  # how many positions it was made for
        self.windows = tuple(set(shape.windows))  # those that occur, each once
        # Built on "meta", where tensors have no values: to draw random weights only for a checkpoint to
        # overwrite them would take seconds.
        with torch.device("meta"):
            # The constructor would draw numbers even on "meta", and import torch's compiler for that.
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(shape.vocab_size, shape.hidden_size))
            self.layers = nn.ModuleList(DecoderLayer(shape, i) for i in range(shape.num_hidden_layers))
            self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        # Now give them memory. `to_empty` would do the same, but imports torch's compiler.
        self._apply(lambda parameter: torch.empty(parameter.shape, dtype=dtype, device=device))
        self.requires_grad_(False).eval()
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Not a buffer: `to` must not round it to half precision, which would misplace distant tokens.
        self.inv_freq = shape.inv_freq.to(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def kv_shape(self) -> KVShape:
        """What one token needs in the KV cache."""
        layers, kv_heads = self.shape.num_hidden_layers, self.shape.num_key_value_heads
        return KVShape(layers, kv_heads, self.shape.head_dim, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: PagedKVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Return hidden states (T, hidden_size) of tokens (T,) at positions (T,), and write to the cache."""
        x = self.embed_tokens(token_ids)  # (T, hidden_size)
        # The same angles in every layer, so they are computed once, in fp32.
        angles = positions[:, None].float() * self.inv_freq  # (T, head_dim / 2)
        cos, sin = (f(angles)[:, None] * self.shape.rope_scaling for f in (torch.cos, torch.sin))
        rope = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, metadata)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (S, vocab_size) of hidden states (S, hidden_size)."""
        return self.lm_head(hidden)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (i, i + head_dim / 2) of x (T, heads, head_dim) by its own angle.

    Args:
        cos, sin: cosines and sines (T, 1, head_dim). Each angle is there twice, and the first half of the
            sines is negated, so that a becomes a cos - b sin, and b becomes b cos + a sin, in one operation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
