"""A bench for schedulers: it runs one without a model, and audits every step."""

from __future__ import annotations

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import SamplingParams
from labkit.schedulers import scheduler_class
from labkit.schedulers.audit import Auditor, check_pool
from labkit.schedulers.naive import UncachedScheduler
from labkit.schedulers.static import StaticScheduler
from labkit.schedulers.whole_prompts import WholePromptScheduler
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace

NEVER_DRAFT = (StaticScheduler, UncachedScheduler)


class Bench:
    """A scheduler with made-up tokens in place of a model."""

    def __init__(
        self,
        kind: str = "continuous",
        *,
        blocks: int = 20,
        size: int = 4,
        seats: int = 4,
        budget: int = 12,
        policy: str = "paged",
        caching: bool = True,
        chunked: bool = True,
    ) -> None:
        self.seats, self.budget = seats, budget
        self.pool = BlockPool(blocks, size, enable_prefix_caching=caching)
        self.scheduler: Scheduler = scheduler_class(kind, enable_chunked_prefill=chunked)(
            self.pool, max_num_seqs=seats, max_num_batched_tokens=budget, kv_policy=policy
        )
        self.trace = Trace(TraceMeta(blocks, size, seats, budget, kind, policy))
        self.auditor = Auditor(self.scheduler, self.pool, budget, seats)
        self.steps = 0
        self.count = 0
        self.admissions: list[str] = []

    def add(self, prompt: int | list[int], max_tokens: int = 4, *, n: int = 1, priority: int = 0) -> str:
        name = str(self.count)
        self.count += 1
        tokens = [1] * prompt if isinstance(prompt, int) else prompt
        params = SamplingParams(max_tokens=max_tokens, temperature=1.0, n=n)
        request, *children = (
            Request(name if i == 0 else f"{name}.{i}", tokens, params, priority=priority) for i in range(n)
        )
        request.children = children
        self.scheduler.add(request)
        return name

    def step(self, *, faulty: bool = False, token: int = 1, drafts: int = 0, right: int = 0) -> StepRecord:
        """One step; who decodes has so many drafts, so many of them right."""
        before = [r for r in self.scheduler.running if len(r.token_ids) - r.num_computed_tokens == 1]
        if isinstance(self.scheduler, NEVER_DRAFT):
            drafts = 0
        for request in before:
            request.drafts = (token,) * min(drafts, request.max_len - len(request.token_ids) - 1)
        plan = self.scheduler.schedule()
        self.failed, plan.failed = plan.failed, {}  # which the auditor would not let pass
        self.auditor.check_plan(plan)
        check_pool(self.pool)
        if isinstance(self.scheduler, WholePromptScheduler):
            joins = {a.request_id for a in plan.admitted}  # it may lack one token, if it was preempted
            kinds = zip(plan.requests, plan.kinds, strict=True)
            decodes = [r.request_id for r, kind in kinds if kind == "d" and r.request_id not in joins]
            prompts = [kind for kind in plan.kinds if kind != "d"]
            assert not (decodes and prompts), "prompts and answers in one step"
            assert "c" not in prompts, "a prompt was cut"
        elif not plan.padding:
            running = {id(request) for request in plan.requests}
            for request in before:  # no answer waits a step while it holds a seat
                assert id(request) in running or request.status != "running"
        assert not (plan.preempted and plan.admitted)
        result = StepResult([self._sample(plan, row, token, right) for row in range(len(plan.requests))])
        if faulty and plan.requests:
            result.errors[self.steps % len(plan.requests)] = "made up"
            result.sampled[self.steps % len(plan.requests)] = ()
        self.scheduler.commit(plan, result)
        record = self.trace.append(record_step(self.steps, plan, result, self.scheduler))
        self._check_queue(record)
        self.auditor.check_record(record)
        self.admissions += [admission.request_id for admission in record.admitted]
        self.steps += 1
        return record

    def _check_queue(self, record: StepRecord) -> None:
        """The trace knows the queue, its order and why its head waits."""
        state = self.trace.state(record.step, after=True)
        known = [request.request_id for request in self.scheduler.waiting]
        assert state.queue == known
        assert len(known) + len(state.held) == record.waiting
        assert (record.blocked[0] if record.blocked else None) == (known[0] if known else None)

    @staticmethod
    def _sample(plan: StepPlan, row: int, token: int, right: int = 0) -> tuple[int, ...]:
        request, drafts = plan.requests[row], plan.drafts.get(row, ())
        at_end = plan.starts[row] + plan.num_tokens[row] == len(request.token_ids) + len(drafts)
        return (*drafts[:right], token) if at_end and request.status == "running" else ()

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "somebody was left behind"
        assert self.pool.num_free == self.pool.num_blocks
        assert not self.pool.tables
        assert not self.scheduler.running
        assert len(self.scheduler.waiting) == 0
