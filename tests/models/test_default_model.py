"""The real default model: sixteen real prompts, each injected at another step, token for token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.analysis.workload import make_workload
from labkit.models.load import LoadedModel, find, load_model

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
