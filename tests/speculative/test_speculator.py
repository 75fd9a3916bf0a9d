"""Speculation changes how many steps there are, and never a token."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
from conftest import VOCAB, greedy, loaded
from hypothesis import given
from hypothesis import strategies as st

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.model_runner import accept
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.schedulers.audit import check_pool
from labkit.speculative.draft_model import ModelDrafter
from labkit.speculative.ngram import NgramDrafter
from labkit.speculative.speculator import Speculator, StepCosts, acceptance


def engine_of(speculative: str | None, **config) -> Engine:
    defaults = dict(block_size=4, num_blocks=80, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    if speculative == "draft":
        defaults["draft_model"] = loaded("qwen2")
    return Engine(
        EngineConfig(
            model=loaded("llama"), speculative=speculative, speculative_gate=False, **{**defaults, **config}
        )
    )


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks
    if engine.speculator and isinstance(engine.speculator.drafter, ModelDrafter):
        pool = engine.speculator.drafter.pool
        check_pool(pool)
        assert not pool.tables


def repetitive(rng: random.Random, length: int) -> list[int]:
    """A prompt in which n-grams occur again and again."""
    words = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 4))] for _ in range(3)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(words)
    return tokens[:length]


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


# -- who drafts -----------------------------------------------------------------------------------


def test_accept_counts_up_to_the_first_that_differs() -> None:
    assert accept((), ()) == 0
    assert accept((1, 2, 3), (1, 2, 3)) == 3
    assert accept((1, 2, 3), (1, 9, 3)) == 1
    assert accept((1, 2), (9, 2)) == 0


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), data=st.data())
def test_ngram_drafts_follow_the_longest_and_latest_match(tokens: list[int], data: st.DataObject) -> None:
    drafter = NgramDrafter(longest=4, shortest=2)
    count = data.draw(st.integers(1, 6))
    request = Request("0", tokens[:1], SamplingParams())
    for length in range(1, len(tokens) + 1):  # it reads on where it stopped
        if data.draw(st.booleans()) or length == len(tokens):
            request.token_ids = tokens[:length]
            assert drafter.propose([(request, count)]) == [by_hand(tokens[:length], count)]


@pytest.mark.parametrize(("longest", "shortest", "field"), [(2, 4, "longest"), (4, 0, "shortest")])
def test_ngrams_of_no_size_are_refused(longest: int, shortest: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be between"):
        NgramDrafter(longest, shortest)


def by_hand(tokens: list[int], count: int) -> tuple[int, ...]:
    for size in (4, 3, 2):
        end = tokens[-size:]
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(end) == size and tokens[place - size : place] == end:
                text = list(tokens)
                for i in range(count):
                    text.append(text[place + i])
                return tuple(text[len(tokens) :])
    return ()


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
