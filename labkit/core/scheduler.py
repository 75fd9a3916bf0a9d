"""What runs in this step, and why. No tensors here.

There are no phases: each running request computes `min(tokens it knows - tokens it has computed, budget)`
tokens. Prefill, a chunk of it, decode, the rest after a prefix hit and the return after a preemption are
all that one rule (vLLM v1's), and one forward pass mixes whatever the plan holds. Continuous batching is
from Orca (Yu et al. 2022), chunked prefill beside decode from Sarathi-Serve (Agrawal et al. 2024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.core.waiting_queue import WaitingQueue, order
from labkit.outputs import FinishReason
from labkit.trace.records import Admission, Arrival, Blocks, Copy, Finish, Priority, StepRecord

_PREEMPTED = "nobody is admitted in a step that preempted"


class Scheduler:
    """Continuous batching: requests join and leave at every step.

    Args:
        pool: where pages come from.
        max_num_seqs: seats.
        max_num_batched_tokens: token budget of a step; at least `max_num_seqs`, so that decode always fits.
        kv_policy: "paged", or "reserved" to take a request's whole maximum when it is admitted.
        enable_chunked_prefill: whether a step mixes prompts, and chunks of them, with decode. If not, a step
            is for whole prompts while any can be admitted, and running answers wait meanwhile.
    """

    forks = True  # whether the answers of n > 1 start from one computed prompt

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_policy: str = "paged",
        enable_chunked_prefill: bool = True,
    ) -> None:
        if max_num_seqs > max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({max_num_seqs}) must not exceed max_num_batched_tokens "
                f"({max_num_batched_tokens})"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.kv_policy = kv_policy
        self.enable_chunked_prefill = enable_chunked_prefill
        # Blocks kept free at admission while others run, so that they can grow before anyone is preempted.
        # A request that has reserved its maximum does not grow.
        self.watermark = max(1, pool.num_blocks // 100) if kv_policy == "paged" else 0
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}  # all that are not finished
        self._arrivals = 0
        self._aborting: dict[str, None] = {}
        self._arrived: list[Arrival] = []
        self._reprioritised: list[Priority] = []
        self._finished: list[Finish] = []
        self._returned: list[Blocks] = []
        self.held_back = ""  # why the requests have no more drafts, for the record of the next step
        # A failed admission: who, with how many pages free and published, and why.
        self._stuck: tuple[Request, int, int, str] | None = None

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a request (and its children) into the queue. Takes effect at the next step.

        Raises:
            ValueError: for an id in use, or a request that the pool could never hold.
        """
        self.check(request)
        family = [request, *request.children]
        for member in family:
            member.arrival = self._arrivals
            self._arrivals += 1
            self.requests[member.request_id] = member
            self._arrived.append(
                Arrival(
                    member.request_id,
                    member.num_prompt_tokens,
                    member.params.max_tokens,
                    member.priority,
                    request.request_id if self.forks and member is not request else "",
                )
            )
        self.waiting.push(request)
        if not self.forks:
            self._queue_children(request)

    def check(self, request: Request) -> None:
        """Raise as `add` does, and change nothing."""
        for member in (request, *request.children):
            if member.request_id in self.requests:
                raise ValueError(f"request_id {member.request_id!r} is already in use")
        need = self.pool.blocks_for(request.max_len - 1)  # the last token is never written
        if need > self.pool.num_blocks:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens with max_tokens {request.params.max_tokens} "
                f"may need {need} pages of {self.pool.block_size} tokens, but the pool has "
                f"{self.pool.num_blocks}: lower max_tokens, or raise num_blocks"
            )
        if not self.enable_chunked_prefill and request.max_len - 1 > self.max_num_batched_tokens:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens with max_tokens {request.params.max_tokens} "
                f"may have to be computed in one step of at most {self.max_num_batched_tokens} tokens: raise "
                "max_num_batched_tokens, or set enable_chunked_prefill"
            )

    def abort(self, request_id: str) -> bool:
        """End a request at the next step boundary. False if there is none of that name."""
        if request_id not in self.requests:
            return False
        self._aborting[request_id] = None
        return True

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority (lower runs first); counts from the next step on."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        request.priority = priority
        self._reprioritised.append(Priority(request_id, priority))
        if request in self.waiting:
            self.waiting.push(request)
        return True

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do or to record."""
        return bool(self.requests or self._finished or self._arrived)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out and give its pages back."""
        if request.status == "running":
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        blocks = self._release(request)
        if reason == "error":
            self.pool.forget(blocks)  # nobody shall find what a fault may have written
        request.status = "finished"
        request.finish_reason = reason
        del self.requests[request.request_id]
        self._aborting.pop(request.request_id, None)
        self._finished.append(Finish(request.request_id, reason, blocks))
        self._queue_children(request)

    def _release(self, request: Request) -> tuple[int, ...]:
        request.num_slots = 0
        request.drafts = ()
        request.shares_tail = False
        return tuple(self.pool.release(request.request_id)) if request.status == "running" else ()

    def _queue_children(self, request: Request) -> None:
        for child in request.children:
            if child.request_id in self.requests:
                self.waiting.push(child)
        request.children = []

    # -- planning ---------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step: running requests first, then waiting ones, under one budget and one seat limit."""
        self.end_aborted()
        plan = StepPlan(held_back=self.held_back)
        if self.enable_chunked_prefill:
            self.plan_waiting(plan, self.plan_running(plan))
            return plan
        self.plan_waiting(plan, self.max_num_batched_tokens)
        if not plan.requests:
            self.plan_running(plan)
            if plan.preempted:
                plan.blocked = (self.waiting.peek().request_id, _PREEMPTED)
        return plan

    def end_aborted(self) -> None:
        while self._aborting:  # one by one: another thread may add to it
            request_id, _ = self._aborting.popitem()
            if request_id in self.requests:
                self.finish(self.requests[request_id], "abort")

    def plan_running(self, plan: StepPlan) -> int:
        """Plan one token for each request that decodes, then chunks of prompts; returns the budget left.

        Decode goes first, so that no prompt, however long, keeps a running answer waiting.
        """
        decoding, growing, prefilling = [], [], []
        for request in self.running:
            start = request.num_computed_tokens
            if len(request.token_ids) - start > 1:
                prefilling.append(request)
                continue
            decoding.append(request)
            if start >= request.num_slots or request.shares_tail:
                growing.append(request)
        if growing:
            self.grow(plan, growing)
        budget = self.max_num_batched_tokens
        for request in decoding:
            if request.status == "running":  # not preempted just now
                budget -= self.plan_row(plan, request, budget)
        budget -= self.plan_drafts(plan, budget)
        for request in prefilling:
            if budget and request.status == "running":
                budget -= self.plan_row(plan, request, budget)
        return budget

    def plan_drafts(self, plan: StepPlan, budget: int) -> int:
        """Add drafts to the rows that decode, as the budget and free pages allow; returns how many tokens.

        Nobody is preempted for a draft.
        """
        taken = 0
        for row, request in enumerate(plan.requests):
            if not request.drafts:
                continue
            drafts = request.drafts[: budget - taken]
            room = request.num_slots - request.num_computed_tokens - 1
            pages = self.pool.blocks_for(max(0, len(drafts) - room))
            pages = min(pages, max(0, self.pool.num_free - self.watermark))
            if pages:
                with contextlib.suppress(OutOfBlocks):
                    self.allocate(plan, request, pages)
                    room += pages * self.pool.block_size
            if drafts := drafts[:room]:
                plan.draft(row, drafts)
                taken += len(drafts)
        return taken

    def plan_row(self, plan: StepPlan, request: Request, budget: int) -> int:
        missing = len(request.token_ids) - request.num_computed_tokens
        num_tokens = min(missing, budget)
        plan.add(request, num_tokens)
        if request.children and num_tokens == missing:
            self._plan_forks(plan, request)
        return num_tokens

    def grow(self, plan: StepPlan, growing: list[Request]) -> None:
        """Give each of these requests the page its next token needs, preempting the newest until it fits."""
        while sum(map(self._needs_page, growing)) > self.pool.num_free:
            victim = max(self.running, key=order)
            if len(self.running) == 1:
                raise InvariantError(f"request {victim.request_id!r} runs alone and finds no page")
            self.preempt(plan, victim)
            growing = [request for request in growing if request is not victim]
        for request in growing:
            with self._ending(plan, request):
                start = request.num_computed_tokens
                if start >= request.num_slots:
                    self.allocate(plan, request, 1)
                elif pair := self.pool.make_writable(request.request_id, start // self.pool.block_size):
                    plan.copied.append(Copy(request.request_id, *pair))
            request.shares_tail = False

    def _needs_page(self, request: Request) -> bool:
        start = request.num_computed_tokens
        if start >= request.num_slots:
            return True
        table = self.pool.table(request.request_id)
        return self.pool.ref_counts[table[start // self.pool.block_size]] > 1

    def allocate(self, plan: StepPlan, request: Request, count: int) -> None:
        blocks = self.pool.allocate(request.request_id, count)
        request.num_slots += count * self.pool.block_size
        plan.taken.append(Blocks(request.request_id, tuple(blocks)))

    @contextlib.contextmanager
    def _ending(self, plan: StepPlan, request: Request) -> Iterator[None]:
        """A pool that has no page after all has taken none: its request ends, and the others go on."""
        try:
            yield
        except OutOfBlocks as error:
            plan.failed[request.request_id] = f"the pool gave it no page: {error}"
            self.finish(request, "error")

    def preempt(self, plan: StepPlan, victim: Request) -> None:
        """Take a request's pages and seat away; it keeps its tokens and will compute them again."""
        self.running.remove(victim)
        plan.preempted.append(Blocks(victim.request_id, self._release(victim)))
        victim.status = "waiting"
        victim.num_computed_tokens = 0
        self.waiting.push(victim)

    def plan_waiting(self, plan: StepPlan, budget: int) -> None:
        """Admit from the head of the queue while seats, budget and pages last; say why it stopped."""
        while (request := self.waiting.peek()) is not None:
            reason = self.try_admit(plan, request, budget)
            if reason:
                plan.blocked = (request.request_id, reason)
                return
            if request.status == "running":  # not ended just now
                budget -= self.plan_row(plan, request, budget)

    def try_admit(self, plan: StepPlan, request: Request, budget: int) -> str | None:
        """Admit the request, or say why it must wait."""
        if plan.preempted:
            return _PREEMPTED
        if len(self.running) >= self.max_num_seqs:
            seats = self.max_num_seqs
            return "the only seat is taken" if seats == 1 else f"all {seats} seats are taken"
        if budget == 0:
            return f"the token budget of {self.max_num_batched_tokens} is used up"
        if not self.enable_chunked_prefill and len(request.token_ids) > budget:
            return f"it has {len(request.token_ids)} tokens, and {budget} are left of the token budget"
        return self._admit(plan, request)

    def _admit(self, plan: StepPlan, request: Request) -> str | None:
        """Give a request a seat and pages for all its tokens, or say what is missing."""
        pool = self.pool
        attempt = (request, pool.num_free, pool.num_published)
        if self.running and self._stuck and self._stuck[:3] == attempt:
            return self._stuck[3]  # nothing has changed since: spare the look-up
        shared = pool.match(request.token_ids)
        tokens = request.max_len - 1 if self.kv_policy == "reserved" else len(request.token_ids)
        count = pool.blocks_for(tokens) - len(shared)
        left = pool.num_free_without(shared)
        kept = self.watermark if self.running else 0
        if count + kept > left:
            reason = f"it needs {count} page{'s' * (count > 1)}, and {left} are free"
            reason += f", {kept} of them kept for growth" if kept else ""
            self._stuck = (*attempt, reason)
            return reason
        self._stuck = None
        self.waiting.remove(request)
        pool.share(request.request_id, shared)
        cached = len(shared) * pool.block_size
        plan.admitted.append(Admission(request.request_id, cached, tuple(shared), len(request.token_ids)))
        self._seat(request, cached)
        with self._ending(plan, request):
            self.allocate(plan, request, count)
        return None

    def _seat(self, request: Request, num_computed_tokens: int) -> None:
        request.status = "running"
        request.num_computed_tokens = request.num_cached_tokens = num_computed_tokens
        request.num_slots = len(self.pool.table(request.request_id)) * self.pool.block_size
        self.running.append(request)

    def _plan_forks(self, plan: StepPlan, parent: Request) -> None:
        """The prompt is computed in this step: let as many children start from it as there are seats."""
        row = len(plan.requests) - 1
        alone = plan.preempted or self.kv_policy == "reserved"  # a fork is an admission, and has no reserve
        seats = 0 if alone else self.max_num_seqs - len(self.running)
        partial = parent.num_prompt_tokens % self.pool.block_size > 0
        for child in parent.children[:seats]:
            if child.request_id not in self.requests:  # aborted meanwhile
                continue
            shared = self.pool.fork(parent.request_id, child.request_id)
            self._seat(child, parent.num_prompt_tokens)
            child.shares_tail = parent.shares_tail = partial
            plan.admitted.append(Admission(child.request_id, parent.num_prompt_tokens, tuple(shared)))
            plan.forks[len(plan.requests)] = row
            plan.add(child, 0)
        parent.children = parent.children[seats:]
        self._queue_children(parent)  # the others come as ordinary requests, and share full pages

    # -- after the step ---------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take over what the runner computed: tokens advance, full pages become known, requests end."""
        size = self.pool.block_size
        for row, (request, start, num_tokens, tokens) in enumerate(
            zip(plan.requests, plan.starts, plan.num_tokens, result.sampled, strict=True)
        ):
            if request.status != "running":  # an idle seat
                continue
            if result.errors and row in result.errors:
                request.error = result.errors[row]
                self.finish(request, "error")
                continue
            reason: FinishReason | None = "stop" if row in result.stopped else None
            for token in tokens:
                request.token_ids.append(token)
                if token in request.stop_ids:
                    reason = "stop"
                    break
                if len(request.token_ids) >= request.max_len:
                    reason = reason or "length"
                    break
            if row in plan.drafts:  # those that were wrong were computed for nothing
                num_tokens = len(tokens)
            end = request.num_computed_tokens = start + num_tokens
            if end // size > start // size:
                self.pool.publish(request.request_id, request.token_ids, end)
            if reason:
                self.finish(request, reason)
            elif row in plan.drafts:
                self._take_back(request)

    def _take_back(self, request: Request) -> None:
        """Give back the pages that only wrong drafts needed."""
        request.drafts = ()
        keep = self.pool.blocks_for(len(request.token_ids))
        if self.kv_policy == "paged" and keep * self.pool.block_size < request.num_slots:
            blocks = self.pool.truncate(request.request_id, keep)
            request.num_slots = keep * self.pool.block_size
            self._returned.append(Blocks(request.request_id, tuple(blocks)))

    def record(
        self, step: int, plan: StepPlan, result: StepResult, *, time: float = 0.0, seconds: float = 0.0
    ) -> StepRecord:
        """The step as the trace keeps it: the plan, what came of it, and who came and went."""
        published, evicted = self.pool.drain_changes()
        head, blocked = self.waiting.peek(), plan.blocked
        if head and (blocked is None or blocked[0] != head.request_id):
            # The other answers to a request that has just failed come to the queue after planning.
            blocked = (head.request_id, "it joined the queue when this step was over")
        record = StepRecord(
            step,
            tuple([request.request_id for request in plan.requests]),
            "".join(plan.kinds),
            tuple(plan.starts),
            tuple(plan.num_tokens),
            tuple(result.sampled),
            tuple(plan.padding) if any(plan.padding) else (),
            tuple([plan.drafts.get(i, ()) for i in range(len(plan.requests))]) if plan.drafts else (),
            tuple(self._arrived),
            tuple(self._reprioritised),
            tuple(plan.admitted),
            tuple(plan.preempted),
            tuple(plan.taken),
            tuple(plan.copied),
            tuple(self._finished),
            tuple(self._returned),
            published,
            evicted,
            self.num_waiting,
            blocked,
            plan.held_back,
            self.pool.num_free,
            time,
            seconds,
        )
        self._arrived.clear()
        self._reprioritised.clear()
        self._finished.clear()
        self._returned.clear()
        return record
