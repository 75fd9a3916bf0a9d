"""Decode steps from recorded graphs equal eager ones, on a tape that stands in for CUDA (see `tape.py`)."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata, row_order
from labkit.core.kv_cache import PagedKVCache
from labkit.engine import Engine
from labkit.kernels import paged_decode
from labkit.kernels.backend import Backend
from labkit.kernels.cuda_graphs import DecodeGraphs, buckets
from labkit.kernels.gathered_sdpa import SDPA, gathered_rows
from labkit.kernels.paged_decode import paged_rows, static_paged_rows
from labkit.sampling_params import SamplingParams
from tests.conftest import VOCAB, greedy, loaded
from tests.kernels.tape import TapeCapture


def graphs_of(
    engine_or: Any, capture: TapeCapture, *, backend: Backend = SDPA, rows: int = 4, length: int = 512
) -> DecodeGraphs:
    model, cache = engine_or
    graphs = DecodeGraphs(
        model,
        cache,
        backend,
        max_num_seqs=rows,
        max_model_len=length,
        memory_limit=2**20,
        say=None,
        capture=capture,
    )
    graphs.warm_up()
    return graphs


def rows_of(lengths: list[int], size: int, num_blocks: int, seed: int) -> list[Span]:
    blocks = list(range(num_blocks))
    random.Random(seed).shuffle(blocks)
    rows = [Span(length - 1, 1, [blocks.pop() for _ in range(-(-length // size))]) for length in lengths]
    return [rows[i] for i in row_order(rows)]


def eagerly(family: str, cache: PagedKVCache, token_ids: list[int], rows: list[Span]) -> Tensor:
    model = loaded(family).module
    layout = build_metadata(rows, cache, SDPA, windows=model.windows)
    positions = torch.tensor([row.start for row in rows])
    return model(torch.tensor(token_ids), positions, cache, layout)


# -- the same as eager ----------------------------------------------------------------------------


def test_replays_equal_eager_steps_whatever_the_rows_lengths_and_tables(family: str) -> None:
    torch.manual_seed(0)
    model, size, num_blocks = loaded(family).module, 4, 80
    cache = model.kv_shape.new_cache(num_blocks, size)
    cache.blocks.normal_()
    graphs = graphs_of((model, cache), TapeCapture(), length=160)
    assert graphs.captured == [(n, width) for n in (1, 2, 4) for width in (10, 20, 40)]
    used = set()
    for seed, lengths in enumerate(
        ([1], [4, 1], [5, 4, 3], [40, 41, 39, 1], [120, 7], [3], [160], [64, 63, 65], [1, 1, 1, 1])
    ):
        rows = rows_of(lengths, size, num_blocks, seed)
        token_ids = [(7 * seed + i) % VOCAB for i in range(len(rows))]
        before = cache.blocks.clone()
        replayed = graphs.run(token_ids, rows)
        blocks, cache.blocks[:] = cache.blocks.clone(), before
        plain = eagerly(family, cache, token_ids, rows)
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
        # Live blocks are as an eager step leaves them: padding has written to the null block alone.
        torch.testing.assert_close(blocks[:, :-1], cache.blocks[:, :-1], rtol=1e-4, atol=1e-4)
        used.add(replayed.shape)
    assert used == {(n, 48) for n in (1, 2, 3, 4)}


def test_an_engine_with_graphs_answers_as_generate_does(family: str) -> None:
    engine = Engine(
        EngineConfig(loaded(family), max_num_seqs=4, max_num_batched_tokens=12, block_size=4, num_blocks=13)
    )
    capture = TapeCapture()
    engine.runner.graphs = graphs_of((engine.model.module, engine.runner.cache), capture, length=52)
    rng = random.Random(family)
    wanted = {}
    while len(wanted) < 9 or engine.has_unfinished:
        if len(wanted) < 9 and rng.random() < 0.5:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 4, 5, 17]))]
            params = SamplingParams(max_tokens=rng.choice([1, 9, 24]), temperature=0, ignore_eos=True)
            wanted[engine.add_request(prompt, params)] = greedy(family, prompt, params.max_tokens)
        engine.step()
    assert {name: engine.outputs[name].token_ids for name in wanted} == wanted
    decode = [step for step in engine.trace if set(step.num_tokens) == {1}]
    assert capture.replays == len(decode) > 20
    assert any(step.preempted for step in engine.trace)


def test_outputs_stay_when_another_graph_is_replayed() -> None:
    model = loaded("llama").module
    cache = model.kv_shape.new_cache(20, 4)
    graphs = graphs_of((model, cache), TapeCapture(), length=64)
    first = graphs.run([5, 6], rows_of([9, 3], 4, 20, 0))
    kept = first.clone()
    graphs.run([7, 8], rows_of([12, 4], 4, 20, 1))
    graphs.run([9], rows_of([2], 4, 20, 2))
    assert torch.equal(first, kept)


def test_the_tape_notices_what_a_graph_cannot_hold() -> None:
    model = loaded("llama").module
    cache = model.kv_shape.new_cache(20, 4)
    cache.blocks.normal_()

    def from_the_host(tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Any) -> Any:
        return gathered_rows(0, [Span(0, 1, [0])] * len(tables), cache, windows)[0]

    def waiting(tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Any) -> Any:
        return SDPA.static(tables[:, : int(lengths.max())], lengths, cache, windows)

    for static, what in ((from_the_host, "lift_fresh"), (waiting, "item")):
        backend = Backend("test", "", SDPA.decode, SDPA.chunks, static)
        with pytest.raises(AssertionError, match=f"{what} cannot be captured"):
            graphs_of((model, cache), TapeCapture(), backend=backend)

    longest = 1  # a Python number that changes between steps

    def frozen(tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Any) -> Any:
        return SDPA.static(tables, torch.full_like(lengths, longest), cache, windows)

    backend = Backend("test", "", SDPA.decode, SDPA.chunks, frozen)
    graphs = graphs_of((model, cache), TapeCapture(), backend=backend, length=64)
    longest = 9
    row = rows_of([9], 4, 20, 0)
    assert not torch.allclose(graphs.run([5], row), eagerly("llama", cache, [5], row), rtol=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel itself is captured")
def test_the_triton_backend_equals_plain_attention_under_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.kernels import flash_decoding

    kernel = _as_operator(flash_decoding.paged_decode)
    monkeypatch.setattr(flash_decoding, "paged_decode", kernel)
    monkeypatch.setattr(paged_decode, "_processors", lambda device: 4)  # so that rows are split
    backend = Backend("triton", "", paged_rows, SDPA.chunks, static_paged_rows)
    model = loaded("mistral").module  # which has a window
    cache = model.kv_shape.new_cache(80, 4)
    cache.blocks.normal_()
    graphs = graphs_of((model, cache), TapeCapture(), backend=backend, rows=2, length=160)
    assert graphs.captured == [(n, width) for n in (1, 2) for width in (10, 40)]
    for seed, lengths in enumerate(([5], [40, 41], [159], [4, 1])):
        rows = rows_of(lengths, 4, 80, seed)
        token_ids = [3 + seed] * len(rows)
        plain = eagerly("mistral", cache, token_ids, rows)
        torch.testing.assert_close(graphs.run(token_ids, rows), plain, rtol=1e-4, atol=1e-4)


def _as_operator(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel as one operator, which a tape can see."""

    @torch.library.custom_op("labkit_tests::paged_decode", mutates_args=())
    def operator(
        q: Tensor, blocks: Tensor, tables: Tensor, lengths: Tensor, scale: float, window: int, splits: int
    ) -> Tensor:
        return kernel(q, blocks, tables, lengths, scale=scale, window=window or None, splits=splits)

    @functools.wraps(kernel)
    def call(*tensors: Tensor, scale: float, window: int | None, splits: int) -> Tensor:
        return operator(*tensors, scale, window or 0, splits)

    return call


# -- which graphs there are -----------------------------------------------------------------------


def test_buckets_come_largest_first_and_reach_the_limits() -> None:
    assert buckets(1, 3, growth=4) == [(1, 3)]
    assert buckets(8, 512, growth=4) == [(n, w) for n in (8, 4, 2, 1) for w in (512, 128, 32, 8)]
    assert [n for n, _ in buckets(48, 1, growth=2)] == [48, 32, 24, 16, 12, 8, 4, 2, 1]
    for rows in range(1, 70):
        found = buckets(rows, 100, growth=2)
        assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
        assert found[0] == (rows, 100)


def test_recording_ends_at_the_memory_limit_and_says_so() -> None:
    model = loaded("llama").module
    cache = model.kv_shape.new_cache(40, 4)
    capture, lines = TapeCapture(cost=100), []
    graphs = DecodeGraphs(
        model,
        cache,
        SDPA,
        max_num_seqs=4,
        max_model_len=80,
        memory_limit=250,
        say=lines.append,
        capture=capture,
    )
    graphs.warm_up()
    assert graphs.captured == [(2, 20), (4, 10), (4, 20)]
    assert lines[0] == "Capturing 6 CUDA graphs of decode steps, for up to 4 requests of 80 tokens."
    assert lines[1].startswith("CUDA graphs have reached their limit")
    assert lines[2].startswith("Captured 3 CUDA graphs in ")
    row = rows_of([3], 4, 40, 0)
    assert graphs.run([1], row).shape == (1, 48)  # in a larger one
    assert graphs.run([1] * 5, row * 5) is None
    assert graphs.run([1], rows_of([81], 4, 40, 0)) is None


def test_without_any_graph_steps_run_eagerly() -> None:
    engine = Engine(EngineConfig(loaded("llama"), max_num_seqs=4, block_size=4, num_blocks=40))
    engine.runner.graphs = DecodeGraphs(
        engine.model.module,
        engine.runner.cache,
        SDPA,
        max_num_seqs=4,
        max_model_len=80,
        memory_limit=0,
        say=None,
        capture=TapeCapture(),
    )
    engine.runner.graphs.warm_up()
    assert engine.runner.graphs.captured == []
    name = engine.add_request([1, 2, 3], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert engine.outputs[name].token_ids == greedy("llama", [1, 2, 3], 6)
