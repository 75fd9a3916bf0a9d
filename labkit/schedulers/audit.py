"""Checks of every step of an engine, for schedulers and pools of your own. No tensors here.

The auditor keeps books of its own, from what the record of each step says, and compares the pool with them. A
broken rule raises `InvariantError` at the step that broke it: it names the rule, the request and the block.
"""

from __future__ import annotations

from collections.abc import Collection

from labkit.core.block_pool import BlockPool, InvariantError
from labkit.core.plan import StepPlan
from labkit.core.scheduler import Scheduler
from labkit.trace.pool_state import PoolState
from labkit.trace.records import Finish, StepRecord

_IDLE_STEPS = 1000  # so many empty plans in a row, while requests wait, mean that they wait for ever


class Auditor:
    """Keeps books of which request holds which blocks, independent of the pool's own.

    Args:
        scheduler, pool: the scheduler and the pool that are checked.
        budget, seats: the limits of the engine.
    """

    def __init__(self, scheduler: Scheduler, pool: BlockPool, budget: int, seats: int) -> None:
        self.scheduler, self.pool = scheduler, pool
        self._budget, self._seats = budget, seats
        self._books = PoolState(pool.block_size)
        self._idle = 0

    def check_plan(self, plan: StepPlan) -> None:
        """Check a plan before it runs.

        Raises:
            InvariantError: if the plan breaks a rule; the message names the rule, and the request or block.
        """
        for name, why in plan.failed.items():
            raise InvariantError(f"request {name!r} was promised a page, and {why}")
        total = sum(plan.num_tokens) + sum(plan.padding)
        if total > self._budget:
            raise InvariantError(
                f"over budget: the plan computes {total} tokens, the budget is {self._budget}"
            )
        names = [request.request_id for request in plan.requests]
        if len(names) > self._seats:
            raise InvariantError(f"over seats: the plan runs {len(names)} requests on {self._seats} seats")
        for name in names:
            if names.count(name) > 1:
                raise InvariantError(f"request {name!r} is in the plan twice")
        known = {request.request_id for request in (*self.scheduler.running, *self.scheduler.waiting)}
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            known.update(child.request_id for child in request.children)
        for name in self.scheduler.requests:
            if name not in known:
                raise InvariantError(f"forgotten request: {name!r} neither runs nor waits")
        self._idle = 0 if names or not self.scheduler.requests else self._idle + 1
        if self._idle >= _IDLE_STEPS:
            raise InvariantError(f"forgotten request: nothing ran for {_IDLE_STEPS} steps, though some wait")
        self._check_rows(plan)

    def _check_rows(self, plan: StepPlan) -> None:
        size = self.pool.block_size
        owners: dict[int, list[str]] = {}
        for name, table in self.pool.tables.items():
            for block in table:
                owners.setdefault(block, []).append(name)
        for row, (request, start, num_tokens) in enumerate(
            zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ):
            name = request.request_id
            # Children that start in this step share the blocks that their parent writes to.
            family = {name} | {
                plan.requests[child].request_id for child, parent in plan.forks.items() if parent == row
            }
            if num_tokens == 0:
                continue
            missing = len(request.token_ids) - start
            drafted = len(plan.drafts.get(row, ()))
            if drafted and num_tokens != missing + drafted:
                raise InvariantError(f"request {name!r} guesses before it has computed all that it knows")
            if start != request.num_computed_tokens or not 0 < num_tokens <= missing + drafted:
                raise InvariantError(
                    f"request {name!r} has computed {request.num_computed_tokens} of "
                    f"{len(request.token_ids)} tokens: it cannot compute {num_tokens} from {start} on"
                )
            table = self.pool.tables.get(name, [])
            if len(table) * size < start + num_tokens:
                raise InvariantError(
                    f"no page: request {name!r} computes token {start + num_tokens - 1} "
                    f"but its {len(table)} pages end at {len(table) * size}"
                )
            for block in table[start // size : (start + num_tokens - 1) // size + 1]:
                if not 0 <= block < self.pool.num_blocks:
                    raise InvariantError(f"block {block} of request {name!r} is not in the pool")
                others = [owner for owner in owners[block] if owner not in family]
                if others or owners[block].count(name) > 1:
                    raise InvariantError(
                        f"two owners: request {name!r} writes to block {block}, which request "
                        f"{(others or [name])[0]!r} holds as well"
                    )

    def check_record(self, record: StepRecord) -> None:
        """Check after a step that pool and books agree on each request's block table and on what is free.

        Raises:
            InvariantError: if they do not; the message names the rule, the request and the block.
        """
        step = f"step {record.step}"
        given_back = (*record.preempted, *((f.request_id, f.blocks) for f in record.finished))
        freed = [(block, name) for name, blocks in given_back for block in blocks]
        left = {*freed, *((old, name) for name, old, _ in record.copied)}  # (block, request) pairs that ended
        before = self._books.owners
        for name, blocks in record.taken:
            for block in blocks:
                holders = [holder for holder in before.get(block, ()) if (block, holder) not in left]
                if holders:
                    raise InvariantError(
                        f"{step}: block {block} was handed to request {name!r} while "
                        f"request {holders[0]!r} holds it"
                    )
        aborted = [finish for finish in record.finished if finish.reason == "abort"]
        self._check_returned(step, aborted)
        self._books.begin(record)
        self._check_returned(step, [finish for finish in record.finished if finish not in aborted])
        self._books.end(record)
        for name in self._books.tables.keys() | self.pool.tables.keys():
            ours, theirs = self._books.tables.get(name, []), self.pool.tables.get(name, [])
            if list(theirs) != ours:
                raise InvariantError(
                    f"{step}: request {name!r} should hold blocks {ours}, not {list(theirs)}"
                )
        for name in self._books.arrivals:
            if name not in self.scheduler.requests:
                raise InvariantError(f"{step}: forgotten request: {name!r} was not finished, but is gone")
        self._check_free(step, freed)

    def _check_returned(self, step: str, ends: Collection[Finish]) -> None:
        for request_id, _, blocks in ends:
            held = self._books.tables.get(request_id, [])
            if sorted(held) != sorted(blocks):
                raise InvariantError(
                    f"{step}: request {request_id!r} held blocks {held} and gave back {list(blocks)}"
                )

    def _check_free(self, step: str, freed: list[tuple[int, str]]) -> None:
        owned = {block for table in self._books.tables.values() for block in table}
        free, expected = self.pool.num_free, self.pool.num_blocks - len(owned)
        what = []
        if free != expected:
            rule = "double free" if free > expected else "leak"
            what.append(f"{rule}: {expected} blocks have no owner, but {free} count as free")
        try:
            check_pool(self.pool)
        except InvariantError as error:
            what.append(str(error))
        if what:
            gone = ", ".join(f"block {block} of request {name!r}" for block, name in freed[:3])
            what += [f"given back in this step: {gone}"] if gone else []
            raise InvariantError(f"{step}: " + "; ".join(what))


def check_pool(pool: BlockPool) -> None:
    """Check every rule of a pool. It is slow, so only tests and the auditor call it.

    Raises:
        InvariantError: if a rule is broken; the message names the rule, the block and the request.
    """
    counted = [0] * pool.num_blocks
    for request_id, table in pool.tables.items():
        if len(set(table)) != len(table):
            raise InvariantError(f"request {request_id!r} holds a block twice: {table}")
        for block in table:
            counted[block] += 1
    free, cached = set(pool.free), set(pool.cached)
    if len(free) != len(pool.free):
        twice = next(block for block in pool.free if pool.free.count(block) > 1)
        raise InvariantError(f"block {twice} is in the free list twice")
    for block, count in enumerate(counted):
        if count != pool.ref_counts[block]:
            raise InvariantError(
                f"block {block}: reference count {pool.ref_counts[block]}, but it is in {count} tables"
            )
        places = (count > 0) + (block in free) + (block in cached)
        if places != 1:
            raise InvariantError(f"block {block} is in {places} of: free, cached, owned")
        if count > 1 and block not in pool.key_of and block not in pool.forked:
            raise InvariantError(f"block {block} has {count} owners, but nobody shared it")
        if block in free and block in pool.key_of:
            raise InvariantError(f"block {block} is in the free list and in the prefix cache")
    if not (cached <= pool.key_of.keys() == pool.node_of.keys()):
        raise InvariantError("a block in the prefix cache has no place in the prefix tree")
    for block, key in pool.key_of.items():
        if pool.block_of.get(key) != block:
            raise InvariantError(f"block {block} is known by a key that leads elsewhere")
    if len(pool.block_of) != len(pool.key_of):
        raise InvariantError("the prefix tree holds a key without a block")
