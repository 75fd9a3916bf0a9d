"""Our own code against `transformers`, logits for logits, and what it does with a wrong checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from labkit.core.attention import Span, build_metadata
from labkit.core.model import Transformer
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.architecture import build, supports
from tests.conftest import VOCAB, loaded, reference

CPU = torch.device("cpu")


def our_logits(
    model: Transformer, tokens: list[int], chunks: list[int], *, block_size: int = 4
) -> torch.Tensor:
    """Logits at every position, computed chunk by chunk over shuffled blocks."""
    count = -(-len(tokens) // block_size)
    cache = model.kv_shape.new_cache(count, block_size)
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    parts, start = [], 0
    for size in chunks:
        span = Span(start, size, table)
        metadata = build_metadata([span], cache, SDPA, windows=model.windows)
        positions = torch.arange(start, start + size)
        hidden = model(torch.tensor(tokens[start : start + size]), positions, cache, metadata)
        parts.append(model.logits(hidden))
        start += size
    return torch.cat(parts)


@pytest.mark.parametrize("chunks", [[40], [7, 7, 7, 7, 7, 5], [1] * 40, [39, 1]])
def test_logits_equal_transformers(family: str, chunks: list[int]) -> None:
    tokens = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        theirs = reference(family)(torch.tensor([tokens])).logits[0]
    ours = our_logits(loaded(family).module, tokens, chunks)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
            rope_theta=500000.0,
        ),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_rope_types_and_biases(rope: dict, bias: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_parameters=rope,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
    )
    theirs = LlamaForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ours = build(config, theirs.state_dict().items(), dtype=torch.float32, device=CPU)
    tokens = list(range(100))
    with torch.inference_mode():
        want = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(our_logits(ours, tokens, [64, 36]), want, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_close(family: str) -> None:
    """Teacher-forced: half the bits move logits by little next to their spread."""
    tokens = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        full = our_logits(loaded(family).module, tokens, [40])
        half = build(
            reference(family).config, reference(family).state_dict().items(), dtype=torch.bfloat16, device=CPU
        )
        error = (our_logits(half, tokens, [40]).float() - full).abs()
    assert half.dtype == torch.bfloat16
    assert error.mean() < 0.05 * full.std()
    assert error.max() > 0  # bf16 was really used


def test_wrong_checkpoints_are_named() -> None:
    model = reference("llama")
    state = dict(model.state_dict())

    def built(tensors: dict) -> Transformer:
        return build(model.config, tensors.items(), dtype=torch.float32, device=CPU)

    missing = {k: v for k, v in state.items() if "layers.1.self_attn.k_proj" not in k}
    with pytest.raises(
        ValueError, match=r"1 tensors are missing, among them 'layers.1.self_attn.k_proj.weight'"
    ):
        built(missing)
    with pytest.raises(ValueError, match=r"'layers.0.extra.weight' is not part of a llama model"):
        built({**state, "model.layers.0.extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'norm.weight' has shape \(3,\), not \(48,\)"):
        built({**state, "model.norm.weight": torch.ones(3)})


def test_what_is_supported() -> None:
    assert supports(LlamaConfig())
    assert not supports(LlamaConfig(hidden_act="gelu"))
    assert not supports(LlamaConfig(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)))
    assert not supports(GPT2Config())


def test_sizes_for_the_pool() -> None:
    module = loaded("llama").module
    assert module.kv_shape.bytes_per_token == 2 * 2 * 2 * 8 * 4
    cache = module.kv_shape.new_cache(3, 4)
    assert cache.blocks.nbytes == (3 + 1) * 4 * module.kv_shape.bytes_per_token
    assert module.max_model_len == 512


def test_an_engine_starts_without_the_modelling_code_of_transformers() -> None:
    """Which takes two seconds to import, in every process."""
    code = (
        "import sys; from labkit import Engine, EngineConfig; "
        "Engine(EngineConfig('tiny-random', device='cpu')); "
        "sys.exit('transformers.models.llama.modeling_llama' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
