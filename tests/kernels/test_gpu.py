"""What only a GPU can show: graphs, kernels and choices there equal the plain path.

Skipped, with this reason, where there is none. `test_flash_decoding.py` runs its kernel on the GPU as well.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata
from labkit.core.kv_cache import KVShape
from labkit.core.model import Transformer
from labkit.engine import Engine
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA, block_table
from labkit.kernels.paged_decode import PagedDecode, paged_rows
from labkit.kernels.select import choose_backend
from labkit.kernels.varlen import PackedChunks, varlen_attention
from labkit.models.architecture import build
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import SamplingParams
from tests.conftest import VOCAB, greedy, loaded, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and there is none"),
]
CUDA = torch.device("cuda")
SM_80 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def on_gpu(family: str, dtype: torch.dtype) -> LoadedModel:
    model = reference(family)
    module = build(model.config, model.state_dict().items(), dtype=dtype, device=CUDA)
    return LoadedModel(family, module, tiny_tokenizer(), model.config, frozenset())


def answers(engine: Engine, count: int = 9) -> tuple[dict[str, list[int]], dict[str, tuple[list[int], int]]]:
    """The engine's greedy answers to requests that join as it runs, and what was asked."""
    rng = random.Random(5)
    asked: dict[str, tuple[list[int], int]] = {}
    while len(asked) < count or engine.has_unfinished:
        if len(asked) < count and rng.random() < 0.5:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 4, 5, 17, 60]))]
            tokens = rng.choice([1, 9, 24])
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            asked[engine.add_request(prompt, params)] = (prompt, tokens)
        engine.step()
    return {name: engine.outputs[name].token_ids for name in asked}, asked


@pytest.mark.parametrize("attention_backend", ["sdpa", "triton"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_in_fp32_every_backend_answers_as_generate_does_with_and_without_graphs(
    family: str, attention_backend: Any, cuda_graphs: bool
) -> None:
    config = EngineConfig(
        on_gpu(family, torch.float32),
        max_num_seqs=6,
        max_num_batched_tokens=24,
        block_size=4,
        attention_backend=attention_backend,
        cuda_graphs=cuda_graphs,
    )
    engine = Engine(config)
    assert engine.runner.backend.name == attention_backend
    assert bool(engine.runner.graphs and engine.runner.graphs.captured) is cuda_graphs
    got, asked = answers(engine)
    assert got == {name: greedy(family, prompt, tokens) for name, (prompt, tokens) in asked.items()}


def test_eight_bits_give_the_same_tokens_with_and_without_graphs() -> None:
    answered = []
    for cuda_graphs in (False, True):
        config = EngineConfig("tiny-random", device="cuda", quantization="int8", cuda_graphs=cuda_graphs)
        engine = Engine(config)
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        names = [engine.add_request([5, 6, 7 + i], params) for i in range(3)]
        while engine.has_unfinished:
            engine.step()
        answered.append([engine.outputs[name].token_ids for name in names])
    assert answered[0] == answered[1]


@pytest.mark.parametrize("as_t4", [False, True])
@pytest.mark.parametrize("wanted", ["sdpa", "triton"])
def test_in_fp16_logits_are_near_those_of_fp32(family: str, wanted: str, as_t4: bool) -> None:
    model = on_gpu(family, torch.float16).module
    backend = choose_backend(CUDA, torch.float16, 8, wanted=wanted, as_t4=as_t4)
    exact = teacher_forced(loaded(family).module, SDPA)
    near = teacher_forced(model, backend)
    off = (near - exact).std(dim=-1) / exact.std(dim=-1)
    assert off.max() < 0.05
    assert (near.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def teacher_forced(model: Transformer, backend: Backend) -> Tensor:
    """Logits (T, vocab_size, fp32, on the CPU) of two texts, in chunks first and then token by token."""
    rng = random.Random(1)
    texts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (50, 33)]
    tables = [[9, 3, 1, 7], [0, 8, 2]]
    cache, found = model.kv_shape.new_cache(10, 16), ([], [])
    done = [0, 0]
    for take in ((30, 20), (5, 1), (1, 7), *[(1, 1)] * 5, *[(1, 0)] * 9):
        some = sorted((i for i in (0, 1) if take[i]), key=lambda i: (take[i] > 1, -done[i]))
        rows = [Span(done[i], take[i], tables[i]) for i in some]
        layout = build_metadata(rows, cache, windows=model.windows, backend=backend)
        ids = [token for i in some for token in texts[i][done[i] : done[i] + take[i]]]
        positions = [at for row in rows for at in range(row.start, row.length)]
        inputs = (torch.tensor(x, device=model.device) for x in (ids, positions))
        logits = model.logits(model(*inputs, cache, layout)).float().cpu()
        for i, part in zip(some, logits.split([take[i] for i in some]), strict=True):
            found[i].append(part)
            done[i] += take[i]
    return torch.cat([*found[0], *found[1]])


@pytest.mark.skipif(not SM_80, reason="FlashAttention needs sm_80")
@pytest.mark.skipif(varlen_attention() is None, reason="this PyTorch has no varlen_attn with windows and GQA")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_chunks_equal_single_ones(window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = on_gpu("llama", dtype).module
    backend = choose_backend(CUDA, dtype, 8)
    cache = model.kv_shape.new_cache(64, 16)
    cache.blocks.normal_()
    rows = [Span(3, 90, list(range(0, 6))), Span(0, 17, [20, 21]), Span(200, 5, list(range(30, 43)))]
    q = torch.randn(112, 6, 8, device=CUDA, dtype=dtype)
    packed, single = (
        build_metadata(rows, cache, windows=[window], backend=b).groups for b in (backend, SDPA)
    )
    assert len(packed) == 1 and isinstance(packed[0], PackedChunks)
    out = packed[0].attend(q, cache.layers[0], scale=0.3, window=window)
    for group in single:
        plain = group.attend(q[group.first : group.last], cache.layers[0], scale=0.3, window=window)
        torch.testing.assert_close(out[group.first : group.last], plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_the_kernel_equals_gathered_attention_over_thousands_of_tokens(
    dtype: torch.dtype, group: int, dim: int
) -> None:

    torch.manual_seed(0)
    cache = KVShape(1, 2, dim, dtype, CUDA).new_cache(700, 16)
    cache.blocks.normal_()
    blocks = torch.randperm(700).tolist()
    rows = [Span(6000, 1, blocks[:376]), Span(4095, 1, blocks[376:632]), Span(33, 1, blocks[632:635])]
    q = torch.randn(3, 2 * group, dim, device=CUDA, dtype=dtype)
    tables = block_table(rows, cache, 376)
    lengths = torch.tensor([row.length for row in rows], device=CUDA)
    (gathered,) = SDPA.decode(0, rows, cache, [None, 300])
    for window in (None, 300):
        plain = gathered.attend(q, cache.layers[0], scale=dim**-0.5, window=window)
        for splits in (1, 2, 64):
            decode = PagedDecode(0, 3, tables, lengths, splits)
            out = decode.attend(q, cache.layers[0], scale=dim**-0.5, window=window)
            tolerance = 1e-4 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)


def test_an_engine_as_t4_computes_in_fp16_without_the_kernels_of_newer_gpus() -> None:
    engine = Engine(EngineConfig("tiny-random", device="cuda", as_t4=True, max_num_seqs=4))
    assert engine.model.dtype == torch.float16
    backend = engine.runner.backend
    assert backend.decode is paged_rows and "as on a T4" in backend.reason
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    names = [engine.add_request([5, 6, 7 + i], params) for i in range(4)]
    while engine.has_unfinished:
        engine.step()
    assert all(len(engine.outputs[name].token_ids) == 12 for name in names)
    with pytest.raises(ValueError, match="as_t4 computes in float16, and the loaded model"):
        Engine(EngineConfig(on_gpu("llama", torch.float32), as_t4=True))


def test_blocks_come_from_the_memory_that_a_step_leaves_free(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.cache_clear()  # for a model of which nothing was told yet
    config = EngineConfig(on_gpu("llama", torch.float16), max_num_seqs=3, block_size=16)
    engine = Engine(config)
    assert engine.pool.num_blocks == 3 * 32  # of 512 positions each: there is room for all
    said = capsys.readouterr().out
    assert "Attention on cuda:0: triton (decode reads pages in place" in said
    assert "Capturing" in said and "Captured" in said
    Engine(config)
    assert capsys.readouterr().out == "", "each model is told of once"
