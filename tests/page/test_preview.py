"""What the next step would do: exactly what it then does, and nothing moves before."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.offload.pool import _PLAIN
from labkit.sampling_params import SamplingParams

PLANNED = ("step", "requests", "kinds", "starts", "num_tokens", "padding", "arrived", "admitted", "preempted")
ALSO = ("taken", "copied", "evicted")


def state_of(engine: Engine) -> dict[str, Any]:
    pool, scheduler = engine.pool, engine.scheduler
    return copy.deepcopy(
        {
            "pool": {name: value for name, value in vars(pool).items() if name != "cached"},
            "cached": list(pool.cached),
            "requests": [
                {
                    slot: getattr(request, slot)
                    for slot in ("status", "num_computed_tokens", "token_ids", "capacity")
                }
                for request in scheduler.requests.values()
            ],
            "running": [request.request_id for request in scheduler.running],
            "waiting": [request.request_id for request in scheduler.waiting],
            "arrived": scheduler.changes.arrived,
        }
    )


def flat(kind: type) -> type:
    """A kind of list or dictionary that refuses to be copied one by one."""

    def refuse(self: Any, memo: dict[int, Any]) -> Any:
        raise AssertionError("copied number by number")

    return type(f"Flat{kind.__name__}", (kind,), {"__deepcopy__": refuse})


def test_a_preview_of_a_large_pool_copies_no_number_by_itself(model: LoadedModel) -> None:
    """Of 20,000 pages, most in the prefix cache: one by one, they took a tenth of a second."""
    engine = Engine(EngineConfig(model=model, num_blocks=20_000, block_size=1, max_num_batched_tokens=512))
    for i in range(40):
        prompt = [(i + 7 * at * at) % 97 for at in range(400)]
        engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
    for _ in range(30):
        engine.step()
    assert len(engine.pool.cached) > 5000 and engine.has_unfinished
    before, pool = state_of(engine), engine.pool
    kinds = {name: type(getattr(pool, name)) for name in _PLAIN}
    for name, kind in kinds.items():
        setattr(pool, name, flat(kind)(getattr(pool, name)))
    plan = engine.preview()
    for name, kind in kinds.items():
        setattr(pool, name, kind(getattr(pool, name)))
    assert state_of(engine) == before
    assert engine.step().taken == plan.taken


class Page:
    """A page as an object, in a pool of one's own, which a look ahead must not touch."""

    def __init__(self, number: int) -> None:
        self.number, self.taken = number, 0


class OwnPool(BlockPool):
    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.forked = [Page(number) for number in range(num_blocks)]  # a name that the pool has, too

    def _take(self) -> int:
        block = super()._take()
        self.forked[block].taken += 1
        return block

    def _drop(self, block: int, request_id: str) -> None:
        self.ref_counts[block] -= 1
        if not self.ref_counts[block]:
            self.free.append(block)


def test_a_preview_leaves_the_objects_of_a_learners_pool_alone(model: LoadedModel) -> None:
    config = EngineConfig(model=model, num_blocks=24, block_size=4, enable_prefix_caching=False)
    engine = Engine(config, pool=OwnPool)
    engine.add_request([5] * 9, SamplingParams(max_tokens=3, ignore_eos=True))
    assert engine.preview().taken
    assert not any(page.taken for page in engine.pool.forked)


@pytest.mark.parametrize("scheduler", ["continuous", "static", "naive"])
@pytest.mark.parametrize("kv_policy", ["paged", "reserved"])
def test_a_preview_is_the_step_that_follows(model: LoadedModel, scheduler: str, kv_policy: str) -> None:
    engine = Engine(
        EngineConfig(
            model=model, num_blocks=24, block_size=4, max_num_seqs=4, max_num_batched_tokens=16,
            scheduler=scheduler, kv_policy=kv_policy,
        )
    )  # fmt: skip
    for i in range(8):
        engine.add_request("the same start " * (1 + i % 3), SamplingParams(max_tokens=20, ignore_eos=True))
    engine.add_request(
        "two answers", SamplingParams(max_tokens=6, n=2, temperature=1.0, seed=1, ignore_eos=True)
    )
    while engine.has_unfinished:
        if len(engine.trace) == 5:
            engine.abort("3")
        before = state_of(engine)
        preview = engine.preview()
        assert state_of(engine) == before
        record = engine.step()
        for name in (*PLANNED, *ALSO):
            assert getattr(preview, name) == getattr(record, name), (record.step, name)
        assert preview.sampled == ((),) * len(record.requests)
        aborted = [finish for finish in record.finished if finish.reason == "abort"]
        assert list(preview.finished) == aborted
    if (scheduler, kv_policy) == ("continuous", "paged"):
        assert any(record.preempted for record in engine.trace), "this run should have been short of pages"


def test_without_anything_to_do_a_preview_is_empty(model: LoadedModel) -> None:
    preview = Engine(EngineConfig(model=model, num_blocks=8)).preview()
    assert preview.requests == () and preview.blocked is None and preview.free_blocks == 8
