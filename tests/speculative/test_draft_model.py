"""A second model drafts: with the noise of the request, within its own pool, and only if it can."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.plan import StepPlan, StepResult
from labkit.speculative.speculator import acceptance
from tests.conftest import greedy, loaded
from tests.speculative.drafting import drain, engine_of, repetitive


def test_the_model_itself_drafts_what_it_then_chooses() -> None:
    """With noise of its own a sampled draft would be right by luck alone; with the request's it is right."""
    engine = engine_of("draft", draft_model=loaded("llama"), num_speculative_tokens=4)
    request_id = engine.add_request([5, 6, 7], SamplingParams(max_tokens=21, temperature=1.5, seed=1))
    drain(engine)
    plain = engine_of(None)
    other = plain.add_request([5, 6, 7], SamplingParams(max_tokens=21, temperature=1.5, seed=1))
    drain(plain)
    assert engine.outputs[request_id].token_ids == plain.outputs[other].token_ids
    assert acceptance(engine.trace) == [(4, 4)] * 4
    assert len(engine.trace) == 1 + 4, "one token from the prompt, then five in a step"


def test_an_abort_or_a_fault_in_drafting_ends_nobody_else() -> None:
    prompt = repetitive(random.Random(2), 20)
    engine = engine_of("draft")
    kept = engine.add_request(prompt, SamplingParams(max_tokens=30))
    gone = engine.add_request(prompt[1:], SamplingParams(max_tokens=30))
    for _ in range(3):
        engine.step()
    engine.abort(gone)
    run = engine.speculator.drafter.runner.run

    def broken(plan: StepPlan) -> StepResult:
        raise RuntimeError("made up")

    engine.step()
    engine.speculator.drafter.runner.run = broken
    engine.step()
    engine.step()
    assert engine.trace[-1].held_back == "nobody drafts: RuntimeError: made up"
    engine.speculator.drafter.runner.run = run
    drain(engine)
    assert engine.outputs[kept].token_ids == greedy("llama", prompt, 30)
    assert engine.outputs[gone].finish_reason == "abort"


def test_another_vocabulary_is_refused_and_so_is_what_cannot_draft() -> None:
    foreign = dataclasses.replace(loaded("qwen2"), tokenizer=SimpleNamespace(get_vocab=dict))
    with pytest.raises(ValueError, match="draft_model qwen2 has another vocabulary than llama"):
        engine_of("draft", draft_model=foreign)
    with pytest.raises(ValueError, match="draft_model must be named"):
        Engine(EngineConfig(model=loaded("llama"), speculative="draft"))
    for wrong, message in (
        (dict(speculative="magic"), "speculative must be None or 'ngram' or 'draft', not 'magic'"),
        (dict(speculative="ngram", scheduler="static"), "scheduler continuous or naive, not 'static'"),
        (dict(draft_model="tiny-random"), "draft_model needs speculative 'draft'"),
        (dict(num_speculative_tokens=0), "num_speculative_tokens must be at least 1"),
        (dict(speculative_gate=1), "speculative_gate must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**wrong)


def test_the_gate_measures_this_machine_and_changes_no_token() -> None:
    prompt = repetitive(random.Random(5), 30)
    engine = Engine(
        EngineConfig(model=loaded("llama"), speculative="ngram", block_size=4, num_blocks=40, audit=True)
    )
    costs = engine.speculator.costs
    assert costs.base + costs.token > 0
    assert engine.pool.num_free == 40
    request_id = engine.add_request(prompt, SamplingParams(max_tokens=40))
    drain(engine)
    assert engine.outputs[request_id].token_ids == greedy("llama", prompt, 40)
