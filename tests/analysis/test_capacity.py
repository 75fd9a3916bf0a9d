"""The model of what a step costs, and the replay against it: what it says must be what the engine does."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.analysis.capacity import (
    GPUS,
    MODELS,
    TERMS,
    Demand,
    FittedClock,
    Gpu,
    ModelSize,
    Replica,
    Roofline,
    Settings,
    StepWork,
    draw_demands,
    fit,
    replay,
)
from labkit.analysis.capacity.decode_run import DecodeRun
from labkit.analysis.capacity.replay import ROUTERS, _request
from labkit.benchmark.engine import forecast
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import load_model
from labkit.sampling_params import SamplingParams
from labkit.schedulers.audit import check_pool
from labkit.trace.records import StepRecord

PRICES = FittedClock(step=0.03, tokens=2e-3, keys=5e-6, sampled=1e-3, rows=4e-4, pairs=2e-7)


def tick(work: StepWork) -> float:
    return 1.0


def made_up_steps(count: int = 120, seed: int = 0) -> list[StepRecord]:
    """Steps of many shapes, without their seconds."""
    rng = random.Random(seed)
    records = []
    for step in range(count):
        rows = rng.randint(1, 24)
        num_tokens = tuple(rng.choice((1, 1, 1, rng.randint(2, 90))) for _ in range(rows))
        starts = tuple(rng.randint(0, 500) for _ in range(rows))
        sampled = tuple(rng.choice(((), (7,), (7,))) for _ in range(rows))
        names = tuple(map(str, range(rows)))
        records.append(
            StepRecord(step, names, "d" * rows, starts=starts, num_tokens=num_tokens, sampled=sampled)
        )
    return records


def timed(records: list[StepRecord], clock: FittedClock, noise: float = 0.0) -> list[StepRecord]:
    rng = random.Random(1)
    return [
        dataclasses.replace(record, seconds=clock(StepWork.of(record)) * rng.lognormvariate(0, noise))
        for record in records
    ]


# -- the work of a step ---------------------------------------------------------------------------


def test_the_work_of_a_step_by_hand() -> None:
    # A decodes at place 3, so it looks at 4 keys; B computes four tokens from the start: 1 + 2 + 3 + 4 pairs.
    step = StepRecord(0, ("a", "b"), "dc", starts=(3, 0), num_tokens=(1, 4), sampled=((7,), ()))
    assert StepWork.of(step) == StepWork(rows=2, tokens=5, sampled=1, keys=8, pairs=14)


def test_an_idle_seat_is_padding_and_reads_nothing() -> None:
    step = StepRecord(
        0, ("a", "b"), "di", starts=(3, 9), num_tokens=(1, 0), sampled=((7,), ()), padding=(0, 1)
    )
    assert StepWork.of(step) == StepWork(rows=1, tokens=2, sampled=1, keys=4, pairs=4)


def test_a_draft_is_a_place_that_samples() -> None:
    step = StepRecord(0, ("a",), "d", starts=(3,), num_tokens=(3,), sampled=((7, 8),), drafted=((7, 9),))
    assert StepWork.of(step) == StepWork(rows=1, tokens=3, sampled=3, keys=6, pairs=4 + 5 + 6)


# -- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [("step",), TERMS[:2], TERMS[:3], TERMS])
def test_a_fit_finds_the_prices_of_an_exact_trace(terms: tuple[str, ...]) -> None:
    clock = FittedClock(**{term: getattr(PRICES, term) for term in terms})
    found = fit(timed(made_up_steps(), clock), terms)
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(clock, term), rel=1e-6, abs=1e-15)
    assert found.error < 1e-8 and abs(found.bias) < 1e-8 and found.num_steps == 120


def test_a_fit_finds_nearly_the_prices_of_a_noisy_one_with_wild_steps_in_it() -> None:
    clock = FittedClock(step=0.03, tokens=2e-3, keys=2e-5)
    records = timed(made_up_steps(600), clock, noise=0.05)
    records = [  # every thirtieth step met a busy moment
        dataclasses.replace(record, seconds=record.seconds * 4) if record.step % 30 == 0 else record
        for record in records
    ]
    found = fit(records)
    for term in TERMS[:3]:
        assert getattr(found, term) == pytest.approx(getattr(clock, term), rel=0.1)
    assert 0.02 < found.error < 0.08
    assert found.bias < -0.05, "what the wild steps took is not in the clock, and it says so"


def test_no_price_is_negative() -> None:
    """Where steps get shorter with the keys they read, keys are free, and the rest is fitted without them."""
    base = FittedClock(step=1.0, tokens=1e-3)
    records = [
        dataclasses.replace(record, seconds=base(work) - 1e-5 * work.keys)
        for record in made_up_steps()
        for work in [StepWork.of(record)]
    ]
    found = fit(records, TERMS)
    assert found.keys == 0 and all(getattr(found, term) >= 0 for term in TERMS)
    assert found.error < 0.05


def test_a_fit_leaves_out_steps_that_computed_nothing_or_have_no_time() -> None:
    records = timed(made_up_steps(), PRICES)
    empty = StepRecord(200, seconds=5.0)
    assert fit([*records, empty, *made_up_steps(9, seed=3)]).num_steps == len(records)


@pytest.mark.parametrize(
    ("count", "terms", "complaint"),
    [
        (5, TERMS[:3], "at least 6 steps with their seconds, to fit 3 terms, not 5"),
        (50, ("step", "weather"), "terms must be some of step, tokens, keys, .*, not step, weather"),
        (50, (), "not none"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(count: int, terms: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit(timed(made_up_steps(count), PRICES), terms)


def test_a_price_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 0"):
        FittedClock(tokens=-1.0)


# -- the roofline ---------------------------------------------------------------------------------


def test_the_roofline_by_hand() -> None:
    gpu = Gpu("mine", flops=1000, bandwidth=100, memory=10_000)
    model = ModelSize(parameters=50, layers=2, heads=4, kv_heads=1, head_dim=3, weight_bytes=2)
    clock = Roofline(gpu, model, overhead=0.25)
    assert model.kv_bytes_per_token == 2 * 2 * 1 * 3 * 2 == 24
    decode = StepWork(rows=1, tokens=1, sampled=1, keys=10, pairs=10)
    # 100 bytes of weights, and 24 for each of 10 tokens read and one written, at 100 bytes/s.
    assert clock(decode) == pytest.approx((100 + 24 * 11) / 100 + 0.25)
    assert clock.bound(decode) == "bandwidth"
    # 2 operations for each of 50 parameters and 400 tokens; 4 for each layer, head, number and pair.
    prompt = StepWork(rows=1, tokens=400, sampled=1, keys=400, pairs=80_200)
    assert clock(prompt) == pytest.approx((2 * 50 * 400 + 4 * 2 * 4 * 3 * 80_200) / 1000 + 0.25)
    assert clock.bound(prompt) == "compute"
    # 90% of 10,000 bytes, less 100 of weights, in pages of 8 tokens.
    assert clock.num_blocks(8) == (9000 - 100) // (8 * 24)


def test_a_llama_on_a_t4() -> None:
    llama = MODELS["llama-3.1-8b"]
    assert llama.kv_bytes_per_token == 131_072
    with pytest.raises(ValueError, match=r"the weights take 16\.1 GB, and 90% of a T4 is 14\.4 GB"):
        Roofline(GPUS["T4"], llama).num_blocks()
    half = Roofline(GPUS["T4"], dataclasses.replace(llama, weight_bytes=1))
    assert half.num_blocks() == int((14.4e9 - 8_030_261_248) // (16 * 131_072)) == 3037
    one = StepWork(1, 1, 1, 1, 1)
    assert half(one) == pytest.approx(8.03e9 / 300e9, rel=1e-3)


def test_gpus_are_in_the_order_of_what_they_do() -> None:
    works = [StepWork(8, 8, 8, 4000, 4000), StepWork(1, 2000, 1, 2000, 2_001_000)]
    for work in works:
        seconds = [
            Roofline(GPUS[name], MODELS["smollm2-135m"])(work) for name in ("T4", "L4", "A100", "H100")
        ]
        assert seconds == sorted(seconds, reverse=True)


def test_a_gpu_is_what_the_data_sheet_that_it_names_says() -> None:
    for gpu in GPUS.values():
        found = re.search(
            r"data sheet \d+: ([\d,]+) TFLOPS( with sparsity)?.*, ([\d,.]+) (GB|TB)/s$", gpu.source
        )
        assert found, gpu.source
        peak, sparse, speed, unit = found.groups()
        assert gpu.flops == float(peak.replace(",", "")) * 1e12 / (2 if sparse else 1)
        assert gpu.bandwidth == pytest.approx(float(speed.replace(",", "")) * {"GB": 1e9, "TB": 1e12}[unit])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Gpu("x", 0, 1, 1), "flops must be at least 1"),
        (lambda: ModelSize(0, 1, 1, 1, 1), "parameters must be at least 1"),
        (lambda: ModelSize(1, 1, 1, 1, 1, weight_bytes=0), "weight_bytes must be between"),
        (lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"], overhead=-1), "overhead must be at least 0"),
        (lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"]).num_blocks(share=2), "share must be between"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: collections.abc.Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


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


def test_a_forecast_runs_what_it_predicts() -> None:
    """Its seconds are nobody's business here: tiny-random has hardly any."""
    loaded = load_model("tiny-random", device="cpu", say=None)
    cases = forecast.cases_of(loaded.tokenizer, scale=0.1)
    report = forecast.forecast(loaded, cases, repeats=2, replayed=50, progress=False)
    assert [row.fitted for row in report.rows] == [True, True, False, False, False]
    assert all(len(row.all_rates) == 2 and row.rate > 0 and row.predicted_rate > 0 for row in report.rows)
    assert all(0 < row.ttft < 60 and 0 < row.predicted_ttft < 60 for row in report.rows)
    told = json.loads(json.dumps(report.to_json()))
    assert told["clock"]["num_steps"] == report.clock.num_steps > 20
    assert "32 seats, arriving at 70%" in str(report) and "median error of a step" in str(report)
    bars = forecast.figure(report).data
    assert [bar.name for bar in bars] == ["measured", "predicted"] * 2
    assert list(bars[1].y) == [row.predicted_rate for row in report.rows]


def test_a_served_case_is_the_steps_that_were_predicted() -> None:
    """A backlog leaves nothing to time: the engine's steps and the replay's are the same."""
    loaded = load_model("tiny-random", device="cpu", say=None)
    case = forecast.cases_of(loaded.tokenizer, scale=0.2)[2]
    served = forecast.serve(loaded, case)
    sizes = Settings(served.num_blocks, max_num_seqs=case.seats, max_num_batched_tokens=case.budget)
    told = replay(case.demands, tick, sizes, traces=True)
    assert [step.num_tokens for step in served.records] == [step.num_tokens for step in told.traces[0]]
    assert len(served.ttft) == len(case.jobs) and len(served.itl) == told.gap_counts.sum()


# -- the jump -------------------------------------------------------------------------------------


def pool_of(replica: Replica) -> tuple[object, ...]:
    """All that the pool knows, with every order that decides what comes next."""
    pool = replica.pool
    known = {key: pool.node_of[block] for key, block in pool.block_of.items()}
    return list(pool.free), list(pool.cached), dict(pool.block_of), known, pool.tables


def after_all(demands: list[Demand], sizes: Settings, *, jump: bool, clock: FittedClock) -> Replica:
    replica = Replica(sizes, clock, jump=jump)
    for number, demand in enumerate(sorted(demands, key=lambda demand: demand.at)):
        replica.advance(demand.at)
        replica.add(_request(number, demand), demand.at)
    replica.advance(float("inf"))
    check_pool(replica.pool)
    return replica


STEADY = (
    "gaps",
    "gap_counts",
    "steps",
    "busy",
    "blocks",
    "peak_blocks",
    "preemptions",
    "cached",
    "looked_up",
)
CLOCKS = st.sampled_from((FittedClock(step=1.0), FittedClock(step=0.4, tokens=0.07, keys=0.003)))


@given(st.lists(DRAWN, min_size=1, max_size=12), SIZES, CLOCKS)
@settings(max_examples=250, deadline=None)
def test_a_jump_gives_exactly_what_stepping_gives(
    demands: list[Demand], sizes: Settings, clock: FittedClock
) -> None:
    plain = after_all(demands, sizes, jump=False, clock=clock)
    jumped = after_all(demands, sizes, jump=True, clock=clock)
    assert (jumped.first_token, jumped.finish) == (plain.first_token, plain.finish)
    for name in STEADY:
        assert getattr(jumped, name) == getattr(plain, name), name
    assert pool_of(jumped) == pool_of(plain)


@given(st.lists(DRAWN, min_size=4, max_size=16), SIZES, st.sampled_from(sorted(ROUTERS)))
@settings(max_examples=60, deadline=None)
def test_a_router_sees_the_same_replicas_whether_they_jump_or_not(
    demands: list[Demand], sizes: Settings, routing: str
) -> None:
    clock = FittedClock(step=0.4, tokens=0.07, keys=0.003)
    both = [replay(demands, clock, sizes, replicas=3, routing=routing, jump=jump) for jump in (False, True)]
    assert np.array_equal(both[0].replica, both[1].replica)
    assert np.array_equal(both[0].finish, both[1].finish)


def test_most_steps_are_jumped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the two tests above compare a thing with itself."""
    begun = []
    begin = DecodeRun.begin
    monkeypatch.setattr(DecodeRun, "begin", lambda run: begun.append(1) or begin(run))
    told = replay(draw_demands(40, rate=0.2, seed=2), tick, Settings(400, max_num_seqs=8))
    assert len(begun) > 0.7 * told.steps
    crowded = replay(draw_demands(40, seed=2), tick, Settings(40, max_num_seqs=8))
    assert crowded.preemptions


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
