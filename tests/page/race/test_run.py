"""A race runs the same requests on the real engine, measures what its trace says, and compares tokens."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from labkit.core.request import Request
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.race.run import (
    MAX_ANSWER,
    MAX_PROMPT,
    MAX_REQUESTS,
    Check,
    Entry,
    Progress,
    Race,
    RaceCancelled,
    RaceError,
    Setting,
    Workload,
    config_of,
    run_race,
)
from labkit.page.race.workloads import COURSES, SETTINGS
from labkit.sampling_params import SamplingParams
from labkit.speculative.ngram import NgramDrafter
from labkit.trace.records import TraceMeta
from labkit.trace.trace import Trace

THREE = [SETTINGS[name] for name in ("naive", "static", "continuous")]


def small(**fields) -> Workload:
    entries = tuple(Entry(tuple(range(10, 16 + i)), 4 + 3 * (i % 3), step=2 * i) for i in range(6))
    return Workload(**{"entries": entries, "num_blocks": 16, "block_size": 4, "max_num_seqs": 3} | fields)


@pytest.fixture(scope="module")
def race(model: LoadedModel) -> Race:
    return run_race(model, small(), THREE)


# -- what comes out -------------------------------------------------------------------------------


def test_all_settings_give_the_tokens_of_a_request_alone(model: LoadedModel, race: Race) -> None:
    assert race.check == Check(True, False, f"All three gave the same {race.results[0].generated} tokens.")
    for number, entry in enumerate(race.workload.entries):
        engine = Engine(config_of(model, race.workload, Setting("alone")))
        engine.add_request(
            list(entry.prompt), SamplingParams(max_tokens=entry.max_tokens, temperature=0, ignore_eos=True)
        )
        while engine.has_unfinished:
            engine.step()
        (output,) = engine.outputs.values()
        for result in race.results:
            assert list(result.tokens[number]) == output.token_ids


def test_each_leaves_a_trace_of_its_own_setting(race: Race) -> None:
    assert [result.trace.meta.scheduler for result in race.results] == ["naive", "static", "continuous"]
    assert [result.setting.name for result in race.results] == ["naive", "static", "continuous"]
    for result in race.results:
        assert Trace.from_lines(result.trace.lines()) == result.trace
        assert result.generated == race.workload.answer_tokens == sum(r.total_sampled for r in result.trace)
        ended = [finish.request_id for record in result.trace for finish in record.finished]
        assert sorted(ended) == list("012345")
    naive, static, continuous = race.results
    assert naive.steps > static.steps > continuous.steps
    assert static.padding > 0 == continuous.padding == naive.padding
    assert naive.batch == 1 < continuous.batch


def test_requests_arrive_at_their_step_and_never_late(race: Race) -> None:
    """While something runs, a request joins in the record of its own step."""
    for result in race.results:
        arrivals = {a.request_id: record.step for record in result.trace for a in record.arrived}
        assert [int(name) for name in arrivals] == list(range(6))
        for number, entry in enumerate(race.workload.entries):
            assert arrivals[str(number)] == entry.step, result.setting.name


def test_no_steps_pass_while_the_engine_rests(model: LoadedModel) -> None:
    entries = (Entry((5, 6, 7), 2), Entry((5, 6, 8), 2, step=500))
    race = run_race(model, small(entries=entries), THREE[:2])
    assert [result.steps for result in race.results] == [4, 4]
    assert race.check.sentence == "Both gave the same 4 tokens."


def test_times_are_those_of_the_trace(race: Race) -> None:
    for result in race.results:
        records = result.trace.records
        lasted = records[-1].time - records[0].time + records[0].seconds
        assert lasted <= result.seconds + 1e-6 and result.seconds < lasted + 1
        assert result.tokens_per_second == pytest.approx(result.generated / result.seconds)
        ends = {record.step: record.time for record in records}
        for number, entry in enumerate(race.workload.entries):
            rows = ((r.step, row) for r in records for row in r.rows if row.request_id == str(number))
            first = next(ends[step] for step, row in rows if row.sampled)
            first -= ends.get(entry.step - 1, records[0].time - records[0].seconds)
            assert result.ttft[number] == pytest.approx(first, abs=0.05)
        gaps = sum(b - a for a, b in pairwise(sorted(ends.values())))
        assert 0 < result.itl_median <= result.itl_max <= gaps
        assert 0 < result.ttft_median <= result.ttft_max <= result.seconds


def test_waste_and_usage_by_hand(model: LoadedModel) -> None:
    """One request of 3 + 3 tokens on pages of 4: 3, 4 and 5 tokens in the cache, on 1, 1 and 2 pages."""
    settings = [Setting("paged"), Setting("reserved", kv_policy="reserved")]
    race = run_race(model, small(entries=(Entry((5, 6, 7), 3),), num_blocks=8), settings)
    paged, reserved = race.results
    assert paged.waste == pytest.approx(1 - 12 / 16)
    assert reserved.waste == pytest.approx(1 - 12 / 24)
    assert (paged.kv_usage, paged.kv_usage_peak) == (pytest.approx(4 / 3 / 8), 2 / 8)
    assert reserved.kv_usage == reserved.kv_usage_peak == 2 / 8
    assert paged.preemptions == 0


def test_a_request_by_seconds_counts_from_when_it_was_due(model: LoadedModel) -> None:
    entries = tuple(Entry((5, 6, 7 + i), 2, seconds=0.15 * i) for i in range(3))
    race = run_race(model, small(entries=entries), THREE[1:])
    for result in race.results:
        assert result.seconds >= 0.3
        arrived = [record.time - record.seconds for record in result.trace if record.arrived]
        assert [b - a > 0.1 for a, b in pairwise(arrived)] == [True, True]
        assert max(result.ttft) < 0.2
    assert race.check.same


def test_chunks_let_the_others_go_on(model: LoadedModel) -> None:
    entries = (Entry((5, 6, 7), 12), Entry(tuple(range(40, 80)), 3, step=3))
    settings = [
        Setting("whole", enable_chunked_prefill=False),
        Setting("chunked", max_num_batched_tokens=8),
    ]
    race = run_race(model, small(entries=entries, num_blocks=64), settings)
    assert race.check.same
    whole, chunked = race.results
    assert "c" not in "".join(record.kinds for record in whole.trace)
    assert {r.total_tokens for r in whole.trace if "1" in r.requests and not r.starts[0]} == {40}
    assert sum("c" in record.kinds for record in chunked.trace) > 2
    assert max(record.total_tokens for record in chunked.trace) == 8


def test_drafts_change_steps_and_no_token(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = small(entries=(Entry((5, 6, 7), 20),), num_blocks=32)
    plain = Setting("plain")
    answer = run_race(model, workload, [plain, Setting("again")]).results[0].tokens[0]

    class Oracle(NgramDrafter):
        """Knows the next two tokens, and not the one after them."""

        def propose(self, wanted: list[tuple[Request, int]]) -> list[tuple[int, ...]]:
            ((request, count),) = wanted
            done = len(request.output_token_ids)
            return [(*answer[done : done + 2], 9)[:count]]

    monkeypatch.setattr("labkit.speculative.draft_model.NgramDrafter", Oracle)
    race = run_race(model, workload, [plain, Setting("drafts", speculative="ngram")])
    without, drafts = race.results
    assert race.check == Check(True, False, "Both gave the same 20 tokens.")
    assert (without.drafted, without.acceptance) == (0, None)
    right = sum(record.total_accepted for record in drafts.trace)
    assert right == 20 - drafts.steps > 10 and drafts.acceptance == right / drafts.drafted < 0.8
    assert without.steps == 20


def test_tokens_that_come_together_share_the_gap(race: Race) -> None:
    result = dataclasses.replace(race.results[0], token_times=((0.0, 0.3, 0.3, 0.3, 0.5, 0.7, 0.7),))
    assert (result.itl_median, result.itl_max) == (pytest.approx(0.1), 0.3)
    assert dataclasses.replace(result, token_times=()).itl_median is None


# -- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "fault", "said"),
    [("float32", True, "must not happen in float32"), ("bfloat16", False, "In bfloat16 that can happen")],
)
def test_other_tokens_are_noticed(race: Race, dtype: str, fault: bool, said: str) -> None:
    first, second, *_ = race.results
    meta = dataclasses.replace(first.trace.meta, dtype=dtype)
    broken = dataclasses.replace(second, tokens=(second.tokens[0], (1, 2, 3), *second.tokens[2:]))
    first = dataclasses.replace(first, trace=Trace(meta, first.trace.records))
    check = Race(race.workload, (first, broken)).check
    assert (check.same, check.fault) == (False, fault)
    assert said in check.sentence and "differ in 1 of 6 answers, first in that to request 1" in check.sentence


# -- on the way -----------------------------------------------------------------------------------


def test_progress_goes_up_to_one(model: LoadedModel) -> None:
    seen: list[Progress] = []
    race = run_race(model, small(), THREE, progress=seen.append)
    assert [p.share for p in seen] == sorted(p.share for p in seen)
    assert (seen[0].share, seen[-1].share) == (0, 1)
    assert len(seen) == 3 + sum(result.steps for result in race.results)
    assert [p.setting for p in seen if p.step == 0] == ["naive", "static", "continuous"]
    assert (seen[-1].answered, seen[-1].requests, seen[-1].number) == (6, 6, 2)


def test_it_can_be_stopped_between_two_steps(model: LoadedModel) -> None:
    seen: list[Progress] = []
    with pytest.raises(RaceCancelled, match="stopped in static, after 2 steps"):
        run_race(
            model,
            small(),
            THREE,
            progress=seen.append,
            cancelled=lambda: bool(seen) and seen[-1].setting == "static" and seen[-1].step >= 2,
        )
    assert seen[-1].step == 2


def test_waiting_for_an_arrival_can_be_stopped(model: LoadedModel) -> None:
    entries = (Entry((5, 6, 7), 1, seconds=0), Entry((5, 6, 7), 1, seconds=59))
    asked = iter(range(10**6))
    with pytest.raises(RaceCancelled):
        run_race(model, small(entries=entries), THREE[:2], cancelled=lambda: next(asked) > 6)


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ((), f"1 to {MAX_REQUESTS} requests, not 0"),
        ((Entry((1,), 1),) * (MAX_REQUESTS + 1), f"1 to {MAX_REQUESTS} requests"),
        ((Entry((), 1),), "length of the prompt"),
        ((Entry((1,) * (MAX_PROMPT + 1), 1),), f"{MAX_PROMPT}"),
        ((Entry((1,), MAX_ANSWER + 1),), f"max_tokens must be between 1 and {MAX_ANSWER}"),
        ((Entry((1,), 1, step=-1),), "step"),
        ((Entry((1,), 1, seconds=1e9),), "seconds"),
        ((Entry((1,), 1, seconds=1), Entry((1,), 1)), "all by step or all by seconds"),
    ],
)
def test_a_workload_is_bounded(entries: tuple[Entry, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Workload(entries, 16)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], list("abcd"), []])
def test_two_or_three_settings_by_name(model: LoadedModel, names: list[str]) -> None:
    with pytest.raises(ValueError, match="2 to 3 settings with different names"):
        run_race(model, small(), [Setting(name) for name in names])


def test_what_a_setting_cannot_serve_is_said_with_its_name(model: LoadedModel) -> None:
    long = small(entries=(Entry(tuple(range(40)), 4),), num_blocks=4)
    with pytest.raises(RaceError, match=r"^naive: prompt has 40 tokens, but max_model_len is 16"):
        run_race(model, dataclasses.replace(long, max_num_seqs=1), THREE)
    with pytest.raises(RaceError, match=r"^nonsense: scheduler must be one of"):
        run_race(model, small(), [Setting("nonsense", "nonsense"), Setting("b")])


def test_a_failing_request_ends_the_race(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    race_settings = THREE[:2]
    monkeypatch.setattr("labkit.core.model_runner.ModelRunner.run", broken)
    with pytest.raises(RaceError, match=r"naive: request 0 failed: .*out of luck"):
        run_race(model, small(), race_settings)


# -- the named ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COURSES)
def test_a_named_workload_shows_what_it_says(model: LoadedModel, name: str) -> None:
    course = COURSES[name]
    race = run_race(model, course.workload(model.tokenizer), [SETTINGS[s] for s in course.settings])
    assert race.check.same
    assert race.workload.answer_tokens <= 260, "too long for a laptop"
    results = {result.setting.name: result for result in race.results}
    if name in ("uneven", "trickle"):
        assert results["naive"].steps > 1.2 * results["static"].steps > 1.2 * results["continuous"].steps
        assert results["static"].padding > 20
    elif name == "pool":
        reserved, paged = results.values()
        assert reserved.waste > 2 * paged.waste
        assert paged.batch > reserved.batch and paged.steps < reserved.steps
    elif name == "copy":
        assert results["continuous"].drafted == 0 < results["speculation"].drafted
        assert results["speculation"].steps <= results["continuous"].steps
    else:
        whole, chunked = results.values()
        assert max(r.total_tokens for r in whole.trace) >= 400
        assert max(r.total_tokens for r in chunked.trace) <= 32


def test_it_needs_no_torch_to_read_a_race() -> None:
    assert TraceMeta(1, 1, 1, 1) and "torch" not in vars(
        __import__("labkit.page.race.run", fromlist=["race"])
    )
