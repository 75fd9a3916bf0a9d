"""Prompts computed elsewhere: the answers are those of one engine, and faults stay where they are."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.disaggregated import DisaggregatedEngine
from labkit.disaggregated.engine import _THERE
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.trace import Trace
from tests.conftest import generate, loaded, reference
from tests.engines import drain, random_prompt
from tests.in_threads import in_threads  # noqa: F401
from tests.waiting import wait_for


def params(max_tokens: int, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **others)


def engine_of(model: object = "tiny-random", **config: object) -> DisaggregatedEngine:
    sizes = dict(block_size=4, num_blocks=60, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    return DisaggregatedEngine(EngineConfig(model, **{**sizes, **config}), say=None)


def finish(engine: DisaggregatedEngine) -> None:
    drain(engine)
    assert not engine.elsewhere


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("num_blocks", [40, 400])  # too few for all at once, and enough
def test_answers_are_those_of_one_engine(family: str, num_blocks: int, tmp_path: Path) -> None:
    reference(family).save_pretrained(tmp_path)
    engine = engine_of(tmp_path, num_blocks=num_blocks)
    rng = random.Random(3)
    shared = random_prompt(rng, 10)
    jobs = [(shared + random_prompt(rng, rng.randrange(1, 70)), rng.randrange(2, 20)) for _ in range(9)]
    jobs += [(random_prompt(rng, 3), 9)]  # shorter than a page: computed here
    ids = [engine.add_request(prompt, params(most)) for prompt, most in jobs]
    finish(engine)
    for name, (prompt, most) in zip(ids, jobs, strict=True):
        output = engine.outputs[name]
        assert output.token_ids == generate(reference(family), prompt, most)
        if num_blocks == 400:  # all of it came from the other process, but for what lies in no whole page
            assert output.metrics.num_cached_tokens >= (len(prompt) - 1) // 4 * 4
    if num_blocks == 400:
        assert max(record.total_tokens for record in engine.trace) <= 6 * 5  # no step computed a long prompt


@pytest.mark.usefixtures("in_threads")
def test_pages_in_8_bits_arrive_as_well() -> None:
    prompt = random_prompt(random.Random(4), 30)
    one, two = (
        Engine(EngineConfig("tiny-random", kv_cache_dtype="int8"), say=None),
        engine_of(kv_cache_dtype="int8"),
    )
    for engine in (one, two):
        engine.add_request(prompt, params(9), request_id="a")
        drain(engine)
    assert two.outputs["a"].token_ids == one.outputs["a"].token_ids
    assert two.outputs["a"].metrics.num_cached_tokens == 28


@pytest.mark.usefixtures("in_threads")
def test_one_trace_says_who_is_where_and_what_both_pools_hold() -> None:
    engine = engine_of(num_blocks=30, max_num_seqs=3, max_num_batched_tokens=16)
    ids = [engine.add_request(random_prompt(random.Random(n), 40), params(20)) for n in range(5)]
    finish(engine)
    places: dict[str, list[str]] = {name: [] for name in ids}
    for record in engine.trace:
        for name, place, amount in record.moved:
            places[name].append(place)
            assert (
                amount == 40 if place != "arriving" else amount > 2 * 2 * 2 * 40 * 16 * 4
            )  # keys and values
        for arrival in record.arrived:
            places[arrival.request_id].append("here")
    assert all(found == ["unsent", "there", "arriving", "here"] for found in places.values())
    tables = [r.other_pool.tables for r in engine.trace if r.other_pool]
    assert {pool.num_blocks for r in engine.trace if (pool := r.other_pool)} == {30}
    for name in ids:  # in chunks of 16 tokens at most, and then it leaves
        grown = [held for table in tables for held in table if held.request_id == name]
        assert grown[-1].num_computed_tokens == 40 and len(grown[-1].blocks) == 10
        assert sorted(held.num_computed_tokens for held in grown) == [
            held.num_computed_tokens for held in grown
        ]
    assert tables[-1] == ()
    last = engine.trace.state(engine.trace[-1].step)
    assert last.elsewhere == {} and last.other_pool.num_blocks == 30
    assert Trace.from_lines(engine.trace.lines()) == engine.trace


def test_the_trace_says_why_a_request_does_not_run() -> None:
    engine = engine_of(max_num_seqs=1)
    other = psutil.Process(engine._other.pid)
    other.suspend()  # so that it has not computed them yet
    first, second = (engine.add_request(random_prompt(random.Random(n), 40), params(30)) for n in range(2))
    step = engine.step().step
    other.resume()
    assert engine.trace.why(first, step).endswith("computed by the prefill engine")
    assert "before its prompt is sent" in engine.trace.why(second, step)


@pytest.mark.usefixtures("in_threads")
def test_prompts_wait_until_there_is_room_for_their_pages() -> None:
    engine = engine_of(num_blocks=30, max_num_seqs=3)
    for n in range(6):
        engine.add_request(random_prompt(random.Random(n), 40), params(20))
    engine._send()
    assert list(engine.elsewhere.values()).count(_THERE) == 2  # each needs 11 pages
    while engine.has_unfinished:
        engine.step()
        assert list(engine.elsewhere.values()).count(_THERE) + len(engine.scheduler.requests) <= 3
    assert not any(record.evicted and record.preempted for record in engine.trace)
    assert {len(output.token_ids) for output in engine.outputs.values()} == {20}


@pytest.mark.usefixtures("in_threads")
def test_several_answers_share_what_arrives() -> None:
    prompt = random_prompt(random.Random(1), 30)
    wanted = params(8, n=3, temperature=1, seed=5)
    engine = engine_of()
    engine.add_request(prompt, wanted, request_id="a")
    assert engine.abort("a.2")
    finish(engine)
    first, second, third = engine.outputs.values()
    assert first.token_ids != second.token_ids
    assert [len(output.token_ids) for output in (first, second)] == [8, 8]
    assert third.finish_reason == "abort"


@pytest.mark.usefixtures("in_threads")
def test_an_abort_finds_a_request_wherever_it_is() -> None:
    engine = engine_of(max_num_seqs=1)
    for name in "abcd":
        engine.add_request(random_prompt(random.Random(ord(name)), 40), params(30), request_id=name)
    assert engine.abort("d")  # before anything was sent
    while "a" in engine.elsewhere:
        engine.step()
    assert engine.set_priority("c", -1)  # before b now
    assert engine.abort("a")  # it has arrived
    while engine.elsewhere["c"] != _THERE:
        engine.step()
        engine._send()
    assert engine.abort("c")
    assert not engine.abort("nobody")
    finish(engine)
    reasons = {name: output.finish_reason for name, output in engine.outputs.items()}
    assert reasons == {"a": "abort", "b": "length", "c": "abort", "d": "abort"}


def test_the_other_process_can_end_and_answers_go_on() -> None:
    engine = engine_of(num_blocks=400)
    prompts = [random_prompt(random.Random(n), 60) for n in range(3)]
    first = engine.add_request(prompts[0], params(100))
    while first in engine.elsewhere:
        engine.step()
    other = psutil.Process(engine._other.pid)
    other.suspend()  # it does not answer any more
    second = engine.add_request(prompts[1], params(4))
    engine._send()
    other.kill()
    while second in engine.elsewhere:
        engine.step()
    third = engine.add_request(prompts[2], params(4))
    finish(engine)
    assert len(engine.outputs[first].token_ids) == 100
    assert engine.outputs[second].finish_reason == "error"
    assert engine.outputs[second].error == "the process that computes prompts ended (exit code -9)"
    assert engine.outputs[third].finish_reason == "length"
    assert engine.outputs[third].metrics.num_cached_tokens == 0  # computed here


def test_it_stands_behind_the_same_front() -> None:
    with AsyncEngine(engine_of()) as engine:
        names = [engine.submit(random_prompt(random.Random(n), 30), params(10)) for n in range(4)]
        for name in names:
            *_, last = engine.stream(name)
            assert len(last.token_ids) == 10
        other = psutil.Process(engine.engine._other.pid)
    del engine
    wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model": loaded("llama")}, "model must be named"),
        ({"scheduler": "static"}, "scheduler must be 'continuous'"),
        ({"enable_prefix_caching": False}, "with enable_prefix_caching"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1"),
    ],
)
def test_what_cannot_work_is_named(config: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DisaggregatedEngine(EngineConfig(**config))
