"""Measures what a device can do: how fast it reads memory, and how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from labkit.analysis.devices import Ceiling
from labkit.kernels.int8 import pick_kernel

_READ_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}  # far beyond any cache
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def measure_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    read_bytes: int | None = None,
    gemm_size: int | None = None,
    repeats: int = 5,
) -> Ceiling:
    """Measure a device with one big read and one big product.

    Args:
        device: The device.
        dtype: The dtype of the product.
        int8: Whether a product of int8 is measured as well.
        read_bytes: The size of the read; None is far beyond the caches.
        gemm_size: The number of rows and columns of the matrices.
        repeats: The number of runs of each, after one to warm up; the fastest counts.
    """
    size = read_bytes or _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    n = gemm_size or _GEMM_SIZE.get(device.type, _GEMM_SIZE["cpu"])
    bandwidth = _bandwidth(size, device, repeats)
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind(0)
    peak = {str(dtype).removeprefix("torch."): 2 * n**3 / _fastest(lambda: a @ b, device, repeats)}
    if int8:
        kernel, _ = pick_kernel(device)
        weight = torch.randint(-60, 61, (n, n), device=device, dtype=torch.int8)
        multiply = kernel(weight, torch.ones(n, 1, device=device))
        x = torch.randint(-127, 128, (n, n), device=device).float()
        peak["int8"] = 2 * n**3 / _fastest(lambda: multiply(x), device, repeats)
    return Ceiling(bandwidth, peak)


def _bandwidth(size: int, device: torch.device, repeats: int) -> float:
    """Measure the bytes per second of a read. Two kernels read, and the faster one counts."""
    data = torch.ones(size // 4, device=device)
    return data.nbytes / min(_fastest(read, device, repeats) for read in (data.sum, data.amax))


def _fastest(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. A CPU has finished when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
