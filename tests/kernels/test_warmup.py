"""What happens before the first request: memory is measured, graphs are captured, and switches refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.warmup import activation_bytes, backend_for, warm_up
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
    token_ids, positions, cache, _ = seen[0]
    assert len(token_ids) == 100 and positions.tolist() == list(range(200, 300))
    assert cache.num_blocks == 1


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
