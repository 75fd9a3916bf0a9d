"""The engine from outside: the tokens of `transformers`, clear errors, faults that stay where they are."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
import torch
from conftest import FAMILIES, VOCAB, greedy, loaded
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.scheduler import Scheduler
from labkit.schedulers.audit import check_pool
from labkit.trace.trace import Trace


def engine_of(family: str = "llama", **config) -> Engine:
    defaults = dict(block_size=4, num_blocks=60, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    return Engine(EngineConfig(model=loaded(family), **{**defaults, **config}))


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine._unfinished


def play(
    engine: Engine, jobs: list[tuple[list[int], int]], *, arrival: float = 1.0, seed: int = 0
) -> list[str]:
    """Run jobs that arrive with this chance at each step; ids in the order of the jobs."""
    rng = random.Random(seed)
    ids, left = [], list(jobs)
    while left or engine.has_unfinished:
        while left and rng.random() < arrival:
            prompt, max_tokens = left.pop(0)
            ids.append(engine.add_request(prompt, SamplingParams(max_tokens=max_tokens)))
        engine.step()
    return ids


# -- tokens ---------------------------------------------------------------------------------------


WAYS = [(scheduler, budget) for scheduler in ("continuous", "static", "naive") for budget in (7, 64, 512)]
WAYS += [("unmixed", 80), ("uncached", 64)]  # unmixed: a whole prompt must fit
SIZES = [(1, 110), (4, 28), (16, 7)]


@pytest.mark.parametrize(
    "family, scheduler, budget, block_size, num_blocks, caching",
    [
        (family, *way, *size, caching)
        for family, way, size, caching in itertools.product(FAMILIES, WAYS, SIZES, (True, False))
        # One model in every way. The others, which differ in a layer, in all of continuous batching.
        if family == "llama" or way[0] == "continuous" or (size == (4, 28) and caching and way[1] != 512)
    ],
)
def test_tokens_equal_transformers(
    family: str, scheduler: str, budget: int, block_size: int, num_blocks: int, caching: bool
) -> None:
    """Small pools (so that some are preempted), page boundaries, shared prefixes, two ways to arrive."""
    rng = random.Random(0)
    common = random_prompt(rng, 20)
    lengths = [n for k in (1, 2) for n in (16 * k - 1, 16 * k, 16 * k + 1)]
    jobs = [(random_prompt(rng, length), rng.randint(1, 40)) for length in (1, *lengths)]
    jobs += [(common + random_prompt(rng, length), rng.randint(1, 40)) for length in (1, 4, 9)]
    jobs.append((common, 12))
    unmixed = scheduler == "unmixed"
    for arrival in (1.0, 0.4):
        engine = engine_of(
            family,
            scheduler="continuous" if unmixed else scheduler,
            enable_chunked_prefill=not unmixed,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        ids = play(engine, jobs, arrival=arrival)
        for request_id, (prompt, max_tokens) in zip(ids, jobs, strict=True):
            output = engine.outputs[request_id]
            assert output.token_ids == greedy(family, prompt, max_tokens), request_id
            assert output.finish_reason == "length"
        drain(engine)
        if scheduler in ("continuous", "unmixed") and arrival == 1.0:
            assert any(record.preempted for record in engine.trace)
        hits = sum(a.num_cached_tokens for record in engine.trace for a in record.admitted)
        assert (hits > 0) == (caching and scheduler not in ("static", "uncached"))


def test_a_corrupted_block_table_changes_the_tokens() -> None:
    """The negative control: the comparison above is able to fail."""
    rng = random.Random(2)
    jobs = [(random_prompt(rng, 30), 12) for _ in range(4)]
    engine = engine_of(audit=False)
    forward = engine.runner._forward

    def corrupted(plan, rows, spans):
        if len(engine.trace) == 3:
            for span in spans:
                span.table = [span.table[-1], *span.table[1:]]
        return forward(plan, rows, spans)

    engine.runner._forward = corrupted
    ids = play(engine, jobs)
    wrong = [engine.outputs[i].token_ids != greedy("llama", *job) for i, job in zip(ids, jobs, strict=True)]
    assert any(wrong)


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


# -- ends -----------------------------------------------------------------------------------------


def test_stops_at_eos_stop_tokens_stop_strings_and_the_models_limit() -> None:
    prompt = [5, 6, 7]
    free = greedy("llama", prompt, 40)
    tokenizer = loaded("llama").tokenizer
    at = next(i for i in range(4, 40) if free[i] not in free[:i])
    by_id = engine_of()
    by_id.add_request(prompt, SamplingParams(max_tokens=40, stop_token_ids=[free[at]]))
    drain(by_id)
    assert by_id.outputs["0"].token_ids == free[: at + 1]
    assert by_id.outputs["0"].finish_reason == "stop"

    whole = tokenizer.decode(free)
    stop = whole[6:9]
    by_text = engine_of()
    by_text.add_request(prompt, SamplingParams(max_tokens=40, stop=[stop, "never there"]))
    drain(by_text)
    output = by_text.outputs["0"]
    assert output.text == whole[: whole.find(stop)]
    assert output.finish_reason == "stop"
    assert len(output.token_ids) < 40
    assert by_text.trace[-1].finished[0].reason == "stop"

    short = engine_of(max_model_len=10)
    short.add_request(prompt, SamplingParams(max_tokens=40))
    drain(short)
    assert short.outputs["0"].token_ids == free[:7]
    assert short.outputs["0"].finish_reason == "length"


def test_eos_ends_unless_ignored() -> None:
    free = greedy("llama", [5, 6, 7], 20)
    at = next(i for i in range(3, 20) if free[i] not in free[:i])
    model = loaded("llama")
    ended = type(model)(model.name, model.module, model.tokenizer, model.config, frozenset([free[at]]))
    for ignore, length in ((False, at + 1), (True, 20)):
        engine = Engine(EngineConfig(model=ended, num_blocks=20))
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=ignore))
        drain(engine)
        assert engine.outputs["0"].token_ids == free[:length]


def test_abort_frees_once_and_leaves_the_others_alone() -> None:
    engine = engine_of()
    jobs = [([i + 1] * 9, 12) for i in range(8)]  # two of them wait
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    for _ in range(3):
        engine.step()
    assert engine.abort(ids[1])
    assert engine.abort(ids[1])  # twice is once
    assert engine.abort(ids[7])
    assert not engine.abort("nobody")
    assert engine.outputs[ids[1]].finish_reason is None  # not before the boundary
    record = engine.step()
    assert {(f.request_id, f.reason) for f in record.finished} == {(ids[1], "abort"), (ids[7], "abort")}
    drain(engine)
    assert not engine.abort(ids[1])
    for i, (request_id, job) in enumerate(zip(ids, jobs, strict=True)):
        output = engine.outputs[request_id]
        if i in (1, 7):
            assert output.finish_reason == "abort"
            assert output.token_ids == greedy("llama", *job)[: len(output.token_ids)]
        else:
            assert output.token_ids == greedy("llama", *job)


def test_aborting_the_only_request_is_recorded() -> None:
    engine = engine_of()
    engine.add_request([1, 2, 3])
    engine.step()
    engine.abort("0")
    assert engine.has_unfinished
    record = engine.step()
    assert record.finished[0].blocks
    assert not engine.has_unfinished
    assert engine.trace.state(record.step, after=True).owners == {}


def test_abort_of_n_ends_all_answers() -> None:
    engine = engine_of()
    engine.add_request([1, 2, 3], SamplingParams(n=3, temperature=1.0))
    engine.step()
    engine.abort("0")
    drain(engine)
    assert [engine.outputs[i].finish_reason for i in ("0", "0.1", "0.2")] == ["abort"] * 3


# -- faults ---------------------------------------------------------------------------------------


def test_a_nan_ends_its_own_request_and_no_other() -> None:
    engine = engine_of()
    jobs = [([i + 1] * 7, 12) for i in range(4)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    engine.step()
    engine.step()
    poisoned = engine.pool.tables[ids[2]][0]
    engine.runner.cache.v[0, poisoned] = math.nan
    record = engine.step()
    assert [(f.request_id, f.reason) for f in record.finished] == [(ids[2], "error")]
    assert "NaN" in engine.outputs[ids[2]].error
    late = engine.add_request([9] * 7, SamplingParams(max_tokens=12))  # takes over the poisoned page
    drain(engine)
    assert engine.runner.cache.v.isfinite().all()
    for request_id, job in (*zip(ids, jobs, strict=True), (late, ([9] * 7, 12))):
        if request_id != ids[2]:
            assert engine.outputs[request_id].token_ids == greedy("llama", *job)


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("boom\nmore"), "the step failed: RuntimeError: boom$"),
        (torch.OutOfMemoryError("x"), "ran out of memory: lower max_num_batched_tokens or num_blocks"),
    ],
)
def test_a_step_that_breaks_ends_who_was_in_it_and_the_queue_goes_on(error: Exception, message: str) -> None:
    engine = engine_of(max_num_seqs=2)
    jobs = [([i + 1] * 7, 12) for i in range(5)]
    ids = [engine.add_request(p, SamplingParams(max_tokens=m)) for p, m in jobs]
    engine.step()
    forward = engine.runner._forward

    def broken(*args):
        engine.runner._forward = forward
        raise error

    engine.runner._forward = broken
    engine.step()
    drain(engine)
    for i, (request_id, job) in enumerate(zip(ids, jobs, strict=True)):
        output = engine.outputs[request_id]
        if i < 2:
            assert output.finish_reason == "error"
            assert re.search(message, output.error)
        else:
            assert output.token_ids == greedy("llama", *job)


def test_what_a_failed_request_left_in_the_prefix_cache_is_not_found_again() -> None:
    engine = engine_of()
    prompt = list(range(20))
    engine.add_request(prompt, SamplingParams(max_tokens=20))
    engine.step()
    forward, engine.runner._forward = engine.runner._forward, None
    engine.step()
    assert engine.outputs["0"].finish_reason == "error"
    engine.runner._forward = forward
    engine.add_request(prompt, SamplingParams(max_tokens=20))
    record = engine.step()
    assert record.admitted[0].num_cached_tokens == 0
    drain(engine)
    assert engine.outputs["1"].token_ids == greedy("llama", prompt, 20)


def test_a_broken_step_of_a_static_batch_with_idle_seats() -> None:
    engine = engine_of(scheduler="static")
    for i, max_tokens in enumerate((1, 9, 9)):
        engine.add_request([i + 1] * 4, SamplingParams(max_tokens=max_tokens))
    for _ in range(3):
        engine.step()
    engine.runner._forward = None  # calling it raises
    engine.step()
    assert [engine.outputs[i].finish_reason for i in ("0", "1", "2")] == ["length", "error", "error"]
    assert not engine.has_unfinished


def test_an_interrupt_leaves_the_engine_usable() -> None:
    llm = LLM(loaded("llama"), num_blocks=40, block_size=4, audit=True)
    forward = llm.engine.runner._forward

    def interrupted(*args):
        if len(llm.engine.trace) == 4:
            raise KeyboardInterrupt
        return forward(*args)

    llm.engine.runner._forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], progress=False)
    assert not llm.engine.outputs
    assert llm.engine.pool.num_free == 40
    llm.engine.runner._forward = forward
    (output,) = llm.generate([1, 2], SamplingParams(max_tokens=9), progress=False)
    assert output.token_ids == greedy("llama", [1, 2], 9)
    assert Trace.from_lines(llm.engine.trace.lines()) == llm.engine.trace


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, values, message",
    [
        ("", {}, "prompt is empty: it must have at least one token"),
        ("half \ud800", {}, "prompt is not text: it holds half a surrogate pair"),
        (b"hello", {}, "prompt must be text or a list of token ids, not bytes"),
        ([], {}, "prompt is empty"),
        (None, {}, "prompt must be text or a list of token ids, not NoneType"),
        ([1, VOCAB], {}, f"prompt: a token id must be between 0 and {VOCAB - 1}, not {VOCAB}"),
        ([1, -1], {}, "prompt: a token id must be between"),
        ([1, 1.5], {}, "prompt: a token id must be a whole number"),
        ([1] * 100, {}, "prompt has 100 tokens, but max_model_len is 100"),
        ([1], dict(params={"max_tokens": 3}), "params must be SamplingParams, not dict"),
        ([1], dict(params=SamplingParams(stop_token_ids=[VOCAB])), "stop_token_ids: a token id must be"),
        ([1], dict(params=SamplingParams(logit_bias={VOCAB: 1})), "logit_bias: a token id must be"),
        ([1], dict(priority="high"), "priority must be a whole number"),
        ([1], dict(request_id=""), "request_id must be a string of 1 to 128 characters"),
        ([1], dict(request_id=7), "request_id must be a string"),
        ([1], dict(request_id="x" * 129), "request_id must be a string"),
        (
            [1] * 90,
            dict(params=SamplingParams(max_tokens=10)),
            "may need 25 pages of 4 tokens, but the pool has 20",
        ),
    ],
)
def test_bad_input_names_the_field_and_the_limit_and_costs_nobody_anything(
    prompt: object, values: dict, message: str
) -> None:
    engine = engine_of(num_blocks=20, max_model_len=100)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=6))
    engine.step()
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.add_request(prompt, **values)
    drain(engine)
    assert engine.outputs["0"].token_ids == greedy("llama", [1, 2, 3], 6)
    assert list(engine.outputs) == ["0"]


def test_an_abort_ends_the_answers_of_its_own_request_and_no_namesake() -> None:
    engine = engine_of(num_blocks=100)
    hot = dict(temperature=1.0, max_tokens=8)
    engine.add_request([1, 2], SamplingParams(n=3, **hot), request_id="a")
    engine.add_request([1, 2], SamplingParams(**hot), request_id="b")
    engine.add_request([1, 2], SamplingParams(**hot), request_id="b.1")
    engine.step()
    engine.outputs.pop("a")  # its owner has lost interest: that must not break the step either
    assert engine.abort("a")
    assert engine.abort("b")
    drain(engine)
    reasons = {name: output.finish_reason for name, output in engine.outputs.items()}
    assert reasons == {"a.1": "abort", "a.2": "abort", "b": "abort", "b.1": "length"}
    assert Trace.from_lines(engine.trace.lines()) == engine.trace


def test_a_loaded_model_keeps_its_dtype_and_device() -> None:
    with pytest.raises(ValueError, match="dtype must be auto for a loaded model"):
        engine_of(dtype="float16")
    assert engine_of(dtype="float32", device="cpu").model.dtype == torch.float32


def test_an_id_cannot_be_used_twice() -> None:
    engine = engine_of()
    engine.add_request([1], request_id="a")
    with pytest.raises(ValueError, match="request_id 'a' is already in use"):
        engine.add_request([1], request_id="a")
    drain(engine)
    with pytest.raises(ValueError, match="already in use"):
        engine.add_request([1], request_id="a")
    engine.outputs.pop("a")
    engine.add_request([1], request_id="a")
    engine.add_request([1], request_id="9")  # what the engine itself would soon call one
    for _ in range(8):
        engine.add_request([1])
    drain(engine)
    assert len(engine.outputs) == 10


def test_sizes_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="max_model_len must be at most 512, the limit of llama, not 513"):
        engine_of(max_model_len=513)
    with pytest.raises(ValueError, match="GiB for the KV cache"):
        engine_of(num_blocks=10**9)


def test_the_default_pool_has_room_for_all_seats_and_no_more() -> None:
    engine = Engine(EngineConfig(model=loaded("llama"), max_num_seqs=3, block_size=16))
    assert engine.pool.num_blocks == 3 * 512 // 16
    assert engine.max_model_len == 512


# -- a learner's parts ----------------------------------------------------------------------------


def run_with(scheduler: type[Scheduler] | None = None, pool: type[BlockPool] | None = None) -> Engine:
    config = EngineConfig(
        model=loaded("llama"), block_size=4, num_blocks=30, max_num_seqs=3, max_num_batched_tokens=16
    )
    engine = Engine(config, scheduler=scheduler, pool=pool)
    for i in range(5):
        engine.add_request([i + 1] * 9, SamplingParams(max_tokens=8))
    for _ in range(1100):
        if not engine.has_unfinished:
            break
        engine.step()
    return engine


class ShortestFirst(Scheduler):
    """A policy of one's own: the request with the shortest prompt goes first."""

    def add(self, request) -> None:
        request.priority = request.num_prompt_tokens
        super().add(request)


class GivesTwice(BlockPool):
    def allocate(self, request_id, count):
        blocks = super().allocate(request_id, count)
        if len(self.tables) == 2:
            self.free.append(blocks[0])
        return blocks


class Refuses(BlockPool):
    def allocate(self, request_id, count):
        if self.tables.keys() - {request_id}:
            raise OutOfBlocks("not today")
        return super().allocate(request_id, count)


class FreesTwice(BlockPool):
    def release(self, request_id):
        table = super().release(request_id)
        self.free.append(table[0])
        return table


class Leaks(BlockPool):
    def release(self, request_id):
        table = super().release(request_id)
        (self.free or list(self.cached)).pop()
        if not self.free:
            self.cached.popitem()
        return table


class OverBudget(Scheduler):
    def schedule(self):
        self.max_num_batched_tokens = 27
        return super().schedule()


class OverSeats(Scheduler):
    def schedule(self):
        self.max_num_seqs = 4
        return super().schedule()


class Forgets(Scheduler):
    def schedule(self):
        plan = super().schedule()
        if len(self.running) > 2:
            self.running.pop()
        return plan


class Loses(Scheduler):
    def schedule(self):
        if len(self.waiting) and self.waiting.peek().request_id == "4":
            self.waiting.remove(self.requests.pop("4"))
        return super().schedule()


class Sleeps(Scheduler):
    def plan_waiting(self, plan, budget) -> None:
        return None


class Skips(Scheduler):
    def schedule(self):
        plan = super().schedule()
        if plan.starts and plan.starts[0] > 9:
            plan.starts[0] -= 1
        return plan


def test_a_policy_of_ones_own_runs_and_is_right() -> None:
    engine = run_with(scheduler=ShortestFirst)
    for i in range(5):
        assert engine.outputs[str(i)].token_ids == greedy("llama", [i + 1] * 9, 8)


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(pool=GivesTwice), r"step 0: double free: .*block \d+ is in 2 of: free, cached, owned"),
        (dict(pool=FreesTwice), r"double free: .*block 0 of request '0'"),
        (dict(pool=Leaks), r"step \d+: leak: .*given back in this step: block 0 of request '0'"),
        (dict(pool=Refuses), r"request '1' was promised a page, and the pool gave it no page: not today"),
        (dict(scheduler=OverBudget), r"over budget: the plan computes 27 tokens, the budget is 16"),
        (dict(scheduler=OverSeats), r"over seats: the plan runs 4 requests on 3 seats"),
        (dict(scheduler=Forgets), r"forgotten request: '\d' neither runs nor waits"),
        (dict(scheduler=Loses), r"step \d+: forgotten request: '4' was not finished, but is gone"),
        (dict(scheduler=Sleeps), r"forgotten request: nothing ran for 1000 steps"),
        (dict(scheduler=Skips), r"request '0' has computed \d+ of \d+ tokens: it cannot compute 1 from \d+"),
    ],
)
def test_a_broken_rule_is_caught_at_its_step_by_name(parts: dict, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        run_with(**parts)


class EngineMachine(RuleBasedStateMachine):
    """The whole engine, model included: add, step, abort, fail, fork and change priorities in any order."""

    @initialize(
        scheduler=st.sampled_from(["continuous", "static", "naive", "uncached"]),
        policy=st.sampled_from(["paged", "reserved"]),
        blocks=st.integers(12, 30),
        budget=st.integers(4, 30),
        caching=st.booleans(),
    )
    def build(self, scheduler, policy, blocks, budget, caching) -> None:
        self.jobs: dict[str, tuple[list[int], int]] = {}
        self.engine = engine_of(
            scheduler=scheduler,
            kv_policy=policy,
            num_blocks=blocks,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.forward = self.engine.runner._forward

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt, max_tokens) -> None:
        request_id = self.engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
        self.jobs[request_id] = prompt, max_tokens

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12), n=st.integers(2, 4))
    def fork(self, prompt, n) -> None:
        self.engine.add_request(prompt, SamplingParams(max_tokens=6, temperature=1.0, n=n))

    @rule()
    def step(self) -> None:
        self.engine.step()
        check_pool(self.engine.pool)

    @rule()
    def fail(self) -> None:
        def broken(*args):
            raise RuntimeError("made up")

        self.engine.runner._forward = broken
        self.engine.step()
        self.engine.runner._forward = self.forward
        check_pool(self.engine.pool)

    @rule(data=st.data())
    def abort(self, data) -> None:
        if self.engine.outputs:
            self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.outputs))))

    @rule(data=st.data(), priority=st.integers(-2, 2))
    def reprioritise(self, data, priority) -> None:
        if self.engine.outputs:
            self.engine.set_priority(data.draw(st.sampled_from(sorted(self.engine.outputs))), priority)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        drain(self.engine)
        for request_id, (prompt, max_tokens) in self.jobs.items():
            output = self.engine.outputs[request_id]
            expected = greedy("llama", prompt, max_tokens)
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason in ("length", "abort", "error")
            assert output.finish_reason != "length" or output.token_ids == expected


TestWholeEngine = EngineMachine.TestCase
TestWholeEngine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- LLM ------------------------------------------------------------------------------------------


def test_generate_takes_one_prompt_or_many(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    params = SamplingParams(max_tokens=5)
    assert [o.token_ids for o in llm.generate([3, 4], params)] == [greedy("llama", [3, 4], 5)]
    assert "tokens/s" in capsys.readouterr().err
    many = llm.generate([[3, 4], [5]], [params, SamplingParams(max_tokens=2)], progress=False)
    assert [o.token_ids for o in many] == [greedy("llama", [3, 4], 5), greedy("llama", [5], 2)]
    assert capsys.readouterr().err == ""
    assert len(llm.generate([3], SamplingParams(n=3, temperature=1.0), progress=False)) == 3
    assert llm.generate([], progress=False) == []
    assert not llm.engine.outputs
    metrics = many[0].metrics
    assert (
        metrics.arrival_time <= metrics.first_scheduled_time < metrics.token_times[0] <= metrics.finish_time
    )
    assert len(metrics.token_times) == 5


def test_generate_refuses_before_it_runs_anything() -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[1], []])
    with pytest.raises(ValueError, match="params must be one or one per prompt: 1 for 2 prompts"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="blocksize is not a setting; known are "):
        LLM(loaded("llama"), blocksize=3)
    with pytest.raises(ValueError, match="prompts must be text, token ids, or a list of either, not None"):
        llm.generate(None)
    with pytest.raises(ValueError, match="params must be SamplingParams, not dict"):
        llm.generate([[1]], {})
    assert len(llm.engine.trace) == 0
    assert not llm.engine.outputs


def test_ten_engines_share_one_copy_of_the_weights() -> None:
    model = loaded("llama")
    engines = [Engine(EngineConfig(model=model, num_blocks=8)) for _ in range(10)]
    assert len({engine.runner.model.norm.weight.data_ptr() for engine in engines}) == 1
    assert len({engine.runner.cache.k.data_ptr() for engine in engines}) == 10


def test_logprobs_come_with_the_tokens() -> None:
    engine = engine_of()
    engine.add_request([1, 2], SamplingParams(max_tokens=6, logprobs=2))
    engine.add_request([1, 2], SamplingParams(max_tokens=6))
    drain(engine)
    output = engine.outputs["0"]
    assert [entry.token for entry in output.logprobs] == output.token_ids
    assert all(entry.top[0] == (entry.token, entry.logprob) for entry in output.logprobs)
    assert engine.outputs["1"].logprobs is None
