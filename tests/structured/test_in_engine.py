"""Answers with a form in the engine: always of that form, and the same tokens whatever runs beside them."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core import model_runner
from labkit.disaggregated.engine import DisaggregatedEngine
from labkit.models.architecture import build
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_random
from labkit.outputs import RequestOutput
from labkit.structured.form import AnswerForm
from labkit.trace.trace import Trace
from labkit.views import text
from tests.structured.forms import tiny, vocabulary
from tests.structured.schemas import SCHEMAS

PROMPT = "the answer to this, and to the rest of it, is the answer to this, and to the"
REGEX = r"[A-Z][a-z]{2,8} \d{1,3}(, [a-z]+){0,4}\."
FEW = ("long_keys", "shape", "film", "steps", "event", "unicode", "quoted", "digit", "mixed", "config")
ASKED: list[Any] = [{"choice": ["yes", "no, thank you", "perhaps"]}, {"regex": REGEX}, "json"]
ASKED += [{"json": SCHEMAS[name]} for name in FEW] + [{"grammar": 'start: "a" (" time" | " day")+ "."'}, None]


@functools.cache
def drafting() -> LoadedModel:
    """A model of the same vocabulary, which thinks otherwise."""
    config, tensors, _ = tiny_random(seed=1)
    module = build(config, tensors.items(), dtype=torch.float32, device=torch.device("cpu"))
    return replace(tiny(), name="other", module=module, config=config)


def engine_of(**config: Any) -> Engine:
    if config.get("speculative") == "draft":
        config["draft_model"] = drafting()
    defaults = dict(block_size=4, num_blocks=1500, max_num_seqs=16, max_num_batched_tokens=256, audit=True)
    return Engine(EngineConfig(tiny(), **{**defaults, **config}), say=None)


def answers(
    temperature: float, asked: list[Any] = ASKED, **config: Any
) -> tuple[Engine, list[RequestOutput]]:
    engine = engine_of(**config)
    ids = [
        engine.add_request(
            PROMPT,
            SamplingParams(max_tokens=60, temperature=temperature, seed=number, structured=each),
        )
        for number, each in enumerate(asked)
    ]
    engine.run()
    assert engine.pool.num_free == engine.pool.num_blocks
    return engine, [engine.outputs[name] for name in ids]


def check(asked: Any, output: RequestOutput) -> None:
    """An answer that is not cut has the form; one that is cut has used up its tokens."""
    assert output.finish_reason in ("stop", "length"), output.error
    if asked is None or output.finish_reason == "length":
        assert len(output.token_ids) == 60 or asked is None
    elif asked == "json":
        assert isinstance(json.loads(output.text), dict)
    elif "choice" in asked:
        assert output.text in asked["choice"]
    elif "regex" in asked:
        assert re.fullmatch(asked["regex"], output.text), output.text
    elif "grammar" in asked:
        assert re.fullmatch("a( time| day)+[.]", output.text), output.text
    else:
        judge = jsonschema.Draft202012Validator
        jsonschema.validate(
            json.loads(output.text), asked["json"], judge, format_checker=judge.FORMAT_CHECKER
        )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_answer_that_is_not_cut_has_its_form(temperature: float) -> None:
    asked = [{"json": schema} for schema in SCHEMAS.values()] + ASKED
    _, outputs = answers(temperature, asked)
    for each, output in zip(asked, outputs, strict=True):
        check(each, output)
    assert sum(output.finish_reason == "stop" for output in outputs) > len(outputs) / 2


@pytest.fixture(scope="module", params=[0.0, 1.5])
def alone(request: pytest.FixtureRequest) -> tuple[float, list[list[int]]]:
    """A temperature, and the tokens of all answers, each alone in the engine, step by step."""
    _, outputs = answers(request.param, max_num_seqs=1, jump_ahead=False, enable_prefix_caching=False)
    for asked, output in zip(ASKED, outputs, strict=True):
        check(asked, output)
    return request.param, [output.token_ids for output in outputs]


WAYS = {
    "jump-ahead": dict(),
    "no jump-ahead": dict(jump_ahead=False),
    "preemption": dict(num_blocks=60),
    "preemption, one by one": dict(num_blocks=60, jump_ahead=False),
    "chunks": dict(max_num_batched_tokens=16),
    "whole prompts": dict(enable_chunked_prefill=False),
    "no prefix cache": dict(enable_prefix_caching=False),
    "reserved": dict(kv_policy="reserved"),
    "static": dict(scheduler="static"),
    "naive": dict(scheduler="naive"),
    "ngram": dict(speculative="ngram", speculative_gate=False),
    "ngram, gated": dict(speculative="ngram"),
    "ngram, no jump-ahead": dict(speculative="ngram", speculative_gate=False, jump_ahead=False),
    "draft": dict(speculative="draft", speculative_gate=False, num_speculative_tokens=4),
    "draft, no jump-ahead": dict(speculative="draft", speculative_gate=False, jump_ahead=False),
    "draft, preemption": dict(speculative="draft", speculative_gate=False, num_blocks=70),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_the_same_in_any_company(way: str, alone: tuple[float, list[list[int]]]) -> None:
    temperature, wanted = alone
    engine, outputs = answers(temperature, **WAYS[way])
    assert [output.token_ids for output in outputs] == wanted
    assert any(record.preempted for record in engine.trace) == ("preemption" in way)


def test_two_processes_give_the_same_tokens(alone: tuple[float, list[list[int]]]) -> None:
    temperature, wanted = alone
    engine = Engine(
        EngineConfig("tiny-random", tensor_parallel_size=2, num_blocks=1500, block_size=4, num_threads=1),
        say=None,
    )
    params = [
        SamplingParams(max_tokens=60, temperature=temperature, seed=number, structured=each)
        for number, each in enumerate(ASKED)
    ]
    ids = [engine.add_request(PROMPT, each) for each in params]
    engine.run()
    same = [engine.outputs[name].token_ids == tokens for name, tokens in zip(ids, wanted, strict=True)]
    assert all(same)


def test_prompts_computed_elsewhere_give_the_same_tokens(alone: tuple[float, list[list[int]]]) -> None:
    """The form stays in the process in which the answer grows."""
    temperature, wanted = alone
    engine = DisaggregatedEngine(
        EngineConfig("tiny-random", num_blocks=1500, block_size=4, num_threads=1), say=None
    )
    ids = [
        engine.add_request(
            PROMPT, SamplingParams(max_tokens=60, temperature=temperature, seed=number, structured=each)
        )
        for number, each in enumerate(ASKED)
    ]
    while engine.has_unfinished:
        engine.step()
    assert [engine.outputs[name].token_ids for name in ids] == wanted


def test_jump_ahead_takes_fewer_steps_and_the_trace_says_what_was_forced() -> None:
    asked = [{"json": SCHEMAS["long_keys"]}]
    quick, (one,) = answers(0.0, asked)
    slow, (other,) = answers(0.0, asked, jump_ahead=False)
    assert one.token_ids == other.token_ids and len(quick.trace) < len(slow.trace) / 2
    for engine, output in ((quick, one), (slow, other)):
        rows = [row for record in engine.trace for row in record.rows if row.sampled]
        assert sum(len(row.allowed) for row in rows) == len(output.token_ids)
        assert all(len(row.allowed) == len(row.sampled) and min(row.allowed) > 0 for row in rows)
    forced = [sum(row.num_forced for record in e.trace for row in record.rows) for e in (quick, slow)]
    assert forced[0] == forced[1] > len(one.token_ids) / 2


def test_forced_tokens_tell_nothing_of_a_drafter() -> None:
    engine, _ = answers(
        0.0,
        [{"choice": ["the same and the same and the same and the same"]}],
        speculative="ngram",
        speculative_gate=False,
    )
    assert sum(map(len, (row.drafted for record in engine.trace for row in record.rows))) > 3
    assert engine.speculator._all.accepted == engine.speculator._all.rejected == 0


def test_n_answers_have_the_form_each_with_noise_of_its_own() -> None:
    for asked in ({"regex": REGEX}, {"json": SCHEMAS["film"]}):
        engine = engine_of()
        params = SamplingParams(max_tokens=60, temperature=1.5, seed=1, n=3, structured=asked)
        first = engine.add_request(PROMPT, params)
        engine.run()
        outputs = [engine.outputs[name] for name in (first, f"{first}.1", f"{first}.2")]
        for output in outputs:
            check(asked, output)
        assert len({output.text for output in outputs}) == 3


def test_an_answer_is_cut_where_its_tokens_end_and_says_so() -> None:
    engine = engine_of()
    cut = engine.add_request(PROMPT, SamplingParams(max_tokens=4, structured={"regex": "[a-z ]{40}"}))
    keys = SamplingParams(max_tokens=45, structured={"json": SCHEMAS["long_keys"]})
    other = engine.add_request(PROMPT, keys)
    engine.run()
    for name, count in ((cut, 4), (other, 45)):
        assert engine.outputs[name].finish_reason == "length" and len(engine.outputs[name].token_ids) == count
    with pytest.raises(ValueError, match="max_tokens must be at least"):
        engine.add_request(PROMPT, SamplingParams(max_tokens=9, structured={"regex": "(no ){300}"}))


@pytest.mark.parametrize("jump_ahead", [False, True])
def test_stop_strings_and_stop_tokens_end_an_answer_in_the_middle(jump_ahead: bool) -> None:
    engine = engine_of(jump_ahead=jump_ahead)
    (the,) = vocabulary().encode(b" the")
    asked = {"choice": ["this is the whole of the answer"]}
    whole = engine.add_request(PROMPT, SamplingParams(structured=asked))
    cut = engine.add_request(PROMPT, SamplingParams(structured=asked, stop=["whole"]))
    token = engine.add_request(PROMPT, SamplingParams(structured=asked, stop_token_ids=[the]))
    engine.run()
    assert [engine.outputs[name].text for name in (whole, cut, token)] == [
        "this is the whole of the answer",
        "this is the ",
        "this is the",
    ]
    assert {engine.outputs[name].finish_reason for name in (whole, cut, token)} == {"stop"}


def test_past_the_end_of_sequence_an_answer_still_ends_where_nothing_may_follow() -> None:
    engine = engine_of()
    params = dict(max_tokens=30, ignore_eos=True, min_tokens=20)
    one = engine.add_request(PROMPT, SamplingParams(structured={"choice": ["yes", "no"]}, **params))
    long = engine.add_request(PROMPT, SamplingParams(structured={"regex": "[a-z]*"}, **params))
    engine.run()
    assert engine.outputs[one].text in ("yes", "no") and engine.outputs[one].finish_reason == "stop"
    assert len(engine.outputs[long].token_ids) == 30 and engine.outputs[long].finish_reason == "length"


@pytest.mark.parametrize("jump_ahead", [False, True])
def test_log_probabilities_are_those_of_the_model_without_the_form(jump_ahead: bool) -> None:
    engine = engine_of(jump_ahead=jump_ahead)
    free = engine.add_request(PROMPT, SamplingParams(max_tokens=1, logprobs=5))
    params = SamplingParams(
        structured={"choice": ["yes, yes", "yes, no"]}, logprobs=5, temperature=1.5, seed=3
    )
    formed = engine.add_request(PROMPT, params)
    engine.run()
    output = engine.outputs[formed]
    assert output.logprobs[0].top == engine.outputs[free].logprobs[0].top
    known = engine.add_request(
        engine.outputs[formed].prompt_token_ids + output.token_ids,
        SamplingParams(max_tokens=1, prompt_logprobs=5),
    )
    engine.run()
    told = engine.outputs[known].prompt_logprobs[-len(output.token_ids) :]
    for entry, wanted in zip(output.logprobs, told, strict=True):
        assert entry.token == wanted.token and entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_a_fault_in_a_mask_ends_its_own_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    params = [SamplingParams(max_tokens=30, structured={"regex": "[a-z]{20}"}) for _ in range(3)]
    wanted = answers(0.0, [{"regex": "[a-z]{20}"}])[1][0].text
    ids = [engine.add_request(PROMPT, each) for each in params]
    free = engine.add_request(PROMPT, SamplingParams(max_tokens=30))
    for _ in range(3):
        engine.step()
    broken: AnswerForm = engine.scheduler.requests[ids[1]].form

    def fail() -> Any:
        raise ValueError("made up")

    monkeypatch.setattr(broken._matcher, "mask", fail)
    engine.run()
    assert engine.outputs[ids[1]].finish_reason == "error"
    assert engine.outputs[ids[1]].error == "ValueError: made up"
    assert [engine.outputs[name].text for name in (ids[0], ids[2])] == [wanted, wanted]
    assert engine.outputs[free].finish_reason in ("stop", "length")


def test_an_abort_and_a_preview_leave_forms_alone() -> None:
    engine = engine_of(max_num_seqs=2)
    params = SamplingParams(
        max_tokens=60, temperature=1.0, seed=2, n=2, structured={"json": SCHEMAS["long_keys"]}
    )
    ids = [engine.add_request(PROMPT, params) for _ in range(3)]
    aborted = f"{ids[1]}.1"
    while engine.has_unfinished:
        engine.preview()
        record = engine.step()
        if record.step == 2:
            engine.abort(aborted)
    assert engine.outputs[aborted].finish_reason == "abort"
    for name in (ids[0], ids[1], ids[2], f"{ids[0]}.1", f"{ids[2]}.1"):
        check({"json": SCHEMAS["long_keys"]}, engine.outputs[name])
    assert engine.outputs[ids[0]].text == engine.outputs[ids[2]].text


def test_a_rule_of_your_own_for_drafts_cannot_break_a_form() -> None:
    """What it accepts beside the form ends the answer, and says why."""
    engine = engine_of(speculative="ngram", speculative_gate=False, jump_ahead=False)
    engine.runner.accept = lambda drafts, chosen: len(drafts)
    name = engine.add_request(
        PROMPT, SamplingParams(max_tokens=40, structured={"regex": "( the answer| x)+"})
    )
    engine.run()
    output = engine.outputs[name]
    assert output.finish_reason != "error" or "breaks the form" in output.error
    engine.runner.accept = model_runner.accept


def test_the_timeline_says_what_a_form_forced_and_what_it_left(tmp_path: Path) -> None:
    engine, (output,) = answers(0.0, [{"json": SCHEMAS["long_keys"]}])
    allowed = [count for record in engine.trace for row in record.rows for count in row.allowed]
    forced = allowed.count(1)
    left = sorted(count for count in allowed if count > 1)
    assert len(allowed) == len(output.token_ids) and left
    words = (
        f"a form forced {forced} of {len(allowed)} tokens, and left {left[len(left) // 2]:,} to choose from"
    )
    assert words in " ".join(text.batch_timeline(engine.trace).split())
    free, _ = answers(0.0, [None])
    assert "a form" not in text.batch_timeline(free.trace)
    engine.trace.save(tmp_path / "run.jsonl")
    assert words in " ".join(text.batch_timeline(Trace.load(tmp_path / "run.jsonl")).split())
