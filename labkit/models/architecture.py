"""What `transformers` saved, as our own transformer: its `config.json` as a shape, its tensors as weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from labkit.core.model import ModelShape, Transformer
from labkit.models.checkpoint import Config

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length

# Our fused projections, and the parts that a checkpoint stores apart.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def supports(config: Config) -> bool:
    """Whether our own transformer computes this model: its type, activation and rotary frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in MODEL_TYPES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
    )


def shape_of(config: Config) -> ModelShape:
    """Translate the configuration of a model that `supports` accepts."""
    attention_bias = bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, rope_scaling = _rotary(config, head_dim)
    return ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=attention_bias or config.model_type == "qwen2",  # whose configuration does not say so
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=config.model_type == "qwen3",
        windows=tuple(_window(config, layer) for layer in range(config.num_hidden_layers)),
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _rotary(config: Config, head_dim: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies and the factor for their cosines and sines (see `ModelShape`)."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":  # stretched for longer texts, in one of several ways
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # here, because few models need it

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
        return inv_freq.float(), scaling
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0


def _window(config: Config, layer: int) -> int | None:
    """Return the sliding window of a layer: all of Mistral's have one, some of Qwen's, no others."""
    if config.model_type == "mistral":
        return config.sliding_window
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None


def build(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """Build a model from its configuration and tensors, under the names that `save_pretrained` gives them.

    Raises:
        ValueError: if a tensor is missing, unknown or of the wrong shape.
    """
    model = Transformer(shape_of(config), dtype=dtype, device=device)
    homes = _homes(model)
    for name, tensor in tensors:
        name = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; we compute it
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:  # the embedding, saved a second time
            continue
        home = homes.pop(name, None)
        if home is None:
            raise ValueError(f"tensor {name!r} is not part of a {config.model_type} model, or comes twice")
        if home.shape != tensor.shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(home.shape)}")
        home.copy_(tensor)
    if homes:
        raise ValueError(f"{len(homes)} tensors are missing, among them {sorted(homes)[0]!r}")
    return model


def _homes(model: Transformer) -> dict[str, Tensor]:
    """Return where each tensor of a checkpoint goes; the parts of fused projections are views into them."""
    shape = model.shape
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    rows = {
        "qkv_proj": [count * shape.head_dim for count in heads],
        "gate_up_proj": [shape.intermediate_size] * 2,
    }
    homes: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        fused = next((projection for projection in FUSED if projection in name), None)
        if fused is None:
            homes[name] = parameter.data
            continue
        for part, piece in zip(FUSED[fused], parameter.data.split(rows[fused]), strict=True):
            homes[name.replace(fused, part)] = piece
    return homes
