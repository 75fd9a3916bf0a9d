"""The kernel of decode steps equals the reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labkit.core.attention import reference_attention
from labkit.kernels import select
from labkit.kernels.gathered_sdpa import block_table
from tests.kernels.paged import DEVICE, filled, needs_triton, rows_of

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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
        (16, 1, 3, 8, 3, None, torch.float32),
        (4, 1, 3, 8, 64, 9, torch.float32),
        (16, 1, 4, 80, 2, 20, torch.bfloat16),
    ],
)
def test_the_kernel_equals_the_reference(
    size: int, kv_heads: int, group: int, dim: int, splits: int, window: int | None, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter is not right in bf16")
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

    q, blocks = torch.ones(1, 2, 8, device=DEVICE), torch.ones(2, 2, 4, 1, 8, device=DEVICE)
    tables, lengths = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.ones(1, device=DEVICE)
    for splits in (0, 65):
        with pytest.raises(ValueError, match=f"splits must be between 1 and 64, not {splits}"):
            paged_decode(q, blocks, tables, lengths, scale=1.0, splits=splits)
    with pytest.raises(ValueError, match="in one piece"):
        paged_decode(q[..., ::2], blocks[..., ::2], tables, lengths, scale=1.0)


COMPILE = """
import importlib.util, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

spec = importlib.util.spec_from_file_location("flash_decoding", sys.argv[1])  # alone, for speed
flash_decoding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flash_decoding)

def build(kernel, types, constants):
    types = types | dict.fromkeys(constants, "constexpr")
    places = {name: (i,) for i, name in enumerate(types)}
    source = ASTSource(kernel, types, {places[name]: value for name, value in constants.items()})
    print(len(compile(source, target=GPUTarget("cuda", 75, 32)).asm["cubin"]))

# What changes from step to step has one specialisation: a width of 1 and one of 16, a window and none.
backend = make_backend(GPUTarget("cuda", 75, 32))
for kernel, names in ((flash_decoding._split_kernel, 12), (flash_decoding._unite_kernel, 4)):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = {p.name: 16 for p in kernel.params if p.is_constexpr}
    numbers, changing = [p.name for p in kernel.params if not p.is_constexpr], ("width", "window", "splits")
    kinds = {
        str(bind(**constants, **{name: value if name in changing else 5 for name in numbers}, debug=False)[1])
        for value in (1, 2, 16, 17, 2**31 - 1)
    }
    assert len(numbers) == names and len(kinds) == 1, kinds
pointers = dict(
    q="*fp16", blocks="*fp16", tables="*i64", lengths="*i64", parts="*fp32", logs="*fp32"
)
numbers = dict(q_row="i32", q_head="i32", width="i32", scale="fp32", window="i32", splits="i32")
sizes = dict(BLOCK=6144, VALUES=3072, HEAD=1024, SLOT=64)
sizes |= dict(SIZE=16, KV_HEADS=3, GROUP=3, DIM=64, TILE=8, GROUP_2=4, DIM_2=64, IN_INT8=False)
build(flash_decoding._split_kernel, pointers | numbers, sizes)
sizes |= dict(BLOCK=6528, VALUES=3264, HEAD=1088, SLOT=64, IN_INT8=True)
build(flash_decoding._split_kernel, pointers | dict(blocks="*i8") | numbers, sizes)
pointers = dict(parts="*fp32", logs="*fp32", out="*fp16")
build(flash_decoding._unite_kernel, pointers | dict(splits="i32"), dict(MOST=64, DIM=64, DIM_2=64))
"""


@needs_triton
def test_the_kernels_compile_for_a_t4_where_none_is(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    source = Path(select.__file__).with_name("flash_decoding.py")
    command = [sys.executable, "-c", COMPILE, str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(size) > 1000 for size in done.stdout.split())
