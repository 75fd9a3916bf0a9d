"""The replay against a clock: what it says must be what the engine does."""

from __future__ import annotations

import collections
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.analysis.capacity import (
    Demand,
    FittedClock,
    Settings,
    StepWork,
    draw_demands,
    replay,
)
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.sampling_params import SamplingParams
from labkit.trace.records import StepRecord


def tick(work: StepWork) -> float:
    return 1.0


# -- the replay is the engine's -------------------------------------------------------------------

DRAWN = st.builds(
    lambda at, own, answer, group, shared: Demand(float(at), own + shared, answer, group, shared),
    st.integers(0, 30),
    st.integers(1, 14),
    st.integers(1, 24),
    st.integers(0, 1),
    st.sampled_from((0, 0, 4, 9)),
)
SIZES = st.builds(
    Settings,
    num_blocks=st.integers(14, 40),
    block_size=st.sampled_from((1, 3, 4)),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 16),
    kv_policy=st.sampled_from(("paged", "paged", "reserved")),
    enable_prefix_caching=st.booleans(),
).map(lambda some: dataclasses.replace(some, num_blocks=some.num_blocks * 4 // some.block_size))


def engine_records(demands: list[Demand], sizes: Settings) -> list[StepRecord]:
    """The same requests through the real engine on a real model, each added before the step it arrives at."""
    engine = Engine(EngineConfig(model="tiny-random", device="cpu", **dataclasses.asdict(sizes)))
    todo = collections.deque(sorted(demands, key=lambda demand: demand.at))
    number = step = 0
    while todo or engine.has_unfinished:
        while todo and todo[0].at <= step:
            demand = todo.popleft()
            tokens = [300 + demand.group] * demand.shared + [400 + number] * (demand.prompt - demand.shared)
            params = SamplingParams(max_tokens=demand.answer, ignore_eos=True)
            engine.add_request(tokens, params, request_id=str(number))
            number += 1
        if engine.has_unfinished:
            engine.step()
        step += 1
    return engine.trace.records


def without_tokens(record: StepRecord) -> StepRecord:
    return dataclasses.replace(record, sampled=tuple((0,) * len(tokens) for tokens in record.sampled))


CROWDED = [
    Demand(float(at), prompt, answer, group, shared)
    for at, prompt, answer, group, shared in (
        (0, 9, 20, 0, 0),
        (0, 14, 12, 1, 8),
        (0, 3, 25, 0, 0),
        (2, 13, 9, 1, 8),
        (3, 30, 5, 0, 0),
        (5, 4, 18, 0, 0),
        (60, 12, 7, 1, 8),
    )
]


@pytest.mark.parametrize(
    "sizes",
    [
        Settings(60, 4, max_num_seqs=8, max_num_batched_tokens=16),
        Settings(16, 4, max_num_seqs=8, max_num_batched_tokens=16),  # pages run out
        Settings(60, 4, max_num_seqs=2, max_num_batched_tokens=5),
        Settings(30, 4, kv_policy="reserved", max_num_seqs=8, max_num_batched_tokens=16),
        Settings(16, 4, max_num_seqs=8, max_num_batched_tokens=16, enable_prefix_caching=False),
    ],
)
def test_a_replay_is_the_engines_trace_step_for_step(sizes: Settings) -> None:
    """Everything but the tokens and the time: who ran, on which pages, who waited and why."""
    mine = replay(CROWDED, tick, sizes, traces=True)
    records = engine_records(CROWDED, sizes)
    assert list(map(without_tokens, mine.traces[0])) == list(map(without_tokens, records))
    if sizes.num_blocks == 16:
        assert mine.preemptions == sum(len(record.preempted) for record in records) > 0
    times = {ended.request_id: at.time for at in mine.traces[0] for ended in at.finished}
    assert mine.finish.tolist() == [times[str(i)] for i in range(len(CROWDED))]


# -- what must hold of any replay -----------------------------------------------------------------


@given(st.lists(DRAWN, min_size=1, max_size=12), SIZES, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_each_request_gets_its_tokens_and_no_more(
    demands: list[Demand], sizes: Settings, replicas: int
) -> None:
    told = replay(demands, tick, sizes, replicas=replicas)
    assert told.gap_counts.sum() + len(demands) == told.num_tokens  # a gap before each token but the first
    assert (told.ttft > 0).all() and (told.finish >= told.first_token).all()
    answers = np.array([demand.answer for demand in told.demands])
    assert (told.finish - told.first_token >= answers - 1).all(), "no request gets two tokens in a step"
    traced = replay(demands, tick, sizes, replicas=replicas, traces=True)
    sampled = collections.Counter(
        name
        for trace in traced.traces
        for record in trace
        for name, tokens in zip(record.requests, record.sampled, strict=True)
        for _ in tokens
    )
    assert [sampled[str(i)] for i in range(len(demands))] == answers.tolist()
    assert np.array_equal(traced.finish, told.finish)


@given(st.integers(0, 1000), st.sampled_from(("round-robin", "least-loaded")))
@settings(max_examples=30, deadline=None)
def test_more_replicas_do_not_lower_the_throughput_of_a_backlog(seed: int, routing: str) -> None:
    """With the lengths of one backlog: of others, the slowest replica could be dealt all the long ones."""
    demands = draw_demands(24, prompt_tokens=(20, 20), answer_tokens=(12, 12), seed=seed)
    clock = FittedClock(step=0.5, tokens=0.02)
    sizes = Settings(64, 4, max_num_seqs=4, max_num_batched_tokens=32)
    rates = [
        replay(demands, clock, sizes, replicas=replicas, routing=routing).tokens_per_second
        for replicas in (1, 2, 3, 4, 6)
    ]
    assert rates == sorted(rates) and rates[-1] > 3 * rates[0]


def test_times_by_hand() -> None:
    """One seat, a second a step: three tokens of a prompt in two chunks, then an answer of three."""
    sizes = Settings(8, 4, max_num_seqs=1, max_num_batched_tokens=2)
    told = replay([Demand(0.5, 3, 3), Demand(1.0, 1, 1)], tick, sizes)
    assert told.first_token.tolist() == [2.5, 5.5]
    assert told.finish.tolist() == [4.5, 5.5]
    assert told.ttft.tolist() == [2.0, 4.5] and told.e2e.tolist() == [4.0, 4.5]
    assert (told.seconds, told.num_tokens, told.steps, told.busy) == (5.0, 4, 5, 1.0)
    assert told.tokens_per_second == 0.8
    # Pages of four tokens: one for four steps; the last token of an answer is never written.
    assert told.kv_usage == pytest.approx((1 + 1 + 1 + 2 + 1) / 5 / 8)
    assert told.kv_peak == 2 / 8
    assert "4 tokens in 5.0 s: 0.8 tokens/s, 5 steps, busy 100%" in str(told)


def test_a_step_that_runs_does_not_see_who_arrives_meanwhile() -> None:
    sizes = Settings(8, 4, max_num_seqs=2, max_num_batched_tokens=8)
    told = replay([Demand(0, 2, 4), Demand(1.5, 2, 1), Demand(3.0, 2, 1)], tick, sizes)
    assert told.first_token.tolist() == [1.0, 3.0, 4.0]  # 1.5 waits for 2; 3.0 is there just in time


def test_percentiles_count_tokens() -> None:
    told = replay(draw_demands(30, rate=1.0), FittedClock(step=0.01, tokens=1e-3), Settings(200))
    every = np.sort(np.repeat(told.gaps, told.gap_counts))
    for percent in (1, 50, 95, 99, 100):
        place = max(0, int(np.ceil(len(every) * percent / 100)) - 1)
        assert told.percentile("itl", percent) == every[place]
    assert told.percentile("ttft", 50) == np.sort(told.ttft)[14]
    with pytest.raises(ValueError, match="what must be ttft, itl or e2e, not 'mood'"):
        told.percentile("mood", 50)
    single = replay([Demand(0, 4, 1)], tick, Settings(4))
    assert np.isnan(single.percentile("itl", 50))


def test_a_shared_beginning_is_computed_once_for_each_replica_that_gets_it() -> None:
    demands = [Demand(100.0 * i, 40, 4, i % 4, 32) for i in range(16)]
    sizes = Settings(100, 8)
    hits = {
        name: replay(demands, tick, sizes, replicas=4, routing=name).prefix_hit_rate
        for name in ("least-loaded", "prefix-aware")
    }
    # 4 groups: each first request computes its 40 tokens, the other 12 find 32 of theirs.
    assert hits["least-loaded"] == hits["prefix-aware"] == pytest.approx(12 * 32 / (16 * 40))
    shifted = [dataclasses.replace(demand, group=(i // 4 + i) % 4) for i, demand in enumerate(demands)]
    turns = replay(shifted, tick, sizes, replicas=4).prefix_hit_rate
    aware = replay(shifted, tick, sizes, replicas=4, routing="prefix-aware").prefix_hit_rate
    assert turns == 0 and aware == pytest.approx(12 * 32 / (16 * 40))
    off = dataclasses.replace(sizes, enable_prefix_caching=False)
    assert replay(shifted, tick, off, replicas=4, routing="prefix-aware").prefix_hit_rate == 0


def test_prefix_aware_leaves_a_replica_that_has_far_more_to_do() -> None:
    demands = [Demand(0.0, 40, 50, 0, 32)] + [Demand(60.0, 40, 50, 0, 32) for _ in range(20)]
    told = replay(demands, tick, Settings(400, 8), replicas=2, routing="prefix-aware")
    counts = np.bincount(told.replica, minlength=2)
    assert counts[told.replica[0]] > counts[1 - told.replica[0]] >= 5


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Demand(-1, 1, 1), "at must be between 0 and"),
        (lambda: Demand(0, 0, 1), "prompt must be at least 1"),
        (lambda: Demand(0, 1, 0), "answer must be at least 1"),
        (lambda: Demand(0, 4, 1, 0, 5), "shared must be between 0 and 4"),
        (lambda: draw_demands(3, rate=0), "rate must be at least"),
        (lambda: draw_demands(3, prompt_tokens=(9, 3)), "prompt_tokens: the upper limit must be at least 9"),
        (lambda: draw_demands(3, groups=2), r"groups \(2\) and shared \(0\) go together"),
        (lambda: replay([], tick, Settings(9)), "demands must hold at least one"),
        (lambda: replay([Demand(0, 1, 1)], tick, Settings(9), replicas=0), "replicas must be at least 1"),
        (
            lambda: replay([Demand(0, 1, 1)], tick, Settings(9), routing="luck"),
            "routing must be one of round-",
        ),
        (
            lambda: replay([Demand(0, 1, 1)], tick, Settings(9), replicas=2, routing=lambda *_: 2),
            "routing must give a whole number from 0 to 1, not 2",
        ),
        (
            lambda: replay([Demand(0, 1, 1)], tick, Settings(9), replicas=2, routing=lambda *_: 0.5),
            "routing must give a whole number from 0 to 1, not 0.5",
        ),
        (lambda: replay([Demand(0, 1, 1)], lambda work: 0.0, Settings(9)), "clock must give more than 0"),
        (lambda: replay([Demand(0, 1, 1)], lambda work: float("nan"), Settings(9)), "clock must give more"),
        (lambda: replay([Demand(0, 100, 9)], tick, Settings(2)), "may need 7 pages .* but the pool has 2"),
        (lambda: Settings(9, 0), "block_size must be at least 1"),
        (lambda: Settings(9, max_num_seqs=0), "max_num_seqs must be at least 1"),
        (lambda: Settings(9, kv_policy="hope"), "kv_policy must be paged or reserved, not 'hope'"),
        (
            lambda: replay([Demand(0, 1, 1)], tick, Settings(9, max_num_seqs=9, max_num_batched_tokens=8)),
            r"max_num_seqs \(9\) must not exceed",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    make: collections.abc.Callable[[], object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_drawn_demands_are_the_same_each_time_and_within_their_limits() -> None:
    drawn = draw_demands(200, rate=4.0, prompt_tokens=(10, 50), answer_tokens=(2, 9), groups=3, shared=16)
    assert drawn == draw_demands(
        200, rate=4.0, prompt_tokens=(10, 50), answer_tokens=(2, 9), groups=3, shared=16
    )
    assert {demand.group for demand in drawn} == {0, 1, 2}
    assert all(26 <= demand.prompt <= 66 and 2 <= demand.answer <= 9 for demand in drawn)
    times = [demand.at for demand in drawn]
    assert times == sorted(times) and 200 / times[-1] == pytest.approx(4.0, rel=0.2)


def test_a_replay_needs_no_torch() -> None:
    code = (
        "import sys; from labkit.analysis.capacity import *; "
        "replay(draw_demands(3), Roofline(GPUS['T4'], MODELS['smollm2-135m']), Settings(99)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_preempted_request_finds_of_its_own_is_no_hit() -> None:
    demands = [Demand(0.0, 13, 8), Demand(0.0, 13, 12)]  # they share nothing
    told = replay(demands, tick, Settings(9, 4, max_num_seqs=2, max_num_batched_tokens=40), traces=True)
    (trace,) = told.traces
    again = [a for record in trace for a in record.admitted][2:]
    assert sum(admission.num_cached_tokens for admission in again) > 0
    assert told.prefix_hit_rate == trace.prefix_hit_rate == 0
