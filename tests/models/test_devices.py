"""Names of dtypes and devices, and what "auto" means."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.packed_linear import bf16_on_cpu
from labkit.models import devices
from labkit.models.devices import DTYPES, auto_reason, resolve_device, resolve_dtype
from labkit.models.errors import ModelError
from labkit.models.load import load_model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(torch.float16, torch.float16), *DTYPES.items(), ("auto", torch.float32)],
)
def test_dtype_names(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, torch.device("cpu")) is dtype


@pytest.mark.parametrize("name", ["float8", "int8", torch.int64, None, 16, ["fp16"]], ids=str)
def test_unknown_dtype_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ModelError, match="auto, float32, fp32, float16, fp16, half, bfloat16, bf16"):
        load_model("tiny-random", dtype=name)


@pytest.fixture(params=[(7, 0), (7, 5), (8, 0), (9, 0)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """That of the GPU cuda:1, beside another one that has everything."""
    found = {None: (10, 0), 0: (10, 0), 1: request.param}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return request.param


def test_auto_dtype_on_a_gpu_is_bf16_only_in_hardware(capability: tuple[int, int]) -> None:
    found = resolve_dtype("auto", torch.device("cuda:1"))
    assert found is (torch.bfloat16 if capability >= (8, 0) else torch.float16)


@pytest.mark.parametrize("name", ["bfloat16", "bf16", torch.bfloat16], ids=str)
def test_bf16_is_refused_where_a_gpu_only_emulates_it(
    capability: tuple[int, int], name: str | torch.dtype
) -> None:
    if capability >= (8, 0):
        assert resolve_dtype(name, torch.device("cuda:1")) is torch.bfloat16
        return
    told = f"bfloat16 needs a GPU of sm_80 or newer, not sm_7{capability[1]} as cuda:1: take float16"
    with pytest.raises(ModelError, match=told):
        load_model("tiny-random", dtype=name, device="cuda:1", say=None)
    assert resolve_dtype("float16", torch.device("cuda:1")) is torch.float16


def test_the_reason_for_fp32_claims_no_speed_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with avx512_bf16 or AMX is faster in bf16: that fp32 is the fastest is not known."""
    plain = "the most exact; half precision is faster only where the hardware computes in it"
    assert auto_reason(torch.device("mps")) == plain
    monkeypatch.setattr(devices, "bf16_on_cpu", lambda: False)
    assert auto_reason(torch.device("cpu")) == plain
    monkeypatch.setattr(devices, "bf16_on_cpu", lambda: True)
    monkeypatch.setattr(devices, "_bf16_share", lambda: 0.517)
    assert (
        auto_reason(torch.device("cpu"))
        == "the most exact; products in bfloat16 take 0.52 of the time on this CPU"
    )


@pytest.mark.skipif(not bf16_on_cpu(), reason="this CPU has no bf16")
def test_measuring_bf16_leaves_the_threads_as_they_are() -> None:
    threads = torch.get_num_threads()
    assert devices._bf16_share() > 0
    assert torch.get_num_threads() == threads


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == resolve_device(torch.device("cpu"))
    for missing in ("cuda", "cuda:0", "mps", "gpu", "meta", "cpu:x", None, torch.device("cuda")):
        with pytest.raises(ModelError, match=r"there is cpu$"):
            resolve_device(missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ModelError, match=r"there is cpu, cuda:0, cuda:1$"):
        resolve_device("cuda:2")
