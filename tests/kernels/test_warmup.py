"""What happens before the first request: memory is measured, graphs are captured, and switches refused."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import labkit.engine
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.kernels import warmup
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.warmup import activation_bytes, backend_for, check_memory, tried_backend, warm_up
from labkit.models.cache_dir import keep_compiled
from labkit.models.load import LoadedModel
from tests.conftest import loaded
from tests.kernels.tape import TapeCapture


class Full(TapeCapture):
    """Has room for graphs only after so many attempts."""

    def __init__(self, attempts: int) -> None:
        super().__init__()
        self.attempts = attempts

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.attempts:
            self.attempts -= 1
            raise torch.OutOfMemoryError("out of memory")
        return super().__call__(compute)


def test_out_of_memory_in_warm_up_lowers_num_blocks_and_says_so() -> None:
    model, lines = loaded("llama").module, []
    config = EngineConfig(loaded("llama"), max_num_seqs=2, block_size=4)
    cache, graphs = warm_up(model, SDPA, config, 80, say=lines.append, capture=Full(2))
    assert cache.num_blocks == 45
    assert graphs.cache is cache and graphs.captured
    said = [line for line in lines if line.startswith("Out of memory")]
    assert said == [
        "Out of memory in warm-up: num_blocks is lowered from 80 to 60.",
        "Out of memory in warm-up: num_blocks is lowered from 60 to 45.",
    ]
    with pytest.raises(ValueError, match="too little memory on cpu for a decode step"):
        warm_up(model, SDPA, config, 3, say=lines.append, capture=Full(10**6))


def test_the_widest_step_is_tried_before_blocks_are_counted(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = loaded(family).module, []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        config = EngineConfig(loaded(family), max_num_seqs=4, max_num_batched_tokens=100, max_model_len=300)
        assert activation_bytes(model, SDPA, config) == 4000
    finally:
        hook.remove()
    token_ids, positions, cache, metadata = seen[0]
    assert len(token_ids) == 100 and positions.tolist() == [299, *range(201, 300)]
    assert cache.num_blocks == 1
    assert [(group.first, group.last) for group in metadata.groups] == [(0, 1), (1, 100)], "both are tried"


@pytest.mark.parametrize("budget", [1, 2, 17, 18])
def test_a_small_budget_is_tried_as_well(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 0),
        ("max_memory_allocated", 7),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    config = EngineConfig(loaded("llama"), max_num_seqs=1, max_num_batched_tokens=budget)
    assert activation_bytes(loaded("llama").module, SDPA, config) == 7


# -- ways back ------------------------------------------------------------------------------------


class Broken(TapeCapture):
    """Fails after so many recordings, in the way of a capture: its end is an error too."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.after:
            self.after -= 1
            return super().__call__(compute)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("after", [0, 1])
def test_an_engine_goes_on_eagerly_where_graphs_cannot_be_captured(after: int) -> None:
    model, lines = fresh(), []
    config = EngineConfig(model, max_num_seqs=2, block_size=4, num_blocks=40)
    for _ in range(2):
        cache, graphs = warm_up(model.module, SDPA, config, 40, say=lines.append, capture=Broken(after))
        assert graphs is None and cache.num_blocks == 40
    assert lines[1:] == [
        "CUDA graphs cannot be captured here, so every step runs eagerly "
        "(RuntimeError: operation not permitted when stream is capturing)."
    ]
    with pytest.raises(ValueError, match="num_blocks=10000000000 needs"):  # no fault of a capture
        warm_up(model.module, SDPA, config, 10**10, capture=Broken(after))


def fresh() -> LoadedModel:
    """A model of which nothing was told yet."""
    shared = loaded("llama")
    return dataclasses.replace(shared, module=copy.copy(shared.module))


@dataclass(eq=False)
class OnGpu:
    """As much of a model on a GPU as is asked before a step."""

    device: torch.device = torch.device("cuda")  # noqa: RUF009


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU on which the steps of the backends fail that have an error here."""
    errors: dict[str, Any] = {}

    def backend_for(model: Any, config: EngineConfig) -> Backend:
        name = "sdpa" if config.attention_backend == "sdpa" else "triton"
        return dataclasses.replace(SDPA, name=name, reason=f"because of {name}")

    def try_step(model: Any, backend: Backend, config: EngineConfig) -> int:
        if backend.name in errors:
            raise errors[backend.name]
        return 5000

    monkeypatch.setattr(warmup, "backend_for", backend_for)
    monkeypatch.setattr(warmup, "activation_bytes", try_step)
    return errors


def test_a_step_that_fails_under_triton_is_tried_with_pytorchs_own_attention(gpu: dict[str, Any]) -> None:
    model, lines = OnGpu(), []
    backend, reserve = tried_backend(model, EngineConfig(), lines.append)
    assert (backend.name, reserve) == ("triton", 5000)
    gpu["triton"] = RuntimeError("out of resource: shared memory\n...")
    backend, reserve = tried_backend(OnGpu(), EngineConfig(), lines.append)
    assert (backend.name, reserve) == ("sdpa", 5000)
    why = "Triton's kernel does not run here (RuntimeError: out of resource: shared memory)"
    assert lines[1] == "Attention on cuda: triton (because of triton)."
    assert lines[3] == f"Attention on cuda: sdpa ({SDPA.reason}; {why})."
    assert lines[0] == lines[2] and lines[0].startswith("Trying attention on cuda: kernels that are new here")
    with pytest.raises(ValueError, match="must be auto or sdpa here, not 'triton': Triton's kernel does not"):
        tried_backend(OnGpu(), EngineConfig(attention_backend="triton"), None)
    gpu["triton"] = ValueError("too little memory on cuda for a step")  # which is no fault of Triton
    with pytest.raises(ValueError, match="too little memory"):
        tried_backend(OnGpu(), EngineConfig(), None)
    gpu["sdpa"] = RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="device-side assert"):
        tried_backend(OnGpu(), EngineConfig(attention_backend="sdpa"), None)


def test_each_model_is_told_of_once(gpu: dict[str, Any]) -> None:
    lines, config = [], EngineConfig(fresh(), max_num_seqs=2, block_size=4)
    model = config.model.module
    for _ in range(3):
        tried_backend(model_on_gpu := OnGpu(), config, lines.append)
        tried_backend(model_on_gpu, config, lines.append)
        warm_up(model, SDPA, config, 40, say=lines.append, capture=TapeCapture())
    words = [line.split()[0] for line in lines]
    assert words == [
        "Trying",
        "Attention",
        "Capturing",
        "Captured",
        "Trying",
        "Attention",
        "Trying",
        "Attention",
    ]
    lines.clear()
    tried_backend(model_on_gpu, dataclasses.replace(config, attention_backend="sdpa"), lines.append)
    assert lines[-1] == "Attention on cuda: sdpa (because of sdpa).", "another answer is told"
    warm_up(model, SDPA, config, 80, say=lines.append, capture=Full(1))
    assert lines[-1] == "Out of memory in warm-up: num_blocks is lowered from 80 to 60."


# -- one at a time, and the memory there is -------------------------------------------------------


@pytest.mark.parametrize("part", ["warm_up", "tried_backend", "make_speculator"])
def test_one_engine_at_a_time_warms_up(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, inside, most = getattr(labkit.engine, part), [], []

    def slowly(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return original(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(labkit.engine, part, slowly)
    config = EngineConfig(loaded("llama"), num_blocks=8, speculative="ngram")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: Engine(config, say=None), range(8)))
    assert most == [1] * 8


def test_what_the_allocator_holds_unused_is_memory_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [2**20]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 2**34))
    shape = dataclasses.replace(loaded("llama").module.kv_shape, device=torch.device("cuda"))
    check_memory(shape, 1000, 16)
    with pytest.raises(
        ValueError, match=r"num_blocks=1000000 needs 3.8 GiB for the KV cache, but cuda has 1.0"
    ):
        check_memory(shape, 10**6, 16)


def test_compiled_kernels_are_kept_beside_what_was_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    knobs = pytest.importorskip("triton").knobs
    assert knobs.cache.dir == str(tmp_path / "triton"), "Triton looks when it compiles"


# -- refusals -------------------------------------------------------------------------------------


def test_a_cpu_and_who_does_not_want_them_get_no_graphs() -> None:
    model = loaded("llama").module
    config = EngineConfig(loaded("llama"), num_blocks=8)
    assert warm_up(model, SDPA, config, 8)[1] is None
    config = EngineConfig(loaded("llama"), num_blocks=8, cuda_graphs=False)
    assert warm_up(model, SDPA, config, 8, capture=TapeCapture())[1] is None
    engine = Engine(config)
    assert engine.runner.graphs is None and engine.runner.backend.name == "sdpa"


def test_switches_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_backend must be one of auto, sdpa, triton, not 'flash'"):
        EngineConfig(attention_backend="flash")
    with pytest.raises(ValueError, match="cuda_graphs must be"):
        EngineConfig(cuda_graphs=1)
    with pytest.raises(ValueError, match="as_t4 computes in float16: dtype must be auto or float16"):
        EngineConfig(as_t4=True, dtype="bfloat16")
    EngineConfig(as_t4=True, dtype="float16")
    model = loaded("llama")
    with pytest.raises(ValueError, match="as_t4 needs a CUDA GPU, and the device is cpu"):
        Engine(EngineConfig(model, as_t4=True))
    with pytest.raises(ValueError, match="attention_backend must be auto or sdpa"):
        Engine(EngineConfig(model, attention_backend="triton", device="cpu"))
    other = torch.nn.Module()  # of another class than `Transformer`, as models that transformers runs are
    assert backend_for(other, EngineConfig()) is SDPA
    with pytest.raises(ValueError, match="for a model that transformers runs"):
        backend_for(other, EngineConfig(attention_backend="triton"))


def test_a_cache_that_does_not_fit_says_how_much_it_needs() -> None:
    with pytest.raises(ValueError, match=r"num_blocks=10000000000 needs [\d.]+ GiB for the KV cache"):
        Engine(EngineConfig("tiny-random", num_blocks=10**10))
