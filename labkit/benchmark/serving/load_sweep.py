"""A server under load: what HTTP costs, hundreds of streams at once, and latency as the rate rises.

Correctness comes first: over HTTP all answers must be those of the engine alone, or there is no table.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from labkit.analysis.client_measures import Measure, Slo, Summary, summary
from labkit.analysis.reference import DifferentTokens
from labkit.benchmark.engine.runs import versions
from labkit.benchmark.serving import load
from labkit.benchmark.serving.arrivals import (
    ANSWERS,
    PROMPTS,
    Arrival,
    Lengths,
    at_once,
    poisson,
    requests,
    tokenizer_of,
)
from labkit.benchmark.serving.load_report import HttpCost, LoadReport, ManyStreams, RateRow, knee
from labkit.benchmark.serving.processes import (
    Answer,
    EngineProcess,
    ServerProcess,
    ServerSizes,
    numbers,
    server_process,
)
from labkit.sampling_params import check_number

FRACTIONS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2)  # of the closed loop's capacity
SLO_TTFT, SLO_ITL = 10.0, 5.0  # times the unloaded median
_SHORT_PROMPTS, _SHORT_ANSWERS = Lengths(12, 0.4, 8, 24), Lengths(10, 0.4, 6, 16)
_LONG = Lengths(64, 0.0, 64, 64)
_WARM = 0.2  # the share of a run in which the server fills up; rates do not count it
_UNLOADED = 8  # requests one by one
_SOLO = 12  # how many of many streams the engine alone answers once more
_NEAR = 0.1  # a rate stands for another that is as close as this share
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class LoadPlan:
    """What to measure.

    Args:
        model, device, dtype, seats, budget: The options of the server.
        batch: The number of streams at once with which the cost of HTTP is measured; 0 leaves it out.
        repeats: The number of those measurements; the median counts.
        streams: The number of short requests at once; 0 leaves them out.
        rates: Requests per second; None takes `FRACTIONS` of what a closed loop reaches.
        seconds: The time of each rate.
        slo_ttft, slo_itl: Objectives in seconds; None is a multiple of the unloaded median.
        url, url_model: Another server that gets the same arrivals, and the name of its model there.
        seed: The seed of the arrivals.

    Raises:
        ValueError: If a value cannot work. The message names the field.
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    seats: int = 32
    budget: int = 512
    batch: int = 32
    repeats: int = 3
    streams: int = 500
    rates: Sequence[float] | None = None
    seconds: float = 25.0
    slo_ttft: float | None = None
    slo_itl: float | None = None
    url: str | None = None
    url_model: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seats", "budget", "repeats"):
            check_number(name, getattr(self, name), 1, math.inf, whole=True)
        for name in ("batch", "streams"):
            check_number(name, getattr(self, name), 0, 10_000, whole=True)
        check_number("seconds", self.seconds, 0.1, 3600)
        for name in ("slo_ttft", "slo_itl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1e-6, 3600)
        if self.rates is not None and not self.rates:
            raise ValueError("rates is empty: it must have at least one")
        for rate in self.rates or ():
            check_number("rates", rate, 1e-3, 1e5)

    def sizes(self) -> ServerSizes:
        """A pool that holds every seat at its longest, so that no figure depends on preemption."""
        longest = -(-(PROMPTS.high + _BLOCK_SIZE + ANSWERS.high) // _BLOCK_SIZE)
        return ServerSizes(
            self.model,
            self.device,
            self.dtype,
            self.seats * longest,
            self.seats,
            max(self.seats, self.budget),
        )


def measure_load(plan: LoadPlan, *, progress: bool = True) -> LoadReport:
    """Start a server and an engine without one, measure both, and then the server alone.

    Raises:
        DifferentTokens: If, in fp32, an answer over HTTP is not that of the engine.
        RuntimeError: If the server ends, or a request fails where none may.
        ServerError: If the other server does not answer.
        ValueError: If there is no such model.
    """
    tokenizer = tokenizer_of(plan.model)
    other = load.supported(plan.url, plan.url_model) if plan.url else None
    parts = 2 * plan.repeats * bool(plan.batch) + bool(plan.streams) + 3
    parts += (1 + bool(other)) * len(plan.rates or FRACTIONS)
    with contextlib.ExitStack() as ending:
        bar = ending.enter_context(tqdm(total=parts, unit="part", disable=not progress))
        sizes = plan.sizes()
        with contextlib.closing(EngineProcess(sizes)) as engine:  # both start at once
            server = ending.enter_context(server_process(sizes, max(1024, 2 * plan.streams)))
            facts = engine.facts
            bench = TargetServer(plan, tokenizer, server, bar)
            bench.run("warming up", at_once(tokenizer, 4, text="warm", answers=_SHORT_ANSWERS))
            http = http_cost(bench, engine) if plan.batch else None
            streams = many_streams(bench, engine) if plan.streams else None
        return _sweep(bench, facts, http, streams, other)


class TargetServer:
    """A server, and the means to send requests to it."""

    def __init__(self, plan: LoadPlan, tokenizer: Any, server: ServerProcess, bar: tqdm) -> None:
        self.plan, self.tokenizer, self.server, self.bar = plan, tokenizer, server, bar

    def run(self, what: str, arrivals: Any, **how: Any) -> list[Measure]:
        """Do what `load.run` does; raise `RuntimeError` if the server ends meanwhile."""
        self.bar.set_description(what)
        try:
            measures = load.run(self.server.url, arrivals, **how)
        except load.ServerError:
            self.server.check(f"before this: {what}", patience=1)
            raise
        failed = sum(bool(measure.error) for measure in measures)
        when = f"in the middle of this: {what}; {failed} of {len(measures)} requests were lost"
        self.server.check(when, patience=1 if failed else 0)
        return measures


def http_cost(bench: TargetServer, engine: EngineProcess) -> HttpCost:
    """The same requests at once, in turn by the engine alone and over HTTP; new words in each round."""
    plan = bench.plan
    tokens: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    seconds: dict[str, list[float]] = {name: [] for name in tokens}
    engine.together(at_once(bench.tokenizer, 4, text="warm", answers=_SHORT_ANSWERS))
    for turn in range(plan.repeats):
        arrivals = at_once(bench.tokenizer, plan.batch, seed=plan.seed, text=f"batch {turn}")
        bench.bar.set_description(f"{plan.batch} at once, in process {turn + 1}/{plan.repeats}")
        took, answers = engine.together(arrivals)
        bench.bar.update()
        measures = bench.run(f"{plan.batch} at once, over HTTP {turn + 1}/{plan.repeats}", arrivals)
        bench.bar.update()
        same = compare(measures, answers, engine.facts["dtype"])
        for name, duration in (("in process", took), ("over HTTP", max(m.end for m in measures))):
            seconds[name].append(duration)
            tokens[name].append(sum(answer.tokens for answer in answers) / duration)
    medians = {name: statistics.median(rates) for name, rates in tokens.items()}
    return HttpCost(plan.batch, same, medians["in process"], medians["over HTTP"], seconds)


def compare(measures: Sequence[Measure], answers: Sequence[Answer], dtype: str) -> str:
    """One sentence on how far answers over HTTP are those of the engine alone.

    Raises:
        DifferentTokens: If, in fp32, one is not.
        RuntimeError: If one failed.
    """
    for measure in measures:
        if measure.error:
            raise RuntimeError(f"an answer over HTTP failed: {measure.error}")
    pairs = zip(measures, answers, strict=True)
    differ = [i for i, (m, answer) in enumerate(pairs) if (m.text, m.tokens) != (answer.text, answer.tokens)]
    if differ and dtype == "float32":
        raise DifferentTokens(
            f"{len(differ)} of {len(answers)} answers over HTTP are not those of the engine alone "
            f"(first: number {differ[0]}); no speed is reported"
        )
    same = f"{len(answers) - len(differ)} of {len(answers)}" if differ else f"All {len(answers)}"
    return f"{same} answers over HTTP have the text and the number of tokens of the engine alone ({dtype})."


def many_streams(bench: TargetServer, engine: EngineProcess) -> ManyStreams:
    """Many short requests at once. Some of the answers are compared with those of the engine alone.

    Raises:
        DifferentTokens: If, in fp32, one of them differs.
    """
    plan = bench.plan
    short = {"seed": plan.seed, "text": "streams", "prompts": _SHORT_PROMPTS}
    arrivals = at_once(bench.tokenizer, plan.streams, answers=_SHORT_ANSWERS, **short)
    # The requests that get the seats first keep them until all the others have come.
    arrivals[: plan.seats] = at_once(bench.tokenizer, min(plan.seats, plan.streams), answers=_LONG, **short)
    measures = bench.run(f"{plan.streams} streams", arrivals)
    left = _left(bench.server.url)
    looked = [i for i in range(0, plan.streams, -(-plan.streams // _SOLO)) if not measures[i].error]
    bench.bar.set_description("some of them alone")
    answers = engine.alone([arrivals[i] for i in looked])
    compare([measures[i] for i in looked], answers, engine.facts["dtype"])
    bench.bar.update()
    return ManyStreams(
        plan.streams,
        summary(measures),
        most_at_once(measures),
        sum(measure.asked - measure.tokens for measure in measures),
        max(measure.end for measure in measures),
        len(looked),
        sum(measures[i].text == answer.text for i, answer in zip(looked, answers, strict=True)),
        left,
    )


def most_at_once(measures: Sequence[Measure]) -> int:
    """The most requests that were under way at one time."""
    begun = [(m.sent, 1) for m in measures if m.sent is not None]
    ended = [(m.end, -1) for m in measures if m.sent is not None]
    return max(itertools.accumulate(change for _, change in sorted(begun + ended)), default=0)


def _left(url: str, seconds: float = 10.0) -> dict[str, float] | None:
    """What a server still holds once it holds nothing, or after some seconds; None if it does not say."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    end = time.monotonic() + seconds
    while True:
        said = numbers(url)
        if any(name not in said for name in names):
            return None
        left = {name: said[name] for name in names}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


# -- the sweep ------------------------------------------------------------------------------------


def _sweep(
    bench: TargetServer,
    facts: dict[str, str],
    http: HttpCost | None,
    streams: ManyStreams | None,
    other: tuple[str, dict[str, Any]] | None,
) -> LoadReport:
    """Measure the server unloaded, in a closed loop, and then at each rate."""
    plan, tokenizer = bench.plan, bench.tokenizer
    unloaded_sent = at_once(tokenizer, _UNLOADED, seed=plan.seed, text="unloaded")
    unloaded = summary(_sound(bench.run("unloaded", unloaded_sent, clients=1)))
    bench.bar.update()
    slo = Slo(
        plan.slo_ttft or SLO_TTFT * unloaded.ttft.median,  # type: ignore[union-attr]
        plan.slo_itl or SLO_ITL * unloaded.itl.median,  # type: ignore[union-attr]
    )
    endless = (Arrival(0.0, *sent) for sent in requests(tokenizer, seed=plan.seed, text="closed"))
    measures = _sound(bench.run("closed loop", endless, clients=plan.seats, seconds=plan.seconds))
    bench.bar.update()
    closed = summary(measures, between=(_WARM * plan.seconds, plan.seconds), slo=slo)
    capacity = closed.tokens / statistics.mean(measure.asked for measure in measures)
    if not capacity and not plan.rates:
        raise RuntimeError(
            f"no token came in {plan.seconds:g} s of a closed loop: take more seconds, or rates"
        )

    rows, others, notes = [], [], []
    for rate in sorted(plan.rates or [float(f"{share * capacity:.3g}") for share in FRACTIONS]):
        rows.append(_at(bench, rate, slo))
        if other and plan.url:
            others.append(_at(bench, rate, slo, (plan.url, *other)))
    place = knee(rows)
    half_rate = rows[place].rate / 2
    half = next((row for row in rows if abs(row.rate / half_rate - 1) <= _NEAR), None)
    half = half or _at(bench, half_rate, slo)
    late = max(row.summary.late for row in rows)
    notes.append(f"The client sent each request within {late * 1e3:.0f} ms of its time.")
    if others:
        given = ", ".join(other[1]) or "none"  # type: ignore[index]
        notes.append(f"Fields beyond the usual that it takes: {given}.")
        if uncounted := sum(row.summary.uncounted for row in others):
            notes.append(
                f"It did not count the tokens of {uncounted} answers: pieces of text stand for them."
            )
    return LoadReport(
        settings=_settings(plan, facts),
        http=http,
        streams=streams,
        unloaded=unloaded,
        closed=closed,
        clients=plan.seats,
        capacity=capacity,
        slo=slo,
        slo_from=_slo_from(plan),
        rows=rows,
        knee=place,
        half=half,
        other=plan.url or "",
        others=others,
        notes=notes,
    )


def _settings(plan: LoadPlan, facts: dict[str, str]) -> dict[str, Any]:
    sizes = plan.sizes()
    return {
        "model": plan.model,
        **facts,
        "seats": sizes.max_num_seqs,
        "token budget": sizes.max_num_batched_tokens,
        "blocks": f"{sizes.num_blocks} of {_BLOCK_SIZE} tokens",
        "prompts": str(PROMPTS),
        "answers": str(ANSWERS),
        "seconds of each rate": plan.seconds,
        "seed": plan.seed,
        "cores": os.cpu_count(),
        "medians of": plan.repeats,
        **versions(),
    }


def _slo_from(plan: LoadPlan) -> str:
    """Where the objectives come from."""
    ttft = "as asked for" if plan.slo_ttft else f"{SLO_TTFT:g} times the unloaded median"
    itl = "as asked for" if plan.slo_itl else f"{SLO_ITL:g} times"
    return ttft if ttft == itl else f"{ttft}; {itl}"


def _sound(measures: list[Measure]) -> list[Measure]:
    """The same measures; raises `RuntimeError` if one failed, because objectives and rates depend on them."""
    for measure in measures:
        if measure.error:
            raise RuntimeError(f"a request failed before the sweep: {measure.error}")
    return measures


def _at(
    bench: TargetServer, rate: float, slo: Slo, other: tuple[str, str, dict[str, Any]] | None = None
) -> RateRow:
    """Measure one rate, at our server or at another."""
    plan = bench.plan
    arrivals = poisson(bench.tokenizer, rate, plan.seconds, seed=plan.seed, text=f"rate {rate}")
    url = other[0] if other else bench.server.url
    before = numbers(url)
    if other:
        bench.bar.set_description(f"{rate:.2f}/s elsewhere")
        measures = load.run(url, arrivals, model=other[1], extras=other[2])
    else:
        measures = bench.run(f"{rate:.2f} requests/s", arrivals)
    bench.bar.update()
    seen: Summary = summary(measures, between=(_WARM * plan.seconds, plan.seconds), slo=slo)
    return RateRow(rate, seen, mean_queue_time(before, numbers(url)))


def mean_queue_time(before: dict[str, float], after: dict[str, float]) -> float | None:
    """The mean queue time between two looks at a server's numbers, in seconds."""
    name = "request_queue_time_seconds"
    if f"{name}_sum" not in after:
        return None
    count, total = (after[f"{name}_{part}"] - before.get(f"{name}_{part}", 0.0) for part in ("count", "sum"))
    return total / count if count else None
