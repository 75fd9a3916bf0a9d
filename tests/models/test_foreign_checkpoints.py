"""Checkpoints as people have them: what `transformers` does with a folder, we do, or say why not.

Reported elsewhere, tried here:

| project, report                 | what was tried                             | outcome                    |
|---------------------------------|--------------------------------------------|----------------------------|
| vLLM 51063, 6758                | an output layer beside a tied embedding    | was dropped; now it counts |
| transformers 29553              | a Mistral with `attention_bias`            | was refused; now ignored   |
| transformers 27923, exllama 242 | pointers of git-lfs for weights, tokenizer | was "damaged"; now named   |
| vLLM 11374                      | no tokenizer, prompts of token ids         | was refused; now it works  |

One difference is left on purpose: a tensor that no part of an own family takes is an error here, and a
warning in `transformers`.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from labkit import LLM, SamplingParams
from labkit.models.architecture import build, shape_of
from labkit.models.checkpoint import read_config
from labkit.models.errors import ModelError
from labkit.models.hub import find
from labkit.models.load import load_model
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import FAMILIES, SIZES, VOCAB, generate
from tests.models.saved_models import edit_json

pytest_plugins = ["tests.models.fixtures"]

PROMPTS = [[5, 77, 130, 9, 42, 42, 17], list(range(20, 60)), [199, 3]]


def save(folder: Path, kind: str, *, tokenizer: bool = True, **settings: object) -> Path:
    """Save a small random model of a family, with biases and norms that cannot be forgotten unnoticed."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def untouched(folder: Path) -> PreTrainedModel:
    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def without_cache(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens of a model that reads everything anew: windows are right there in any case."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check_tokens(folder: Path, **settings: object) -> None:
    llm = LLM(str(folder), num_blocks=40, block_size=4, **settings)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    found = [out.token_ids for out in llm.generate(PROMPTS, params, progress=False)]
    model = untouched(folder)
    assert found == [without_cache(model, prompt, 10) for prompt in PROMPTS]


# -- a tied embedding, and an output layer in the file ---------------------------------------------


def other_head(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors["lm_head.weight"] = 0.4 * torch.randn(VOCAB, SIZES["hidden_size"], generator=generator)


def same_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


HEADS = {"other": other_head, "same": same_head, "alone": head_alone}


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_the_file_counts_as_in_transformers(head: str, family: str, tmp_path: Path) -> None:
    save(tmp_path, family, tie_word_embeddings=True)
    edit_tensors(tmp_path, HEADS[head])
    check_tokens(tmp_path)
    module = load_model(tmp_path, packed_weights=False, say=None).module
    tied = module.lm_head.weight.data_ptr() == module.embed_tokens.weight.data_ptr()
    assert tied == module.shape.tie_word_embeddings == (head != "other")


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_the_file_counts_in_int8(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that says that it is tied, and one that says what its file holds, are the same model."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    edit_tensors(tmp_path / "tied", HEADS[head])
    shutil.copytree(tmp_path / "tied", tmp_path / "untied")
    edit_json(tmp_path / "untied" / "config.json", lambda c: c.update(tie_word_embeddings=False))

    def two_tables(tensors: dict[str, Tensor]) -> None:
        for one, other in (("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")):
            tensors.setdefault(f"{one}.weight", tensors.get(f"{other}.weight", torch.empty(0)).clone())

    edit_tensors(tmp_path / "untied", two_tables)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    tokens = [
        [out.token_ids for out in llm.generate(PROMPTS, params, progress=False)]
        for llm in (LLM(str(tmp_path / n), quantization="int8", num_blocks=40) for n in ("tied", "untied"))
        for _ in range(2)
    ]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(VOCAB + 1, 48)}))
    with pytest.raises(ModelError, match=r"'lm_head.weight' has shape \(212, 48\), not \(211, 48\)"):
        load_model(tmp_path, say=None)


def test_a_model_saved_without_its_head_has_the_names_of_its_own(family: str, tmp_path: Path) -> None:
    save(tmp_path, family, tie_word_embeddings=True)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    check_tokens(tmp_path)


def test_a_tensor_that_nothing_uses_is_refused_by_name(family: str, tmp_path: Path) -> None:
    save(tmp_path, family)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}))
    with pytest.raises(ModelError, match=r"'layers.0.extra.weight' is not part of a"):
        load_model(tmp_path, say=None)


def test_what_the_adapter_does_not_use_is_told(tmp_path: Path) -> None:
    save(tmp_path, "olmo2", pad_token_id=0, eos_token_id=2)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}))
    said: list[str] = []
    load_model(tmp_path, say=said.append)
    assert any("left aside" in line and "model.layers.0.extra.weight" in line for line in said)


# -- settings that one family reads and another does not -------------------------------------------

STRAY = {
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "sliding_window": dict(sliding_window=3),
    "use_sliding_window": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "layer_types": dict(
        sliding_window=5, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]
    ),
    "window of 1": dict(sliding_window=1, use_sliding_window=True, max_window_layers=0),
    "no window": dict(sliding_window=None),
    "qk_norm": dict(use_qk_norm=True, qk_layernorm=True),
    "pretraining_tp": dict(pretraining_tp=2),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    "rope_interleaved": dict(rope_interleaved=True, rope_scaling=None, rope_theta=500.0),
    "scales": dict(
        logit_scale=3.0, embedding_multiplier=2.0, attention_multiplier=9.0, query_pre_attn_scalar=4
    ),
    "caps": dict(final_logit_softcapping=1.0, attn_logit_softcapping=1.0),
    "no_rope_layers": dict(no_rope_layers=[0, 1], no_rope_layer_interval=1),
    "eps": dict(rms_norm_eps=0.3, layer_norm_eps=7.0),
    "num_key_value_heads": dict(num_key_value_heads=6),
    "head_dim": dict(head_dim=16),
    "rope_theta": dict(rope_parameters=dict(rope_type="default", rope_theta=30.0)),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "llama3": dict(
        rope_parameters=dict(
            **dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0),
            **dict(high_freq_factor=4.0, original_max_position_embeddings=64),
        )
    ),
    "yarn": dict(
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128
        )
    ),
    "dynamic": dict(
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    ),
    "activation": dict(hidden_act="gelu"),
    "old scaling": dict(rope_scaling=dict(type="linear", factor=4.0), rope_theta=1e4),
}


@pytest.mark.parametrize("setting", STRAY)
def test_a_setting_means_what_it_means_to_transformers(setting: str, family: str, tmp_path: Path) -> None:
    """Tokens equal those of the untouched model, which ignores what its family does not read."""
    save(tmp_path, family, **STRAY[setting])
    edit_json(tmp_path / "config.json", lambda config: config.update(STRAY[setting]))  # as a person writes it
    check_tokens(tmp_path)


# What the modelling code of the four families reads, in transformers 5.3 as in 5.24.
READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
    *("attention_bias", "mlp_bias", "layer_types", "sliding_window", "rope_parameters"),
}
WITHOUT_EFFECT = {"attention_dropout", "pad_token_id", "_attn_implementation", "pretraining_tp"}  # on answers


def test_every_key_that_transformers_reads_is_known(family: str) -> None:
    """A release that reads another key fails here, and the key is then obeyed or refused."""
    source = Path(inspect.getfile(type(FAMILIES[family]()))).read_text(encoding="utf-8")
    found = set(re.findall(r"config\.(\w+)|config, \"(\w+)\"", source))
    keys = {key for pair in found for key in pair if key}
    assert keys - READ - WITHOUT_EFFECT == set()


def test_scaling_of_old_files_counts_more_than_plain_positions(tmp_path: Path) -> None:
    """A Llama's file that says everything is read without `transformers`, unless it says this, too."""
    save(tmp_path, "llama")
    edit_json(
        tmp_path / "config.json",
        lambda c: c.update(rope_scaling=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    )
    check_tokens(tmp_path)


REFUSED = {
    "looks ahead": (dict(is_causal=False), r"^is_causal is false"),
    "looks ahead, says 0": (dict(is_causal=0), r"^is_causal is false"),
    "encoder-decoder": (dict(is_encoder_decoder=True), "is an encoder-decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_setting_is_refused_by_its_name(
    case: str, quantization: str | None, family: str, tmp_path: Path
) -> None:
    settings, message = REFUSED[case]
    save(tmp_path, family)
    edit_json(tmp_path / "config.json", lambda config: config.update(settings))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, quantization=quantization, say=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types has 'chunked_attention'"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "no sliding_window"),
        (dict(sliding_window=0, use_sliding_window=True, max_window_layers=0), "at least 1, not 0"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_that_qwen_does_not_have_are_refused(settings: dict, message: str, kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    with pytest.raises(ModelError, match=message):
        shape_of(config)


def test_frequencies_for_a_part_of_a_head_are_refused() -> None:
    rope = dict(rope_type="linear", rope_theta=1e4, factor=2.0, partial_rotary_factor=0.5)
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        shape_of(AutoConfig.for_model("llama", **SIZES, rope_parameters=rope))


# -- a folder without a tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_folder_without_a_tokenizer_takes_token_ids(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind, tokenizer=False, pad_token_id=0, eos_token_id=2)
    llm = LLM(str(tmp_path), num_blocks=40)
    assert llm.engine.model.eos_token_ids == {2}
    params = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
    outputs = llm.generate(PROMPTS, params, progress=False)
    model = untouched(tmp_path)
    assert [out.token_ids for out in outputs] == [generate(model, prompt, 10) for prompt in PROMPTS]
    assert all(out.text == "" and len(out.logprobs) == 10 for out in outputs)
    with pytest.raises(ValueError, match="no tokenizer: its prompts must be token ids, not text"):
        llm.generate("Hello", progress=False)
    with pytest.raises(ValueError, match="stop needs text"):
        llm.generate(PROMPTS, SamplingParams(stop=["."]), progress=False)
    ended = llm.generate(
        PROMPTS[:1], SamplingParams(stop_token_ids=[outputs[0].token_ids[2]]), progress=False
    )
    assert len(ended[0].token_ids) <= 3 and ended[0].finish_reason == "stop"


def test_a_draft_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", tokenizer=False)
    with pytest.raises(ModelError, match="no vocabulary to compare"):
        LLM(str(tmp_path), speculative="draft", draft_model=str(tmp_path), num_blocks=40)


# -- folders that are something else ---------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 269060552\n"


def replace_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def config_gone(folder: Path, name: str) -> None:
    (folder / "config.json").rename(folder / name)


def quantised(how: str) -> Callable[[Path], object]:
    settings = dict(quantization_config=dict(quant_method=how, bits=4))
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(settings))


ELSE = {
    "pointer for weights": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "safetensors .*git lfs pull",
    ),
    "pointer for a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        "tokenizer.json .*git-lfs",
    ),
    "pointer for a config": (lambda f: (f / "config.json").write_text(POINTER), "config.json .*git-lfs"),
    "gguf with a config": (
        lambda f: replace_weights(f, "model-q4.gguf"),
        "no model.safetensors.* it has GGUF",
    ),
    "gguf alone": (
        lambda f: (replace_weights(f, "model-q4.gguf"), config_gone(f, "readme.json")),
        "no config.json; it has GGUF",
    ),
    "onnx": (lambda f: replace_weights(f, "model.onnx"), "it has ONNX"),
    "flax": (lambda f: replace_weights(f, "flax_model.msgpack"), "it has Flax"),
    "Mistral's own names": (
        lambda f: replace_weights(f, "consolidated.safetensors"),
        "safetensors under other names",
    ),
    "adapter": (lambda f: config_gone(f, "adapter_config.json"), "has a LoRA adapter"),
    "adapter beside a model": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "has a LoRA adapter",
    ),
    **{
        how: (quantised(how), rf"are quantised \({how}\)")
        for how in ("gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "aqlm", "hqq", "torchao")
    },
    "compressed-tensors of old": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(compression_config=dict(format="pack"))),
        "are quantised",
    ),
    "mlx": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(quantization=dict(group_size=64, bits=4))),
        "are quantised",
    ),
    "gptq of old": (lambda f: (f / "quantize_config.json").write_text("{}"), r"are quantised \(gptq\)"),
    "awq of old": (lambda f: (f / "quant_config.json").write_text("{}"), r"are quantised \(awq\)"),
}


@pytest.mark.parametrize("case", ELSE)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo2"])
def test_a_folder_of_something_else_is_refused_by_what_it_is(
    case: str, kind: str, tmp_path: Path, no_network: None
) -> None:
    change, message = ELSE[case]
    change(save(tmp_path, kind, pad_token_id=0))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, say=None)


def test_what_transformers_unpacks_by_itself_is_left_to_it(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    quantised("mxfp4")(tmp_path)
    assert read_config(tmp_path).quantization_config["quant_method"] == "mxfp4"


def test_the_path_of_a_file_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model.gguf' is a file: a model is the folder"):
        find(tmp_path / "model.gguf", say=None)


@pytest.mark.parametrize("said", [None, {}, "none", False])
def test_what_says_that_it_is_not_quantised_is_loaded(said: object, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    settings = dict(quantization_config=None if isinstance(said, str) else said, quantization=said)
    edit_json(tmp_path / "config.json", lambda config: config.update(settings))
    load_model(tmp_path, say=None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize(("kind", "quantization"), [("llama", None), ("llama", "int8"), ("olmo2", None)])
def test_numbers_without_scales_are_not_taken_for_weights(
    dtype: torch.dtype, kind: str, quantization: str | None, tmp_path: Path
) -> None:
    save(tmp_path, kind, pad_token_id=0)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: (50 * t[name]).to(dtype)}))
    what = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"layers.1.mlp.up_proj.weight'.* is quantised \({what}\)"):
        load_model(tmp_path, quantization=quantization, say=None)


def test_an_encoder_decoder_is_refused_as_one(tmp_path: Path) -> None:
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    AutoConfig.for_model("bart", d_model=32, vocab_size=VOCAB, **sizes).save_pretrained(tmp_path)
    save_file({"shared.weight": torch.ones(VOCAB, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(bart\)"):
        load_model(tmp_path, say=None)


def test_weights_are_never_a_view_into_the_file() -> None:
    """Who saves a model anew where it lies must not change the one that runs."""
    torch.manual_seed(2)
    model = FAMILIES["llama"]()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other_head(tensors)
    ours = build(model.config, tensors.items(), dtype=torch.float32, device=torch.device("cpu"))
    before = ours.lm_head.weight.clone()
    tensors["lm_head.weight"].zero_()
    assert torch.equal(ours.lm_head.weight, before)
