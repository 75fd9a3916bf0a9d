"""Sends a workload through engines without a model, and says what its users would have seen.

Arrivals, lengths and a clock decide everything else: the real scheduler says which requests run in each step,
and the real pool which blocks they have. Tokens mean nothing here, but a prompt that begins like others finds
that beginning in the prefix cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from labkit.analysis.capacity.clock import Clock
from labkit.analysis.capacity.replica import Replica, Settings
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams, check_number
from labkit.trace import latency
from labkit.trace.trace import Trace


@dataclass(frozen=True, slots=True)
class Demand:
    """One request of a workload.

    Attributes:
        at: When it arrives, in seconds.
        prompt, answer: Their numbers of tokens.
        group, shared: The first `shared` tokens of its prompt are those of all demands of this group.
    """

    at: float
    prompt: int
    answer: int
    group: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        check_number("at", self.at, 0, 1e12)
        check_number("prompt", self.prompt, 1, math.inf, whole=True)
        check_number("answer", self.answer, 1, math.inf, whole=True)
        check_number("group", self.group, 0, math.inf, whole=True)
        check_number("shared", self.shared, 0, self.prompt, whole=True)


def draw_demands(
    count: int,
    *,
    rate: float | None = None,
    prompt_tokens: tuple[int, int] = (16, 256),
    answer_tokens: tuple[int, int] = (16, 128),
    groups: int = 0,
    shared: int = 0,
    seed: int = 0,
) -> list[Demand]:
    """Draw demands, with lengths log-uniform between two limits: many short ones, a few long ones.

    Args:
        count: The number of demands.
        rate: Arrivals per second, at random moments (Poisson); None: all are there at the start.
        prompt_tokens, answer_tokens: The limits.
        groups, shared: The number of groups, and the tokens that the prompts of a group begin with.
        seed: The same seed gives the same demands, on every machine.
    """
    check_number("count", count, 1, math.inf, whole=True)
    if rate is not None:
        check_number("rate", rate, 1e-9, math.inf)
    for name, (low, high) in (("prompt_tokens", prompt_tokens), ("answer_tokens", answer_tokens)):
        check_number(f"{name}: the lower limit", low, 1, math.inf, whole=True)
        check_number(f"{name}: the upper limit", high, low, math.inf, whole=True)
    check_number("groups", groups, 0, math.inf, whole=True)
    check_number("shared", shared, 0, math.inf, whole=True)
    if bool(groups) != bool(shared):
        raise ValueError(f"groups ({groups}) and shared ({shared}) go together: both or neither")
    rng = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    at, demands = 0.0, []
    for _ in range(count):
        at += -math.log(1 - rng.random()) / rate if rate else 0.0
        group = rng.randrange(groups) if groups else 0
        demands.append(Demand(at, shared + draw(*prompt_tokens), draw(*answer_tokens), group, shared))
    return demands


# -- routing --------------------------------------------------------------------------------------

Router = Callable[[Request, Sequence[Replica]], int]  # which replica a request goes to
SLACK = 4  # how many requests more than the least loaded replica a cached prefix is worth


class RoundRobin:
    """Takes one replica after the other."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, request: Request, replicas: Sequence[Replica]) -> int:
        index = self._next % len(replicas)
        self._next += 1
        return index


def least_loaded(request: Request, replicas: Sequence[Replica]) -> int:
    """The replica with the fewest requests, running or waiting."""
    return min(range(len(replicas)), key=lambda i: replicas[i].num_unfinished)


def prefix_aware(request: Request, replicas: Sequence[Replica]) -> int:
    """The replica that has most of the prompt in its prefix cache, unless it is far busier than others.

    This is the idea of the cache-aware routers in front of vLLM and SGLang. Cached tokens save work, but not
    if all requests that share a prefix queue for the one replica that has it. Once another replica has got
    one of them, it has the prefix, too.
    """
    most = min(replica.num_unfinished for replica in replicas) + SLACK
    near = [i for i, replica in enumerate(replicas) if replica.num_unfinished <= most]
    return max(near, key=lambda i: (replicas[i].num_cached_tokens(request), -replicas[i].num_unfinished))


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": lambda: least_loaded,
    "prefix-aware": lambda: prefix_aware,
}


# -- the replay -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What became of a workload. Arrays have one entry for each demand, by arrival; times are in seconds.

    Attributes:
        replica: The replica that each demand went to.
        gaps, gap_counts: The inter-token latencies, and how many tokens had each.
        kv_usage, kv_peak: The share of the blocks in use while steps run: on average, and at most, of any
            replica.
        prefix_hit_rate: The share of the tokens looked up in prefix caches that were found there.
        busy: The share of the time in which a replica runs a step.
        traces: One for each replica, if they were asked for.
    """

    demands: Sequence[Demand]
    first_token: np.ndarray
    finish: np.ndarray
    replica: np.ndarray
    gaps: np.ndarray
    gap_counts: np.ndarray
    steps: int
    preemptions: int
    kv_usage: float
    kv_peak: float
    prefix_hit_rate: float
    busy: float
    traces: tuple[Trace, ...] = ()

    @property
    def arrival(self) -> np.ndarray:
        """When each demand arrived."""
        return np.array([demand.at for demand in self.demands])

    @property
    def seconds(self) -> float:
        """The time from the first arrival to the last token."""
        return float(self.finish.max() - self.demands[0].at)

    @property
    def num_tokens(self) -> int:
        """The tokens of all answers."""
        return sum(demand.answer for demand in self.demands)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def ttft(self) -> np.ndarray:
        """Time to first token, of each demand."""
        return self.first_token - self.arrival

    @property
    def e2e(self) -> np.ndarray:
        """End-to-end latency, of each demand."""
        return self.finish - self.arrival

    def percentile(self, what: str, percent: float) -> float:
        """A `latency.percentile` of "ttft", "itl" (token by token) or "e2e"; NaN if there is none."""
        if what not in ("ttft", "itl", "e2e"):
            raise ValueError(f"what must be ttft, itl or e2e, not {what!r}")
        check_number("percent", percent, 0, 100)
        if what == "itl":
            return latency.percentile(self.gaps.tolist(), percent, self.gap_counts.tolist())
        return latency.percentile(getattr(self, what).tolist(), percent)

    def __str__(self) -> str:
        lines = [
            f"{len(self.demands):,} requests, {self.num_tokens:,} tokens in {self.seconds:,.1f} s: "
            f"{self.tokens_per_second:,.1f} tokens/s, {self.steps:,} steps, busy {self.busy:.0%}",
            f"KV usage {self.kv_usage:.0%}, at most {self.kv_peak:.0%}; {self.preemptions:,} preemptions; "
            f"prefix hits {self.prefix_hit_rate:.0%}",
            f"{'seconds':8}{'median':>10}{'p95':>10}{'p99':>10}",
        ]
        for what in ("ttft", "itl", "e2e"):
            cells = [f"{self.percentile(what, percent):10.3f}" for percent in (50, 95, 99)]
            lines.append(f"{what.upper():8}" + "".join(cells))
        return "\n".join(lines)


def replay(
    demands: Iterable[Demand],
    clock: Clock,
    settings: Settings,
    *,
    replicas: int = 1,
    routing: str | Router = "round-robin",
    jump: bool = True,
    traces: bool = False,
) -> Replay:
    """Send a workload to some replicas and note when tokens come out.

    Args:
        demands: The requests of the workload.
        clock: The seconds of a step: `fit` a trace, or take a `Roofline`.
        settings: The settings of each replica.
        replicas: The number of replicas.
        routing: A name of `ROUTERS`, or a function of a request and the replicas that gives an index. It sees
            the replicas as they are at the arrival.
        jump: Whether runs of decode steps are taken at once, which gives the same result sooner.
        traces: Whether a record of each step is kept, as in the engine's trace.

    Raises:
        ValueError: If there are no demands, a pool could never hold one, or `routing` gives no replica.
    """
    ordered = sorted(demands, key=lambda demand: demand.at)
    if not ordered:
        raise ValueError("demands must hold at least one")
    check_number("replicas", replicas, 1, math.inf, whole=True)
    if isinstance(routing, str):
        if routing not in ROUTERS:
            raise ValueError(f"routing must be one of {', '.join(ROUTERS)}, or a function, not {routing!r}")
        routing = ROUTERS[routing]()
    engines = [Replica(settings, clock, jump=jump, trace=traces) for _ in range(replicas)]
    went = []
    for number, demand in enumerate(ordered):
        for engine in engines:
            engine.advance(demand.at)
        request = _request(number, demand)
        index = routing(request, engines) if replicas > 1 else 0
        if not isinstance(index, int) or not 0 <= index < replicas:
            raise ValueError(f"routing must give a whole number from 0 to {replicas - 1}, not {index!r}")
        engines[index].add(request, demand.at)
        went.append(index)
    for engine in engines:
        engine.advance(math.inf)
    return _gather(ordered, engines, went, settings)


def _request(number: int, demand: Demand) -> Request:
    """A request whose tokens are three numbers, repeated: of the group, of its prompt, and of its answer."""
    own = 2 * number
    tokens = [-1 - demand.group] * demand.shared + [own] * (demand.prompt - demand.shared)
    return Request(str(number), tokens, _params(demand.answer), seed=own + 1)


@cache
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def _gather(demands: list[Demand], engines: list[Replica], went: list[int], settings: Settings) -> Replay:
    names = [str(number) for number in range(len(demands))]
    finish = np.array([engines[index].finish[name] for name, index in zip(names, went, strict=True)])
    busy = sum(engine.busy for engine in engines)
    looked_up = sum(engine.looked_up for engine in engines)
    return Replay(
        demands,
        np.array([engines[index].first_token[name] for name, index in zip(names, went, strict=True)]),
        finish,
        np.array(went),
        np.concatenate([engine.gaps for engine in engines]),
        np.concatenate([engine.gap_counts for engine in engines]).astype(int),
        sum(engine.steps for engine in engines),
        sum(engine.preemptions for engine in engines),
        sum(engine.blocks for engine in engines) / busy / settings.num_blocks,
        max(engine.peak_blocks for engine in engines) / settings.num_blocks,
        sum(engine.cached for engine in engines) / looked_up if looked_up else 0.0,
        busy / len(engines) / (float(finish.max()) - demands[0].at),
        tuple(engine.trace for engine in engines if engine.trace is not None),
    )
