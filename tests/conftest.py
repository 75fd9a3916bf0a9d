"""Small random models, and what `transformers` makes of the same prompts."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import settings

import tests.own_progress  # noqa: F401

# Where there is no GPU, Triton's kernels run on the CPU. To be said before anything imports Triton.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
# Tests run side by side, as do the notebooks' kernels: threads that wait for each other would take it all.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from labkit.kernels.cpu.layers import fuse
from labkit.models.architecture import build
from labkit.models.cache_dir import cache_dir
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_tokenizer

torch.set_num_threads(1)
settings.register_profile("labkit", deadline=None)  # seconds never decide a test
settings.load_profile("labkit")

VOCAB = 211
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.4,  # far from uniform, so that the top two are rarely close
)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


@functools.cache
def reference(family: str) -> PreTrainedModel:
    """A seeded random model of a family, as `transformers` runs it."""
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at birth, which would hide a forgotten bias
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@functools.cache
def loaded(family: str) -> LoadedModel:
    """The same weights in our own code."""
    model = reference(family)
    module = build(model.config, model.state_dict().items(), dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel(family, module, tiny_tokenizer(), model.config, frozenset())


@functools.cache
def fused(family: str) -> LoadedModel:
    """The same with the kernels for a CPU, where they can be compiled."""
    model = reference(family)
    module = build(model.config, model.state_dict().items(), dtype=torch.float32, device=torch.device("cpu"))
    fuse(module, cache_dir() / "kernels")
    return replace(loaded(family), module=module)


def generate(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What `generate` answers to one prompt, greedily and past any end of sequence."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@functools.cache
def _greedy(family: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    return tuple(generate(reference(family), prompt, max_tokens))


def greedy(family: str, prompt: Sequence[int], max_tokens: int, *, at_most: int = 48) -> list[int]:
    """The tokens of `generate`, one prompt at a time; the longest answer is computed once and cut."""
    return list(_greedy(family, tuple(prompt), max(max_tokens, at_most))[:max_tokens])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser beside other tests is at times too slow for what a test waits for: it gets a second try."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=2))
