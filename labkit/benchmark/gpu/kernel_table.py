"""What becomes of the kernels in Triton: they are compiled for GPUs that need not be here, and read back.

Which specialisations there are is not listed anywhere: engines on a fake GPU ask for them (`fake_gpu.py`),
with all their graphs and some steps beside them. Triton's own compiler comes with the assembler and
disassembler of CUDA, so registers, spills and shared memory are those of the code that will run.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedConfig

from labkit.analysis.devices import GPUS, Gpu
from labkit.analysis.shapes import SHAPES, config_of
from labkit.benchmark.gpu.counts import Launch
from labkit.benchmark.gpu.fake_gpu import FakeGpu, fake_model
from labkit.benchmark.report import Report
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.sampling_params import SamplingParams

T4 = GPUS["T4"]
TARGETS = {  # by compute capability; where no GPU of the list has it, the next one asks
    75: T4,
    80: GPUS["A100"],
    86: dataclasses.replace(GPUS["L4"], name="A10G", capability=(8, 6), processors=80),
    89: GPUS["L4"],
    90: GPUS["H100"],
    100: dataclasses.replace(GPUS["H100"], name="B200", capability=(10, 0), processors=148),
}
WINDOWED = "Mistral-7B"  # heads of 128, and a sliding window
MOST_SHARED = 64 * 1024  # bytes that a block of threads of sm_75 can have
_REGISTERS = 64 * 1024  # of a multiprocessor
_THREADS = {75: 1024, 86: 1536, 89: 1536}  # of a multiprocessor; 2,048 on others
_WIDE = 128  # bits


@dataclass(frozen=True)
class Specialisation:
    """A kernel with its arguments; of a tensor, dtype and distance from a multiple of 16 bytes."""

    shape: str
    dtype: str
    kernel: Any = field(repr=False, compare=False)
    name: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, launch: Launch, shape: str, dtype: torch.dtype) -> Specialisation:
        def kind(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.dtype, value.storage_offset() * value.dtype.itemsize % 16

        arguments = tuple((name, kind(value)) for name, value in launch.arguments.items())
        return cls(shape, str(dtype).removeprefix("torch."), launch.kernel, launch.name, arguments)


@dataclass(frozen=True)
class Compiled:
    """A kernel as a GPU runs it. Memory is in bytes, for each thread or, if shared, for each program.

    Attributes:
        loads: How many instructions read global memory, by their width in bits.
        programs: How many programs fit on a multiprocessor at once, by its registers and threads.
    """

    kernel: str
    shape: str
    dtype: str
    sm: int
    registers: int
    spilled: int
    shared: int
    programs: int
    loads: dict[int, int]

    @property
    def is_fine(self) -> bool:
        """Whether nothing is spilled, shared memory suffices, and the cache is read 16 bytes at a time."""
        narrow = sum(self.loads.get(bits, 0) for bits in (8, 16))  # one is the query, once in a program
        wide = not self.reads_cache or (self.loads.get(_WIDE, 0) >= 2 and narrow <= 1)
        return not self.spilled and self.shared <= MOST_SHARED and wide

    @property
    def reads_cache(self) -> bool:
        """Whether this kernel reads keys and values, which is where the time goes."""
        return "unite" not in self.kernel


# -- what engines ask for -------------------------------------------------------------------------


def architectures() -> dict[str, PreTrainedConfig]:
    """Return the architectures whose kernels are compiled, with one layer each: all ask for the same."""
    window = MistralConfig(head_dim=128, sliding_window=4096)
    found = {shape: config_of(shape) for shape in SHAPES} | {WINDOWED: window}
    for config in found.values():
        config.num_hidden_layers = 1
    return found


def asked(gpu: Gpu, shape: str, config: PreTrainedConfig, dtype: torch.dtype) -> list[Specialisation]:
    """Return all that an engine with 32 seats asks for on a GPU: in warm-up, in graphs, and between them."""
    found: dict[Specialisation, None] = {}

    def note(launch: Launch) -> None:
        found[Specialisation.of(launch, shape, dtype)] = None

    with FakeGpu(gpu, note):
        model = fake_model(config, dtype=str(dtype).removeprefix("torch."))
        engine = Engine(EngineConfig(model, max_num_batched_tokens=64, max_model_len=8192), say=None)
        for count, length in ((1, 300), (3, 20), (4, 40), (1, 60)):  # prompts beside rows that decode
            for _ in range(count):
                engine.add_request([5] * length, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
            engine.step()
        engine.run()
    return list(found)


def all_asked(sms: Sequence[int] = tuple(TARGETS)) -> Iterator[tuple[int, Specialisation]]:
    """Give what each GPU is asked for, in the dtypes that "auto" takes there, and on a T4 in fp32 as well."""
    for sm in sms:
        dtypes = (torch.float16, torch.float32) if sm < 80 else (torch.bfloat16,)
        for shape, config in architectures().items():
            for dtype in dtypes:
                for one in asked(TARGETS[sm], shape, config, dtype):
                    yield sm, one


# -- the compiler ---------------------------------------------------------------------------------


def why_not() -> str:
    """Say what is missing for compiling here, or nothing."""
    try:
        import triton
        from triton import knobs
    except ImportError:
        return "there is no Triton with an assembler of its own (3.4 or newer)"
    if knobs.runtime.interpret:
        return f"Triton {triton.__version__} interprets kernels here: unset TRITON_INTERPRET"
    tools = (knobs.nvidia.ptxas, knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm)
    missing = [tool for tool in tools if not Path(tool.path).is_file()]
    return f"Triton {triton.__version__} comes without {missing[0].path}" if missing else ""


class _Absent:
    """A driver for a GPU that is not here: Triton asks it what to compile for."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(one: Specialisation, sm: int) -> Any:
    """Compile for a compute capability; returns Triton's compiled kernel, the same one for the same code."""
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    class Pointer(MockTensor):
        def __init__(self, dtype: torch.dtype, offset: int) -> None:
            super().__init__(dtype)
            self.data_ptr = lambda: offset  # type: ignore[method-assign]

    arguments = {
        name: Pointer(*value) if isinstance(value, tuple) else value for name, value in one.arguments
    }
    driver.set_active(_Absent(sm))
    return one.kernel.warmup(grid=(1,), **arguments)


def read_back(cubin: bytes) -> tuple[int, int, dict[int, int]]:
    """Return registers, bytes of local memory, and loads from global memory by their width in bits."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _said(knobs.nvidia.cuobjdump.path, "-res-usage", file)
        code = _said(knobs.nvidia.nvdisasm.path, "-c", file)
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    spilled = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code))
    widths = (
        re.search(r"\.(?:[US]?(8|16|64|128))(?:\.|$)", name) for name in re.findall(r"\bLDG(\S*)", code)
    )
    return registers, spilled, dict(Counter(int(found[1]) if found else 32 for found in widths))


def _said(*command: Any) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


# -- the table ------------------------------------------------------------------------------------


@dataclass
class KernelReport(Report):
    """All kernels on all GPUs."""

    rows: list[Compiled]

    @property
    def faults(self) -> list[Compiled]:
        """Those that spill, take too much shared memory, or read the cache in small pieces."""
        return [row for row in self.rows if not row.is_fine]

    def __str__(self) -> str:
        sms = sorted({row.sm for row in self.rows})
        lines = [
            f"Made by `python -m labkit.benchmark --kernels` ({self.settings_line}). Registers of a thread,",
            "and in brackets how many programs fit on a multiprocessor at once.",
            "",
            "| kernel | shape | dtype | " + " | ".join(f"sm_{sm}" for sm in sms) + " |",
            "|---|---|---|" + "---|" * len(sms),
        ]
        cells: dict[tuple, dict[int, Compiled]] = {}
        for row in self.rows:
            key = (row.kernel, row.shape, row.dtype)
            here = cells.setdefault(key, {})
            here[row.sm] = max(here.get(row.sm, row), row, key=lambda one: one.registers)
        for key, found in cells.items():
            told = (f"{found[sm].registers} ({found[sm].programs})" if sm in found else "" for sm in sms)
            lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(told)} |")
        shared = max(row.shared for row in self.rows)
        lines += ["", f"Shared memory: at most {shared:,} bytes a program. "]
        lines[-1] += (
            "Nothing is spilled, no local memory is used, and keys and values are read 16 bytes at a time."
            if not self.faults
            else f"NOT AS IT SHOULD BE: {'; '.join(map(str, self.faults))}"
        )
        return "\n".join(lines)


def kernel_report(sms: Sequence[int] = tuple(TARGETS)) -> KernelReport:
    """Compile everything that engines ask for, and read it back.

    Raises:
        ValueError: If there is no compiler here.
    """
    if reason := why_not():
        raise ValueError(f"kernels cannot be compiled here: {reason}")
    import triton
    from triton import knobs

    rows: dict[tuple[int, str, str], Compiled] = {}
    for sm, one in all_asked(sms):
        compiled = compile_kernel(one, sm)
        key = (sm, one.name, compiled.hash)
        if key not in rows:
            rows[key] = _row(one, sm, compiled)
    versions = {"Triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}
    order = sorted(rows.values(), key=lambda row: (row.kernel, row.dtype, row.sm))
    return KernelReport(versions, order)


def _row(one: Specialisation, sm: int, compiled: Any) -> Compiled:
    registers, spilled, loads = read_back(compiled.asm["cubin"])
    threads = 32 * compiled.metadata.num_warps
    allocated = -(-registers // 8) * 8 * threads  # a warp gets its registers in pieces of 256
    programs = min(_REGISTERS // allocated, _THREADS.get(sm, 2048) // threads)
    shape = one.shape if "q" in dict(one.arguments) else "all"
    return Compiled(
        one.name,
        shape,
        one.dtype,
        sm,
        registers,
        spilled,
        compiled.metadata.shared,
        programs,
        loads,
    )
