"""A scheduler or a pool of one's own runs, and a rule that it breaks is named at its step."""

from __future__ import annotations

import random

import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from tests.conftest import greedy, loaded
from tests.engines import drain, random_prompt


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
    """A policy of one's own: the shortest prompt goes first."""

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


# -- a scheduler of one's own, made of the building blocks ----------------------------------------


class PromptsFirst(Scheduler):
    """Admits whenever it can; answers go on in the steps in which nobody is admitted."""

    def schedule(self) -> StepPlan:
        self.end_aborted()
        plan = StepPlan(held_back=self.held_back)
        self.plan_waiting(plan, self.max_num_batched_tokens)
        if not plan.requests:
            self.plan_running(plan)
            if (head := self.waiting.peek()) is not None:
                plan.blocked = (head.request_id, "answers go on")
        return plan


class ChunksBeforeDecode(Scheduler):
    """The order of `plan_running` turned round: answers get what the prompts leave of the budget."""

    def schedule(self) -> StepPlan:
        self.end_aborted()
        plan = StepPlan(held_back=self.held_back)
        decoding = [r for r in self.running if len(r.token_ids) - r.num_computed_tokens == 1]
        # Blocks come first, so that nobody is preempted who is in the plan already.
        self.grow(plan, [r for r in decoding if r.num_computed_tokens >= r.capacity or r.shares_tail])
        budget = self.max_num_batched_tokens
        for request in sorted(self.running, key=lambda r: r in decoding):
            if budget:
                budget -= self.plan_row(plan, request, budget)
        self.plan_waiting(plan, budget)
        return plan


class OneAtATime(Scheduler):
    """Admits at most one request in a step, and runs the newest first."""

    def schedule(self) -> StepPlan:
        self.running.reverse()
        return super().schedule()

    def try_admit(self, plan: StepPlan, request: Request, budget: int) -> str | None:
        if plan.admitted:
            return "one was admitted in this step already"
        return super().try_admit(plan, request, budget)


class ShortestPromptFirst(Scheduler):
    """Admits the shortest prompt of those that wait, past the order of the queue."""

    def plan_waiting(self, plan: StepPlan, budget: int) -> None:
        for request in sorted(self.waiting, key=lambda r: r.num_prompt_tokens):
            if reason := self.try_admit(plan, request, budget):
                plan.blocked = (self.waiting.peek().request_id, reason)
                return
            budget -= self.plan_row(plan, request, budget)


@pytest.mark.parametrize("policy", [PromptsFirst, ChunksBeforeDecode, OneAtATime, ShortestPromptFirst])
@pytest.mark.parametrize("num_blocks", [16, 60])
def test_the_building_blocks_in_another_order_give_the_same_tokens(
    policy: type[Scheduler], num_blocks: int
) -> None:
    rng = random.Random(3)
    jobs = [
        (random_prompt(rng, rng.randint(1, 30)), SamplingParams(max_tokens=rng.randint(1, 20)))
        for _ in range(8)
    ]
    hot = SamplingParams(max_tokens=12, temperature=1.0, seed=4, n=3)
    config = EngineConfig(
        model=loaded("llama"),
        block_size=4,
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_num_batched_tokens=9,
    )
    traces, answers = [], []
    for scheduler in (policy, None):
        engine = Engine(config, scheduler=scheduler)
        for prompt, params in jobs:
            engine.add_request(prompt, params)
            engine.step()
        engine.add_request(jobs[0][0][:7], hot, request_id="hot")
        engine.add_request([1, 2, 3], SamplingParams(max_tokens=30), request_id="gone")
        engine.step()
        assert engine.abort("gone")
        drain(engine)
        assert engine.outputs.pop("gone").finish_reason == "abort"
        answers.append({name: output.token_ids for name, output in engine.outputs.items()})
        traces.append(list(engine.trace))
    assert answers[0] == answers[1]
    assert [answers[0][str(i)] for i in range(8)] == [greedy("llama", p, q.max_tokens) for p, q in jobs]
    assert traces[0] != traces[1], "another policy takes other steps"
    assert any(record.preempted for record in traces[0]) == (num_blocks == 16)


class LongestLast(Scheduler):
    """Two lines say another order: short requests first, and the longest gives up its blocks."""

    def order(self, request: Request) -> tuple[int, ...]:
        return (len(request.token_ids),)

    def victim(self) -> Request:
        return max(self.running, key=self.order)


def test_an_order_of_ones_own_rules_the_queue_and_the_victims_and_its_reasons_are_true() -> None:
    config = EngineConfig(
        model=loaded("llama"), block_size=4, num_blocks=16, max_num_seqs=3, max_num_batched_tokens=32
    )
    prompts = {str(length): [7] * length for length in (20, 3, 14, 8, 5, 11)}
    engine = Engine(config, scheduler=LongestLast)
    for name, prompt in prompts.items():
        engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True), request_id=name)
    drain(engine)
    admitted = [admission.request_id for record in engine.trace for admission in record.admitted]
    assert admitted[:3] == ["3", "5", "8"]
    assert {finish.request_id for record in engine.trace for finish in record.finished} == prompts.keys()
    preempted = [name for record in engine.trace for name, _ in record.preempted]
    assert preempted, "the pool was to be too small"
    for record in engine.trace:
        for name, _ in record.preempted:  # it was the longest of those that ran
            state = engine.trace.state(record.step - 1)
            assert state.computed[name] == max(state.computed[other] for other in state.tables)
        if record.blocked:
            assert record.blocked[1] not in ("the scheduler gave no reason",)
            assert "joined the queue when" not in record.blocked[1]
    for name, prompt in prompts.items():
        assert engine.outputs[name].token_ids == greedy("llama", prompt, 12)


class PreemptsThePlanned(Scheduler):
    def schedule(self) -> StepPlan:
        plan = super().schedule()
        if len(plan.requests) > 1:
            self.preempt(plan, plan.requests[0])
        return plan


def test_to_preempt_what_is_planned_already_is_an_error_that_says_so() -> None:
    with pytest.raises(InvariantError, match=r"request '\d' is planned already: preempt it before"):
        run_with(PreemptsThePlanned)


class Continues(Scheduler):
    """Overrides nothing: a class of one's own."""


def test_a_scheduler_of_ones_own_admits_whole_prompts_without_chunked_prefill() -> None:
    config = EngineConfig(
        model=loaded("llama"), block_size=4, num_blocks=40, max_num_seqs=3, max_num_batched_tokens=16,
        enable_chunked_prefill=False,
    )  # fmt: skip
    engine = Engine(config, scheduler=Continues)
    for i in range(4):
        engine.add_request([i + 1] * 11, SamplingParams(max_tokens=5))
    drain(engine)
    kinds = [set(record.kinds) for record in engine.trace if record.kinds]
    assert {"p"} in kinds and {"d"} in kinds
    assert all(len(kind) == 1 for kind in kinds), "a prompt and an answer in one step"
    with pytest.raises(ValueError, match="enable_chunked_prefill must be True for a scheduler that is not a"):
        Engine(config, scheduler=lambda *args, **limits: Continues(*args, **limits))


def test_a_request_made_by_hand_runs_without_text() -> None:
    engine = Engine(EngineConfig(model=loaded("llama"), block_size=4, num_blocks=30))
    request = Request("mine", [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add(request)
    engine.run()
    output = engine.outputs["mine"]
    assert output.token_ids == request.output_token_ids == greedy("llama", [1, 2, 3], 3)
    assert (output.text, output.finish_reason) == ("", "length")


class FailsToRead:
    text = ""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def push(self, token: int) -> bool:
        self.left -= 1
        if not self.left:
            raise UnicodeError("no such character")
        return False

    def finish(self) -> bool:
        return False


def test_a_reader_that_fails_ends_its_own_request_alone() -> None:
    engine = Engine(EngineConfig(model=loaded("llama"), block_size=4, num_blocks=30))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for name, nth in (("a", 99), ("b", 3), ("c", 99)):
        engine.add(Request(name, [5, 6, 7], params, reader=FailsToRead(nth)))
    engine.run()
    ends = {name: output.finish_reason for name, output in engine.outputs.items()}
    assert ends == {"a": "length", "b": "error", "c": "length"}
    assert engine.outputs["b"].error == "UnicodeError: no such character"
    assert len(engine.outputs["b"].token_ids) == 3
    assert engine.pool.num_free == engine.pool.num_blocks
