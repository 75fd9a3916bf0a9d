"""A model over several processes answers what `transformers` answers, and counts what that costs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from labkit import Engine, EngineConfig, SamplingParams
from labkit.analysis.roofline import ModelSize, StepWork
from labkit.models.errors import ModelError
from labkit.models.load import LoadedModel
from labkit.parallel import load_parallel
from tests.conftest import FAMILIES, SIZES, generate, reference
from tests.engines import drain, random_prompt
from tests.in_threads import in_threads  # noqa: F401

pytestmark = pytest.mark.usefixtures("in_threads")

MANY_HEADS = {**SIZES, "num_attention_heads": 12, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the families, and of a Llama whose heads three and four processes can share."""
    folders = {}
    for name in (*FAMILIES, "many heads"):
        model = many_heads() if name == "many heads" else reference(name)
        folders[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        model.save_pretrained(folders[name])
    return folders


def many_heads() -> PreTrainedModel:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**MANY_HEADS)).eval()


def parallel(folder: Path, world_size: int, **switches: object) -> LoadedModel:
    return load_parallel(folder, world_size, say=None, **switches)


def engine_of(model: LoadedModel, **config: object) -> Engine:
    sizes = dict(block_size=4, num_blocks=60, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    return Engine(EngineConfig(model=model, **{**sizes, **config}), say=None)


@pytest.mark.parametrize("cpu_kernels", [True, False])
def test_two_processes_answer_as_one_does(family: str, saved: dict[str, Path], cpu_kernels: bool) -> None:
    """With chunks, preemptions, a prefix cache and drafts, in an order that chance decides."""
    model = parallel(saved[family], 2, cpu_kernels=cpu_kernels)
    rng = random.Random(5)
    shared = random_prompt(rng, 12)
    jobs = [(shared + random_prompt(rng, rng.randrange(1, 60)), rng.randrange(4, 24)) for _ in range(8)]
    for config in (
        dict(max_num_batched_tokens=16, num_blocks=30),  # chunks, and too little room for all
        dict(speculative="ngram", speculative_gate=False),
        dict(scheduler="static", enable_chunked_prefill=False),  # padding
    ):
        engine = engine_of(model, **config)
        ids = [
            engine.add_request(prompt, SamplingParams(ignore_eos=True, max_tokens=most))
            for prompt, most in jobs
        ]
        drain(engine)
        for name, (prompt, most) in zip(ids, jobs, strict=True):
            assert engine.outputs[name].token_ids == generate(reference(family), prompt, most)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_three_and_four_processes_too(world_size: int, saved: dict[str, Path]) -> None:
    """Of three, one has two KV heads, and the others one each and more columns."""
    model = parallel(saved["many heads"], world_size)
    engine = engine_of(model)
    prompts = [random_prompt(random.Random(n), 5 + 3 * n) for n in range(5)]
    ids = [engine.add_request(prompt, SamplingParams(ignore_eos=True, max_tokens=12)) for prompt in prompts]
    drain(engine)
    for name, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[name].token_ids == generate(many_heads(), prompt, 12)


def test_answers_that_share_blocks_are_copied_in_all_processes(saved: dict[str, Path]) -> None:
    prompt = random_prompt(random.Random(1), 10)  # ends in the middle of a block
    params = SamplingParams(
        ignore_eos=True, max_tokens=10, n=3, temperature=1, seed=4, logprobs=2, prompt_logprobs=1
    )
    found = []
    for model in (str(saved["llama"]), parallel(saved["llama"], 2)):
        engine = engine_of(model)
        engine.add_request(prompt, params)
        drain(engine)
        assert any(record.copied for record in engine.trace)
        found.append(engine.outputs.values())
    for alone, together in zip(*found, strict=True):
        assert alone.token_ids == together.token_ids
        for one, other in zip(alone.logprobs, together.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_each_process_keeps_its_heads_in_8_bits(saved: dict[str, Path]) -> None:
    """A scale belongs to a head, so nothing is rounded otherwise than in one process."""
    prompt = random_prompt(random.Random(1), 10)
    model = parallel(saved["llama"], 2)
    for params in (
        SamplingParams(ignore_eos=True, max_tokens=20),
        SamplingParams(ignore_eos=True, max_tokens=10, n=3, temperature=1, seed=4),
    ):
        found, taken = [], []
        for one in (str(saved["llama"]), model):
            engine = engine_of(one, kv_cache_dtype="int8", num_blocks=24)
            engine.add_request(prompt, params)
            drain(engine)
            found.append([output.token_ids for output in engine.outputs.values()])
            taken.append(engine.runner.cache.blocks.nbytes)
        assert found[0] == found[1]
        assert engine.runner.cache.blocks.dtype == torch.int8 and taken[0] == 2 * taken[1]
    exact = engine_of(model)  # beside it, with the same processes
    name = exact.add_request(prompt, SamplingParams(ignore_eos=True, max_tokens=9))
    drain(exact)
    assert exact.outputs[name].token_ids == generate(reference("llama"), prompt, 9)


def test_whole_numbers_are_cut_before_they_are_rounded(saved: dict[str, Path]) -> None:
    """Each process rounds its own part: close to what one computes, and no more than that."""
    prompt, hidden = random_prompt(random.Random(2), 30), []
    params = SamplingParams(ignore_eos=True, max_tokens=1, prompt_logprobs=0)
    for model in (str(saved["llama"]), parallel(saved["llama"], 2, quantization="int8")):
        engine = engine_of(model)
        name = engine.add_request(prompt, params)
        drain(engine)
        known = engine.outputs[name].prompt_logprobs[1:]
        hidden.append(torch.tensor([entry.logprob for entry in known]))
    plain, rounded = hidden
    assert (plain - rounded).abs().mean() < 0.25
    assert not torch.equal(plain, rounded)


def test_bytes_are_what_the_formula_says(saved: dict[str, Path]) -> None:
    for world_size in (2, 4):
        engine = engine_of(parallel(saved["many heads"], world_size), max_num_batched_tokens=16)
        for length in (90, 9, 2):
            engine.add_request(
                random_prompt(random.Random(length), length), SamplingParams(ignore_eos=True, max_tokens=5)
            )
        drain(engine)
        layers, hidden, itemsize = 2, 48, 4
        share = 2 * (world_size - 1) / world_size
        size = ModelSize(  # what the capacity model expects, of which parameters and heads do not matter here
            1, layers, 12, 4, 4, hidden=hidden, vocab=MANY_HEADS["vocab_size"], activation_bytes=itemsize
        )
        assert any(not work.sampled for work in map(StepWork.of, engine.trace))  # chunks of a prompt
        for record in engine.trace:
            expected = size.traffic(StepWork.of(record), world_size)
            assert (record.sent_in_layers, record.sent_elsewhere) == (expected.in_layers, expected.elsewhere)
            assert record.sent_in_layers == 2 * layers * record.total_tokens * hidden * itemsize * share
            assert 0 < record.sending < record.seconds
    assert not any(record.sent_in_layers for record in engine_of("tiny-random").trace)


def test_engines_share_a_model_and_forget_their_caches(saved: dict[str, Path]) -> None:
    model = parallel(saved["qwen3"], 2)
    engines = [engine_of(model, num_blocks=20 + n) for n in range(2)]
    prompt = random_prompt(random.Random(8), 20)
    ids = [engine.add_request(prompt, SamplingParams(ignore_eos=True, max_tokens=8)) for engine in engines]
    while any(engine.has_unfinished for engine in engines):
        for engine in engines:
            engine.step()
    answers = [engine.outputs[name].token_ids for engine, name in zip(engines, ids, strict=True)]
    assert answers == [generate(reference("qwen3"), prompt, 8)] * 2
    engines[0].release()
    assert len(model.module.workers.dropped) == 1


def test_an_error_in_one_process_ends_the_model_with_its_reason(saved: dict[str, Path]) -> None:
    model = parallel(saved["llama"], 2)
    engine = engine_of(model)
    name = engine.add_request([1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=8))
    engine.step()
    engine.runner.cache.edits.append(("no_such_method", []))  # which the other process will be told
    with pytest.raises(RuntimeError, match=r"process 1 of this model failed: AttributeError.*no_such_method"):
        engine.step()
    assert "process 1 of this model failed" in engine.outputs[name].error
    late = engine.add_request([1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=8))
    with pytest.raises(RuntimeError, match="process 1"):
        engine.step()
    assert engine.outputs[late].finish_reason == "error"


def test_what_cannot_be_had_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tensor_parallel_size=3 does not divide 6 heads over 2 KV heads"):
        parallel(saved["llama"], 3)
    with pytest.raises(ValueError, match="tensor_parallel_size needs attention_backend 'auto'"):
        EngineConfig(tensor_parallel_size=2, attention_backend="sdpa")
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        EngineConfig(tensor_parallel_size=0)
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tensor_parallel_size cannot be had for .*: a gpt2 runs as"):
        parallel(tmp_path, 2)
