"""The record of a step: the plan, its result, and which requests came and went. No tensors here."""

from __future__ import annotations

from labkit.core.plan import Changes, StepPlan, StepResult
from labkit.core.scheduler import Scheduler
from labkit.trace.records import StepRecord


def record_step(
    step: int, plan: StepPlan, result: StepResult, scheduler: Scheduler, time: float = 0, seconds: float = 0
) -> StepRecord:
    """Return the record of a committed step, and clear the scheduler's list of changes."""
    pool, changes, scheduler.changes = scheduler.pool, scheduler.changes, Changes()
    head, blocked = scheduler.waiting.peek(), plan.blocked
    if head and (blocked is None or blocked[0] != head.request_id):
        # The other answers to a request that has just failed come to the queue after planning.
        late = head.family != head.request_id or head.request_id in {a.request_id for a in changes.arrived}
        why = "it joined the queue when this step was over" if late else "the scheduler gave no reason"
        blocked = (head.request_id, why)
    allowed = tuple([request.form.allowed if request.form else () for request in plan.requests])
    return StepRecord(
        step,
        requests=tuple([request.request_id for request in plan.requests]),
        kinds="".join(plan.kinds),
        starts=tuple(plan.starts),
        num_tokens=tuple(plan.num_tokens),
        sampled=tuple(result.sampled),
        padding=tuple(plan.padding) if any(plan.padding) else (),  # of a static batch
        drafted=tuple([plan.drafts.get(i, ()) for i in range(len(plan.requests))]) if plan.drafts else (),
        allowed=allowed if any(allowed) else (),  # where an answer must have a form
        arrived=tuple(changes.arrived),
        reprioritised=tuple(changes.reprioritised),
        admitted=tuple(plan.admitted),
        preempted=tuple(plan.preempted),
        taken=tuple(plan.taken),
        copied=tuple(plan.copied),
        finished=tuple(changes.finished),
        returned=tuple(changes.returned),
        **pool.drain_changes(),  # of the prefix cache
        waiting=scheduler.num_waiting,
        blocked=blocked,
        held_back=plan.held_back,
        free_blocks=pool.num_free,
        time=time,
        seconds=seconds,
        **result.traffic,
        threads=changes.threads,
    )
