"""The real default model, fetched once per machine: what it is, and its tokens against `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.analysis.workload import make_workload, prose
from labkit.benchmark.engine import perplexity
from labkit.models import gguf_convert, gguf_fetch
from labkit.models.hub import find
from labkit.models.load import LoadedModel, load_model
from tests.models.texts import CHAT, ODD_TEXTS

pytest_plugins = ["tests.models.fixtures"]

REAL_IDS = [504, 3575, 282, 4649]  # as SmolLM's own tokenizer has it
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rivers.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
    "List three uses for a paper clip.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain what a queue is to a child.",
]
TOKENS = 20


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompts(model: LoadedModel) -> list[list[int]]:
    """Eight chats and eight pieces of a book, from 20 to 150 tokens."""
    chats = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return chats + [job.prompt for job in make_workload(model.tokenizer, 8, prompt_tokens=(20, 150))]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        find("smollm2-135m", say=None), dtype=torch.float32
    )
    reference.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(
    "config",
    [
        dict(block_size=16, num_blocks=300, max_num_batched_tokens=512),
        dict(block_size=4, num_blocks=48, max_num_batched_tokens=64, max_num_seqs=8),  # preempts
    ],
)
def test_tokens_equal_transformers(
    model: LoadedModel, prompts: list[list[int]], expected: list[list[int]], config: dict
) -> None:
    engine = Engine(EngineConfig(model=model, audit=True, **config))
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    ids = []
    while len(ids) < len(prompts) or engine.has_unfinished:
        if len(ids) < len(prompts):
            ids.append(engine.add_request(prompts[len(ids)], params))
        engine.step()
    assert [engine.outputs[i].token_ids for i in ids] == expected
    assert any(record.preempted for record in engine.trace) == (config["num_blocks"] == 48)
    assert any({"c", "d"} <= set(record.kinds) or {"p", "d"} <= set(record.kinds) for record in engine.trace)


def test_it_answers_in_words(model: LoadedModel) -> None:
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, tokenize=False
    )
    (output,) = LLM(model, num_blocks=20).generate(prompt, progress=False)
    assert "Paris" in output.text
    assert output.finish_reason == "stop"


# -- the copy in the cache


def test_a_kv_cache_in_8_bits_costs_next_to_nothing_on_a_real_text(model: LoadedModel) -> None:
    text = model.tokenizer.encode(prose(), add_special_tokens=False)[:384]
    _, near = perplexity.compare_text(model, [], text, size=128, int8_kv=True)
    assert abs(near.ratio - 1) < 0.01  # loosely: on all of the text it is within 0.003
    assert near.top1_agreement > 0.95
    tokens = [
        LLM(model, kv_cache_dtype=dtype, num_blocks=40).chat("What is the capital of France?", progress=False)
        for dtype in (None, "int8")
    ]
    assert [out[0].text for out in tokens] == ["The capital of France is Paris."] * 2


@pytest.fixture(scope="session")
def real_folder() -> Path:
    return gguf_fetch.fetch()


@pytest.mark.usefixtures("no_network")
def test_the_default_model_is_read_as_it_lies_without_network(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("convert", "read_tokenizer"):  # it was done when the model was fetched
        monkeypatch.delattr(gguf_convert, work)
    model = load_model(say=None)
    assert find("smollm2-135m") == real_folder
    assert (model.name, model.config.num_hidden_layers, model.config.num_key_value_heads) == (
        "smollm2-135m",
        30,
        3,
    )
    assert model.config.vocab_size == 49152
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.eos_token_ids


@torch.inference_mode()
def test_the_default_model_knows_paris(real_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_default_tokenizer(real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    for text in ODD_TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("Hello  world 1234") == ["Hello", "Ġ", "Ġworld", "Ġ", "1", "2", "3", "4"]
    assert tokenizer("The capital of France").input_ids == REAL_IDS
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)
