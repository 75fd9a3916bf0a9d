"""PyTorch has several kernels behind one name, and each lays its result out in its own way: all will do.

The layouts stand for the kernels that a CPU does not have: a GPU's memory-efficient kernel, say, answers in
the order of tokens, and the formula (MATH), which a T4 takes for bf16, in the order of heads.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.config import EngineConfig
from labkit.core.attention import Span, attend, build_metadata, reference_attention, row_order
from labkit.core.kv_cache import KVShape
from labkit.engine import Engine
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.warmup import warm_up
from labkit.models.adapter import adapt
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import SamplingParams
from tests.conftest import VOCAB, greedy, loaded, reference
from tests.kernels.paged import DEVICE, filled
from tests.kernels.tape import TapeCapture

KERNELS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]  # those of a CPU
ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)]  # of an answer's dimensions in memory
Attention = Callable[..., Tensor]


def laid_out(order: tuple[int, ...]) -> Attention:
    """Attention whose answer lies in memory in this order of its dimensions."""
    original = F.scaled_dot_product_attention

    def call(*args: Any, **kwargs: Any) -> Tensor:
        out = original(*args, **kwargs)
        return out.permute(order).contiguous().permute([order.index(place) for place in range(4)])

    return call


def answer(engine: Engine, family: str) -> None:
    """Check requests of all kinds, some of which join as others run, against `generate`."""
    rng = random.Random(11)
    wanted: dict[str, list[int]] = {}
    while len(wanted) < 7 or engine.has_unfinished:
        if len(wanted) < 7 and rng.random() < 0.5:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 19, 40]))]
            prompt *= rng.choice([1, 2])  # a text that repeats is drafted
            params = SamplingParams(max_tokens=rng.choice([1, 9, 20]), temperature=0, ignore_eos=True)
            wanted[engine.add_request(prompt, params)] = greedy(family, prompt, params.max_tokens)
        engine.step()
    assert {name: engine.outputs[name].token_ids for name in wanted} == wanted


def engine_of(model: LoadedModel, **settings: Any) -> Engine:
    config = dict(max_num_seqs=4, max_num_batched_tokens=24, block_size=4, num_blocks=60) | settings
    return Engine(EngineConfig(model, **config), say=None)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("speculative", [None, "ngram"])
def test_every_kernel_gives_the_tokens_of_generate(
    family: str, kernel: SDPBackend, speculative: str | None
) -> None:
    with sdpa_kernel([kernel]):
        answer(engine_of(loaded(family), speculative=speculative, speculative_gate=False), family)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("speculative", [None, "ngram"])
def test_every_layout_of_an_answer_will_do(
    family: str, order: tuple[int, ...], speculative: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(loaded(family), speculative=speculative, speculative_gate=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out(order))
    answer(engine, family)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_model_that_transformers_runs_takes_every_layout(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference("llama")
    adapted = LoadedModel("llama", adapt(model), tiny_tokenizer(), model.config, frozenset())
    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out(order))
    answer(engine_of(adapted), "llama")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_graphs_are_recorded_with_every_kernel(family: str, kernel: SDPBackend) -> None:
    engine, capture = engine_of(loaded(family)), TapeCapture()
    module = engine.model.module
    with sdpa_kernel([kernel]):
        cache, graphs = warm_up(module, SDPA, engine.config, 60, say=None, capture=capture)
        engine.runner.cache, engine.runner.graphs = cache, graphs
        answer(engine, family)
    assert capture.replays > 5


HALVES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS = [Span(20, 1, [5, 0]), Span(3, 1, [2]), Span(9, 5, [3]), Span(14, 29, [4, 1, 6]), Span(0, 20, [7, 8])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("window", [None, 6])
def test_every_kernel_computes_the_reference_in_every_dtype(
    kernel: SDPBackend, dtype: torch.dtype, window: int | None
) -> None:
    torch.manual_seed(4)
    rows = [ROWS[i] for i in row_order(ROWS)]
    cache = filled(rows, 9, 16, 2, 8, dtype)
    cache.blocks.nan_to_num_(0)
    q = torch.randn(56, 6, 8, device=DEVICE).to(dtype)
    metadata = build_metadata(rows, cache, SDPA, windows=[window])
    with sdpa_kernel([kernel]):
        out = attend(q, cache, 0, metadata, scale=0.3, window=window)
    plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)
    torch.testing.assert_close(out, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1, 4, 11, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)  # in fp32, a CPU computes most rows without this kernel
def test_no_call_makes_the_memory_efficient_kernel_copy_its_mask(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes masks whose rows begin at multiples of 16 elements, and copies others, in every layer."""
    shapes = [(20, 1), (3, 1), (9, 5), (14, 5), (14, 29), (0, 20)]
    blocks = iter(range(1000))
    rows = [Span(at, n, [next(blocks) for _ in range(-(-(at + n) // size))]) for at, n in shapes]
    rows = [rows[i] for i in row_order(rows)]
    cache = KVShape(2, 2, 8, dtype, DEVICE).new_cache(next(blocks), size)
    q = torch.randn(sum(row.num_queries for row in rows), 6, 8, device=DEVICE).to(dtype)
    masks: list[Tensor] = []
    original = F.scaled_dot_product_attention

    def look(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.extend([attn_mask] if attn_mask is not None else [])
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    metadata = build_metadata(rows, cache, SDPA, windows=[None, 6])
    for layer, window in ((0, None), (0, 6), (1, None), (1, 6)):
        attend(q, cache, layer, metadata, scale=0.3, window=window)
    for mask in masks:
        assert mask.stride(-1) == 1
        assert all(
            step % 16 == 0 for step, n in zip(mask.stride()[:-1], mask.shape[:-1], strict=True) if n > 1
        )
    assert len(masks) == 14 and len({mask.data_ptr() for mask in masks}) == 7  # once for all layers
