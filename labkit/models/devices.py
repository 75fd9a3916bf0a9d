"""Where a model runs and in which precision: names to devices and dtypes, and what "auto" means."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from labkit.kernels.packed_linear import PackedLinear, bf16_on_cpu
from labkit.models.errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is the GPU that CUDA sees, else the CPU.

    Raises:
        ModelError: if this machine does not have it; the message lists those it has.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        found = torch.device(device)
        missing = (found.index or 0) >= counts.get(found.type, 0)
    except (RuntimeError, TypeError):  # torch knows no device of this name
        missing = True
    if missing:
        here = ["cpu", *(f"cuda:{number}" for number in range(gpus)), *["mps"] * counts["mps"]]
        raise ModelError(f"device {str(device)!r} is not available; there is {', '.join(here)}")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a name, or what "auto" means on a device (see `auto_reason`).

    Raises:
        ModelError: if there is no such dtype, and the message lists the names; or if it is bf16, and the GPU
            does not have that.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if _has_bf16(device) else torch.float16
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ModelError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    if found == torch.bfloat16 and device.type == "cuda" and not _has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ModelError(
            f"dtype bfloat16 needs a GPU of sm_80 or newer, not sm_{major}{minor} as {device}: take float16"
        )
    return found


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16. Older ones, such as a T4, emulate it, far slower than their fp16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def auto_reason(device: torch.device) -> str:
    """Say why "auto" takes the dtype that it takes on a device."""
    if device.type == "cpu" and bf16_on_cpu():
        share = _bf16_share()
        return f"the most exact; products in bfloat16 take {share:.2f} of the time on this CPU"
    if device.type != "cuda":
        return "the most exact; half precision is faster only where the hardware computes in it"
    if resolve_dtype("auto", device) == torch.bfloat16:
        return "this GPU has it in hardware, and its range is fp32's"
    return "this GPU has no bf16 in hardware"


def _bf16_share() -> float:
    """Return the time of a product in bf16 as a share of that in fp32, in a tenth of a second."""
    x = torch.randn(32, 1024)
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        layer = PackedLinear(nn.Linear(1024, 1024, bias=False, dtype=dtype))
        products[dtype] = functools.partial(layer, x.to(dtype))
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where others use the cores, too
    try:
        with torch.inference_mode():
            for _ in range(20):
                for dtype, product in products.items():
                    begin = time.perf_counter()
                    product()
                    seconds[dtype].append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])
