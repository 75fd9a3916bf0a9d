"""One engine without a model: the real scheduler and block pool, and a clock that says what a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.analysis.capacity.clock import Clock
from labkit.analysis.capacity.decode_run import DecodeRun
from labkit.analysis.roofline import StepWork
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import check_number
from labkit.trace.lookups import Lookups
from labkit.trace.records import TraceMeta
from labkit.trace.trace import Trace


@dataclass(frozen=True)
class Settings:
    """The settings of a replica, under the names of `EngineConfig`."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    kv_policy: str = "paged"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            check_number(name, getattr(self, name), 1, math.inf, whole=True)
        if self.kv_policy not in ("paged", "reserved"):
            raise ValueError(f"kv_policy must be paged or reserved, not {self.kv_policy!r}")


class Replica:
    """A queue, a scheduler and a pool, stepped by a clock.

    Args:
        settings: The settings of its scheduler and its pool.
        clock: A function that gives the seconds of a step.
        jump: Whether runs of decode steps are taken at once (see `DecodeRun`); the result is the same.
        trace: Whether a record of each step is kept; then no steps are taken at once.

    Attributes:
        now: When the last step ended, in seconds.
        first_token, finish: When the first token of each request came, and its last.
        gaps, gap_counts: The inter-token latencies, token by token, and how many tokens had each.
        steps, busy: The number of steps taken, and their seconds.
        blocks: Blocks in use times the seconds that they were; with `peak_blocks`, for KV usage.
        cached, looked_up: Tokens found in the prefix cache, and tokens looked up, as `Lookups` counts.
    """

    def __init__(self, settings: Settings, clock: Clock, *, jump: bool = True, trace: bool = False) -> None:
        self.pool = BlockPool(
            settings.num_blocks, settings.block_size, enable_prefix_caching=settings.enable_prefix_caching
        )
        limits = {
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "kv_policy": settings.kv_policy,
        }
        self.scheduler = Scheduler(self.pool, **limits)
        self.clock = clock
        self.trace = Trace(TraceMeta(settings.num_blocks, settings.block_size, **limits)) if trace else None
        self.now = 0.0
        self.first_token: dict[str, float] = {}
        self.finish: dict[str, float] = {}
        self.gaps: list[float] = []
        self.gap_counts: list[int] = []
        self.steps = self.preemptions = self.peak_blocks = self.cached = self.looked_up = 0
        self.busy = self.blocks = 0.0
        self._lookups = Lookups()
        self._jump = jump and not trace
        self._plan: StepPlan | None = None  # of the step that runs now
        self._result = StepResult([])
        self._run: DecodeRun | None = None
        self._last = False  # whether the run ends with the step that runs now
        self._seconds = 0.0  # of the step that runs now; 0 between steps
        self._stuck = (
            False  # the last step could not admit the head of the queue, and no request has left since
        )
        self._behind: dict[str, float] = {}  # preempted requests, and when their last token came

    # -- what a router may look at ----------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self.scheduler.requests)

    @property
    def num_running(self) -> int:
        """Requests that have a seat."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have no seat."""
        return self.scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner."""
        return self.pool.num_free

    def num_cached_tokens(self, request: Request) -> int:
        """How many tokens of a prompt have their keys and values in this replica's prefix cache."""
        return len(self.pool.match(request.token_ids)) * self.pool.block_size

    # -- time -------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Call `advance(now)` before; a step that runs at that moment does not see it.

        Raises:
            ValueError: If the pool could never hold the request.
        """
        seats = self.num_running < self.scheduler.max_num_seqs
        if self._run and seats and not self.num_waiting:
            if self._seconds:
                self._last = True  # the request gets a seat after the step that runs now
            else:
                self._stop_run()
        self.scheduler.add(request)
        if not self._seconds:
            self.now = max(self.now, now)

    def advance(self, until: float) -> None:
        """Carry out all steps that end by `until`. A step that still runs at that moment is not over."""
        while True:
            if self._seconds:
                if self.now + self._seconds > until:
                    return
                self._end_step()
            if not self.scheduler.requests or self.now >= until:
                return
            self._begin_step()

    def _begin_step(self) -> None:
        if self._run is None and self._jump and self._all_decode():
            self._run, self._last = DecodeRun(self.scheduler), False
        work = self._run.begin() if self._run else None
        if work is None:
            self._stop_run()
            work = self._make_plan()
        self._seconds = float(self.clock(work))
        if not self._seconds > 0:
            raise ValueError(f"clock must give more than 0 seconds, not {self._seconds} for {work}")
        used = self.pool.num_blocks - self.pool.num_free
        self.blocks += used * self._seconds
        self.peak_blocks = max(self.peak_blocks, used)
        self.busy += self._seconds

    def _stop_run(self) -> None:
        if self._run:
            self._run.stop()
            self._run = None

    def _all_decode(self) -> bool:
        """Whether a run of decode steps can begin here."""
        scheduler = self.scheduler
        seats = len(scheduler.running) < scheduler.max_num_seqs
        if not scheduler.running or (seats and scheduler.num_waiting and not self._stuck):
            return False
        return all(
            request.num_prompt_tokens <= request.num_computed_tokens == len(request.token_ids) - 1
            and request.request_id not in self._behind
            for request in reversed(scheduler.running)  # those that still compute a prompt came last
        )

    def _make_plan(self) -> StepWork:
        plan = self._plan = self.scheduler.schedule()
        sampled = [
            (request.seed,) if start + count == len(request.token_ids) else ()
            for request, start, count in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ]
        self._result = StepResult(sampled)
        return StepWork.of_rows(plan.starts, plan.num_tokens, len(sampled) - sampled.count(()))

    def _end_step(self) -> None:
        begin, self.now = self.now, self.now + self._seconds
        if self._run:
            steady = self.num_running
            finished = self._run.end()
            self.finish.update((request.request_id, self.now) for request in finished)
            if finished or self._last:
                self._stop_run()
            self._stuck = self._stuck and not finished
        else:
            steady = self._commit(begin)
        if steady:
            self.gaps.append(self._seconds)
            self.gap_counts.append(steady)
        self.steps += 1
        self._seconds = 0.0

    def _commit(self, begin: float) -> int:
        """Commit the plan; returns how many rows sampled in the step before, and again in this one."""
        plan, result, running = self._plan, self._result, self.num_running
        self.scheduler.commit(plan, result)
        self._stuck = bool(
            plan.blocked
            and not plan.admitted
            and not plan.preempted
            and self.num_running == running
            and plan.kinds.count("d") == running
        )
        record = record_step(self.steps, plan, result, self.scheduler, time=self.now, seconds=self._seconds)
        if self.trace is not None:
            self.trace.append(record)
        self.preemptions += len(plan.preempted)
        for request_id, _ in plan.preempted:
            if request_id in self.first_token:
                self._behind.setdefault(request_id, begin)
        for admission in self._lookups.take(record):
            self.cached += admission.num_cached_tokens
            self.looked_up += admission.num_looked_up
        steady = 0
        for request, tokens in zip(plan.requests, result.sampled, strict=True):
            name = request.request_id
            if not tokens:
                continue
            if name not in self.first_token:
                self.first_token[name] = self.now
            elif name in self._behind:
                self.gaps.append(self.now - self._behind.pop(name))
                self.gap_counts.append(1)
            else:
                steady += 1
        for ended in record.finished:
            self.finish.setdefault(ended.request_id, self.now)  # a run has noted its own
        return steady
