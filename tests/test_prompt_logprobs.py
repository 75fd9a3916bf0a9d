"""The log-probabilities of a prompt's tokens, against the logits of `transformers` itself."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from labkit import Engine, EngineConfig, SamplingParams
from labkit.serving.async_engine import AsyncEngine
from tests.conftest import loaded, reference

LONG = [(7 * i + i * i) % 211 for i in range(70)]
PROMPTS = [[5], [199, 3], *(LONG[-n:] for n in (3, 4, 5, 17, 64)), [*LONG[:40], 1, 2, 3], LONG, LONG]
SETTINGS = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 12, "max_num_seqs": 4},
    "preemption": {"num_blocks": 32, "max_model_len": 120, "max_num_batched_tokens": 30},
    "static": {"scheduler": "static"},
    "naive": {"scheduler": "naive"},
    "uncached": {"scheduler": "uncached"},
    "reserved": {"kv_policy": "reserved"},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 200},
    "drafts": {"speculative": "ngram", "speculative_gate": False},
}


def engine(family: str, **settings: object) -> Engine:
    sizes = {"num_blocks": 90, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    return Engine(EngineConfig(model=loaded(family), audit=True, **{**sizes, **settings}), say=None)


@functools.cache
def expected(family: str, prompt: tuple[int, ...]) -> torch.Tensor:
    """What `transformers` foretells after each token: (tokens, vocabulary)."""
    with torch.inference_mode():
        return reference(family)(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_they_are_those_of_transformers(settings: dict[str, object], family: str) -> None:
    running = engine(family, **settings)
    asked = {"prompt_logprobs": 3, "max_tokens": 12, "ignore_eos": True}
    ids = []
    for number, prompt in enumerate(PROMPTS):
        more = {"n": 3, "temperature": 1.0, "seed": 4} if number % 3 == 2 else {}
        ids.append(running.add_request(prompt, SamplingParams(**asked, **more)))
        if number % 2:
            running.step()
    while running.has_unfinished:
        running.step()
    if "num_blocks" in settings:
        assert sum(output.metrics.num_preemptions for output in running.outputs.values())
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        output, logits = running.outputs[request_id], expected(family, tuple(prompt))
        assert output.finish_reason == "length"
        assert output.metrics.num_cached_tokens == 0  # what is cached has no logits
        first, *rest = output.prompt_logprobs
        assert first is None and [entry.token for entry in rest] == prompt[1:]
        for before, entry in zip(logits, rest, strict=False):
            assert entry.logprob == pytest.approx(float(before[entry.token]), abs=1e-4)
            assert [token for token, _ in entry.top] == before.topk(3).indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(
                before.topk(3).values.tolist(), abs=1e-4
            )


def test_the_answers_to_one_prompt_share_them() -> None:
    running = engine("llama")
    running.add_request(LONG, SamplingParams(prompt_logprobs=0, n=9, temperature=1.0, max_tokens=3))
    running.run()
    first, *others = running.outputs.values()
    assert len(first.prompt_logprobs) == len(LONG) and not first.prompt_logprobs[1].top
    assert all(output.prompt_logprobs is first.prompt_logprobs for output in others)


def test_they_change_no_answer_and_nobody_elses() -> None:
    """What such a request computes is cached for others, and its own look-ups are not counted as misses."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    running = engine("qwen3")
    plain = running.add_request(LONG, params)
    running.run()
    asked = running.add_request(LONG, dataclasses.replace(params, prompt_logprobs=1))
    looked_up = running.step().admitted[0].num_looked_up
    running.run()
    again = running.add_request(LONG, params)
    running.run()
    outputs = [running.outputs[request_id] for request_id in (plain, asked, again)]
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0, 68]
    assert looked_up == 0
    assert outputs[0].prompt_logprobs is None is outputs[2].prompt_logprobs


def test_a_preview_leaves_them_alone() -> None:
    running = engine("llama", max_num_batched_tokens=16)
    request_id = running.add_request(LONG, SamplingParams(prompt_logprobs=0, max_tokens=2))
    known = []
    while running.has_unfinished:
        running.preview()
        running.step()
        known.append(len(running.outputs[request_id].prompt_logprobs))
    assert known == [17, 33, 49, 65, 70, 70]


@pytest.mark.parametrize("value", [-1, 21, 1.5, True])
def test_a_wrong_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs must be"):
        SamplingParams(prompt_logprobs=value)


def test_a_snapshot_has_them_once_they_are_complete() -> None:
    with AsyncEngine(engine("llama", max_num_batched_tokens=16)) as live:
        ids = live.submit(LONG, SamplingParams(prompt_logprobs=0, max_tokens=3, ignore_eos=True))
        for snapshot in live.stream(ids):
            assert (snapshot.prompt_logprobs is None) == (not snapshot.token_ids)
        assert len(snapshot.prompt_logprobs) == len(LONG)
