"""Other ways to compute the same products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.core.model import Transformer
from labkit.kernels import packed_linear
from labkit.models.architecture import build
from labkit.models.teacher_forcing import teacher_forced
from tests.conftest import loaded, reference

TOKENS = list(range(50))


def plain(family: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = reference(family)
    return build(model.config, model.state_dict().items(), dtype=dtype, device=torch.device("cpu"))


def assert_same(model: Transformer, family: str) -> None:
    want = teacher_forced(loaded(family).module, TOKENS)
    torch.testing.assert_close(teacher_forced(model, TOKENS), want, rtol=1e-4, atol=1e-4)
    one = teacher_forced(model, TOKENS[:1])  # a single row may take another way
    torch.testing.assert_close(one, want[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("also_packed", [False, True])
def test_split_projections_compute_the_same(family: str, also_packed: bool) -> None:
    model = plain(family)
    packed_linear.split(model)
    if also_packed and packed_linear.can_pack(model):
        packed_linear.pack(model)
    assert_same(model, family)
    assert isinstance(model.layers[1].self_attn.qkv_proj, packed_linear.SplitLinear)
    assert [len(w) for w in model.layers[0].self_attn.qkv_proj.weights] == [48, 16, 16]


def test_packed_weights_compute_the_same(family: str) -> None:
    model = plain(family)
    if not packed_linear.can_pack(model):
        pytest.skip("no oneDNN here")
    packed_linear.pack(model)
    assert_same(model, family)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_half_precision_is_packed_where_the_cpu_computes_in_it() -> None:
    assert not packed_linear.can_pack(plain("llama", torch.float16))
    model = plain("llama", torch.bfloat16)
    if not packed_linear.can_pack(model):
        pytest.skip("this CPU has no bf16")
    want = teacher_forced(model, TOKENS)
    packed_linear.pack(model)
    torch.testing.assert_close(teacher_forced(model, TOKENS), want, rtol=0.05, atol=0.2)
