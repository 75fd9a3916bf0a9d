"""Continuous batching, without a model: who runs in which step, with which blocks, and why."""

from __future__ import annotations

import itertools

import pytest

from labkit.core.block_pool import OutOfBlocks
from tests.core.scheduler_bench import Bench


def test_a_block_that_was_copied_and_freed_may_come_back_in_the_same_step() -> None:
    bench = Bench(blocks=10, size=2, seats=3, budget=4, caching=False)
    bench.add([0], 4, n=2)  # both answers share the block in which the prompt ends
    bench.step()
    allocate, calls = bench.pool.make_writable, itertools.count()

    def failing(request_id: str, index: int) -> tuple[int, int] | None:
        if next(
            calls
        ):  # the first answer gets a copy; the second finds no block, ends, and frees the old one
            raise OutOfBlocks("made up")
        return allocate(request_id, index)

    bench.pool.make_writable = failing
    record = bench.step(drafts=1)  # the draft of the first takes that block again
    assert record.copied[0].old in record.taken[0].blocks


def test_a_request_added_while_others_run_joins_at_the_next_step() -> None:
    bench = Bench()
    first = bench.add(3, 10)
    bench.step()
    bench.step()
    late = bench.add([0] * 5, 10)  # no prefix to share
    record = bench.step()
    assert record.requests == (first, late)
    assert record.kinds == "dp"
    assert record.num_tokens == (1, 5)


def test_prompts_are_chunked_and_never_stop_decode() -> None:
    bench = Bench(blocks=60, budget=6)
    first = bench.add(2, 20)
    bench.step()
    bench.add(30, 2)
    records = [bench.step() for _ in range(8)]
    assert all(record.requests[0] == first and record.kinds[0] == "d" for record in records)
    assert [record.num_tokens[1] for record in records[:6]] == [5] * 6
    assert records[0].kinds == "dc"
    assert records[5].sampled[1] == (1,)  # the last chunk samples


def test_first_come_first_served_and_priorities_before_that() -> None:
    bench = Bench(seats=1, blocks=40)
    names = [bench.add(3, 2, priority=priority) for priority in (0, 0, -1, 1)]
    bench.drain()
    assert bench.admissions == [names[2], names[0], names[1], names[3]]


def test_a_changed_priority_moves_a_request_in_the_queue() -> None:
    bench = Bench(seats=1, blocks=40)
    names = [bench.add(3, 2) for _ in range(4)]
    bench.step()
    bench.scheduler.set_priority(names[3], -5)
    assert [r.request_id for r in bench.scheduler.waiting] == [names[3], names[1], names[2]]
    record = bench.step()
    assert bench.trace.why(names[0], record.step) == "request 0 is not in the engine"
    assert not bench.scheduler.set_priority("nobody", 1)
    bench.drain()
    assert bench.admissions == [names[0], names[3], names[1], names[2]]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    bench = Bench(blocks=6, size=2, seats=3, caching=False)
    old, new = bench.add(4, 8), bench.add(3, 6)
    bench.step()
    later = bench.add(8, 2)
    preempted = [name for _ in range(9) for name, _ in bench.step().preempted]
    assert preempted == [new]
    bench.drain()
    assert bench.admissions == [old, new, new, later]


def test_a_request_that_waits_for_blocks_is_looked_at_again_once_they_can_be_shared() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=24)
    prompt = list(range(48))
    bench.add(prompt, 9)
    bench.add(prompt, 9)
    first = bench.step()
    assert first.blocked == ("1", "the token budget of 24 is used up")
    second = bench.step()  # the blocks of the first are full now, but not yet known
    assert not second.admitted
    assert bench.step().admitted[0].num_cached_tokens == 44


def test_reserved_takes_the_whole_maximum_and_never_preempts() -> None:
    bench = Bench(blocks=12, size=4, policy="reserved")
    for _ in range(6):
        bench.add(5, 12)
    record = bench.step()
    assert [len(taken.blocks) for taken in record.taken] == [4, 4, 4]  # 5 + 12 - 1 tokens each
    bench.drain()
    assert not any(record.preempted for record in bench.trace)


def test_a_request_that_could_never_fit_is_refused_at_once() -> None:
    bench = Bench(blocks=4, size=4)
    bench.add(10, 7)  # 16 tokens to store: the last is never written
    with pytest.raises(
        ValueError, match=r"may need 5 pages .* the pool has 4: lower max_tokens, or raise num"
    ):
        bench.add(10, 8)
    bench.drain()


def test_n_shares_the_prompt_and_copies_the_tail_on_the_first_write() -> None:
    bench = Bench(blocks=20, size=4, seats=4, budget=12)
    bench.add(10, 4, n=3)
    record = bench.step()
    assert record.requests == ("0", "0.1", "0.2")
    assert record.sampled == ((1,), (1,), (1,))
    assert bench.pool.num_blocks - bench.pool.num_free == 3
    record = bench.step()
    assert [(copy.request_id, copy.old) for copy in record.copied] == [("0", 2), ("0.1", 2)]
    assert bench.pool.num_blocks - bench.pool.num_free == 5
    bench.drain()


def test_children_start_when_a_single_token_of_the_prompt_was_left() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=3)
    bench.add(4, 4, n=2)
    assert [bench.step().requests for _ in range(2)] == [("0",), ("0", "0.1")]
    bench.drain()


def test_more_answers_than_seats_still_all_come() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=12)
    bench.add(9, 4, n=5)
    bench.drain()
    assert sorted(bench.admissions) == ["0", "0.1", "0.2", "0.3", "0.4"]
    cached = {a.request_id: a.num_cached_tokens for record in bench.trace for a in record.admitted}
    assert cached["0.1"] == 9  # a fork
    assert cached["0.4"] == 8  # full blocks through the prefix cache


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs \(5\) must not exceed max_num_batched_tokens \(4\)"):
        Bench(seats=5, budget=4)
    bench = Bench()
    bench.add(3)
    bench.count = 0
    with pytest.raises(ValueError, match="request_id '0' is already in use"):
        bench.add(3)


def test_drafts_take_blocks_for_a_step_and_give_back_those_of_the_wrong_ones() -> None:
    bench = Bench(blocks=10, size=4, seats=2, budget=12)
    bench.add(6, max_tokens=20)
    bench.step()  # the prompt, and a first token
    record = bench.step(drafts=8, right=2)
    assert (record.num_tokens, record.drafted, record.sampled) == ((9,), ((1,) * 8,), ((1, 1, 1),))
    assert record.kinds == "d"
    request = bench.scheduler.requests["0"]
    assert (request.num_computed_tokens, len(request.token_ids)) == (9, 10)
    assert [len(taken.blocks) for taken in record.taken] == [2]  # tokens 6 to 14 lie in blocks 1 to 3
    assert [(name, len(blocks)) for name, blocks in record.returned] == [("0", 1)]
    assert bench.trace.state(1).computed["0"] == 15
    assert bench.trace.state(1, after=True).computed["0"] == 9
    assert (record.total_drafted, record.total_accepted) == (8, 2)
    bench.drain()


def test_drafts_never_cost_anybody_a_token_a_block_or_a_seat() -> None:
    bench = Bench(blocks=6, size=4, seats=3, budget=3)
    bench.add(3, max_tokens=12)
    bench.add(3, max_tokens=12)
    for _ in range(3):
        bench.step()
    tight = bench.step(drafts=5, right=5)
    assert sum(tight.num_tokens) == 3, "both decode, and one token is left of the budget"
    assert not tight.preempted
    bench.drain()


def test_nothing_is_published_before_it_is_accepted() -> None:
    bench = Bench(blocks=20, size=4, seats=2, budget=20)
    bench.add(6, max_tokens=20)
    bench.step()
    record = bench.step(drafts=8, right=0)
    assert len(record.published) == 0, "of the second block a single token is the answer's"
    record = bench.step(drafts=8, right=8)
    assert len(record.published) == 3, "tokens 4 to 15"
    bench.drain()


def test_a_tail_that_all_answers_share_costs_one_block_less_than_they_are() -> None:
    bench = Bench(blocks=4, size=4, seats=3, budget=12, caching=False)
    bench.add([1, 2, 3, 4, 5, 6], 2, n=3)  # two blocks, the second half full: two copies, and two blocks free
    bench.step()
    record = bench.step()
    assert not record.preempted
    assert [copy.old for copy in record.copied] == [1, 1]
    bench.drain()
