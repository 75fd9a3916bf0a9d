"""Speculation changes how many steps there are, and never a token."""

from __future__ import annotations

import random

import pytest

from labkit import SamplingParams
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.speculative.ngram import NgramDrafter
from labkit.speculative.speculator import Speculator, StepCosts
from tests.conftest import greedy
from tests.speculative.drafting import drain, engine_of, repetitive

# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(num_blocks=24),  # some are preempted
        dict(max_num_batched_tokens=7, max_num_seqs=3),
        dict(kv_policy="reserved"),
        dict(enable_prefix_caching=False, block_size=1, num_blocks=300),
        dict(scheduler="naive", num_speculative_tokens=3),
        dict(enable_chunked_prefill=False, max_num_batched_tokens=90),
    ],
    ids=str,
)
def test_tokens_equal_transformers(speculative: str, config: dict) -> None:
    rng = random.Random(1)
    jobs = [(repetitive(rng, length), rng.randint(1, 40)) for length in (1, 2, 15, 16, 17, 33, 33)]
    engine = engine_of(speculative, **config)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=most)) for prompt, most in jobs]
    drain(engine)
    for request_id, job in zip(ids, jobs, strict=True):
        assert engine.outputs[request_id].token_ids == greedy("llama", *job), request_id
    assert sum(record.total_drafted for record in engine.trace) > 0
    assert any(record.preempted for record in engine.trace) == (config == dict(num_blocks=24))


def test_a_wrong_rule_of_acceptance_changes_the_tokens() -> None:
    """The negative control: the comparison above is able to fail."""
    rng = random.Random(1)
    prompt = repetitive(rng, 33)
    engine = engine_of("draft")
    engine.runner.accept = lambda drafts, chosen: len(drafts)
    request_id = engine.add_request(prompt, SamplingParams(max_tokens=30))
    drain(engine)
    assert engine.outputs[request_id].token_ids != greedy("llama", prompt, 30)


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
def test_sampled_tokens_logprobs_and_penalties_are_those_without_speculation(speculative: str) -> None:
    rng = random.Random(3)
    prompts = [repetitive(rng, rng.randint(3, 30)) for _ in range(6)]
    params = [
        SamplingParams(
            max_tokens=25,
            temperature=temperature,
            top_k=k,
            repetition_penalty=1.1 if k else 1.0,
            frequency_penalty=0.2,
            seed=k,
            logprobs=2,
        )
        for k, temperature in enumerate([0.0, 0.3, 0.6, 0.9, 1.2, 0.1])
    ]

    def run(speculative: str | None) -> list:
        engine = engine_of(speculative)
        ids = [engine.add_request(*job) for job in zip(prompts, params, strict=True)]
        drain(engine)
        run.steps = len(engine.trace)
        return [engine.outputs[i] for i in ids]

    plain = run(None)
    plain_steps = run.steps
    drafted = run(speculative)
    for a, b in zip(plain, drafted, strict=True):
        assert a.token_ids == b.token_ids
        assert [x.token for x in a.logprobs] == [x.token for x in b.logprobs] == b.token_ids
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
        assert len(b.metrics.token_times) == len(b.token_ids)
    assert run.steps <= plain_steps


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
def test_answers_of_n_stops_and_ends_are_those_without_speculation(speculative: str) -> None:
    prompt = repetitive(random.Random(8), 18)
    text = engine_of(None)
    free = text.add_request(prompt, SamplingParams(max_tokens=30, temperature=0.4, seed=4))
    drain(text)
    answer = text.outputs[free]
    for extra in (
        dict(n=3),
        dict(stop=answer.text[10:13]),
        dict(stop_token_ids=[answer.token_ids[11]]),
        dict(max_tokens=2),
        dict(max_tokens=1),
    ):
        params = SamplingParams(**{**dict(max_tokens=30, temperature=0.4, seed=4, logprobs=0), **extra})
        outputs = []
        for kind in (None, speculative):
            engine = engine_of(kind)
            engine.add_request(prompt, params, request_id="a")
            drain(engine)
            outputs.append(engine.outputs)
        assert outputs[0].keys() == outputs[1].keys()
        for name, plain in outputs[0].items():
            drafted = outputs[1][name]
            assert (plain.token_ids, plain.text, plain.finish_reason) == (
                drafted.token_ids,
                drafted.text,
                drafted.finish_reason,
            )
            assert len(drafted.logprobs) == len(drafted.token_ids)


# -- whether it pays ------------------------------------------------------------------------------


def rows_of(count: int) -> list[Request]:
    rows = []
    for i in range(count):
        request = Request(str(i), [1, 2, 3, 1, 2], SamplingParams(max_tokens=1000))
        request.num_computed_tokens, request.status = 4, "running"
        rows.append(request)
    return rows


def test_the_price_of_a_draft_rises_with_the_rows_and_with_who_drafts() -> None:
    costs = StepCosts(base=12, token=1, plain_base=12)
    assert costs.price(1) == pytest.approx(1 / 13)
    assert costs.price(12) == pytest.approx(1 / 2)
    with_model = StepCosts(base=12, token=1, plain_base=12, draft_base=3, draft_token=0.25)
    assert with_model.price(1) == pytest.approx((1 + 3.25) / 13)


def test_nobody_drafts_where_it_cannot_pay() -> None:
    speculator = Speculator(NgramDrafter(), 4, StepCosts(base=1, token=1, plain_base=1, draft_base=9))
    rows = rows_of(3)
    assert speculator.draft(rows) == (
        "nobody drafts: in a step of 3 rows a draft costs more than it can bring"
    )
    assert not any(request.drafts for request in rows)


def test_leaving_a_captured_graph_must_pay_too() -> None:
    speculator = Speculator(NgramDrafter(), 4, StepCosts(base=100, token=1, plain_base=10))
    assert "would take too much longer" in speculator.draft(rows_of(1))


def test_who_drafts_badly_stops_and_tries_again_more_and_more_seldom() -> None:
    speculator = Speculator(NgramDrafter(), 4, StepCosts(base=12, token=1, plain_base=12))
    (request,) = rows = rows_of(1)
    tries = []
    for step in range(400):
        why = speculator.draft(rows)
        if request.drafts:
            tries.append(step)
            plan = StepPlan()
            plan.add(request, 1)
            plan.draft(0, request.drafts)
            speculator.learn(plan, StepResult([(9,)]))  # never right
        else:
            assert why.startswith("1 of 1 rows draft nothing: a draft pays if it is right 10% of the time")
    first = [step for step in tries if step < 30]
    assert first == list(range(len(first))), "at first each step"
    pauses = [b - a for a, b in zip(tries[len(first) - 1 :], tries[len(first) :], strict=False)]
    assert pauses[:3] == [32, 64, 128]


def test_who_drafts_well_goes_on_with_as_many_as_may_be() -> None:
    speculator = Speculator(NgramDrafter(), 4, StepCosts(base=12, token=1, plain_base=12))
    (request,) = rows = rows_of(1)
    for _ in range(20):
        assert speculator.draft(rows) == ""
        plan = StepPlan()
        plan.add(request, 1)
        plan.draft(0, request.drafts)
        speculator.learn(plan, StepResult([(*request.drafts, 7)]))
    assert len(request.drafts) == 4
