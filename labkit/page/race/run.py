"""A race: the same requests under several settings, one after the other on the real model.

Each setting leaves a trace. Seconds depend on what else the machine does meanwhile; steps, blocks and tokens
do not. In fp32 all settings must give the same tokens: if they do not, the engine has a fault, and
`Race.check` says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from labkit.sampling_params import SamplingParams, check_number
from labkit.trace import latency
from labkit.trace.memory_use import MemoryUse, memory_uses, waste
from labkit.trace.trace import Trace

if TYPE_CHECKING:
    from labkit.config import EngineConfig
    from labkit.engine import Engine
    from labkit.models.load import LoadedModel

MAX_SETTINGS = 3
MAX_REQUESTS = 32
MAX_PROMPT = 1024  # tokens
MAX_ANSWER = 256  # tokens
MAX_SECONDS = 60.0  # from the start to the last arrival
_NAP = 0.05  # seconds between two looks at the clock, while nothing runs


class RaceError(RuntimeError):
    """A race that cannot be run to its end; the message says under which setting, and why."""


class RaceCancelled(RaceError):
    """Somebody stopped the race."""


@dataclass(frozen=True)
class Setting:
    """One way to run the requests. `max_num_batched_tokens` None means that of the workload.

    With `speculative` (see `EngineConfig`) every step drafts as much as it can, whether that pays or not, so
    that a race goes the same way on any machine.
    """

    name: str
    scheduler: str = "continuous"
    kv_policy: str = "paged"
    enable_chunked_prefill: bool = True
    max_num_batched_tokens: int | None = None
    speculative: str | None = None


@dataclass(frozen=True)
class Entry:
    """A request of a race: it joins the queue before step `step`, or `seconds` after the start.

    If nothing runs when its step is still to come, it joins at once: no steps pass while the engine rests.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    step: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Workload:
    """The requests of a race, all by step or all by seconds, and the engine's sizes.

    Raises:
        ValueError: for more or longer requests than a race may have; the message names the limit.
    """

    entries: tuple[Entry, ...]
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        if not 1 <= len(self.entries) <= MAX_REQUESTS:
            raise ValueError(f"a race has 1 to {MAX_REQUESTS} requests, not {len(self.entries)}")
        for entry in self.entries:
            check_number("length of the prompt", len(entry.prompt), 1, MAX_PROMPT, whole=True)
            check_number("max_tokens", entry.max_tokens, 1, MAX_ANSWER, whole=True)
            check_number("step", entry.step, 0, 10_000, whole=True)
            if entry.seconds is not None:
                check_number("seconds", entry.seconds, 0, MAX_SECONDS)
        if len({entry.seconds is None for entry in self.entries}) > 1:
            raise ValueError("the requests of a race arrive all by step or all by seconds, not some by each")

    @property
    def by_seconds(self) -> bool:
        return self.entries[0].seconds is not None

    @property
    def answer_tokens(self) -> int:
        return sum(entry.max_tokens for entry in self.entries)


@dataclass(frozen=True)
class Progress:
    """How far a race is. `share` is the share of all tokens that are generated, over all settings."""

    setting: str
    number: int
    settings: int
    step: int
    answered: int
    requests: int
    share: float


@dataclass(frozen=True)
class Result:
    """One setting's run of all requests. Times are in seconds."""

    setting: Setting
    trace: Trace
    seconds: float  # from the start to the end of the last step
    tokens: tuple[tuple[int, ...], ...]  # generated, for each request
    ttft: tuple[float, ...]  # time to the first token, from each request's arrival
    token_times: tuple[tuple[float, ...], ...]  # when each token came, for each request

    @property
    def generated(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, waiting for arrivals included."""
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def steps(self) -> int:
        return len(self.trace)

    @property
    def preemptions(self) -> int:
        return sum(len(record.preempted) for record in self.trace)

    @property
    def padding(self) -> int:
        """Slots computed for nothing, in static batches."""
        return sum(sum(record.padding) for record in self.trace)

    @property
    def drafted(self) -> int:
        return sum(record.total_drafted for record in self.trace)

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted; None if there were no drafts."""
        accepted = sum(record.total_accepted for record in self.trace)
        return accepted / self.drafted if self.drafted else None

    @cached_property
    def _uses(self) -> list[MemoryUse]:
        return memory_uses(self.trace)

    @property
    def waste(self) -> float:
        """Share of the slots of owned pages that hold no token, a mean over all steps' pages."""
        return waste(self._uses)

    @property
    def kv_usage(self) -> float:
        """Share of the pool's pages that somebody owns, a mean over the steps."""
        return statistics.mean(use.owned for use in self._uses) / self.trace.meta.num_blocks

    @property
    def kv_usage_peak(self) -> float:
        """The same at its highest."""
        return max(use.owned for use in self._uses) / self.trace.meta.num_blocks

    @property
    def batch(self) -> float:
        """Requests that got a token of work in a step, a mean over the steps."""
        return statistics.mean(sum(map(bool, record.num_tokens)) for record in self.trace)

    @property
    def ttft_median(self) -> float:
        return statistics.median(self.ttft)

    @property
    def ttft_max(self) -> float:
        return max(self.ttft)

    @property
    def itl_median(self) -> float | None:
        """The median of `latency.itl_shared`; None if no answer has two tokens."""
        gaps = [gap for times in self.token_times for gap in latency.itl_shared(times)]
        return statistics.median(gaps) if gaps else None

    @property
    def itl_max(self) -> float | None:
        return max((gap for times in self.token_times for gap in latency.itl(times)), default=None)


@dataclass(frozen=True)
class Check:
    """Whether all settings gave the same tokens. `fault`: they had to, and did not."""

    same: bool
    fault: bool
    sentence: str


@dataclass(frozen=True)
class Race:
    """The results of all settings, in the order in which they ran."""

    workload: Workload
    results: tuple[Result, ...]

    @property
    def check(self) -> Check:
        """Compare the tokens of all settings with those of the first."""
        first, *others = self.results
        dtype = first.trace.meta.dtype
        for other in others:
            pairs = list(zip(first.tokens, other.tokens, strict=True))
            differ = [number for number, (a, b) in enumerate(pairs) if a != b]
            if not differ:
                continue
            who = f"{other.setting.name!r} and {first.setting.name!r}"
            where = f"{who} differ in {len(differ)} of {len(pairs)} answers, first in that to request "
            if dtype == "float32":
                told = "This must not happen in float32: the engine has a fault, and the times mean nothing."
                return Check(False, True, f"{where}{differ[0]}. {told}")
            told = f"In {dtype} that can happen: rounding depends on who else is in the batch."
            return Check(False, False, f"{where}{differ[0]}. {told}")
        names = {2: "Both", 3: "All three"}.get(len(self.results), "All")
        return Check(True, False, f"{names} gave the same {first.generated} tokens.")


def run_race(
    model: LoadedModel,
    workload: Workload,
    settings: Sequence[Setting],
    *,
    progress: Callable[[Progress], object] | None = None,
    cancelled: Callable[[], bool] | None = None,
    watch: Callable[[str, Trace], object] | None = None,
) -> Race:
    """Run all requests under each setting in turn, greedily, each to its full length.

    Args:
        model: the model to run; its weights are shared, and each setting has an engine of its own.
        workload: the requests and their arrivals.
        settings: two or three settings with different names.
        progress: a function that is called before the first step of each setting and after every step.
        cancelled: a function that is called before every step and says whether to stop.
        watch: a function that is called when a setting begins, with its name and the trace that grows.

    Raises:
        ValueError: for impossible settings.
        RaceCancelled: when `cancelled` returns True.
        RaceError: if a request cannot be served under a setting, or fails.
    """
    names = [setting.name for setting in settings]
    if not 2 <= len(names) <= MAX_SETTINGS or len(set(names)) < len(names):
        raise ValueError(f"a race has 2 to {MAX_SETTINGS} settings with different names, not {names}")
    stop = cancelled or (lambda: False)
    _warm_up(model, workload, stop)
    results = []
    for number, setting in enumerate(settings):

        def tell(step: int, answered: int, generated: int, number: int = number) -> None:
            if progress:
                share = (number + generated / workload.answer_tokens) / len(names)
                many = len(workload.entries)
                progress(Progress(names[number], number, len(names), step, answered, many, min(1.0, share)))

        engine = _engine(model, workload, setting)
        if watch:
            watch(setting.name, engine.trace)
        results.append(_run(engine, workload, setting, tell, stop))
    return Race(workload, tuple(results))


def config_of(model: LoadedModel, workload: Workload, setting: Setting) -> EngineConfig:
    """The configuration for a setting. Raises ValueError if it is impossible."""
    from labkit.config import EngineConfig

    return EngineConfig(
        model=model,
        num_blocks=workload.num_blocks,
        block_size=workload.block_size,
        max_num_seqs=workload.max_num_seqs,
        max_num_batched_tokens=setting.max_num_batched_tokens or workload.max_num_batched_tokens,
        scheduler=setting.scheduler,  # type: ignore[arg-type]
        kv_policy=setting.kv_policy,  # type: ignore[arg-type]
        enable_chunked_prefill=setting.enable_chunked_prefill,
        speculative=setting.speculative,  # type: ignore[arg-type]
        speculative_gate=False,
    )


def _engine(model: LoadedModel, workload: Workload, setting: Setting) -> Engine:
    from labkit.engine import Engine

    try:
        return Engine(config_of(model, workload, setting))
    except ValueError as error:
        raise RaceError(f"{setting.name}: {error}") from None


def _warm_up(model: LoadedModel, workload: Workload, stop: Callable[[], bool]) -> None:
    """Run a few steps that do not count, because the first steps of a process are slow."""
    engine = _engine(model, workload, Setting("warm-up"))
    engine.add_request(workload.entries[0].prompt[:8], SamplingParams(max_tokens=2, temperature=0))
    while engine.has_unfinished and not stop():
        engine.step()


def _run(
    engine: Engine,
    workload: Workload,
    setting: Setting,
    tell: Callable[[int, int, int], None],
    stop: Callable[[], bool],
) -> Result:
    order = sorted(range(len(workload.entries)), key=lambda i: _when(workload.entries[i]))
    due: dict[int, float] = {}
    answered = generated = step = 0
    tell(0, 0, 0)
    begin = end = time.perf_counter()
    while order or engine.has_unfinished:
        if stop():
            raise RaceCancelled(f"stopped in {setting.name}, after {step} steps")
        now = time.perf_counter() - begin if workload.by_seconds else float(step)
        if not engine.has_unfinished and not workload.by_seconds:
            now = max(now, _when(workload.entries[order[0]]))
        while order and _when(workload.entries[order[0]]) <= now:
            number = order.pop(0)
            due[number] = _add(engine, setting, number, workload.entries[number], begin)
        if not engine.has_unfinished:
            time.sleep(min(_NAP, max(0.0, _when(workload.entries[order[0]]) - now)))
            continue
        record = engine.step()
        end = time.perf_counter()
        step += 1
        answered += len(record.finished)
        generated += record.total_sampled
        tell(step, answered, generated)
    outputs = [engine.outputs[str(number)] for number in range(len(workload.entries))]
    for output in outputs:
        if output.error:
            raise RaceError(f"{setting.name}: request {output.request_id} failed: {output.error}")
    return Result(
        setting,
        engine.trace,
        end - begin,
        tuple(tuple(output.token_ids) for output in outputs),
        tuple(
            latency.ttft(due[number], output.metrics.token_times) or 0.0
            for number, output in enumerate(outputs)
        ),
        tuple(tuple(output.metrics.token_times) for output in outputs),
    )


def _when(entry: Entry) -> float:
    return entry.step if entry.seconds is None else entry.seconds


def _add(engine: Engine, setting: Setting, number: int, entry: Entry, begin: float) -> float:
    """Hand a request in, and return when it was due, which may have been in the middle of a step."""
    params = SamplingParams(max_tokens=entry.max_tokens, temperature=0, ignore_eos=True)
    try:
        engine.add_request(entry.prompt, params, request_id=str(number))
    except ValueError as error:
        raise RaceError(f"{setting.name}: {error}") from None
    return time.perf_counter() if entry.seconds is None else begin + entry.seconds
