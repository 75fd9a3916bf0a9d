"""What `transformers` saved, as our own transformer: its `config.json` as a shape, its tensors as weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from labkit.core.model import ModelShape, Transformer
from labkit.models.checkpoint import Config
from labkit.models.errors import ModelError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length

# The dtypes of weights. Numbers of other dtypes (int8, fp8) mean something only with their scales.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

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
    """Translate the configuration of a model that `supports` accepts.

    A key counts only in those families whose code in `transformers` reads it, and is ignored in the others.

    Raises:
        ModelError: if a setting asks for what our own transformer does not compute; the message names it.
    """
    if not getattr(config, "is_causal", True):
        raise ModelError(
            "is_causal is false in config.json, and what looks ahead cannot write token by token"
        )
    kind = config.model_type
    attention_bias = kind in ("llama", "qwen3") and bool(config.attention_bias)
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
        qkv_bias=attention_bias or kind == "qwen2",  # whose configuration does not say so
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(config.mlp_bias),
        qk_norm=kind == "qwen3",
        windows=tuple(_window(config, layer) for layer in range(config.num_hidden_layers)),
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _rotary(config: Config, head_dim: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies and the factor for their cosines and sines (see `ModelShape`)."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":  # the other types stretch it for longer texts, in several ways
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # here, because few models need it

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    if 2 * len(inv_freq) != head_dim:
        raise ModelError("partial_rotary_factor turns a part of each head, and these models turn all of it")
    return inv_freq.float(), scaling


def _window(config: Config, layer: int) -> int | None:
    """Return the sliding window of a layer: all of Mistral's have one, some of Qwen's, none of Llama's."""
    if config.model_type == "llama":
        return None
    window: int | None = config.sliding_window
    if config.model_type != "mistral":
        kind = config.layer_types[layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"layer_types has {kind!r}, which is no attention of a {config.model_type} model"
            )
        if kind == "full_attention":
            return None
        if window is None:
            raise ModelError("layer_types has 'sliding_attention', and there is no sliding_window to it")
    if window is not None and window < 1:
        raise ModelError(f"sliding_window must be at least 1, not {window}")
    return window


def build(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """Build a model from its configuration and tensors, under the names that `save_pretrained` gives them.

    The output layer of a file counts even where the configuration ties it to the embedding, as it does in
    `transformers`: the two are one table only if the file has one of them, or the same numbers twice.

    Raises:
        ValueError: if a tensor is missing, unknown or of the wrong shape.
        ModelError: if a tensor is quantised, or `shape_of` refuses a setting.
    """
    model = Transformer(shape_of(config), dtype=dtype, device=device)
    homes = _homes(model)
    head: Tensor | None = None  # that of the file, beside a tied embedding
    for name, tensor in tensors:
        name = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; we compute it
            continue
        if tensor.dtype not in FLOATS:
            what = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"tensor {name!r} is quantised ({what}), and such weights are not read")
        if name == "lm_head.weight" and model.shape.tie_word_embeddings and head is None:
            _check_shape(name, tensor, model.lm_head.weight)
            head = tensor
            continue
        home = homes.pop(name, None)
        if home is None:
            raise ValueError(f"tensor {name!r} is not part of a {config.model_type} model, or comes twice")
        _check_shape(name, tensor, home)
        home.copy_(tensor)
    if head is not None:
        _untie(model, head, homes.pop("embed_tokens.weight", None))
    if homes:
        raise ValueError(f"{len(homes)} tensors are missing, among them {sorted(homes)[0]!r}")
    return model


def _check_shape(name: str, tensor: Tensor, home: Tensor) -> None:
    if home.shape != tensor.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(home.shape)}")


def _untie(model: Transformer, head: Tensor, table: Tensor | None) -> None:
    """Give a model with a tied embedding the output layer of its file.

    Args:
        head: the output layer of the file.
        table: the embedding, if the file has none; the output layer then serves as both.
    """
    if table is not None:
        table.copy_(head)
        return
    head = head.to(model.device, model.dtype, copy=True)  # not a view into a file
    if not torch.equal(head, model.embed_tokens.weight):
        model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        model.shape = replace(model.shape, tie_word_embeddings=False)


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
