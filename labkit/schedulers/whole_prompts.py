"""Continuous batching without chunked prefill: a step computes whole prompts or running answers, not both."""

from __future__ import annotations

from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import PREEMPTED, Scheduler


class WholePromptScheduler(Scheduler):
    """Computes whole prompts while any can be admitted. Running answers wait meanwhile."""

    def check(self, request: Request) -> None:
        super().check(request)
        if request.max_len - 1 > self.max_num_batched_tokens:  # it may come back from a preemption
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens with max_tokens {request.params.max_tokens} "
                f"may have to be computed in one step of at most {self.max_num_batched_tokens} tokens: raise "
                "max_num_batched_tokens, or set enable_chunked_prefill"
            )

    def schedule(self) -> StepPlan:
        self.end_aborted()
        plan = StepPlan(held_back=self.held_back)
        self.plan_waiting(plan, self.max_num_batched_tokens)
        if not plan.requests:
            self.plan_running(plan)
            if plan.preempted:
                plan.blocked = (self.waiting.peek().request_id, PREEMPTED)
        return plan

    def try_admit(self, plan: StepPlan, request: Request, budget: int) -> str | None:
        if 0 < budget < len(request.token_ids) and len(self.running) < self.max_num_seqs:
            return f"it has {len(request.token_ids)} tokens, and {budget} are left of the token budget"
        return super().try_admit(plan, request, budget)
