"""What a GPU would be asked to do, on one that is not there (see `labkit.benchmark.gpu.fake_gpu`).

The settings are those of `test_gpu.py`. What is held: all tensors of an operator are on one device, nothing
within a capture waits for the GPU or brings numbers to it, nothing becomes fp64 by accident, no kernel gets
integers that are wider than it wants.
"""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.analysis.devices import GPUS
from labkit.benchmark.gpu.fake_gpu import CUDA, FakeGpu, FakeGpuError, fake_model
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.kernels.varlen import varlen_attention
from labkit.sampling_params import SamplingParams
from tests.conftest import VOCAB, reference
from tests.kernels.paged import needs_triton

SAMPLING = (
    SamplingParams(max_tokens=5, temperature=0),
    SamplingParams(max_tokens=4, temperature=0.7, top_k=20, logprobs=2),
    SamplingParams(max_tokens=3, temperature=1.1, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    SamplingParams(max_tokens=4, temperature=0, presence_penalty=0.5, logit_bias={3: 1.0}, min_tokens=2),
)


def run(engine: Engine, params: tuple[SamplingParams, ...] = SAMPLING) -> None:
    """Requests of several lengths join as the engine runs; none may fail."""
    rng, names = random.Random(5), []
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 4, 17, 30)]
    while prompts or engine.has_unfinished:
        if prompts:
            names.append(engine.add_request(prompts.pop(), params[len(names) % len(params)]))
        engine.step()
    assert [engine.outputs[name].error for name in names] == [None] * 4


def engine_of(model: Any, **settings: Any) -> Engine:
    settings = dict(max_num_seqs=3, max_num_batched_tokens=24, block_size=4, max_model_len=80) | settings
    return Engine(EngineConfig(model, **settings), say=None)


@pytest.mark.parametrize("attention_backend", ["sdpa", "triton"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_t4_can_do_all_that_an_engine_asks_in_fp32(
    family: str, attention_backend: Any, cuda_graphs: bool
) -> None:
    config = reference(family).config  # made here: the model is kept, and other tests read its weights
    with FakeGpu(GPUS["T4"]) as gpu:
        model = fake_model(config, dtype="float32")
        engine = engine_of(model, attention_backend=attention_backend, cuda_graphs=cuda_graphs)
        assert engine.runner.backend.name == attention_backend
        assert bool(engine.runner.graphs and engine.runner.graphs.captured) is cuda_graphs
        with gpu.counting() as counts:
            run(engine)
    assert bool(counts.replays) is cuda_graphs
    assert bool(counts.kernels["_split_kernel"] + counts.captured["_split_kernel"]) is (
        attention_backend == "triton"
    )


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_t4_can_do_all_that_eight_bits_ask(cuda_graphs: bool) -> None:
    with FakeGpu(GPUS["T4"]) as gpu:
        engine = engine_of(fake_model("tiny", quantization="int8"), cuda_graphs=cuda_graphs)
        with gpu.counting() as counts:
            run(engine)
    assert bool(counts.replays) is cuda_graphs
    assert counts.kernels["_int_mm"] and not counts.kernels["_weight_int8pack_mm"]


@pytest.mark.parametrize("attention_backend", ["sdpa", "triton"])
@pytest.mark.parametrize(("gpu", "dtype"), [("T4", "float32"), ("H100", "bfloat16")])
def test_a_gpu_can_do_all_that_a_kv_cache_in_eight_bits_asks(
    gpu: str, dtype: str, attention_backend: Any
) -> None:
    config = reference("mistral").config
    with FakeGpu(GPUS[gpu]) as fake:
        model = fake_model(config, dtype=dtype)
        engine = engine_of(model, attention_backend=attention_backend, kv_cache_dtype="int8")
        assert engine.runner.backend.name == attention_backend
        with fake.counting() as counts:
            run(engine)
    assert counts.replays


@pytest.mark.parametrize("as_t4", [False, True])
@pytest.mark.parametrize("attention_backend", ["sdpa", "triton"])
def test_a_newer_gpu_can_do_all_that_is_asked_in_half_precision(attention_backend: Any, as_t4: bool) -> None:
    config = reference("mistral").config
    with FakeGpu(GPUS["H100"]) as gpu:
        model = fake_model(config, dtype="float16" if as_t4 else "auto")
        assert model.dtype == (torch.float16 if as_t4 else torch.bfloat16)
        engine = engine_of(model, attention_backend=attention_backend, as_t4=as_t4)
        with gpu.counting() as counts:
            run(engine)
    packed = attention_backend == "triton" and not as_t4 and varlen_attention() is not None
    assert bool(counts.kernels["torch_attn::_varlen_attn"]) is packed


def test_greedy_answers_make_no_fp64_and_wait_for_the_gpu_as_often_as_they_must() -> None:
    with FakeGpu(GPUS["T4"]) as gpu:
        engine = engine_of(fake_model("tiny"))
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=4, temperature=0))
        engine.step()
        with gpu.counting() as counts:
            engine.step()
    assert not counts.doubles
    assert counts.replays == 1 and counts.waits <= 3


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.5e9, 16e9])
def test_the_pool_takes_what_weights_and_a_step_leave_free(memory: float) -> None:
    with FakeGpu(dataclasses.replace(GPUS["T4"], memory=memory)) as gpu:
        model = fake_model("SmolLM2-135M")
        weights = gpu.allocated
        assert weights == pytest.approx(134_515_008 * 2, rel=0.001)
        engine = Engine(EngineConfig(model, cuda_graphs=False), say=None)
        taken = engine.pool.num_blocks * 16 * model.module.kv_shape.bytes_per_token
        assert taken <= 0.8 * (memory - weights)
        wanted = 32 * 8192 // 16
        assert engine.pool.num_blocks == wanted or taken > 0.4 * (memory - weights)
        del engine, model
        gc.collect()
        assert gpu.allocated == 0


def test_a_model_that_leaves_no_room_is_refused_in_words() -> None:
    with FakeGpu(dataclasses.replace(GPUS["T4"], memory=0.5e9)):
        model = fake_model("SmolLM2-135M")
        with pytest.raises(ValueError, match="too little memory"):  # for so many rows of logits
            Engine(EngineConfig(model, max_num_seqs=512), say=None)


# -- faults are noticed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x + torch.zeros(3), "at least two devices"),
        (lambda x: x[torch.zeros(2, dtype=torch.long)], "index mixes devices"),
        (lambda x: x[x > 0], "index waits for the GPU"),
        (lambda x: x.nonzero(), "nonzero waits for the GPU"),
        (lambda x: x.tolist(), "reading a tensor waits for the GPU"),
        (lambda x: x.sum().item(), "reading a tensor waits for the GPU"),
        (lambda x: bool(x.any()), "reading a tensor waits for the GPU"),
        (lambda x: x.cpu(), "_to_copy waits for the GPU"),
        (lambda x: torch.cuda.synchronize(), "synchronize waits for the GPU"),
        (lambda x: torch.tensor([1, 2], device=CUDA), "_to_copy copies numbers from the CPU"),
        (lambda x: x.copy_(torch.zeros(3)), "copy_ copies numbers from the CPU"),
    ],
)
def test_what_a_capture_cannot_hold_is_refused(fault: Callable[[Tensor], object], message: str) -> None:
    with FakeGpu(GPUS["T4"]):
        x = torch.zeros(3, device=CUDA)
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            fault(x)


def test_fp64_is_counted_and_numbers_that_are_too_wide_for_a_kernel_are_refused() -> None:
    with FakeGpu(GPUS["A100"]) as gpu:
        torch.zeros(3, device=CUDA).double()
        assert gpu.counts.doubles == {"_to_copy": 1}
        if (attend := varlen_attention()) is not None:
            q = torch.zeros(4, 2, 8, device=CUDA, dtype=torch.float16)
            starts = torch.tensor([0, 4], device=CUDA)
            with pytest.raises(FakeGpuError, match="int64"):
                attend(q, q, q, starts, starts, 4, 4)


@needs_triton
def test_a_launch_of_triton_with_a_tensor_elsewhere_is_refused() -> None:
    from labkit.kernels.flash_decoding import paged_decode

    with FakeGpu(GPUS["T4"]) as gpu:
        q, blocks = torch.zeros(1, 2, 8, device=CUDA), torch.zeros(2, 2, 1, 4, 8, device=CUDA)
        tables, lengths = torch.zeros(1, 2, device=CUDA, dtype=torch.long), torch.ones(1)
        with pytest.raises(FakeGpuError, match="_split_kernel got lengths on cpu"):
            paged_decode(q, blocks, tables, lengths, scale=1.0)
        paged_decode(q, blocks, tables, lengths.to(CUDA), scale=1.0, splits=2)
        assert gpu.counts.kernels["_split_kernel"] == gpu.counts.kernels["_unite_kernel"] == 1
