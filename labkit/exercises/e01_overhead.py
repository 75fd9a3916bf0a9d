"""A model of many layers and hardly any weights: what its steps take is not spent on reading weights."""

from __future__ import annotations

from transformers import LlamaConfig

from labkit.analysis.shapes import random_tensors
from labkit.models.load import LoadedModel, build_transformer
from labkit.models.tiny import tiny_tokenizer


def hollow(loaded: LoadedModel) -> LoadedModel:
    """Make a model of as many layers as another one, each so narrow that its weights fit into a cache.

    Args:
        loaded: the other one. The new one has its dtype and its device, 512 tokens, and random weights.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=loaded.config.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tensors = random_tensors(config, loaded.dtype, loaded.device)
    module = build_transformer(config, tensors.items(), dtype=loaded.dtype, device=loaded.device, say=None)
    return LoadedModel("hollow", module, tiny_tokenizer(), config, frozenset(), None)
