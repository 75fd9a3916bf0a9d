"""Fifteen bugs that other engines had, each guarded by a test that says what it is about."""

from __future__ import annotations

import random

import pytest

from labkit import SamplingParams
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.models.detokenizer import IncrementalDetokenizer
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import VOCAB, greedy
from tests.core.scheduler_bench import Bench
from tests.engines import drain, engine_of, random_prompt

PROMPT = random_prompt(random.Random(0), 21)


def answer(engine, prompt: list[int], max_tokens: int = 12, **params) -> list[int]:
    request_id = engine.add_request(prompt, SamplingParams(max_tokens=max_tokens, **params))
    drain(engine)
    return engine.outputs[request_id].token_ids


def test_01_decode_that_forgets_the_cache_is_told_apart() -> None:
    assert answer(engine_of(), PROMPT) == greedy("llama", PROMPT, 12)
    engine = engine_of(audit=False)
    engine.add_request(PROMPT, SamplingParams(max_tokens=12))
    while engine.has_unfinished:
        engine.step()
        engine.runner.cache.k.zero_()
        engine.runner.cache.v.zero_()
    assert engine.outputs["0"].token_ids != greedy("llama", PROMPT, 12)


def test_02_a_request_larger_than_the_pool_is_refused_not_retried() -> None:
    engine = engine_of(num_blocks=5, max_model_len=100)
    with pytest.raises(ValueError, match="raise num_blocks"):
        engine.add_request(PROMPT, SamplingParams(max_tokens=1))
    assert not engine.has_unfinished


@pytest.mark.parametrize("length", [4, 8, 20])
def test_03_a_prefix_hit_on_the_whole_prompt_leaves_a_token_to_compute(length: int) -> None:
    engine = engine_of()
    first = answer(engine, PROMPT[:length])
    again = answer(engine, PROMPT[:length])
    assert first == again == greedy("llama", PROMPT[:length], 12)
    hit = [a.num_cached_tokens for record in engine.trace for a in record.admitted][1]
    assert hit == length - 4


def test_04_cached_tokens_are_counted_anew_after_a_preemption() -> None:
    bench = Bench(blocks=8, size=2, seats=2, budget=40)
    first = bench.add([1] * 8, 6)
    second = bench.add([1] * 4 + [2] * 2, 6)
    admissions = []
    while bench.scheduler.has_unfinished:
        record = bench.step()
        state = bench.trace.state(record.step)
        for admission in record.admitted:
            admissions.append(admission)
            assert admission.num_cached_tokens == 2 * len(admission.shared)
            assert state.tables[admission.request_id][: len(admission.shared)] == list(admission.shared)
            start = record.starts[record.requests.index(admission.request_id)]
            assert start == admission.num_cached_tokens
    names = [admission.request_id for admission in admissions]
    assert names.count(first) + names.count(second) > 2


def test_05_a_block_is_found_only_once_written_and_only_for_its_own_tokens() -> None:
    bench = Bench(blocks=20, size=4)
    bench.add(list(range(9)), 4)
    plan = bench.scheduler.schedule()
    assert bench.pool.match(list(range(9))) == []  # planned, not yet written
    result = StepResult([(1,)])
    bench.scheduler.commit(plan, result)
    bench.auditor.check_record(bench.trace.append(record_step(-1, plan, result, bench.scheduler)))
    table = bench.pool.tables["0"]
    assert bench.pool.match(list(range(9))) == table[:2]
    assert bench.pool.match([0, 1, 2, 3, 4, 5, 6, 99, 8]) == table[:1]
    assert bench.pool.match([99, *range(1, 9)]) == []
    bench.scheduler.abort("0")
    bench.step()
    assert bench.pool.match(list(range(9))) == table[:2]  # given back, not forgotten
    bench.add([7] * 76, 4)
    bench.step()
    assert bench.pool.match(list(range(9))) in ([], table[:1])  # forgotten when taken again


def test_06_block_tables_are_append_only() -> None:
    rng = random.Random(3)
    bench = Bench(blocks=14, size=3, seats=4)
    before: dict[str, list[int]] = {}
    for _ in range(300):
        if rng.random() < 0.3:
            bench.add([rng.randrange(2) for _ in range(rng.randint(1, 12))], rng.randint(1, 9))
        record = bench.step(token=rng.randrange(2))
        tables = {name: list(table) for name, table in bench.pool.tables.items()}
        gone = {name for name, _ in record.preempted}
        for name, table in before.items():
            if name in tables and name not in gone:
                assert tables[name][: len(table)] == table
        before = tables


def test_07_a_preempted_request_keeps_its_tokens_and_chunks_see_no_further_than_themselves() -> None:
    rng = random.Random(5)
    jobs = [(random_prompt(rng, 20), 30) for _ in range(4)]
    engine = engine_of(num_blocks=26, max_num_batched_tokens=7)
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    drain(engine)
    again = {name for record in engine.trace for name, _ in record.preempted}
    assert again
    for request_id, job in zip(ids, jobs, strict=True):
        assert engine.outputs[request_id].token_ids == greedy("llama", *job)
        assert engine.outputs[request_id].metrics.num_preemptions == sum(
            name == request_id for record in engine.trace for name, _ in record.preempted
        )


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_08_block_boundaries(size: int, blocks: int, off: int) -> None:
    length = blocks * size + off
    if length > 0:
        prompt = random_prompt(random.Random(length), length)
        assert answer(engine_of(block_size=size), prompt, 2 * size + 1) == greedy(
            "llama", prompt, 2 * size + 1
        )


def test_09_no_thrash_near_a_full_pool() -> None:
    bench = Bench(blocks=12, size=2, seats=6, budget=40, caching=False)
    for i in range(12):
        bench.add([i] * 5, 12)
    bench.drain()
    preemptions = sum(len(record.preempted) for record in bench.trace)
    assert 0 < preemptions <= 2 * 12
    assert not any(record.preempted and record.admitted for record in bench.trace)


def test_10_stale_memory_reaches_nobody() -> None:
    engine = engine_of()
    engine.runner.cache.k.fill_(50.0)
    engine.runner.cache.v.fill_(-50.0)
    rng = random.Random(6)
    jobs = [(random_prompt(rng, length), 9) for length in (1, 3, 30, 5, 17)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    drain(engine)
    assert [engine.outputs[i].token_ids for i in ids] == [greedy("llama", *job) for job in jobs]
    fresh = engine_of().runner.cache
    assert not fresh.k.any()
    assert not fresh.v.any()


def test_11_no_shape_or_length_is_frozen_from_one_step_to_the_next() -> None:
    """One engine through batches that grow, shrink and change length by turns."""
    rng = random.Random(7)
    engine = engine_of(num_blocks=200, max_num_seqs=12)
    for count, length in ((1, 60), (12, 1), (3, 33), (12, 40), (1, 1), (5, 90)):
        jobs = [(random_prompt(rng, max(1, length - i)), 5 + i) for i in range(count)]
        ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
        drain(engine)
        assert [engine.outputs[i].token_ids for i in ids] == [greedy("llama", *job) for job in jobs]


def test_12_streams_split_no_character_lose_no_tail_and_leak_no_stop_string() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("snow ☃ 🌨 STOP more")
    stream = IncrementalDetokenizer(tokenizer, ["STOP"])
    seen = []
    for token in tokens:
        stopped = stream.push(token)
        seen.append(stream.text)
        if stopped:
            break
    assert seen[-1] == "snow ☃ 🌨 "
    assert not any("\ufffd" in text or "S" in text for text in seen)
    stream = IncrementalDetokenizer(tokenizer, ["STOP"])
    for token in tokenizer.encode("the end ST"):
        stream.push(token)
    stream.finish()
    assert stream.text == "the end ST"


def test_13_an_abort_waits_for_the_step_boundary_and_frees_once() -> None:
    engine = engine_of()
    engine.add_request(PROMPT)
    other = engine.add_request(PROMPT[::-1], SamplingParams(max_tokens=9))
    forward = engine.runner._forward

    def abort_within(*args):
        engine.runner._forward = forward
        engine.abort("0")  # as another thread might
        held = engine.pool.tables["0"]
        out = forward(*args)
        assert engine.pool.tables["0"] == held
        return out

    engine.runner._forward = abort_within
    engine.step()
    assert engine.outputs["0"].finish_reason is None
    drain(engine)
    ends = [f for record in engine.trace for f in record.finished if f.request_id == "0"]
    assert [end.reason for end in ends] == ["abort"]
    assert engine.outputs[other].token_ids == greedy("llama", PROMPT[::-1], 9)


def test_14_seeded_and_unseeded_requests_share_a_batch_and_children_do_not_share_a_seed() -> None:
    hot = dict(temperature=1.5, max_tokens=15)
    alone = answer(engine_of(), PROMPT, seed=4, **hot)
    engine = engine_of(num_blocks=100)
    ids = [engine.add_request(PROMPT, SamplingParams(seed=seed, **hot)) for seed in (None, 4, None, 4)]
    engine.add_request(PROMPT, SamplingParams(n=3, seed=4, **hot), request_id="n")
    drain(engine)
    tokens = [engine.outputs[i].token_ids for i in ids]
    assert tokens[1] == tokens[3] == alone
    assert len({tuple(t) for t in tokens}) == 3
    assert len({tuple(engine.outputs[i].token_ids) for i in ("n", "n.1", "n.2")}) == 3


def test_15_seats_limit_what_runs_and_prompts_do_not_starve_answers() -> None:
    engine = engine_of(num_blocks=300, max_num_seqs=3, max_num_batched_tokens=8)
    first = engine.add_request(PROMPT[:3], SamplingParams(max_tokens=60))
    engine.step()
    for _ in range(6):
        engine.add_request([random.Random(8).randrange(VOCAB)] * 80, SamplingParams(max_tokens=3))
    while engine.outputs[first].finish_reason is None:
        record = engine.step()
        assert len(engine.scheduler.running) <= 3
        assert record.sampled[record.requests.index(first)], "a step without a token for who was running"
    drain(engine)
