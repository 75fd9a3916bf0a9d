"""Turn a GGUF file of a Llama into the folder that `save_pretrained` would have written.

GGUF is one file with everything in it: named tensors in small-integer formats, and metadata from which the
configuration, the tokenizer and the chat template can be read back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

# What llama.cpp calls a tensor, and what transformers calls it.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # the token type of <|im_end|> and other special tokens


def convert(gguf: Path, folder: Path, *, watch: Callable[[list], Iterable] = iter) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` (fp16) and the tokenizer files.

    Args:
        gguf: a GGUF file with a Llama and a "smollm" tokenizer.
        folder: an existing folder to write to.
        watch: a wrapper for the list of tensors, such as a progress bar.

    Raises:
        ValueError: if the file holds something else, or a weight that fp16 cannot hold.
        OSError: if writing fails.
    """
    reader = GGUFReader(gguf)

    def meta(key: str):
        field = reader.get_field(key)
        if field is None:
            raise ValueError(f"{gguf.name} has no metadata {key!r}")
        return field.contents()

    kind = (meta("general.architecture"), meta("tokenizer.ggml.model"), meta("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{gguf.name} holds {'/'.join(kind)}, but only llama/gpt2/smollm can be converted")

    names = {tensor.name for tensor in reader.tensors}
    config = read_config(meta, tied="output.weight" not in names)
    tensors = {}
    for tensor in watch(list(reader.tensors)):
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermute(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermute(weight, config.num_key_value_heads)
        tensors[hf_name(tensor.name)] = torch.from_numpy(to_half(weight, tensor.name))

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    # safetensors lets only the owner read its file, but a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    read_tokenizer(meta).save_pretrained(folder)


def read_config(meta: Callable, *, tied: bool) -> LlamaConfig:
    """Read the configuration from the metadata.

    Args:
        tied: whether the output layer is the embedding table.
    """

    def real(key: str) -> float:
        return float(str(np.float32(meta(key))))  # stored as fp32: 1e-05, and not 9.999999747378752e-06

    hidden, heads = meta("llama.embedding_length"), meta("llama.attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(meta("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=meta("llama.feed_forward_length"),
        num_hidden_layers=meta("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta("llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=meta("llama.context_length"),
        rms_norm_eps=real("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": real("llama.rope.freq_base")},
        tie_word_embeddings=tied,
        bos_token_id=meta("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta("tokenizer.ggml.eos_token_id"),
        pad_token_id=meta("tokenizer.ggml.padding_token_id"),
        dtype="float16",
    )


def hf_name(name: str) -> str:
    """Translate a tensor's name: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            _, number, part, end = parts
            return f"model.layers.{int(number)}.{LAYER_NAMES[part]}.{end}"
        part, end = parts
        return f"{OTHER_NAMES[part]}.{end}"
    except (KeyError, ValueError):
        raise ValueError(f"a Llama has no tensor {name!r}") from None


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection, (rows, columns), back in the order of `transformers`.

    RoPE turns pairs of dimensions. `transformers` pairs dimension i of a head with i + half, GGUF with its
    neighbour, so GGUF stores each head's rows as 0, half, 1, half + 1, ...
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_half(weight: np.ndarray, name: str) -> np.ndarray:
    """Round fp32 to fp16, which loses nothing that matters. Raises `ValueError` for numbers beyond its range.

    A quantised weight is an integer times an fp16 scale (plus an fp16 offset). It lies up to half a step from
    the weight it was made from: 1/30 of the range of its group with 4 bits, 1/508 with 8. Compared with that,
    the relative error of fp16, at most 1/2048, is small. Norms were bf16 and come through unchanged.
    """
    largest = np.abs(weight).max(initial=0)
    if not largest <= np.finfo(np.float16).max:  # "not <=" is also true of NaN
        raise ValueError(f"{name} holds {largest}, which is more than fp16 can hold")
    return weight.astype(np.float16)


def read_tokenizer(meta: Callable) -> PreTrainedTokenizerFast:
    """Build the tokenizer: byte-level BPE that takes digits one at a time, as SmolLM's own does."""
    tokens, types = meta("tokenizer.ggml.tokens"), meta("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in meta("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[meta("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[meta("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[meta("tokenizer.ggml.padding_token_id")],
        chat_template=meta("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta("llama.context_length"),
    )
