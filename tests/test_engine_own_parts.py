"""A scheduler or a pool of one's own runs, and a rule that it breaks is named at its step."""

from __future__ import annotations

import pytest
from conftest import greedy, loaded

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.scheduler import Scheduler


def run_with(scheduler: type[Scheduler] | None = None, pool: type[BlockPool] | None = None) -> Engine:
    config = EngineConfig(
        model=loaded("llama"), block_size=4, num_blocks=30, max_num_seqs=3, max_num_batched_tokens=16
    )
    engine = Engine(config, scheduler=scheduler, pool=pool)
    for i in range(5):
        engine.add_request([i + 1] * 9, SamplingParams(max_tokens=8))
    for _ in range(1100):
        if not engine.has_unfinished:
            break
        engine.step()
    return engine


class ShortestFirst(Scheduler):
    """A policy of one's own: whoever has the shortest prompt goes first."""

    def add(self, request) -> None:
        request.priority = request.num_prompt_tokens
        super().add(request)


class GivesTwice(BlockPool):
    def allocate(self, request_id, count):
        blocks = super().allocate(request_id, count)
        if len(self.tables) == 2:
            self.free.append(blocks[0])
        return blocks


class Refuses(BlockPool):
    def allocate(self, request_id, count):
        if self.tables.keys() - {request_id}:
            raise OutOfBlocks("not today")
        return super().allocate(request_id, count)


class FreesTwice(BlockPool):
    def release(self, request_id):
        table = super().release(request_id)
        self.free.append(table[0])
        return table


class Leaks(BlockPool):
    def release(self, request_id):
        table = super().release(request_id)
        (self.free or list(self.cached)).pop()
        if not self.free:
            self.cached.popitem()
        return table


class OverBudget(Scheduler):
    def schedule(self):
        self.max_num_batched_tokens = 27
        return super().schedule()


class OverSeats(Scheduler):
    def schedule(self):
        self.max_num_seqs = 4
        return super().schedule()


class Forgets(Scheduler):
    def schedule(self):
        plan = super().schedule()
        if len(self.running) > 2:
            self.running.pop()
        return plan


class Loses(Scheduler):
    def schedule(self):
        if len(self.waiting) and self.waiting.peek().request_id == "4":
            self.waiting.remove(self.requests.pop("4"))
        return super().schedule()


class Sleeps(Scheduler):
    def plan_waiting(self, plan, budget) -> None:
        return None


class Skips(Scheduler):
    def schedule(self):
        plan = super().schedule()
        if plan.starts and plan.starts[0] > 9:
            plan.starts[0] -= 1
        return plan


def test_a_policy_of_ones_own_runs_and_is_right() -> None:
    engine = run_with(scheduler=ShortestFirst)
    for i in range(5):
        assert engine.outputs[str(i)].token_ids == greedy("llama", [i + 1] * 9, 8)


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(pool=GivesTwice), r"step 0: double free: .*block \d+ is in 2 of: free, cached, owned"),
        (dict(pool=FreesTwice), r"double free: .*block 0 of request '0'"),
        (dict(pool=Leaks), r"step \d+: leak: .*given back in this step: block 0 of request '0'"),
        (dict(pool=Refuses), r"request '1' was promised a page, and the pool gave it no page: not today"),
        (dict(scheduler=OverBudget), r"over budget: the plan computes 27 tokens, the budget is 16"),
        (dict(scheduler=OverSeats), r"over seats: the plan runs 4 requests on 3 seats"),
        (dict(scheduler=Forgets), r"forgotten request: '\d' neither runs nor waits"),
        (dict(scheduler=Loses), r"step \d+: forgotten request: '4' was not finished, but is gone"),
        (dict(scheduler=Sleeps), r"forgotten request: nothing ran for 1000 steps"),
        (dict(scheduler=Skips), r"request '0' has computed \d+ of \d+ tokens: it cannot compute 1 from \d+"),
    ],
)
def test_a_broken_rule_is_caught_at_its_step_by_name(parts: dict, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        run_with(**parts)
