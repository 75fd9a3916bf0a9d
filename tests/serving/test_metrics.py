"""What Prometheus is told equals a count made from the trace."""

from __future__ import annotations

import threading
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import load_model
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.metrics import PREFIX, Metrics
from labkit.speculative.speculator import acceptance

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
}


def values_of(metrics: Metrics) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name.removeprefix(PREFIX), sample.labels.get("finished_reason", "")): sample.value
        for family in families
        for sample in family.samples
    }


def run(live: AsyncEngine) -> None:
    """A pool too small for all, a shared beginning, an abort, and several answers to one prompt."""
    shared = "the same words at the beginning of each "
    live.pause()  # until all are there, so that the steps are the same every time
    names = [
        live.submit(shared + "one two three"[: 3 + i], SamplingParams(max_tokens=6 + i)) for i in range(10)
    ]
    names.append(live.submit("several answers", SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=1)))
    gone = live.submit("somebody who leaves", SamplingParams(max_tokens=200, ignore_eos=True))
    live.abort(gone)
    live.resume()
    for name in names:
        for _ in live.stream(name):
            pass
    while live.num_unfinished:
        for _ in live.stream(gone):
            pass


def test_metrics_equal_a_count_of_the_trace() -> None:
    sizes = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32}
    config = EngineConfig(model="tiny-random", max_model_len=80, **sizes)
    metrics = Metrics("tiny-random")
    with AsyncEngine(Engine(config)) as live:
        metrics.follow(live)
        run(live)
        trace, outputs = live.engine.trace, live.engine.outputs
    got = values_of(metrics)
    assert {name for name, _ in got} >= NAMES
    ends = Counter(finish.reason for record in trace for finish in record.finished)
    for reason, count in ends.items():
        assert got["request_success_total", reason] == count
    assert ends["abort"] == 1
    preemptions = sum(len(record.preempted) for record in trace)
    assert got["num_preemptions_total", ""] == preemptions > 0
    sampled = sum(record.total_sampled for record in trace)
    assert got["generation_tokens_total", ""] == sampled
    looked, preempted = [], set()
    for record in trace:
        preempted |= {name for name, _ in record.preempted}
        looked += [a for a in record.admitted if a.num_looked_up and a.request_id not in preempted]
    assert got["prefix_cache_queries_total", ""] == sum(a.num_looked_up for a in looked) > 0
    assert got["prefix_cache_hits_total", ""] == sum(a.num_cached_tokens for a in looked) > 0
    begun = {row.request_id for record in trace for row in record.rows if row.sampled}
    assert got["prompt_tokens_total", ""] == sum(len(outputs[name].prompt_token_ids) for name in begun)
    assert got["time_to_first_token_seconds_count", ""] == len(begun)
    assert got["inter_token_latency_seconds_count", ""] == sampled - len(begun)
    assert got["e2e_request_latency_seconds_count", ""] == sum(ends.values())
    assert got["num_requests_running", ""] == got["num_requests_waiting", ""] == 0
    assert got["kv_cache_usage_perc", ""] == 0


def test_late_metrics_count_what_the_trace_holds() -> None:
    early, late = Metrics("tiny-random"), Metrics("tiny-random")
    with AsyncEngine(Engine(EngineConfig(model="tiny-random", num_blocks=64, block_size=4))) as live:
        early.follow(live)
        early.follow(live)  # twice is once
        run(live)
        told = threading.Event()
        late.follow(live)
        live.subscribe(lambda record: told.set())  # one after the other: then the other has been told, too
        assert told.wait(20)
    ours, theirs = values_of(early), values_of(late)
    same = [key for key in ours if not key[0].endswith(("_created", "_sum", "_bucket"))]
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_counters_go_on_when_the_engine_is_replaced() -> None:
    metrics = Metrics("tiny-random")
    total = 0
    for _ in range(2):
        with AsyncEngine(Engine(EngineConfig(model="tiny-random", num_blocks=64, block_size=4))) as live:
            metrics.follow(live)
            for _ in live.stream(live.submit("once more", SamplingParams(max_tokens=7, ignore_eos=True))):
                pass
        total += 7
        assert values_of(metrics)["generation_tokens_total", ""] == total


def drafts_of(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        sample.name.removeprefix(PREFIX + "spec_decode_") + sample.labels.get("position", ""): sample.value
        for family in families
        for sample in family.samples
        if "spec_decode" in sample.name and sample.name.endswith("_total")
    }


def test_drafts_equal_a_count_of_the_trace() -> None:
    model = load_model("tiny-random", say=None)
    draft = load_model("tiny-random", quantization="int8", say=None)  # it errs now and then
    common = {"num_blocks": 64, "block_size": 4, "speculative": "draft", "speculative_gate": False}
    metrics = Metrics("tiny-random")
    total: Counter[str] = Counter()
    gaps = 0
    for most in (4, 2):  # counters go on with another engine
        config = EngineConfig(model=model, draft_model=draft, num_speculative_tokens=most, **common)
        with AsyncEngine(Engine(config)) as live:
            metrics.follow(live)
            assert most == 2 or drafts_of(metrics)["num_accepted_tokens_per_pos_total3"] == 0, "from zero on"
            for name in [live.submit("once upon a time", SamplingParams(max_tokens=25)) for _ in range(3)]:
                for _ in live.stream(name):
                    pass
            trace = live.engine.trace
        rows = [row for record in trace for row in record.rows if row.drafted]
        total["num_drafts_total"] += len(rows)
        total["num_draft_tokens_total"] += sum(len(row.drafted) for row in rows)
        total["num_accepted_tokens_total"] += sum(row.num_accepted for row in rows)
        for place, (_, right) in enumerate(acceptance(trace)):
            total[f"num_accepted_tokens_per_pos_total{place}"] += right
        assert drafts_of(metrics) == total
        gaps += sum(row.kind == "decode" and bool(row.sampled) for record in trace for row in record.rows)
    assert values_of(metrics)["inter_token_latency_seconds_count", ""] == gaps, "one for all at once"
    assert 0 < total["num_accepted_tokens_total"] < total["num_draft_tokens_total"]


def test_an_engine_that_does_not_draft_counts_no_drafts() -> None:
    metrics = Metrics("tiny-random")
    with AsyncEngine(Engine(EngineConfig(model="tiny-random", num_blocks=64))) as live:
        metrics.follow(live)
        assert drafts_of(metrics) == {}
