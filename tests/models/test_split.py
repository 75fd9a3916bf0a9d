"""The parts of a model: together they are the whole, and each is a model of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.core.model import ModelShape
from labkit.models.architecture import shape_of
from labkit.models.errors import ModelError
from labkit.models.split import Part, part_of_tensors, parts
from tests.conftest import reference


def shape(**sizes: int) -> ModelShape:
    return replace(shape_of(reference("llama").config), **sizes)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A shape and a number of processes that heads can be shared out to."""
    kv_heads, group = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    world_size = draw(st.integers(1, kv_heads))
    if draw(st.booleans()):
        world_size = kv_heads * draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if group % n == 0]))
    sizes = dict(
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 64])),
        hidden_size=draw(st.sampled_from([48, 576])),
        intermediate_size=draw(st.integers(max(world_size, 8), 2000)),
        vocab_size=draw(st.integers(max(world_size, 2), 300)),
    )
    return shape(**sizes), world_size


@given(cuts())
def test_every_head_column_and_token_has_its_process(cut: tuple[ModelShape, int]) -> None:
    whole, world_size = cut
    found = parts(whole, world_size)
    assert [part.rank for part in found] == list(range(world_size))
    assert [i for part in found for i in part.heads] == list(range(whole.num_attention_heads))
    assert [i for part in found for i in part.columns] == list(range(whole.intermediate_size))
    assert [i for part in found for i in part.tokens][: whole.vocab_size] == list(range(whole.vocab_size))
    assert len({len(part.tokens) for part in found}) == 1  # so that their logits can be put side by side
    assert all(part.heads and part.columns for part in found)
    group = whole.num_attention_heads // whole.num_key_value_heads
    for part in found:  # each process has the keys of its queries, and in each the groups are alike
        assert {head // group for head in part.heads} == set(part.kv_heads)
        assert len(part.heads) % len(part.kv_heads) == 0


def test_columns_make_up_for_heads_that_cannot_be_shared_evenly() -> None:
    """SmolLM2-135M has 3 KV heads: of two processes, the first has two of them."""
    whole = shape(
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
    )

    def weights(part: Part) -> int:
        heads = 2 * len(part.heads) + 2 * len(part.kv_heads)
        return 576 * (64 * heads + 3 * len(part.columns))

    for world_size in (2, 3):
        loads = [weights(part) for part in parts(whole, world_size)]
        assert max(loads) / (sum(loads) / world_size) < 1.05


@pytest.mark.parametrize(("heads", "kv_heads", "world_size"), [(6, 2, 3), (6, 2, 4), (4, 4, 5), (9, 1, 2)])
def test_heads_that_cannot_be_cut_are_named(heads: int, kv_heads: int, world_size: int) -> None:
    whole = shape(num_attention_heads=heads, num_key_value_heads=kv_heads)
    with pytest.raises(ModelError, match=f"{world_size} does not divide {heads} heads over {kv_heads} KV"):
        parts(whole, world_size)


def test_more_processes_than_columns_are_refused() -> None:
    whole = shape(num_attention_heads=8, num_key_value_heads=8, intermediate_size=4)
    with pytest.raises(ModelError, match="tensor_parallel_size=8"):
        parts(whole, 8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_parts_of_tensors_put_together_are_the_tensors(family: str) -> None:
    model = reference(family)
    tensors = dict(model.state_dict())
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.randn(48)
    whole = shape_of(model.config)
    pieces = [dict(part_of_tensors(tensors.items(), whole, part)) for part in parts(whole, 2)]
    for name, tensor in tensors.items():
        own = [piece[name] for piece in pieces]
        if "norm" in name:
            assert all(torch.equal(piece, tensor) for piece in own)
        elif name.endswith("o_proj.bias"):  # which the sum over processes has once
            assert torch.equal(sum(own), tensor)
        else:
            axis = 1 if "o_proj" in name or "down_proj" in name else 0
            together = torch.cat(own, axis)
            assert torch.equal(together.narrow(axis, 0, tensor.shape[axis]), tensor)
            assert not together.narrow(
                axis, tensor.shape[axis], together.shape[axis] - tensor.shape[axis]
            ).any()


def test_a_tensor_of_another_shape_is_not_cut_to_fit() -> None:
    whole = shape_of(reference("llama").config)
    wrong = [("model.layers.0.mlp.down_proj.weight", torch.zeros(48, 81))]
    with pytest.raises(ValueError, match=r"down_proj.weight' has shape \(48, 81\), and 80"):
        list(part_of_tensors(wrong, whole, parts(whole, 2)[0]))
