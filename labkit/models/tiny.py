"""`tiny-random`: a small Llama with seeded weights and a toy tokenizer, made in memory in a moment.

It knows nothing, but it does everything that a real model does. Its token ids depend on every earlier token
and position, and they are the same on any machine, so it is the model for exact tests and checked notebooks.
"""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import LlamaConfig

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # padding, bos, eos
CAPITALISED = 200  # how many of the most common words also have a token with a capital letter
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_random(seed: int = 0) -> tuple[LlamaConfig, dict[str, Tensor], PreTrainedTokenizerFast]:
    """Build the model: its configuration, its tensors and its tokenizer.

    Args:
        seed: the seed of the weights; another seed is another model of the same shape.

    Returns:
        config: 2 layers, hidden size 64, 4 heads of 16 over 2 KV heads, 2,048 positions, untied output layer.
        tensors: weights in fp32 on the CPU, under the names that `LlamaForCausalLM.load_state_dict` knows.
        tokenizer: a byte-level one. A common word is one token, other text goes byte by byte, and any text
            decodes to what it was.
    """
    from transformers import LlamaConfig  # here, because it takes a second to import

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    return config, _tensors(config, seed), tokenizer


def _tensors(config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(rows: int, columns: int, scale: float) -> Tensor:
        # Uniform noise is exact integer arithmetic, while normal noise goes through log and cos, whose last
        # bit differs between machines. A variance of 1/columns keeps activations near 1.
        noise = 2 * torch.rand(rows, columns, generator=generator) - 1
        return noise * (scale * math.sqrt(3 / columns))

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": uniform(config.vocab_size, hidden, math.sqrt(hidden))}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        tensors |= {
            # Large queries and keys make attention pick out a few tokens. An even average over a long past
            # would hardly change if one entry of the KV cache were wrong, and this model must show that.
            layer + "self_attn.q_proj.weight": uniform(queries, hidden, 1.5),
            layer + "self_attn.k_proj.weight": uniform(keys, hidden, 1.5),
            # Large values make an answer depend on the past, and not on the last token alone, in which case
            # it would soon run in a circle.
            layer + "self_attn.v_proj.weight": uniform(keys, hidden, 1.5),
            layer + "self_attn.o_proj.weight": uniform(hidden, queries, 1.5),
            layer + "mlp.gate_proj.weight": uniform(inner, hidden, 1.0),
            layer + "mlp.up_proj.weight": uniform(inner, hidden, 1.0),
            layer + "mlp.down_proj.weight": uniform(hidden, inner, 1.0),
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
        }
    # Logits with a deviation of 4: the best two are rarely so close that rounding could swap them.
    head = uniform(config.vocab_size, hidden, 4.0)
    head[: len(SPECIAL_TOKENS) + 256] *= 0.5  # so that it mostly writes words, and seldom stops by itself
    return tensors | {"model.norm.weight": torch.ones(hidden), "lm_head.weight": head}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the toy tokenizer: three special tokens, the 256 bytes, and the words of `data/words.txt`."""
    words = files("labkit").joinpath("data/words.txt").read_text(encoding="utf-8").split()
    capitals = [word.capitalize() for word in words[:CAPITALISED]]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # "Ġ" is how byte-level tokenizers write the space before a word.
    tokens += ["Ġ" + word for word in [*words, *capitals]] + capitals + ["system", "user", "assistant"]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(tokens))}

    # No merges at all: a word that is a token is taken whole, and any other falls apart into bytes.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
