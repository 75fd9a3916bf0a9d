"""The engine from outside: the tokens of `transformers`, ends where they belong, and clear errors."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.request import Request
from labkit.engine import answer_ids
from labkit.trace.trace import Trace
from tests.conftest import FAMILIES, VOCAB, fused, greedy, loaded
from tests.engines import drain, engine_of, play, random_prompt

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
    """Small pools (so that some are preempted), block boundaries, shared prefixes, two ways to arrive."""
    rng = random.Random(0)
    common = random_prompt(rng, 20)
    lengths = [n for k in (1, 2) for n in (16 * k - 1, 16 * k, 16 * k + 1)]
    jobs = [(random_prompt(rng, length), rng.randint(1, 40)) for length in (1, *lengths)]
    jobs += [(common + random_prompt(rng, length), rng.randint(1, 40)) for length in (1, 4, 9)]
    jobs.append((common, 12))
    unmixed = scheduler == "unmixed"
    for arrival in (1.0, 0.4):
        model = fused if (arrival == 1.0) == caching else loaded  # each way with each kind of layer
        engine = engine_of(
            model=model(family),
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


def test_a_priority_is_checked_when_it_is_changed_too() -> None:
    engine = engine_of()
    engine.add_request([1, 2, 3])
    with pytest.raises(ValueError, match=r"priority must be a whole number, not 0\.5"):
        engine.set_priority("0", 0.5)
    assert engine.set_priority("0", -1)
    assert not engine.set_priority("1", -1)


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


def test_ten_engines_share_one_copy_of_the_weights() -> None:
    model = loaded("llama")
    engines = [Engine(EngineConfig(model=model, num_blocks=8)) for _ in range(10)]
    assert len({engine.runner.model.norm.weight.data_ptr() for engine in engines}) == 1
    assert len({engine.runner.cache.k.data_ptr() for engine in engines}) == 10


def test_the_answers_of_n_are_a_family() -> None:
    assert answer_ids("7", 1) == ["7"]
    assert answer_ids("7", 3) == ["7", "7.1", "7.2"]
    assert Request("7", [1], SamplingParams()).family == "7"
    assert Request("7.1", [1], SamplingParams(), family="7").family == "7"


def test_an_engine_may_be_given_its_model_alone(tmp_path: Path) -> None:
    named, shared = Engine("tiny-random"), Engine(loaded("llama"))
    assert named.config == EngineConfig(model="tiny-random")
    assert shared.model is loaded("llama")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Engine(tmp_path)  # a path is a folder with a model, and this one is empty
    with pytest.raises(ValueError, match="config must be EngineConfig or a model, not dict"):
        Engine({"model": "tiny-random"})


def test_an_engine_says_what_it_is_doing() -> None:
    engine = engine_of(max_num_seqs=1)
    engine.add_request([1, 2, 3, 4, 5])
    engine.add_request([1, 2])
    engine.step()
    wanted = "Engine('llama', torch.float32 on cpu, 1 running, 1 waiting, 58 of 60 pages free)"
    assert repr(engine) == wanted


@pytest.mark.parametrize("config, length", [(dict(num_blocks=40), 30), (dict(num_blocks=5), 20)])
def test_no_max_tokens_means_up_to_the_limit(config: dict, length: int) -> None:
    """The limit is the model's, or what the pool holds if that is less."""
    engine = engine_of(max_model_len=30, **config)
    name = engine.add_request([1, 2, 3], SamplingParams(max_tokens=None))
    drain(engine)
    assert engine.trace[0].arrived[0].max_tokens == length - 3
    assert engine.outputs[name].token_ids == greedy("llama", [1, 2, 3], length - 3)
    assert engine.outputs[name].finish_reason == "length"


def test_n_answers_to_a_text_know_the_text() -> None:
    engine = engine_of()
    engine.add_request({"prompt": "ab"}, SamplingParams(n=2, temperature=1.0, max_tokens=2))
    assert [output.prompt for output in engine.outputs.values()] == ["ab", "ab"]


def test_a_tokenizer_with_more_tokens_than_the_model_ends_nobody_elses_request() -> None:
    engine = Engine(EngineConfig(model=loaded("llama")), say=None)  # 211 tokens; its tokenizer has more
    other = engine.add_request([5, 6, 7], SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match="prompt: a token id must be between 0 and 210"):
        engine.add_request("hello wide world")
    engine.run()
    assert engine.outputs[other].finish_reason == "length"
