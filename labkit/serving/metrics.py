"""Numbers for Prometheus, under vLLM's names, so that its dashboards work with another prefix.

All counts come from the records of the steps, as the pictures do; seconds come from the times that the
answers keep. Counters go on when another engine takes the engine's place.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from labkit.outputs import RequestOutput
from labkit.serving.async_engine import AsyncEngine
from labkit.trace import latency
from labkit.trace.lookups import Lookups
from labkit.trace.memory_use import kv_usage
from labkit.trace.records import StepRecord

PREFIX = "labkit:"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Metrics:
    """The numbers that a server counts.

    Args:
        model_name: the label that all of them carry.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._lock = threading.Lock()
        self._live: AsyncEngine | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._tokens: dict[str, int] = {}  # sampled so far, of requests under way
        self._lookups = Lookups()
        self._drafts: _Drafts | None = None  # once there is an engine that drafts

        def gauge(name: str, what: str) -> Gauge:
            made = Gauge(PREFIX + name, what, ["model_name"], registry=self.registry)
            return made.labels(model_name)

        def counter(name: str, what: str) -> Counter:
            made = Counter(PREFIX + name, what, ["model_name"], registry=self.registry)
            return made.labels(model_name)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, what, ["model_name"], registry=self.registry, buckets=buckets)
            return made.labels(model_name)

        self.running = gauge("num_requests_running", "Requests that ran in the latest step.")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue.")
        self.kv_usage = gauge(
            "kv_cache_usage_perc", "Share of the KV cache's blocks that have an owner, 0 to 1."
        )
        self.queries = counter(
            "prefix_cache_queries", "Tokens looked up in the prefix cache, but not again after a preemption."
        )
        self.hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.preemptions = counter("num_preemptions", "Requests that had to give their blocks back.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests whose first token came.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            PREFIX + "request_success",
            "Requests that ended, by how.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _LONG)
        self.itl = histogram("inter_token_latency_seconds", "From one step's tokens to the next.", _SHORT)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG)
        self.queue_time = histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG)
        self.prefill_time = histogram("request_prefill_time_seconds", "First step to first token.", _LONG)
        self.decode_time = histogram("request_decode_time_seconds", "First token to last.", _LONG)
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_length = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def follow(self, live: AsyncEngine) -> None:
        """Count what this engine does, from the first step that its trace holds, and no longer another's."""
        with self._lock:
            if live is self._live:
                return
            self._unsubscribe()
            self._live, self._tokens, self._lookups = live, {}, Lookups()
            config = live.engine.config
            if config.speculative and self._drafts is None:
                self._drafts = _Drafts(self.registry, self._model, config.num_speculative_tokens)
            self._unsubscribe = live.subscribe(functools.partial(self._count, live))

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, live: AsyncEngine, record: StepRecord) -> None:
        """Count a step. Runs on the engine's thread."""
        self.running.set(len(record.requests))
        self.waiting.set(record.waiting)
        self.kv_usage.set(kv_usage(record.free_blocks, live.engine.pool.num_blocks))
        for admission in self._lookups.take(record):
            self.queries.inc(admission.num_looked_up)
            self.hits.inc(admission.num_cached_tokens)
        self.preemptions.inc(len(record.preempted))
        self.generation_tokens.inc(record.total_sampled)
        if self._drafts and record.drafted:
            self._drafts.count(record)
        outputs = live.engine.outputs
        for name, sampled in zip(record.requests, record.sampled, strict=True):
            if sampled:
                self._sampled(name, len(sampled), outputs.get(name))
        for finish in record.finished:
            self._tokens.pop(finish.request_id, None)
            self._success.labels(self._model, finish.reason).inc()
            if output := outputs.get(finish.request_id):
                self._finished(output)
        if not (record.waiting or set(record.requests) - {finish.request_id for finish in record.finished}):
            self.running.set(0)  # no further step will say so

    def _sampled(self, name: str, count: int, output: RequestOutput | None) -> None:
        before = self._tokens.get(name, 0)
        self._tokens[name] = before + count
        if output is None:  # it finished so long ago that it was forgotten
            return
        if before == 0:
            self.prompt_tokens.inc(len(output.prompt_token_ids))
        times = output.metrics.token_times
        if before >= len(times):  # they are of another request, which has taken the name
            return
        if before == 0:
            self.ttft.observe(output.metrics.ttft)
        else:  # once for all tokens of a step, as in vLLM
            for gap in latency.itl_per_step(times[before - 1 : before + 1]):
                self.itl.observe(gap)

    def _finished(self, output: RequestOutput) -> None:
        metrics, times = output.metrics, output.metrics.token_times
        self.prompt_length.observe(len(output.prompt_token_ids))
        self.answer_length.observe(len(output.token_ids))
        if metrics.e2e_latency is not None:
            self.e2e.observe(metrics.e2e_latency)
        if metrics.queue_time is not None:
            self.queue_time.observe(metrics.queue_time)
        if times and metrics.first_scheduled_time is not None:
            self.prefill_time.observe(times[0] - metrics.first_scheduled_time)
            self.decode_time.observe(latency.decode_time(times))


class _Drafts:
    """Counters of drafts. They show from the start, with zeros."""

    def __init__(self, registry: CollectorRegistry, model: str, most: int) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            full = f"{PREFIX}spec_decode_{name}"
            return Counter(full, what, ["model_name", *labels], registry=registry)

        self._model = model
        self.rows = counter("num_drafts", "Times that a request had drafts in a step.").labels(model)
        self.drafted = counter("num_draft_tokens", "Tokens drafted.").labels(model)
        self.accepted = counter("num_accepted_tokens", "Drafted tokens that were right.").labels(model)
        self._by_place = counter(
            "num_accepted_tokens_per_pos", "Drafted tokens that were right, by place.", "position"
        )
        for place in range(most):
            self._by_place.labels(model, str(place))

    def count(self, record: StepRecord) -> None:
        for row in record.rows:
            if row.drafted:
                self.rows.inc()
                self.drafted.inc(len(row.drafted))
                self.accepted.inc(row.num_accepted)
                for place in range(row.num_accepted):
                    self._by_place.labels(self._model, str(place)).inc()
