"""Models of `transformers` on the paged cache: the tokens of `generate`, or a refusal that says why."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.core.attention import Span, build_metadata
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.adapter import adapt
from labkit.models.errors import ModelError
from labkit.models.load import LoadedModel, load_model
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import SIZES, VOCAB, generate

MIXED = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    **dict(head_dim=8, num_key_value_heads=6, first_k_dense_replace=2),
)
FAMILIES = {
    "gemma3_text": MIXED,
    "phi3": dict(sliding_window=12),
    "gpt2": {},
    "opt": dict(ffn_dim=80, word_embed_proj_dim=32),
    "olmo2": {},
    "granite": dict(
        attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=0.5
    ),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "stablelm": dict(use_qkv_bias=True, qk_layernorm=True),
}
MORE_FAMILIES = {
    "cohere": dict(logit_scale=2.0, use_qk_norm=True),
    "cohere2": dict(**MIXED, logit_scale=2.0),
    "ernie4_5": dict(use_bias=True),
    "exaone4": MIXED,
    "gemma": {},
    "gemma2": dict(
        **MIXED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, attn_implementation="eager"
    ),
    "glm": dict(attention_bias=True),
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": dict(**MIXED, **EXPERTS),
    "granitemoehybrid": dict(
        layer_types=["attention"] * 2, shared_intermediate_size=32, mamba_n_heads=12, mamba_d_head=8
    ),
    "llama": dict(hidden_act="gelu", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    "ministral3": dict(
        rope_parameters=dict(
            **dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=16),
            **dict(llama_4_scaling_beta=1.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0),
        )
    ),
    "mixtral": dict(**EXPERTS, sliding_window=12),
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "phi": {},
    "qwen2_moe": dict(**EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": EXPERTS,
    "starcoder2": dict(sliding_window=12),
}


def build(kind: str, seed: int = 7, **settings) -> PreTrainedModel:
    """A small random model of a type, with biases and norms that cannot be forgotten unnoticed."""
    sizes = dict(**SIZES, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    settings = {name: value for name, value in {**sizes, **settings}.items() if value is not None}
    config = AutoConfig.for_model(kind, **settings)
    seq2seq = config.is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "sinks" in name:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter) + 1.5 * ("post_" in name)
    return model


@functools.cache
def reference(kind: str) -> PreTrainedModel:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return build(kind, **{**FAMILIES, **MORE_FAMILIES}[kind])


def as_loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(type(model).__name__, adapt(model), tiny_tokenizer(), model.config, frozenset())


@functools.cache
def loaded(kind: str) -> LoadedModel:
    return as_loaded(reference(kind))


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@functools.cache
def jobs(kind: str) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers: longer than the window, with a shared start, around the edges of pages."""
    common, tail, *prompts = random_prompts(3, 20, 9, 33, 1, 15, 16, 17)
    prompts = [common, *prompts[:2], common + tail, *prompts[2:], common + tail[:1]]
    return [(prompt, generate(reference(kind), prompt, 15 - i)) for i, prompt in enumerate(prompts)]


def engine_of(model: LoadedModel, **config) -> Engine:
    defaults = dict(block_size=4, num_blocks=18, max_num_seqs=3, max_num_batched_tokens=7, audit=True)
    return Engine(EngineConfig(model=model, **{**defaults, **config}))


def answers(engine: Engine, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    ids = [
        engine.add_request(prompt, SamplingParams(max_tokens=length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    while engine.has_unfinished:
        engine.step()
    assert not any(engine.outputs[i].error for i in ids)
    assert engine.pool.num_free == engine.pool.num_blocks
    return [engine.outputs[i].token_ids for i in ids]


def check_tokens(kind: str, num_jobs: int = 8, **config) -> Engine:
    engine = engine_of(loaded(kind), **config)
    prompts, wanted = zip(*jobs(kind)[:num_jobs], strict=True)
    assert answers(engine, prompts, [len(tokens) for tokens in wanted]) == list(wanted)
    return engine


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "block_size, num_blocks, budget, caching",
    [(4, 18, 7, True), (4, 18, 512, False), (16, 5, 7, False), (16, 5, 512, True)],
)
def test_tokens_equal_generate(
    kind: str, block_size: int, num_blocks: int, budget: int, caching: bool
) -> None:
    engine = check_tokens(
        kind,
        max_num_batched_tokens=budget,
        block_size=block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=caching,
    )
    assert budget == 7 or any(record.preempted for record in engine.trace)
    assert caching == any(a.num_cached_tokens for record in engine.trace for a in record.admitted)


@pytest.mark.parametrize("kind", MORE_FAMILIES)
def test_tokens_of_more_families_equal_generate(kind: str) -> None:
    check_tokens(kind, num_jobs=4)
    check_tokens(kind, num_jobs=4, block_size=16, num_blocks=5, max_num_batched_tokens=512)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "opt"])
def test_scaled_and_capped_logits_are_those_of_the_model(kind: str) -> None:
    """Greedy tokens alone would not tell: they are the same at any scale."""
    module, tokens = loaded(kind).module, torch.tensor(random_prompts(8, 30)[0])
    cache = module.kv_shape.new_cache(8, 4)
    layout = build_metadata([Span(0, 30, range(8))], cache, SDPA, windows=module.windows)
    logits = module.logits(module(tokens, torch.arange(30), cache, layout)[-3:])
    with torch.inference_mode():
        wanted = reference(kind)(input_ids=tokens[None]).logits[0, -3:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2", "opt"])
@pytest.mark.parametrize("scheduler", ["static", "naive"])
def test_padding_and_other_schedulers_change_nothing(kind: str, scheduler: str) -> None:
    check_tokens(kind, scheduler=scheduler, num_blocks=100, max_num_batched_tokens=64)


@pytest.mark.parametrize("kind", {**FAMILIES, **MORE_FAMILIES})
def test_a_corrupted_block_table_changes_the_tokens(kind: str) -> None:
    """The negative control: answers of every family hang on what is in their pages."""
    engine = engine_of(loaded(kind), audit=False, num_blocks=100)
    forward = engine.runner._forward

    def corrupted(plan, rows, spans):
        for span in spans:
            span.table = [*span.table[:-2], *reversed(span.table[-2:])] if span.start else span.table
        return forward(plan, rows, spans)

    engine.runner._forward = corrupted
    prompts, wanted = zip(*jobs(kind)[:4], strict=True)
    assert answers(engine, prompts, [len(tokens) for tokens in wanted]) != list(wanted)


def test_two_engines_share_one_model_which_stays_as_it_was() -> None:
    model = build("gemma3_text", seed=8, **MIXED)
    attention, (prompt, other) = model.config._attn_implementation, random_prompts(5, 30, 22)
    before = generate(model, prompt, 20)
    shared = as_loaded(model)
    first, second = engine_of(shared), engine_of(shared, block_size=16, max_num_batched_tokens=64)
    a = first.add_request(prompt, SamplingParams(max_tokens=20))
    b = second.add_request(other, SamplingParams(max_tokens=20))
    middle = None
    while first.has_unfinished or second.has_unfinished:
        first.step()
        second.step()
        middle = middle or generate(model, prompt, 20)
    assert first.outputs[a].token_ids == middle == before
    assert second.outputs[b].token_ids == generate(model, other, 20)
    assert model.config._attn_implementation == attention
    kept = {tensor.data_ptr() for tensor in model.parameters()}
    assert kept == {tensor.data_ptr() for tensor in shared.module.parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "gpt_oss", "mixtral"])
def test_half_precision_is_no_reason_to_refuse(kind: str, dtype: torch.dtype) -> None:
    settings = {**FAMILIES, **MORE_FAMILIES}[kind]
    assert adapt(build(kind, **settings).to(dtype)).dtype == dtype


def test_length_ends_where_rotary_frequencies_would_change() -> None:
    factors = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0])
    rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=48, **factors)
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=48)
    module = as_loaded(model)
    assert module.module.max_model_len == 48
    (prompt,) = random_prompts(6, 30)
    assert answers(engine_of(module), [prompt], [18]) == [generate(model, prompt, 18)]


# -- refusals -------------------------------------------------------------------------------------

BYPASS = "does not go through the AttentionInterface"
STATE = "keeps a state besides keys and values"
REFUSED = {
    "falcon": (dict(head_dim=None), BYPASS),
    "gpt_neo": (dict(attention_types=[[["global", "local"], 1]], num_layers=2), BYPASS),
    "bloom": ({}, "takes no position_ids"),
    "mpt": ({}, "takes no position_ids"),
    "mamba": ({}, STATE),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), STATE),
    "jamba": (dict(**EXPERTS, attn_layer_period=2, attn_layer_offset=1), STATE),
    "t5": (dict(d_kv=8, d_ff=32, num_heads=4), "encoder-decoder"),
    "bert": ({}, "neither causal nor causal within a sliding window"),
    "doge": ({}, "attention masks of its own"),
    "deepseek_v3": (LATENT, "not all of one size"),
    "jetmoe": (dict(kv_channels=8), "logits come out otherwise"),
    "openai-gpt": ({}, "does not keep the keys and values of all its layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    settings, why = REFUSED[kind]
    model = build(kind, **settings)
    with pytest.raises(
        ModelError, match=f"^{type(model).__name__} cannot run on the paged KV cache: .*{why}"
    ):
        adapt(model)


LATENT_KINDS = {
    "deepseek_v3": {**LATENT, "v_head_dim": 12},  # whose output layer gets too much, if nobody looks
    "deepseek_v2": LATENT,
    "minicpm3": LATENT,
    "glm4_moe_lite": LATENT,
    "longcat_flash": LATENT,
}


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_latent_attention_is_refused_as_what_it_is(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = build(kind, **LATENT_KINDS[kind])
    with pytest.raises(
        ModelError, match=r"multi-head latent attention.* \(kv_lora_rank in its config.json\)"
    ):
        adapt(model)


def test_attention_within_chunks_is_refused_as_what_it_is() -> None:
    model = build("llama4_text", num_local_experts=2, attention_chunk_size=8)
    with pytest.raises(ModelError, match=r"^Llama4ForCausalLM .* attends within chunks"):
        adapt(model)


def test_multi_modal_model_is_refused() -> None:
    eyes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    eyes |= dict(image_size=28, patch_size=14)
    config = AutoConfig.for_model("gemma3", text_config=SIZES, vision_config=eyes, mm_tokens_per_image=4)
    with pytest.raises(ModelError, match=r"^Gemma3ForConditionalGeneration .* takes more than text"):
        adapt(AutoModelForCausalLM.from_config(config).eval())


class Shifted(nn.Module):
    """Looks at the token before, which in a flattened batch is somebody else's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.roll(1, dims=1))


def test_what_shows_in_nothing_but_the_logits_is_refused() -> None:
    model = build("llama")
    adapt(model)
    model.model.layers[1].mlp = Shifted(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match="logits come out otherwise"):
        adapt(model)


def test_mask_that_is_plain_only_by_chance_is_refused() -> None:
    """Doge adds learned numbers to its mask: the same number everywhere, as long as these are zero."""
    model = build("doge")
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.A)
    with pytest.raises(ModelError, match="attention masks of its own"):
        adapt(model)


def test_unknown_argument_of_attention_is_refused_by_its_name() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = functools.partial(attention.forward, position_bias=torch.zeros(1))
    with pytest.raises(ModelError, match="takes more than pages hold: position_bias"):
        adapt(model)


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is in training mode: call eval\(\)"):
        adapt(build("llama").train())


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_folder_is_loaded_and_answers_as_generate_does(folder: Path) -> None:
    (prompt,) = random_prompts(9, 20)
    llm = LLM(str(folder), num_blocks=20)
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True), progress=False)
    assert output.token_ids == generate(reference("gpt2"), prompt, 12)
    assert llm.engine.model.eos_token_ids == {2}


def test_folder_of_a_refused_model(tmp_path: Path) -> None:
    build("falcon", head_dim=None).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"FalconForCausalLM cannot run on .*{BYPASS}"):
        load_model(tmp_path, say=None)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_tensors_that_are_missing_or_misshapen_are_never_made_up(change: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensor = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = tensor[:, 1:].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors in .* missing or misshapen, such as .*{name}"):
        load_model(folder, say=None)


def test_folder_of_something_else_than_a_language_model(folder: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(folder)
    with pytest.raises(ModelError, match=r"cannot load .* as a causal language model"):
        load_model(folder, say=None)


def test_states_that_are_not_finite_give_no_finite_logits_in_spite_of_a_soft_cap() -> None:
    adapted = adapt(build("gemma2", seed=3, **MORE_FAMILIES["gemma2"]))
    hidden = torch.ones(3, SIZES["hidden_size"])
    hidden[0, 5], hidden[1, 7] = torch.inf, torch.nan
    assert adapted.logits(hidden).isfinite().any(dim=-1).tolist() == [False, False, True]
