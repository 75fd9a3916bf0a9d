"""Attention on a GPU: the kernel, in Triton's interpreter where there is no GPU, and what calls it."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from labkit.core.attention import Span, attend, build_metadata, reference_attention, row_order
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.kernels import select
from labkit.kernels import varlen as kernels_varlen
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA, block_table, gathered_chunks, gathered_rows, static_rows
from labkit.kernels.paged_decode import PagedDecode, num_splits, paged_rows, static_paged_rows
from labkit.kernels.select import Sm75, choose_backend
from labkit.kernels.varlen import PackedChunks, packed_chunks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def filled(
    rows: list[Span], num_blocks: int, size: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> PagedKVCache:
    """A cache with random keys and values for all tokens of these rows, and NaN everywhere else."""
    cache = KVShape(1, kv_heads, dim, dtype, DEVICE).new_cache(num_blocks, size)
    cache.blocks.fill_(torch.nan)
    for row in rows:
        for token in range(row.length):
            cache.blocks[0, row.table[token // size], :, :, token % size] = torch.randn(2, kv_heads, dim)
    return cache


def rows_of(lengths: list[int], size: int, seed: int = 0) -> tuple[list[Span], int]:
    """Rows with a single query, longest first, over shuffled pages, and how many pages there are."""
    needs = [-(-length // size) for length in lengths]
    pages = list(range(sum(needs) + 3))
    random.Random(seed).shuffle(pages)
    rows = [
        Span(length - 1, 1, [pages.pop() for _ in range(need)])
        for length, need in zip(lengths, needs, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.length), sum(needs) + 3


@needs_triton
@pytest.mark.parametrize(
    ("size", "kv_heads", "group", "dim", "splits", "window", "dtype"),
    [
        (1, 1, 3, 8, 1, None, torch.float32),
        (1, 2, 1, 8, 4, 7, torch.float32),
        (4, 2, 1, 8, 1, None, torch.float32),
        (4, 1, 4, 64, 2, 1, torch.float32),
        (4, 1, 7, 80, 1, 6, torch.float32),
        (16, 1, 3, 64, 1, None, torch.float32),
        (16, 2, 1, 80, 2, None, torch.float32),
        (16, 1, 8, 8, 4, 17, torch.float32),
        (16, 1, 1, 64, 8, 1000, torch.float32),
        (16, 1, 3, 64, 2, None, torch.float16),
        (16, 1, 4, 80, 2, 20, torch.bfloat16),
    ],
)
def test_the_kernel_equals_the_reference(
    size: int, kv_heads: int, group: int, dim: int, splits: int, window: int | None, dtype: torch.dtype
) -> None:
    from labkit.kernels.flash_decoding import paged_decode

    torch.manual_seed(0)
    n = 2 if size > 1 else 30
    rows, num_blocks = rows_of([1, n * size - 1, n * size, n * size + 1], size)
    cache = filled(rows, num_blocks, size, kv_heads, dim, dtype)
    # As the model hands them over: cut out of a wider tensor.
    q = torch.randn(len(rows), kv_heads * (group + 1), dim, device=DEVICE).to(dtype)[:, : kv_heads * group]
    out = paged_decode(
        q,
        cache.layers[0],
        block_table(rows, cache, n + 2).int(),
        torch.tensor([row.length for row in rows], dtype=torch.int32, device=DEVICE),
        scale=0.3,
        window=window,
        splits=splits,
    )
    plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)
    torch.testing.assert_close(out, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_triton
def test_a_nan_among_the_keys_of_a_row_reaches_that_row_alone() -> None:
    from labkit.kernels.flash_decoding import paged_decode

    rows, num_blocks = rows_of([40, 12], 4)
    cache = filled(rows, num_blocks, 4, 1, 8, torch.float32)
    cache.blocks[0, rows[0].table[3], 0, 0, 2, 5] = torch.nan
    tables, lengths = block_table(rows, cache, 10), torch.tensor([40, 12], device=DEVICE)
    for splits in (1, 4):
        q = torch.ones(2, 2, 8, device=DEVICE)
        out = paged_decode(q, cache.layers[0], tables, lengths, scale=1.0, splits=splits)
        assert out.isnan().flatten(1).all(dim=1).tolist() == [True, False]


@needs_triton
def test_the_kernel_says_what_it_cannot_take() -> None:
    from labkit.kernels.flash_decoding import paged_decode

    q, pages = torch.ones(1, 2, 8, device=DEVICE), torch.ones(2, 2, 4, 1, 8, device=DEVICE)
    tables, lengths = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="splits must be a power of two, not 3"):
        paged_decode(q, pages, tables, lengths, scale=1.0, splits=3)
    with pytest.raises(ValueError, match="in one piece"):
        paged_decode(q[..., ::2], pages[..., ::2], tables, lengths, scale=1.0)


COMPILE = """
import importlib.util, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("flash_decoding", sys.argv[1])  # alone, for speed
flash_decoding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flash_decoding)

def build(kernel, types, constants):
    types = types | dict.fromkeys(constants, "constexpr")
    places = {name: (i,) for i, name in enumerate(types)}
    source = ASTSource(kernel, types, {places[name]: value for name, value in constants.items()})
    print(len(compile(source, target=GPUTarget("cuda", 75, 32)).asm["cubin"]))

pointers = dict(
    q="*fp16", blocks="*fp16", tables="*i64", lengths="*i64", parts="*fp32", logs="*fp32"
)
numbers = dict(q_row="i32", q_head="i32", width="i32", scale="fp32", window="i32", splits="i32")
sizes = dict(BLOCK=6144, VALUES=3072, HEAD=1024, SLOT=64)
sizes |= dict(SIZE=16, KV_HEADS=3, GROUP=3, DIM=64, TILE=8, GROUP_2=4, DIM_2=64)
build(flash_decoding._split_kernel, pointers | numbers, sizes)
pointers = dict(parts="*fp32", logs="*fp32", out="*fp16")
build(flash_decoding._unite_kernel, pointers, dict(SPLITS=8, DIM=64, DIM_2=64))
"""


@needs_triton
def test_the_kernels_compile_for_a_t4_where_none_is(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    source = Path(select.__file__).with_name("flash_decoding.py")
    command = [sys.executable, "-c", COMPILE, str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(size) > 1000 for size in done.stdout.split())


@needs_triton
def test_a_mixed_batch_goes_through_both_kinds_of_group() -> None:
    torch.manual_seed(1)
    single, num_blocks = rows_of([33, 16, 5], 4)
    pages = list(range(num_blocks, num_blocks + 12))
    rows = [*single, Span(9, 6, pages[:4]), Span(0, 5, pages[4:6])]
    cache = filled(rows, num_blocks + 12, 4, 2, 8, torch.float32)
    cache.blocks.nan_to_num_(0)  # gathered pages are read to their end
    q = torch.randn(16, 6, 8, device=DEVICE)
    backend = Backend("triton", "", paged_rows, gathered_chunks, static_paged_rows)
    layout = build_metadata(rows, cache, num_padding=2, windows=[None, 5], backend=backend)
    assert isinstance(layout.groups[0], PagedDecode)
    assert [(group.first, group.last) for group in layout.groups] == [(0, 3), (3, 9), (9, 14)]
    for window in (None, 5):
        out = attend(q, cache, 0, layout, scale=0.3, window=window)
        plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_splits_keep_a_gpu_busy_and_have_something_to_do() -> None:
    for programs in (1, 3, 8, 96, 1024):
        for tokens in (1, 16, 100, 4096, 131072):
            splits = num_splits(programs, tokens, 40)
            assert splits & (splits - 1) == 0
            assert splits == 1 or (programs * splits <= 160 and tokens // splits >= 64 and splits <= 64)
    assert num_splits(3, 4096, 40) == 32
    assert num_splits(256, 4096, 40) == 1


# -- packed chunks --------------------------------------------------------------------------------


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    token_starts: Tensor,
    most_queries: int,
    most_tokens: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` computes: each row's queries are the last of its tokens."""
    assert query_starts.dtype == token_starts.dtype == torch.int32
    assert window_size[1] == 0 and enable_gqa
    queries, tokens = query_starts.tolist(), token_starts.tolist()
    out = torch.zeros_like(q)
    for i in range(len(queries) - 1):
        n, length = queries[i + 1] - queries[i], tokens[i + 1] - tokens[i]
        assert n <= most_queries and length <= most_tokens
        at = torch.arange(length, device=q.device)
        own = at[length - n :, None]
        seen = at <= own if window_size[0] < 0 else (at <= own) & (at >= own - window_size[0])
        keys, values = (
            x[tokens[i] : tokens[i + 1]].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[queries[i] : queries[i + 1]], keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[queries[i] : queries[i + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_packed_chunks_hand_over_the_live_slots_of_each_row(
    size: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_varlen, "varlen_attention", lambda: varlen)
    torch.manual_seed(2)
    rng = random.Random(size)
    shapes = [
        (0, 2),
        (3 * size - 2, 3) if size > 1 else (5, 3),
        (2 * size, size + 1),
        (0, 4 * size + 1),
        (9, 1),
    ]
    pages = list(range(200))
    rng.shuffle(pages)
    rows = [Span(start, n, [pages.pop() for _ in range(-(-(start + n) // size))]) for start, n in shapes]
    rows = [rows[i] for i in row_order(rows)]
    cache = filled(rows, 200, size, 2, 8, torch.float32)  # NaN, were one slot too many gathered
    backend = Backend("test", "", gathered_rows, packed_chunks, static_rows)
    layout = build_metadata(rows, cache, windows=[window], backend=backend)
    assert isinstance(layout.groups[-1], PackedChunks)
    q = torch.randn(sum(row.num_queries for row in rows), 6, 8, device=DEVICE)
    chunk = layout.groups[-1]
    out = chunk.attend(q[chunk.first :], cache.layers[0], scale=0.3, window=window)
    plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)[chunk.first :]
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


# -- the choice -----------------------------------------------------------------------------------


def test_a_cpu_has_plain_attention_and_says_why() -> None:
    backend = choose_backend(torch.device("cpu"), torch.float32, 64)
    assert (backend.name, backend.decode, backend.chunks) == ("sdpa", SDPA.decode, SDPA.chunks)
    assert "Triton kernels need a CUDA GPU" in backend.reason
    assert choose_backend(torch.device("cpu"), torch.float32, 64, wanted="sdpa").name == "sdpa"
    with pytest.raises(ValueError, match="attention_backend must be auto or sdpa here, not 'triton'"):
        choose_backend(torch.device("cpu"), torch.float32, 64, wanted="triton")
    with pytest.raises(ValueError, match="attention_backend must be one of auto, sdpa, triton, not 'flash'"):
        choose_backend(torch.device("cpu"), torch.float32, 64, wanted="flash")
    with pytest.raises(ValueError, match="as_t4 needs a CUDA GPU"):
        choose_backend(torch.device("cpu"), torch.float32, 64, as_t4=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were an H100, with Triton and FlashAttention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(select, "varlen_attention", lambda: varlen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return monkeypatch


def test_a_newer_gpu_has_triton_and_packed_chunks_in_half_precision(gpu: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        backend = choose_backend(CUDA, dtype, 64)
        assert (backend.name, backend.decode, backend.chunks) == ("triton", paged_rows, packed_chunks)
    for dtype, dim, why in ((torch.float32, 64, "float32"), (torch.float16, 20, "head_dim of 20")):
        backend = choose_backend(CUDA, dtype, dim)
        assert (backend.name, backend.chunks) == ("triton", gathered_chunks)
        assert why in backend.reason
    gpu.setattr(select, "varlen_attention", lambda: None)
    assert "this PyTorch has no FlashAttention" in choose_backend(CUDA, torch.float16, 64).reason


def test_a_t4_and_whatever_stands_in_for_one_has_no_kernels_of_sm_80(gpu: pytest.MonkeyPatch) -> None:
    backend = choose_backend(CUDA, torch.float16, 64, as_t4=True)
    assert (backend.name, backend.decode) == ("triton", paged_rows)
    assert backend.chunks is not packed_chunks
    assert "as on a T4" in backend.reason
    plain = choose_backend(CUDA, torch.float16, 64, as_t4=True, wanted="sdpa")
    assert plain.name == "sdpa" and "asked for" in plain.reason
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backend = choose_backend(CUDA, torch.float16, 64)
    assert (backend.name, backend.chunks) == ("triton", gathered_chunks)
    assert "sm_75" in backend.reason


def test_where_triton_cannot_be_had_the_reason_says_so(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert "Triton makes no code for sm_60" in choose_backend(CUDA, torch.float16, 64).reason
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    backend = choose_backend(CUDA, torch.float16, 64)
    assert backend.name == "sdpa" and "triton is not installed" in backend.reason
    with pytest.raises(ValueError, match="not 'triton': the package triton is not installed"):
        choose_backend(CUDA, torch.float16, 64, wanted="triton")


def test_groups_limited_to_the_kernels_of_sm_75_compute_the_same() -> None:
    torch.manual_seed(3)
    rows = [Span(20, 1, [5, 0]), Span(3, 1, [2]), Span(14, 9, [4, 1])]
    cache = KVShape(1, 2, 8, torch.float32, DEVICE).new_cache(6, 16)
    cache.blocks.normal_()
    q = torch.randn(11, 6, 8, device=DEVICE)
    backend = Backend("sdpa", "", select._as_sm75(SDPA.decode), select._as_sm75(SDPA.chunks), SDPA.static)
    layout = build_metadata(rows, cache, backend=backend)
    assert all(isinstance(group, Sm75) for group in layout.groups)
    out = attend(q, cache, 0, layout, scale=0.3)
    plain = reference_attention(q, cache, 0, rows, scale=0.3)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_masks_are_cut_out_of_rows_that_the_memory_efficient_kernel_takes_as_they_are() -> None:
    rows = [Span(20, 1, [0, 1]), Span(3, 7, [2])]
    cache = KVShape(1, 2, 8, torch.float16, DEVICE).new_cache(6, 11)
    for group in build_metadata(rows, cache, SDPA).groups:
        mask = group.masks[None]
        assert mask.stride(-1) == 1 and all(stride % 16 == 0 for stride in mask.stride()[:-1])
