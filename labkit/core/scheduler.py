"""The scheduler: what runs in each step, and why. No tensors here.

There are no phases: each running request computes `min(tokens it knows - tokens it has computed, budget)`
tokens. Prefill, a chunk of it, decode, the rest after a prefix hit and the return after a preemption are
all that one rule (vLLM v1's), and one forward pass computes any mixture of them. Continuous batching is
from Orca (Yu et al. 2022), chunked prefill beside decode from Sarathi-Serve (Agrawal et al. 2024).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from labkit.config import check_seats
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.plan import Changes, StepPlan, StepResult
from labkit.core.request import Request
from labkit.core.waiting_queue import WaitingQueue, order
from labkit.outputs import FinishReason
from labkit.trace.records import Admission, Arrival, Blocks, Copy, Finish, Priority

PREEMPTED = "nobody is admitted in a step that preempted"


class Scheduler:
    """Continuous batching: requests join and leave at every step.

    A scheduler of your own is a subclass. For another order, override `order` and `victim`; for another plan,
    `schedule`, with the methods that keep pool, queue and plan consistent: `end_aborted` (call it first),
    `plan_running`, `plan_row`, `grow` (new blocks, and preemption), `plan_waiting`, `try_admit`;
    and the single moves `admit`, `seat`, `allocate`, `preempt` (before `plan_row`), `finish` and `fork`.

    Args:
        pool: the pool that blocks come from.
        max_num_seqs: the number of seats.
        max_num_batched_tokens: the token budget of a step; at least `max_num_seqs`, so that decode fits.
        kv_policy: "paged", or "reserved", which takes the blocks of the longest answer at admission.
    """

    forks = True  # whether n > 1 answers start from one computed prompt
    uses_prefix_cache = True
    order = staticmethod(order)  # what the queue is sorted by, lowest first

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        kv_policy: str = "paged",
    ) -> None:
        check_seats(max_num_seqs, max_num_batched_tokens)
        self.pool, self.kv_policy = pool, kv_policy
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        # Blocks kept free at admission while others run, so that these can grow before one is preempted.
        self.watermark = max(1, pool.num_blocks // 100) if kv_policy == "paged" else 0
        self.waiting = WaitingQueue(self.order)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}  # all that are not finished
        self.changes = Changes()  # since the last record
        self.held_back = ""  # why requests do not have more drafts
        self._num_arrivals = 0
        self._aborting: dict[str, None] = {}  # a set of ids
        # The last failed admission: the request, how many blocks were free and published, and the reason.
        self._stuck: tuple[Request, int, int, str] | None = None

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request and its children; the next step can run them. Raises what `check` raises."""
        self.check(request)
        for member in (request, *request.children):
            member.arrival = self._num_arrivals
            self._num_arrivals += 1
            self.requests[member.request_id] = member
            parent = request.request_id if self.forks and member is not request else ""
            lengths = member.num_prompt_tokens, member.params.max_tokens
            self.changes.arrived.append(Arrival(member.request_id, *lengths, member.priority, parent))
        self.waiting.push(request)
        if not self.forks:
            self._queue_children(request)

    def check(self, request: Request) -> None:
        """Raise `ValueError` if an id is in use, or the pool could never hold the request."""
        for member in (request, *request.children):
            if member.request_id in self.requests:
                raise ValueError(f"request_id {member.request_id!r} is already in use")
        if not request.num_prompt_tokens:
            raise ValueError("prompt is empty: it must have at least one token")
        need = self.pool.blocks_for(request.max_len - 1)  # the last token is never written
        if need > self.pool.num_blocks:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens with max_tokens {request.params.max_tokens} "
                f"may need {need} pages of {self.pool.block_size} tokens, but the pool has "
                f"{self.pool.num_blocks}: lower max_tokens, or raise num_blocks"
            )

    def abort(self, request_id: str) -> bool:
        """End a request at the next step. Returns False if there is no such request."""
        if known := request_id in self.requests:
            self._aborting[request_id] = None
        return known

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority (lower runs first). Returns False if there is no such request."""
        if (request := self.requests.get(request_id)) is None:
            return False
        request.priority = priority
        self.changes.reprioritised.append(Priority(request_id, priority))
        if request in self.waiting:
            self.waiting.push(request)
        return True

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do, or to record."""
        return bool(self.requests or self.changes.finished or self.changes.arrived)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    # -- the plan of a step -----------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step: running requests first, then waiting ones, under one budget and one seat limit."""
        self.end_aborted()
        plan = StepPlan(held_back=self.held_back)
        budget = self.plan_running(plan)
        self.plan_waiting(plan, budget)
        return plan

    def end_aborted(self) -> None:
        """End the requests that were aborted since the last step."""
        while self._aborting:  # one by one, because another thread may add to it
            request_id, _ = self._aborting.popitem()
            if request_id in self.requests:
                self.finish(self.requests[request_id], "abort")

    def plan_running(self, plan: StepPlan) -> int:
        """Plan a token for each request that decodes, then chunks of prompts; return the budget left.

        Decode goes first, so that no prompt, however long, keeps a running answer waiting.
        """
        decoding, growing, prefilling = [], [], []
        planned = set(map(id, plan.requests))  # nobody, unless waiting requests were admitted before
        for request in self.running:
            if id(request) in planned:
                continue
            start = request.num_computed_tokens
            if len(request.token_ids) - start > 1:
                prefilling.append(request)
                continue
            decoding.append(request)
            if start >= request.capacity or request.shares_tail:
                growing.append(request)
        if growing:
            self.grow(plan, growing)
        budget = self.max_num_batched_tokens - sum(plan.num_tokens)
        for request in decoding:
            if request.status == "running":  # it may have been preempted just now
                budget -= self.plan_row(plan, request, budget)
        if any(request.drafts for request in plan.requests):
            budget -= self.plan_drafts(plan, budget)
        for request in prefilling:
            if budget and request.status == "running":
                budget -= self.plan_row(plan, request, budget)
        return budget

    def plan_row(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Plan the missing tokens of a running request, up to the budget; return how many that is."""
        missing = len(request.token_ids) - request.num_computed_tokens
        num_tokens = min(missing, budget)  # the one rule
        plan.add(request, num_tokens)
        if request.children and num_tokens == missing:
            self.fork(plan, request)
        return num_tokens

    def grow(self, plan: StepPlan, growing: list[Request]) -> None:
        """Give each of these requests the block its next token needs; preempt until there are enough."""
        while self.num_needed(growing) > self.pool.num_free:
            if len(self.running) == 1:
                raise InvariantError(f"request {self.running[0].request_id!r} runs alone and finds no page")
            self.preempt(plan, victim := self.victim())
            growing = [request for request in growing if request is not victim]
        for request in growing:
            with self._ending_if_out_of_blocks(plan, request):
                start = request.num_computed_tokens
                if start >= request.capacity:
                    self.allocate(plan, request, 1)
                elif pair := self.pool.make_writable(request.request_id, start // self.pool.block_size):
                    plan.copied.append(Copy(request.request_id, *pair))
            request.shares_tail = False

    def num_needed(self, growing: list[Request]) -> int:
        """Return how many new blocks the next tokens of these requests take."""
        size = self.pool.block_size
        tails = Counter[int]()  # a tail is the block that the next token goes into
        for request in growing:
            tails.update(self.pool.tables[request.request_id][request.num_computed_tokens // size :][:1])
        # Without a tail, it takes a new block. Of the owners of a shared one, all but the last take a copy.
        copies = sum(min(count, self.pool.ref_counts[tail] - 1) for tail, count in tails.items())
        return len(growing) - tails.total() + copies

    def victim(self) -> Request:
        """The running request that gives up its blocks when they run out: the one that is last in order."""
        return max(self.running, key=self.order)

    def preempt(self, plan: StepPlan, victim: Request) -> None:
        """Take a request's blocks and seat away; it keeps its tokens, and will compute them again."""
        if victim in plan.requests:
            raise InvariantError(f"request {victim.request_id!r} is planned already: preempt it before")
        self.running.remove(victim)
        plan.preempted.append(Blocks(victim.request_id, self._release(victim)))
        victim.status = "waiting"
        victim.num_computed_tokens = 0
        self.waiting.push(victim)

    # -- admission --------------------------------------------------------------------------------

    def plan_waiting(self, plan: StepPlan, budget: int) -> None:
        """Admit from the head of the queue while seats, budget and blocks last; note why that stopped."""
        while (request := self.waiting.peek()) is not None:
            reason = self.try_admit(plan, request, budget)
            if reason:
                plan.blocked = (request.request_id, reason)
                return
            if request.status == "running":  # the pool may have failed it just now
                budget -= self.plan_row(plan, request, budget)

    def try_admit(self, plan: StepPlan, request: Request, budget: int) -> str | None:
        """Admit a waiting request if seats, budget and pool allow it; else return why it must wait."""
        if plan.preempted:
            return PREEMPTED
        if len(self.running) >= self.max_num_seqs:
            seats = self.max_num_seqs
            return "the only seat is taken" if seats == 1 else f"all {seats} seats are taken"
        if budget == 0:
            return f"the token budget of {self.max_num_batched_tokens} is used up"
        return self.admit(plan, request)

    def admit(self, plan: StepPlan, request: Request) -> str | None:
        """Give a request a seat, and blocks for all its tokens; or return what is missing."""
        pool = self.pool
        attempt = (request, pool.num_free, pool.num_published)
        if self.running and self._stuck and self._stuck[:3] == attempt:
            return self._stuck[3]  # nothing has changed since, so do not look it up again
        all_logits = request.params.prompt_logprobs is not None  # and what is found in the cache has none
        shared = pool.match(request.token_ids) if self.uses_prefix_cache and not all_logits else []
        tokens = request.max_len - 1 if self.kv_policy == "reserved" else len(request.token_ids)
        count = pool.blocks_for(tokens) - len(shared)
        left = pool.num_free_without(shared)
        kept = self.watermark if self.running else 0
        if count + kept > left:
            more = f" beside {len(shared)} cached" * bool(shared) + f" and {kept} for growth" * bool(kept)
            reason = f"it needs {count} page{'s' * (count > 1)}{more}, and {left} are free"
            self._stuck = (*attempt, reason)
            return reason
        self._stuck = None
        self.waiting.remove(request)
        pool.share(request.request_id, shared)
        cached = len(shared) * pool.block_size
        looked_up = 0 if all_logits else len(request.token_ids)
        plan.admitted.append(Admission(request.request_id, cached, tuple(shared), looked_up))
        self.seat(request, cached)
        with self._ending_if_out_of_blocks(plan, request):
            self.allocate(plan, request, count)
        return None

    def seat(self, request: Request, num_computed_tokens: int) -> None:
        """Let a request run whose blocks already hold its first `num_computed_tokens` tokens."""
        request.status = "running"
        request.num_computed_tokens = request.num_cached_tokens = num_computed_tokens
        request.capacity = len(self.pool.tables[request.request_id]) * self.pool.block_size
        self.running.append(request)

    def allocate(self, plan: StepPlan, request: Request, count: int) -> None:
        """Append `count` blocks to a running request's table. Takes none if it raises `OutOfBlocks`."""
        blocks = self.pool.allocate(request.request_id, count)
        request.capacity += count * self.pool.block_size
        plan.taken.append(Blocks(request.request_id, tuple(blocks)))

    @contextlib.contextmanager
    def _ending_if_out_of_blocks(self, plan: StepPlan, request: Request) -> Iterator[None]:
        try:
            yield  # a pool of your own may promise more than it has: then only this request ends
        except OutOfBlocks as error:
            request.error = plan.failed[request.request_id] = f"the pool gave it no page: {error}"
            self.finish(request, "error")

    # -- after the step ---------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Apply what a step computed: append its tokens, publish full blocks, end requests."""
        size = self.pool.block_size
        for row, request in enumerate(plan.requests):
            if request.status != "running":  # an idle seat
                continue
            if row in result.errors:
                request.error = result.errors[row]
                self.finish(request, "error")
                continue
            request.prompt_logprobs += result.prompt_logprobs.get(row, ())
            kept, reason = [], None
            for token in result.sampled[row]:
                kept.append(token)
                if reason := request.append(token):  # drafts may reach past the end
                    break
            result.sampled[row], start = tuple(kept), plan.starts[row]
            # Wrong drafts were computed for nothing: what counts is what became part of the answer.
            end = start + (len(kept) if row in plan.drafts else plan.num_tokens[row])
            request.num_computed_tokens = end
            if end // size > start // size and self.uses_prefix_cache:
                self.pool.publish(request.request_id, request.token_ids, end)
            if reason:
                self.finish(request, reason)
            elif row in plan.drafts:
                self._take_back(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, and give its blocks back."""
        if request.status == "running":
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        blocks = self._release(request)
        if reason == "error":
            self.pool.forget(blocks)  # they may hold NaN: no later request must find them
        request.status = "finished"
        del self.requests[request.request_id]
        self._aborting.pop(request.request_id, None)
        self._stuck = None
        self.changes.finished.append(Finish(request.request_id, reason, blocks))
        self._queue_children(request)

    def _release(self, request: Request) -> tuple[int, ...]:
        request.capacity, request.drafts, request.shares_tail = 0, (), False
        return tuple(self.pool.release(request.request_id)) if request.status == "running" else ()

    # -- several answers to one prompt (n > 1) ----------------------------------------------------

    def fork(self, plan: StepPlan, parent: Request) -> None:
        """Start as many children as there are seats from the prompt that this step completes."""
        row = len(plan.requests) - 1
        alone = plan.preempted or self.kv_policy == "reserved"  # then children are admitted from the queue
        seats = 0 if alone else self.max_num_seqs - len(self.running)
        partial = parent.num_prompt_tokens % self.pool.block_size > 0
        for child in parent.children[:seats]:
            if child.request_id not in self.requests:  # it was aborted meanwhile
                continue
            shared = self.pool.fork(parent.request_id, child.request_id)
            self.seat(child, parent.num_prompt_tokens)
            child.shares_tail = parent.shares_tail = partial
            plan.admitted.append(Admission(child.request_id, parent.num_prompt_tokens, tuple(shared)))
            plan.forks[len(plan.requests)] = row
            plan.add(child, 0)
        parent.children = parent.children[seats:]
        self._queue_children(parent)  # the rest come as ordinary requests, and share full blocks

    def _queue_children(self, request: Request) -> None:
        for child in request.children:
            if child.request_id in self.requests:
                self.waiting.push(child)
        request.children = []

    # -- drafts (speculative decoding) ------------------------------------------------------------

    def plan_drafts(self, plan: StepPlan, budget: int) -> int:
        """Add drafts to the rows that decode, as budget and free blocks allow; return how many.

        Nobody is preempted for a draft.
        """
        taken = 0
        for row, request in enumerate(plan.requests):
            if not request.drafts:
                continue
            drafts = request.drafts[: budget - taken]
            room = request.capacity - request.num_computed_tokens - 1  # beside the row's own token
            blocks = self.pool.blocks_for(max(0, len(drafts) - room))
            blocks = min(blocks, max(0, self.pool.num_free - self.watermark))
            if blocks:
                with contextlib.suppress(OutOfBlocks):
                    self.allocate(plan, request, blocks)
                    room += blocks * self.pool.block_size
            if drafts := drafts[:room]:
                plan.draft(row, drafts)
                taken += len(drafts)
        return taken

    def _take_back(self, request: Request) -> None:
        """Give back the blocks that only rejected drafts needed."""
        request.drafts = ()
        keep = self.pool.blocks_for(len(request.token_ids))
        if self.kv_policy == "paged" and keep * self.pool.block_size < request.capacity:
            blocks = self.pool.truncate(request.request_id, keep)
            request.capacity = keep * self.pool.block_size
            self.changes.returned.append(Blocks(request.request_id, tuple(blocks)))
