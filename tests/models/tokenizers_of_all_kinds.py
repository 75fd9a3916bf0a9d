"""Small tokenizers of each kind that checkpoints come with, made with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.models.architecture import build
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import SIZES

WORDS = ["hello", "world", "cat", "s", "a", "b", "c", ".", ",", "é", "日"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"  # how SentencePiece writes the space before a word


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _pieces(*, fallback: bool) -> list[str]:
    return [
        "<unk>",
        *(BYTES if fallback else ()),
        SPACE,
        SPACE * 2,
        *(SPACE + word for word in WORDS),
        *WORDS,
    ]


def _bpe(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    vocab = {piece: number for number, piece in enumerate(_pieces(fallback=True))}
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    backend.decoder = decoder
    return _fast(backend)


def llama_2() -> PreTrainedTokenizerFast:
    """BPE of SentencePiece with bytes to fall back to; the space at the start of a text is stripped."""
    parts = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return _bpe(decoders.Sequence(parts))


def gemma() -> PreTrainedTokenizerFast:
    """The same, but the space at the start stays."""
    return _bpe(decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def bytes_then_metaspace() -> PreTrainedTokenizerFast:
    """The same, but the first token loses all of its spaces."""
    return _bpe(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]))


def unigram() -> PreTrainedTokenizerFast:
    """Unigram of SentencePiece, as T5 and XLM-R have it."""
    pieces = [(piece, -float(number)) for number, piece in enumerate(_pieces(fallback=False))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece, as BERT has it."""
    pieces = ["<unk>", *WORDS, *("##" + word for word in WORDS)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _fast(backend)


def end_of_word() -> PreTrainedTokenizerFast:
    """BPE that marks the end of a word, as GPT-1 has it."""
    pieces = ["<unk>", *WORDS, *(word + "</w>" for word in WORDS)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder()
    return _fast(backend)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny_tokenizer,
    "llama 2": llama_2,
    "gemma": gemma,
    "bytes then metaspace": bytes_then_metaspace,
    "unigram": unigram,
    "word piece": word_piece,
    "end of word": end_of_word,
}


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@lru_cache
def model_with(kind: str) -> LoadedModel:
    """A small random Llama with a tokenizer of a kind, called by that kind."""
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(7)
    reference = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": -(-len(tokenizer) // 8) * 8}))
    weights, cpu = reference.state_dict().items(), torch.device("cpu")
    module = build(reference.config, weights, dtype=torch.float32, device=cpu)
    return LoadedModel(kind, module, tokenizer, reference.config, frozenset())
