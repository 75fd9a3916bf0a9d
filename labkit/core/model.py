"""The decoder-only transformer: tokens in, logits out, with its keys and values in a paged cache.

One file, read top to bottom, for the models of the Llama shape: Llama, SmolLM2, TinyLlama, Mistral, Qwen2,
Qwen2.5 and Qwen3. There is no batch dimension: a step's tokens, whoever they belong to, lie one after the
other in a flattened batch of T tokens, and only attention knows where one request ends and another begins.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from labkit.core.attention import AttentionMetadata, attend
from labkit.core.kv_cache import KVShape, PagedKVCache

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not change with length


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Su et al. 2021) over a paged cache."""

    def __init__(self, config: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = _head_dim(config)
        self.window = _window(config, layer)
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        # Queries, keys and values in one product: one pass over x, one launch.
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.dim, bias=bias)
        self.o_proj = nn.Linear(
            self.heads * self.dim, config.hidden_size, bias=bool(getattr(config, "attention_bias", False))
        )
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: PagedKVCache, layout: AttentionMetadata
    ) -> Tensor:
        qkv = self.qkv_proj(x).view(len(x), -1, self.dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if hasattr(self, "q_norm"):
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rotary(qk, *rope).split((self.heads, self.kv_heads), dim=1)
        cache.write(self.layer, k, v, layout.slots)
        out = attend(q, cache, self.layer, layout, scale=self.dim**-0.5, window=self.window)
        return self.o_proj(out.view(len(x), -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), gate and up in one product."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: PagedKVCache, layout: AttentionMetadata
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only transformer of the Llama shape.

    Build it with `from_tensors`. `forward` gives the hidden states of a flattened batch, and `logits` those
    of the rows that are to be sampled: the output layer is the widest product of all, so it is asked only
    for what is needed.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        # Weights are yet to come: to draw random ones first would take torch a second, for its compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.windows = tuple({layer.self_attn.window for layer in self.layers})

    @staticmethod
    def supports(config: PreTrainedConfig) -> bool:
        """Whether this file can run a model: its type, activation and rotary frequencies are known here."""
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in MODEL_TYPES
            and config.hidden_act == "silu"
            and rope.get("rope_type", "default") in _ROPE_TYPES
        )

    @classmethod
    def empty(cls, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> Transformer:
        """A model whose weights are yet to be filled in."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        # Rotary frequencies are few and want fp32, whatever the weights are.
        frequencies, model.rope_scaling = _rotary(config)
        model.inv_freq = frequencies.float().to(device)
        return model

    @classmethod
    def from_tensors(
        cls,
        config: PreTrainedConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Transformer:
        """Build a model from tensors under the names that `save_pretrained` gives them.

        Raises:
            ValueError: for a tensor that is missing, unknown or of the wrong shape.
        """
        model = cls.empty(config, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        homes = model._homes()
        for name, tensor in tensors:
            name = name.removeprefix("model.")
            if name.endswith("rotary_emb.inv_freq") or (
                name == "lm_head.weight" and config.tie_word_embeddings
            ):
                continue
            home = homes.pop(name, None)
            if home is None:
                raise ValueError(
                    f"tensor {name!r} is not part of a {config.model_type} model, or comes twice"
                )
            if home.shape != tensor.shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(home.shape)}")
            home.copy_(tensor)
        if homes:
            raise ValueError(f"{len(homes)} tensors are missing, among them {sorted(homes)[0]!r}")
        return model

    def _homes(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: fused projections are filled part by part."""
        homes: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            fused = next((part for part in ("qkv_proj", "gate_up_proj") if part in name), None)
            if fused is None:
                homes[name] = parameter.data
                continue
            attention = self.layers[0].self_attn
            if fused == "qkv_proj":
                sizes = [n * attention.dim for n in (attention.heads, attention.kv_heads, attention.kv_heads)]
                parts = ("q_proj", "k_proj", "v_proj")
            else:
                sizes, parts = [self.config.intermediate_size] * 2, ("gate_proj", "up_proj")
            for part, piece in zip(parts, parameter.data.split(sizes), strict=True):
                homes[name.replace(fused, part)] = piece
        return homes

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def max_model_len(self) -> int:
        """Positions that the model was made for."""
        return self.config.max_position_embeddings

    is_adapted = False

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def kv_shape(self) -> KVShape:
        attention = self.layers[0].self_attn
        return KVShape(len(self.layers), attention.kv_heads, attention.dim, self.dtype, self.device)

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """An empty KV cache of this model's shape. Raises `ValueError` if it does not fit."""
        attention = self.layers[0].self_attn
        return PagedKVCache(
            len(self.layers),
            num_blocks,
            block_size,
            attention.kv_heads,
            attention.dim,
            dtype=self.dtype,
            device=self.device,
        )

    def kv_bytes_per_token(self) -> int:
        """What one token takes in the KV cache."""
        attention = self.layers[0].self_attn
        return 2 * len(self.layers) * attention.kv_heads * attention.dim * self.dtype.itemsize

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: PagedKVCache, layout: AttentionMetadata
    ) -> Tensor:
        """Hidden states (T, hidden_size) of tokens (T,) at positions (T,); writes the cache on the way."""
        x = self.embed_tokens(token_ids)
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = (f(angles)[:, None] * self.rope_scaling for f in (torch.cos, torch.sin))
        rope = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, layout)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (S, vocab_size) of hidden states (S, hidden_size)."""
        return self.lm_head(hidden)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (i, i + head_dim / 2) of x (T, heads, head_dim) by an angle of its own.

    Args:
        cos, sin: (T, 1, head_dim), twice the same angles, the first half of the sines negated: a becomes
            a cos - b sin, and b becomes b cos + a sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary(config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Rotary frequencies (head_dim / 2,), in radians per position, and a factor for cosine and sine."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":  # stretched for longer texts, in one of several ways
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    dim = _head_dim(config)
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """The sliding window of a layer: all of Mistral's, some of Qwen's, none elsewhere."""
    if config.model_type == "mistral":
        return config.sliding_window
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None
