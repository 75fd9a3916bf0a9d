"""Models of well-known shapes with random weights, made on the device: enough to measure speed.

Their tokens mean nothing, but depend on every token before, so that equality can be checked as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from labkit.models.devices import resolve_device, resolve_dtype
from labkit.models.errors import ModelError
from labkit.models.load import LoadedModel, build_transformer
from labkit.models.progress import Say
from labkit.models.tiny import tiny_tokenizer

SEATS = (1, 8, 32, 128)
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "SmolLM2-135M": (
        LlamaConfig,
        dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
        | dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
        | dict(rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
    ),
    "Qwen2.5-0.5B": (
        Qwen2Config,
        dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
        | dict(num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768)
        | dict(rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ),
    "Llama-3.2-1B": (
        LlamaConfig,
        dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
        | dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072)
        | dict(rms_norm_eps=1e-5)
        | dict(
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        ),
    ),
    "tiny": (
        LlamaConfig,
        dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
        | dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048),
    ),
}
SHAPES = tuple(name for name in _CONFIGS if name != "tiny")  # "tiny" is there to try things out


def config_of(shape: str) -> PreTrainedConfig:
    """Return the architecture of a shape.

    Raises:
        ModelError: If the shape is unknown.
    """
    if shape not in _CONFIGS:
        raise ModelError(f"no shape {shape!r}; there is {', '.join(_CONFIGS)}")
    kind, sizes = _CONFIGS[shape]
    return kind(**sizes, tie_word_embeddings=True)


def random_tensors(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Make seeded weights, named as by `save_pretrained`. On one device they are the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return dict(_filled(empty, dtype, device, generator))


def _filled(
    empty: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in empty.named_parameters():  # a tied output layer does not come again
        if "norm" in name:
            yield name, torch.ones(parameter.shape, dtype=dtype, device=device)
            continue
        # A variance of 1/inputs keeps activations near 1. The embedding, which is the output layer as well,
        # must not be larger, or each token would be its own likeliest successor.
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        yield name, noise.mul_(1 / math.sqrt(parameter.shape[-1])).to(dtype)


def random_model(
    shape: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    fused_projections: bool = True,
    packed_weights: bool = True,
    cpu_kernels: bool = True,
    say: Say | None = None,
) -> LoadedModel:
    """Make a model of a shape. The arguments are those of `load_model`.

    Raises:
        ModelError: If the shape, dtype or device is unknown.
    """
    to = resolve_device(device)
    as_type = resolve_dtype(dtype, to)
    config = config_of(shape)
    tensors = random_tensors(config, as_type, to)
    module = build_transformer(
        config,
        tensors.items(),
        dtype=as_type,
        device=to,
        quantization=quantization,
        fused_projections=fused_projections,
        packed_weights=packed_weights,
        cpu_kernels=cpu_kernels,
        say=say,
    )
    return LoadedModel(f"{shape} (random)", module, tiny_tokenizer(), config, frozenset(), quantization)


def random_reference(shape: str, loaded: LoadedModel) -> PreTrainedModel:
    """Make the model of `transformers` with the weights of a shape."""
    config = config_of(shape)
    tensors = random_tensors(config, loaded.dtype, loaded.device)
    with torch.device(loaded.device):
        reference = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    reference.load_state_dict(tensors, strict=False)  # the tied output layer is not among them
    return reference.to(loaded.device).eval()
