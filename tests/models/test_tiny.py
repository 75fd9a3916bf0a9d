"""The tiny random model: the same everywhere, and hard to fool."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.models import tiny
from labkit.models.tiny import tiny_random, tiny_tokenizer
from tests.models.texts import CHAT, ODD_TEXTS

TINY_FINGERPRINT = "badc73597e2d5d09d5f8f04c0ea882548c50d974fb98e02abb3e30d2d54adf34"
TINY_CONTINUATION = [1475, 2164, 1995, 1607, 2050, 896, 1448, 624, 265, 370, 1134, 2312]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def test_tiny_random_is_the_same_on_every_machine() -> None:
    config, tensors, _ = tiny_random()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    assert digest.hexdigest() == TINY_FINGERPRINT
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not torch.equal(tiny_random(seed=1)[1]["lm_head.weight"], tensors["lm_head.weight"])
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 64, 2)


def tiny_reference() -> LlamaForCausalLM:
    config, tensors, _ = tiny_random()
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)  # strict: every tensor there, none too many
    return model


@torch.inference_mode()
def test_tiny_random_writes_varied_text_with_clear_winners() -> None:
    model, tokenizer = tiny_reference(), tiny_tokenizer()
    prompt = tokenizer("The cat and the dog", return_tensors="pt").input_ids
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False, eos_token_id=None
    )
    assert out[0, prompt.shape[1] :][:12].tolist() == TINY_CONTINUATION
    assert len(out[0, prompt.shape[1] :].unique()) > 100
    best = model(out).logits[0].topk(2).values
    gaps = best[:, 0] - best[:, 1]
    assert gaps.min() > 1e-4  # a hundred times what fp32 rounding does to logits of this size
    assert gaps.median() > 0.3


@torch.inference_mode()
def test_tiny_random_depends_on_every_earlier_token() -> None:
    model, config = tiny_reference(), tiny_random()[0]
    tokens = torch.randint(3, config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    changed = tokens.repeat(100, 1)
    for row in range(100):
        changed[row, row * 3 - 1] = (changed[row, row * 3 - 1] + 11) % config.vocab_size
    changed[0] = tokens[0].roll(1)  # the same tokens elsewhere
    changed[0, -1] = tokens[0, -1]
    last = model(tokens, logits_to_keep=1).logits
    effect = (model(changed, logits_to_keep=1).logits - last).abs().amax(dim=(1, 2))
    assert effect.min() > 1e-3


def test_tiny_tokenizer_has_a_token_for_each_common_word(tokenizer: PreTrainedTokenizerFast) -> None:
    words = (Path(tiny.__file__).parents[1] / "data" / "words.txt").read_text(encoding="utf-8").split()
    assert len(words) == len(set(words)) > 1500
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert all(len(tokenizer(" " + word).input_ids) == 1 for word in words)
    assert tokenizer.tokenize("The capital of France") == ["The", "Ġcapital", "Ġof", *"ĠFrance"]
    assert tokenizer.tokenize("zyx") == ["z", "y", "x"]


@given(text=st.text())
def test_tiny_tokenizer_round_trips_any_text(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_tokenizer_round_trips_odd_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in ODD_TEXTS] == ODD_TEXTS


def test_tiny_tokenizer_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert (ids[0], ids.count(tokenizer.eos_token_id)) == (tokenizer.bos_token_id, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<|im_start|>", "").replace(
        "<|im_end|>", ""
    )
