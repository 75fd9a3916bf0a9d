"""The engine: token ids in, one step at a time, token ids out, and a record of every step.

`README.md` shows how to run it. `labkit.Engine` is the same with loading, fast kernels, text, and times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from labkit.core.attention import AttentionBackend
from labkit.core.kv_cache import PagedKVCache
from labkit.core.model_runner import DecodeGraphs, ModelRunner, PagedModel
from labkit.core.plan import StepPlan, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.outputs import in_one_line
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace


class Speculation(Protocol):
    """Learns from each step, and drafts tokens for the next (see `labkit.speculative`)."""

    # Gives requests their `drafts`; returns why there are not more, or "".
    def propose(self, plan: StepPlan, result: StepResult, running: Sequence[Request]) -> str: ...

    def forget(self, request_id: str) -> None: ...


class Audit(Protocol):
    """Checks each step, and raises if a rule is broken (see `labkit.schedulers.audit`)."""

    def check_plan(self, plan: StepPlan) -> None: ...

    def check_record(self, record: StepRecord) -> None: ...


class EngineCore:
    """Requests in, tokens out, one step at a time. The caller decides when to step.

    Args:
        model, attention, cache, graphs: the arguments of `ModelRunner`; without `cache`, it gets a new one.
        scheduler: the policy, with the pool that it takes blocks from.
        trace: the trace that records are appended to; None starts a new one.
    """

    speculator: Speculation | None = None
    auditor: Audit | None = None
    make_runner: Callable[..., ModelRunner] = ModelRunner

    def __init__(
        self,
        model: PagedModel,
        scheduler: Scheduler,
        attention: AttentionBackend,
        *,
        cache: PagedKVCache | None = None,
        graphs: DecodeGraphs | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.scheduler, self.pool = scheduler, scheduler.pool
        sizes = self.pool.num_blocks, self.pool.block_size
        cache = cache or model.kv_shape.new_cache(*sizes)
        self.runner = self.make_runner(model, cache, self.pool, backend=attention, graphs=graphs)
        limits = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        self.trace = Trace(TraceMeta(*sizes, *limits)) if trace is None else trace
        self._step = 0
        self._began = time.perf_counter()

    def add(self, request: Request) -> None:
        """Queue a request and its children; the next step can run them. It raises as `Scheduler.add` does."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request at the next step; the first answer of n > 1 ends them all. False if there is none."""
        one = self.scheduler.requests.get(request_id)
        # A copy of all, if it may have others: the engine's thread may change them meanwhile.
        known = [one] if one and one.params.n == 1 else list(self.scheduler.requests.values())
        family = [r.request_id for r in known if request_id in (r.request_id, r.family)]
        return any([self.scheduler.abort(name) for name in family])  # a list: `any` alone would stop early

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do: a request to run, or an abort to carry out and record."""
        return self.scheduler.has_unfinished

    def run(self) -> Trace:
        """Step until nothing is left to do; return the trace."""
        while self.has_unfinished:
            self.step()
        return self.trace

    def step(self) -> StepRecord:
        """Plan, run, commit and record one step. An error in it ends its requests, and the others go on."""
        begin = time.perf_counter()
        plan = self.scheduler.schedule()  # which requests compute how many tokens
        if self.auditor:
            self.auditor.check_plan(plan)
        interrupt: BaseException | None = None
        try:
            result = self.runner.run(plan)  # one forward pass, then sampling
        except BaseException as error:
            result = _failed(plan, error)
            interrupt = None if isinstance(error, Exception) else error  # Ctrl-C: finish the step first
        self.scheduler.commit(plan, result)  # append tokens, publish blocks, end requests
        if self.speculator:  # drafts for the next step
            self.scheduler.held_back = self.speculator.propose(plan, result, self.scheduler.running)
        end = time.perf_counter()
        record = record_step(self._step, plan, result, self.scheduler, end - self._began, end - begin)
        self._step += 1
        self.trace.append(record)
        self.deliver(plan, result, record, begin, end)
        for request_id, reason, blocks in record.finished:
            if self.speculator:
                self.speculator.forget(request_id)
            if reason == "error":  # what it left in its blocks must reach no other request
                self.runner.cache.clear_blocks([b for b in blocks if not self.pool.ref_counts[b]])
        if self.auditor:
            self.auditor.check_record(record)
        if interrupt is not None:
            raise interrupt
        return record

    def deliver(
        self, plan: StepPlan, result: StepResult, record: StepRecord, begin: float, end: float
    ) -> None:
        """Do nothing more after a step. `labkit.Engine` overrides this to hand out text and times."""


def _failed(plan: StepPlan, error: BaseException) -> StepResult:
    """Return the result of a step that raised: every request in it ends, with the reason."""
    what = f"the step failed: {in_one_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        what = "the step ran out of memory: lower max_num_batched_tokens or num_blocks"
    return StepResult([()] * len(plan.requests), errors=dict.fromkeys(range(len(plan.requests)), what))
