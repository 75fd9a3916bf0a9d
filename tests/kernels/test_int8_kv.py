"""A KV cache in 8 bits: how far off it is, that all kernels read it alike, and what an engine makes of it."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import Engine, SamplingParams, engine
from labkit.core.attention import Span, attend, build_metadata, reference_attention
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.kernels.cpu.attention import IN_PLACE
from labkit.kernels.cuda_graphs import DecodeGraphs
from labkit.kernels.gathered_sdpa import SDPA, block_table
from labkit.kernels.int8_kv import Int8KVCache, dequantize, in_int8, kv_shape, quantize, read_tokens
from labkit.kernels.probe import why_not_triton
from labkit.models.architecture import build
from labkit.models.load import LoadedModel
from labkit.models.teacher_forcing import teacher_forced
from labkit.models.tiny import tiny_tokenizer
from labkit.speculative.speculator import acceptance
from tests.conftest import SIZES, fused, loaded
from tests.engines import drain, engine_of, play, random_prompt
from tests.kernels.cpu.compiled import needs_compiler
from tests.kernels.cpu.test_attention import mixed_rows
from tests.kernels.paged import DEVICE, needs_triton, rows_of
from tests.kernels.tape import TapeCapture
from tests.models import test_adapter
from tests.speculative.drafting import repetitive

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def shape_of(dim: int, dtype: torch.dtype = torch.float32, kv_heads: int = 2, layers: int = 1) -> KVShape:
    return KVShape(layers, kv_heads, dim, dtype, CPU)


def written(shape: KVShape, num_blocks: int, size: int) -> tuple[PagedKVCache, PagedKVCache]:
    """A cache in 8 bits with keys and values in every place, and one that holds what it gives back."""
    cache, plain = in_int8(shape).new_cache(num_blocks, size), shape.new_cache(num_blocks, size)
    places = torch.arange(num_blocks * size, device=shape.device)
    slots = cache.slots(places // size, places % size)
    kv = torch.randn(2, len(places), shape.num_kv_heads, shape.head_dim, device=shape.device)
    k, v = kv.to(shape.dtype)
    cache.write(0, k, v, slots)
    plain.blocks.copy_(dequantize(cache.blocks, shape.dtype))
    return cache, plain


# -- rounding -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 9),
    dim=st.integers(1, 24).map(lambda n: 4 * n),
    power=st.integers(-30, 30),
    dtype=st.sampled_from(FLOATS),
)
def test_no_number_is_off_by_more_than_half_a_scale(
    seed: int, rows: int, dim: int, power: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, dim) * 2.0**power).clamp(-6e4, 6e4).to(dtype)
    x[rows // 2] = 0
    numbers, scales = quantize(x)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.float32
    assert numbers.abs().max() <= 127
    least = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(scales, (x.float().abs().amax(-1) / 127).clamp(min=least), rtol=1e-6, atol=0)
    off = (numbers * scales[:, None] - x.float()).abs()
    assert (off <= 0.501 * scales[:, None]).all()
    assert not numbers[rows // 2].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_sound_stays_so_and_alone(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 5] = bad
    numbers, scales = quantize(x)
    assert (numbers * scales[:, None]).isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_every_slot_gives_back_what_was_written_there(size: int, dtype: torch.dtype) -> None:
    shape = shape_of(12, dtype, kv_heads=3)
    cache = in_int8(shape).new_cache(7, size)
    where = torch.randperm(7 * size)[:5]
    slots = cache.slots(where // size, where % size)
    k, v = torch.randn(2, 5, 3, 12).to(dtype)
    cache.write(0, k, v, slots)
    for x, found in zip((k, v), read_tokens(cache.layers[0], slots, dtype), strict=True):
        numbers, scales = quantize(x)
        assert torch.equal(found, (numbers * scales[..., None]).to(dtype))
    cache.copy_blocks([(int(where[0]) // size, 6)])
    assert torch.equal(cache.blocks[:, 6], cache.blocks[:, where[0] // size])
    cache.clear_blocks(range(7))
    assert not cache.blocks.any()


# -- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_numbers_and_scales() -> None:
    shape = shape_of(64, kv_heads=3, layers=30)  # SmolLM2-135M
    assert in_int8(shape).bytes_per_token == 30 * 3 * 2 * (64 + 4)
    assert in_int8(shape).bytes_per_token <= 0.28 * shape.bytes_per_token
    assert in_int8(shape).new_cache(4, 16).blocks.nbytes == 5 * 16 * in_int8(shape).bytes_per_token


@functools.cache
def wide_heads() -> LoadedModel:
    torch.manual_seed(7)
    config = LlamaConfig(**{**SIZES, "head_dim": 64}, tie_word_embeddings=True)
    state = LlamaForCausalLM(config).state_dict().items()
    module = build(config, state, dtype=torch.float32, device=CPU)
    return LoadedModel("wide heads", module, tiny_tokenizer(), config, frozenset())


def test_the_same_memory_holds_three_and_a_half_times_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_CPU_POOL_BYTES", 2**19)

    def preempts(requests: int, dtype: str | None) -> bool:
        sizes = dict(num_blocks=None, max_num_seqs=40, max_num_batched_tokens=1024, audit=False)
        one = engine_of(model=wide_heads(), kv_cache_dtype=dtype, **sizes)
        assert one.pool.num_blocks * 4 * kv_shape(wide_heads().module, dtype).bytes_per_token <= 2**19
        for n in range(requests):  # of eight pages each, all at once
            one.add_request(random_prompt(random.Random(n), 16), SamplingParams(max_tokens=17))
        drain(one)
        return any(record.preempted for record in one.trace)

    assert [preempts(n, None) for n in (8, 9)] == [False, True]
    assert not preempts(28, "int8")


# -- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(3, 3, 8), (9, 3, 64), (14, 2, 64), (12, 1, 80), (10, 1, 24)]
)
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize(
    "backend", [SDPA, pytest.param(IN_PLACE, marks=needs_compiler)], ids=lambda b: b.name
)
def test_backends_read_it_as_the_reference_reads_what_it_holds(
    backend: object, heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype
) -> None:
    """Rows of one query and of drafts, and a chunk; with windows and padding."""
    torch.manual_seed(size)
    rows, num_blocks = mixed_rows(random.Random(size), size)
    cache, plain = written(shape_of(dim, dtype, kv_heads), num_blocks, size)
    tokens = sum(row.num_queries for row in rows)
    q = torch.randn(tokens, heads, dim).to(dtype)
    windows = (None, 1, 7)
    metadata = build_metadata(rows, cache, backend, windows=windows, num_padding=2)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for window in windows:
        got = attend(torch.cat((q, q[:2])), cache, 0, metadata, scale=dim**-0.5, window=window)
        want = reference_attention(q, plain, 0, rows, scale=dim**-0.5, window=window)
        torch.testing.assert_close(got[:tokens], want, **close)


@needs_triton
@pytest.mark.parametrize(
    ("size", "kv_heads", "group", "dim", "splits", "window"),
    [
        (1, 2, 1, 8, 4, 7),
        (4, 1, 7, 80, 1, 6),
        (16, 1, 3, 64, 1, None),
        (16, 2, 1, 80, 2, None),
        (16, 1, 8, 8, 4, 17),
        (5, 1, 3, 12, 3, None),
    ],
)
def test_the_kernel_of_triton_reads_it_too(
    size: int, kv_heads: int, group: int, dim: int, splits: int, window: int | None
) -> None:
    from labkit.kernels.flash_decoding import paged_decode

    torch.manual_seed(0)
    n = 2 if size > 1 else 30
    rows, num_blocks = rows_of([1, n * size - 1, n * size, n * size + 1], size)
    cache, plain = written(
        dataclasses.replace(shape_of(dim, kv_heads=kv_heads), device=DEVICE), num_blocks, size
    )
    q = torch.randn(len(rows), kv_heads * group, dim, device=DEVICE)
    lengths = torch.tensor([row.length for row in rows], dtype=torch.int32, device=DEVICE)
    tables = block_table(rows, cache, n + 2).int()
    out = paged_decode(q, cache.layers[0], tables, lengths, scale=0.3, window=window, splits=splits)
    want = reference_attention(q, plain, 0, rows, scale=0.3, window=window)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert why_not_triton(DEVICE, torch.float32, dim, True) is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [8, 24, 64])
@settings(max_examples=10)
@given(seed=st.integers(0, 999), size=st.integers(1, 17))
def test_fused_layers_write_it_bit_for_bit(dim: int, dtype: torch.dtype, seed: int, size: int) -> None:
    torch.manual_seed(seed)
    caches = [in_int8(shape_of(dim, dtype)).new_cache(8, size) for _ in range(2)]
    rows = min(13, 8 * size)
    where = torch.randperm(8 * size)[:rows]
    slots = caches[0].slots(where // size, where % size)
    qkv = torch.randn(rows, (4 + 2 * 2) * dim).to(dtype)
    qkv[rows // 2] = 0
    ones, zeros = torch.ones(rows, 1, dim, dtype=dtype), torch.zeros(rows, 1, dim, dtype=dtype)  # no rotation
    torch.ops.labkit_cpu.rotate_and_write(qkv, ones, zeros, caches[0].layers[0], slots, 4, None, None, 1e-5)
    _, k, v = qkv.view(rows, -1, dim).split((4, 2, 2), dim=1)
    caches[1].write(0, k, v, slots)
    assert torch.equal(caches[0].blocks, caches[1].blocks)


def test_a_row_that_is_not_sound_spoils_no_other() -> None:
    rows = [Span(20, 1, [0, 1]), Span(9, 1, [2])]
    cache, _ = written(shape_of(64), 3, 16)
    bad = torch.full((1, 2, 64), torch.nan)
    cache.write(0, bad, bad, cache.slots(torch.tensor([0]), torch.tensor([3])))
    out = attend(torch.randn(2, 4, 64), cache, 0, build_metadata(rows, cache, SDPA), scale=0.125)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_a_captured_step_writes_and_reads_it_as_an_eager_one_does() -> None:
    model = loaded("llama").module
    cache = in_int8(model.kv_shape).new_cache(20, 4)
    graphs = DecodeGraphs(
        model,
        cache,
        SDPA,
        max_num_seqs=4,
        max_model_len=64,
        memory_limit=2**20,
        say=None,
        capture=TapeCapture(),
    )
    graphs.warm_up()
    rows = [Span(8, 1, [3, 1, 5]), Span(2, 1, [0])]
    before = cache.blocks.clone()
    replayed = graphs.run([5, 6], rows)
    left, cache.blocks[:] = cache.blocks.clone(), before
    metadata = build_metadata(rows, cache, SDPA, windows=model.windows)
    eager = model(torch.tensor([5, 6]), torch.tensor([8, 2]), cache, metadata)
    torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)
    got, want = (dequantize(blocks[:, :-1], torch.float32) for blocks in (left, cache.blocks))
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) / 100)  # one number may differ


# -- the engine -----------------------------------------------------------------------------------


def alone(family: str, prompt: list[int], params: SamplingParams, **config: object) -> list[list[int]]:
    """The answers to one prompt in an engine of its own, with room for all of it and no shared pages."""
    one = engine_of(family, kv_cache_dtype="int8", enable_prefix_caching=False, **config)
    one.add_request(prompt, params)
    drain(one)
    return [output.token_ids for output in one.outputs.values()]


def test_kernels_and_plain_layers_give_the_same_tokens(family: str) -> None:
    prompt, params = random_prompt(random.Random(3), 30), SamplingParams(max_tokens=30, ignore_eos=True)
    want = alone(family, prompt, params)
    assert alone(family, prompt, params, model=fused(family)) == want
    assert alone(family, prompt, params, max_num_batched_tokens=7) == want


def test_nothing_shows_of_chunks_preemption_or_shared_pages(family: str) -> None:
    rng = random.Random(5)
    shared = random_prompt(rng, 12)
    jobs = [(shared + random_prompt(rng, rng.randrange(1, 40)), rng.randrange(4, 24)) for _ in range(8)]
    one = engine_of(family, kv_cache_dtype="int8", max_num_batched_tokens=16, num_blocks=30)
    ids = play(one, jobs, arrival=0.5)
    assert any(record.preempted for record in one.trace)
    assert any(one.outputs[name].metrics.num_cached_tokens for name in ids)
    for name, (prompt, most) in zip(ids, jobs, strict=True):
        assert [one.outputs[name].token_ids] == alone(family, prompt, SamplingParams(max_tokens=most))


def test_answers_that_share_pages_copy_them_with_their_scales() -> None:
    prompt = random_prompt(random.Random(1), 10)  # ends in the middle of a page
    params = SamplingParams(max_tokens=10, n=3, temperature=1, seed=4, ignore_eos=True)
    one = engine_of(kv_cache_dtype="int8")
    one.add_request(prompt, params)
    drain(one)
    assert any(record.copied for record in one.trace)
    assert [output.token_ids for output in one.outputs.values()] == alone("llama", prompt, params)
    seeds = [alone("llama", prompt, dataclasses.replace(params, n=1))[0]]
    assert one.outputs["0"].token_ids == seeds[0]


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
def test_drafts_change_no_answer(speculative: str) -> None:
    prompt = repetitive(random.Random(5), 40)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    config = dict(speculative=speculative, speculative_gate=False, kv_cache_dtype="int8")
    if speculative == "draft":
        config["draft_model"] = loaded("llama")
    one = engine_of(**config)
    one.add_request(prompt, params)
    drain(one)
    assert acceptance(one.trace)
    assert [one.outputs["0"].token_ids] == alone("llama", prompt, params)
    if speculative == "draft":
        assert isinstance(one.speculator.drafter.runner.cache, Int8KVCache)


def test_a_request_that_failed_leaves_nothing_in_its_pages() -> None:
    one = engine_of(kv_cache_dtype="int8")
    name = one.add_request(random_prompt(random.Random(4), 9), SamplingParams(max_tokens=9))
    one.step()
    held = list(one.pool.tables[name])
    assert one.runner.cache.blocks[:, held].any()
    one.runner.sample = lambda logits, requests: 1 / 0
    drain(one)
    assert "ZeroDivisionError" in one.outputs[name].error
    assert not one.runner.cache.blocks[:, held].any()


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_without_it_the_cache_is_what_it_was(dtype: str | None) -> None:
    cache = engine_of(kv_cache_dtype=dtype).runner.cache
    assert type(cache) is PagedKVCache and cache.blocks.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gemma3_text"])  # gemma2 has soft caps of its own
def test_a_model_that_transformers_runs_keeps_near_its_exact_cache(kind: str) -> None:
    model = test_adapter.loaded(kind)
    tokens = random_prompt(random.Random(6), 40)
    exact, near = (teacher_forced(model.module, tokens, kv_cache_dtype=dtype) for dtype in (None, "int8"))
    off = (near - exact).abs().mean() / exact.std()
    assert 0 < off < 0.05
    one = Engine(dataclasses.replace(engine_of().config, model=model, kv_cache_dtype="int8"), say=None)
    one.add_request(tokens, SamplingParams(max_tokens=5, ignore_eos=True))
    drain(one)
    assert len(one.outputs["0"].token_ids) == 5


def test_heads_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype 'int8' needs a head_dim that 4 divides, not 6"):
        in_int8(shape_of(6))
    model = test_adapter.as_loaded(test_adapter.build("gpt2", hidden_size=36))  # six heads of 6
    with pytest.raises(ValueError, match="kv_cache_dtype 'int8' needs a head_dim that 4 divides, not 6"):
        engine_of(model=model, kv_cache_dtype="int8")


def off_by(exact: Tensor, near: Tensor) -> float:
    return float((near - exact).abs().mean() / exact.std())


def test_logits_stay_near_those_of_an_exact_cache(family: str) -> None:
    tokens = random_prompt(random.Random(8), 120)
    exact, near = (
        teacher_forced(loaded(family).module, tokens, kv_cache_dtype=dtype) for dtype in (None, "int8")
    )
    assert 0 < off_by(exact, near) < 0.03
    assert (exact.argmax(-1) == near.argmax(-1)).float().mean() > 0.9
