"""Sampled tokens depend on the request and its seed alone."""

from __future__ import annotations

import dataclasses
import random

import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.outputs import RequestOutput
from tests.conftest import loaded
from tests.engines import drain, engine_of, random_prompt


@pytest.mark.parametrize("policy", ["paged", "reserved"])
def test_sampled_tokens_do_not_depend_on_company_chunks_or_preemption(policy: str) -> None:
    rng = random.Random(4)
    jobs = [
        (
            random_prompt(rng, rng.randint(1, 30)),
            SamplingParams(max_tokens=20, temperature=0.9, top_k=k, seed=i),
        )
        for i, k in enumerate([0, 5, 0, 20] * 3)
    ]

    def run(**config) -> list[list[int]]:
        engine = engine_of(kv_policy=policy, **config)
        ids = [engine.add_request(prompt, params) for prompt, params in jobs]
        drain(engine)
        run.preempted = any(record.preempted for record in engine.trace)
        return [engine.outputs[i].token_ids for i in ids]

    alone = run(max_num_seqs=1, num_blocks=100)
    assert run(max_num_seqs=12, num_blocks=200) == alone
    assert run(max_num_seqs=12, num_blocks=30, max_num_batched_tokens=13) == alone
    assert run.preempted == (policy == "paged")
    assert run(scheduler="static", num_blocks=200) == alone


def test_requests_without_a_seed_differ_from_each_other_and_not_from_run_to_run() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = engine_of(seed=seed)
        params = SamplingParams(max_tokens=12, temperature=1.5)
        ids = [engine.add_request([1, 2, 3], params) for _ in range(3)]
        drain(engine)
        return [engine.outputs[i].token_ids for i in ids]

    first = run(0)
    assert len(set(map(tuple, first))) == 3
    assert first == run(0)
    assert first != run(1)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_answers_of_n_equal_those_of_their_own_seeds(length: int) -> None:
    prompt = random_prompt(random.Random(1), length)
    params = SamplingParams(max_tokens=15, temperature=1.0, n=4, seed=9)
    engine = engine_of(num_blocks=100)
    first = engine.add_request(prompt, params)
    drain(engine)
    shared = [engine.outputs[i].token_ids for i in (first, "0.1", "0.2", "0.3")]
    assert [engine.outputs[i].index for i in (first, "0.1", "0.2", "0.3")] == [0, 1, 2, 3]
    assert len(set(map(tuple, shared))) == 4
    forks = [a for record in engine.trace for a in record.admitted if a.shared]
    assert [a.num_cached_tokens for a in forks] == [length] * 3
    assert any(record.copied for record in engine.trace) == (length % 4 != 0)
    for config in (
        dict(max_num_seqs=1),
        dict(kv_policy="reserved"),
        dict(enable_prefix_caching=False, num_blocks=14),
    ):
        other = engine_of(**{"num_blocks": 100, **config})
        other.add_request(prompt, params)
        drain(other)
        assert [other.outputs[i].token_ids for i in (first, "0.1", "0.2", "0.3")] == shared


def test_logprobs_come_with_the_tokens() -> None:
    engine = engine_of()
    engine.add_request([1, 2], SamplingParams(max_tokens=6, logprobs=2))
    engine.add_request([1, 2], SamplingParams(max_tokens=6))
    drain(engine)
    output = engine.outputs["0"]
    assert [entry.token for entry in output.logprobs] == output.token_ids
    assert all(entry.top[0] == (entry.token, entry.logprob) for entry in output.logprobs)
    assert engine.outputs["1"].logprobs is None


@pytest.mark.parametrize("speculative", [None, "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_min_tokens_hold_back_every_end(temperature: float, speculative: str | None) -> None:
    """End of sequence and stop tokens, each of which would end this answer sooner."""
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    common = dict(max_tokens=24, temperature=temperature, seed=3)
    free = _run(prompt, SamplingParams(**common)).token_ids
    ends = frozenset(free[:3])
    ended = dataclasses.replace(loaded("llama"), eos_token_ids=ends)
    for least in (0, 1, 2, 5, 24):
        eos = _run(prompt, SamplingParams(min_tokens=least, **common), model=ended, speculative=speculative)
        ids = SamplingParams(min_tokens=least, stop_token_ids=sorted(ends), **common)
        assert eos.token_ids == _run(prompt, ids, speculative=speculative).token_ids
        assert not ends & set(eos.token_ids[:least])
        assert len(eos.token_ids) >= max(1, least)
        if len(eos.token_ids) < 24:
            assert eos.finish_reason == "stop"
            assert eos.token_ids[-1] in ends
        ignored = _run(prompt, SamplingParams(min_tokens=least, ignore_eos=True, **common), model=ended)
        assert ignored.token_ids == free
    assert len(_run(prompt, SamplingParams(**common), model=ended).token_ids) == 1


@pytest.mark.parametrize("least", [0, 3, 7, 12])
def test_a_stop_string_counts_once_it_ends_after_min_tokens(least: int) -> None:
    free = _run([5, 6, 7], SamplingParams(max_tokens=12))
    tokenizer = loaded("llama").tokenizer
    early = tokenizer.decode(free.token_ids[:least]).rstrip("\ufffd")
    for stop in sorted(set(free.text) - {"\ufffd"}):
        params = SamplingParams(max_tokens=12, min_tokens=least, stop=stop)
        output = _run([5, 6, 7], params)
        kept = _run([5, 6, 7], dataclasses.replace(params, include_stop_str_in_output=True))
        place = free.text.find(stop, len(early))
        assert output.token_ids == kept.token_ids
        if place < 0:
            assert output.text == kept.text == free.text
        else:
            assert (output.text, kept.text) == (free.text[:place], free.text[:place] + stop)
            assert output.finish_reason == "stop"


def test_special_tokens_are_text_if_they_are_asked_for() -> None:
    tokenizer = loaded("llama").tokenizer
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    params = SamplingParams(max_tokens=2, logit_bias={start: 100})
    assert _run([5], params).text == ""
    assert _run([5], dataclasses.replace(params, skip_special_tokens=False)).text == "<|im_start|>" * 2


def _run(prompt: list[int], params: SamplingParams, **config) -> RequestOutput:
    engine = Engine(EngineConfig(**{"model": loaded("llama"), "num_blocks": 60, "audit": True, **config}))
    name = engine.add_request(prompt, params)
    drain(engine)
    return engine.outputs[name]
