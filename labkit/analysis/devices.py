"""What devices can do: by their makers' data sheets, or as measured (by `device_probe.py`). No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from labkit.analysis.roofline import Work
from labkit.sampling_params import check_number


@dataclass(frozen=True)
class Gpu:
    """A GPU, with the numbers of its data sheet.

    Attributes:
        flops: The peak of dense half precision products on tensor cores, in operations/s (a multiplication
            and an addition are two).
        bandwidth: The bandwidth of its memory, in bytes/s.
        memory: The size of its memory, in bytes.
        source: The data sheet that has these numbers.
        capability: The compute capability, (7, 5) for sm_75.
        processors: The number of its multiprocessors; 0 is unknown.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str = ""
    capability: tuple[int, int] = (0, 0)
    processors: int = 0

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "memory"):
            check_number(field, getattr(self, field), 1, math.inf)


# NVIDIA's data sheets, by their numbers. Where one gives a peak with sparsity alone, half of it stands here:
# that of dense matrices. (For the T4's memory, the Turing white paper has 320 GB/s.)
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "T4",
            65e12,
            300e9,
            16e9,
            "NVIDIA T4, data sheet 951643: 65 TFLOPS mixed precision, 300 GB/s",
            capability=(7, 5),
            processors=40,
        ),
        Gpu(
            "L4",
            121e12,
            300e9,
            24e9,
            "NVIDIA L4, data sheet 2595652: 242 TFLOPS with sparsity, 300 GB/s",
            capability=(8, 9),
            processors=58,
        ),
        Gpu(
            "A100",
            312e12,
            2039e9,
            80e9,
            "NVIDIA A100 80GB SXM, data sheet 2188504: 312 TFLOPS, 2,039 GB/s",
            capability=(8, 0),
            processors=108,
        ),
        Gpu(
            "H100",
            989.5e12,
            3350e9,
            80e9,
            "NVIDIA H100 SXM, data sheet 2287922: 1,979 TFLOPS with sparsity, 3.35 TB/s",
            capability=(9, 0),
            processors=132,
        ),
    )
}


@dataclass(frozen=True)
class Link:
    """What connects devices that share a model.

    Attributes:
        bandwidth: The bytes/s that a device can send while it receives as many.
        source: The document that has this number. Where it counts both directions, half of it stands here.
    """

    name: str
    bandwidth: float
    source: str = ""

    def __post_init__(self) -> None:
        check_number("bandwidth", self.bandwidth, 1, math.inf)


def _pcie(generation: str, transfers: float) -> Link:
    """Return a link of 16 lanes, with so many bits/s each, of which 128 in 130 carry data."""
    source = f"PCI Express Base Specification {generation}: {transfers / 1e9:.0f} GT/s a lane, 128b/130b"
    return Link(f"PCIe {generation} x16", 16 * transfers * 128 / 130 / 8, source)


# NVIDIA's data sheets for NVLink, and the standards for the others. None of them knows headers, switches, or
# GPUs that reach each other through the processor's memory only: what is measured is less. Nor do they state
# a latency.
LINKS = {
    link.name: link
    for link in (
        Link("NVLink A100", 300e9, "NVIDIA A100 80GB SXM, data sheet 2188504: 600 GB/s, both directions"),
        Link("NVLink H100", 450e9, "NVIDIA H100 SXM, data sheet 2287922: 900 GB/s, both directions"),
        Link("NVLink H200", 450e9, "NVIDIA H200 SXM, data sheet: 900 GB/s, both directions"),
        _pcie("3.0", 8e9),
        _pcie("4.0", 16e9),
        _pcie("5.0", 32e9),
        Link("10 GbE", 10e9 / 8, "IEEE 802.3ae: 10 Gb/s, each direction"),
        Link("25 GbE", 25e9 / 8, "IEEE 802.3by: 25 Gb/s, each direction"),
        Link("100 GbE", 100e9 / 8, "IEEE 802.3ba: 100 Gb/s, each direction"),
    )
}


@dataclass(frozen=True)
class Ceiling:
    """What a device was measured to do: `bandwidth` in bytes/s, `peak` by dtype in operations/s."""

    bandwidth: float
    peak: dict[str, float]

    def least_seconds(self, works: Iterable[Work], dtype: str) -> float:
        """Return the least time for steps that come one after the other."""
        return sum(work.seconds(self.bandwidth, self.peak[dtype]) for work in works)

    def best(self, other: Ceiling) -> Ceiling:
        """Return the higher of two measurements: a busy moment lowers them, and nothing raises them."""
        peak = {dtype: max(value, other.peak.get(dtype, 0.0)) for dtype, value in self.peak.items()}
        return Ceiling(max(self.bandwidth, other.bandwidth), peak)
