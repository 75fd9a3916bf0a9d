"""What the next step would do: exactly what it then does, and nothing moves before."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
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
