"""The model of notebook 01 that has as many layers and hardly any weights."""

from __future__ import annotations

import pytest
import torch

from labkit.analysis.shapes import random_model
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.exercises.e01_overhead import hollow
from labkit.sampling_params import SamplingParams


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_has_as_many_layers_and_hardly_any_weights(dtype: str) -> None:
    real = random_model("SmolLM2-135M", dtype=dtype, device="cpu", say=None)
    empty = hollow(real)
    assert len(empty.module.layers) == len(real.module.layers) == 30
    assert empty.dtype == real.dtype == getattr(torch, dtype)
    weights, of_real = (sum(p.numel() for p in one.module.state_dict().values()) for one in (empty, real))
    assert weights < of_real / 50
    engine = Engine(EngineConfig(model=empty, num_blocks=8))
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.run()
    assert len(engine.outputs["0"].token_ids) == 4
