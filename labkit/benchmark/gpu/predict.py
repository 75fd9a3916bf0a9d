"""What a decode step would take on a GPU that is not here, and why.

How many kernels a step launches, and how many bytes pass through them, is counted: the engine runs on a fake
GPU (`fake_gpu.py`). What must be moved and computed at the least is `labkit.analysis.roofline`'s. What a
launch costs is assumed, in `Costs`, and that is what a measurement has to correct (`check.py` puts both side
by side).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

from labkit.analysis.devices import GPUS, Gpu
from labkit.analysis.roofline import Shape, StepWork, Work
from labkit.analysis.shapes import SEATS, SHAPES
from labkit.benchmark.gpu.counts import Counts
from labkit.benchmark.gpu.fake_gpu import FakeGpu, fake_model
from labkit.benchmark.report import Report
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.kernels.warmup import activation_bytes
from labkit.models.load import LoadedModel
from labkit.sampling_params import SamplingParams

PROMPT = 128  # tokens that each row has in the cache
_LENGTH = 256  # the longest request
_ONE_GRAPH = 2**40  # bytes: after the first graph, which holds all seats, nothing is left for another


@dataclass(frozen=True)
class Costs:
    """What a data sheet does not say: assumptions, until a measurement takes their place.

    Attributes:
        operator: The seconds that Python and PyTorch take to launch one operator.
        kernel: The seconds that each kernel costs the GPU beside its bytes, to start and to drain.
        step, row: The seconds of a step, and of each of its rows, in which the GPU waits for Python.
        bandwidth, peak: The shares of the data sheet's bandwidth and peak that can be had.
    """

    operator: float
    kernel: float
    step: float = 5e-4
    row: float = 2e-5
    bandwidth: float = 0.8
    peak: float = 0.5

    @property
    def reasons(self) -> str:
        """The assumptions in words."""
        return (
            f"Assumed: {1e6 * self.operator:g} us of CPU to launch an operator, {1e6 * self.kernel:g} us of "
            f"GPU for each kernel beside its bytes, {self.bandwidth:.0%} of the bandwidth and "
            f"{self.peak:.0%} of the peak on the data sheet, {1e3 * self.step:g} ms of Python for a step and "
            f"{1e6 * self.row:g} us for a row."
        )


# A T4 stands beside one or two old and slow CPU cores in most places, such as Colab.
_COSTS = {"T4": Costs(operator=10e-6, kernel=3e-6), "L4": Costs(operator=8e-6, kernel=2.5e-6)}
_NEWER = Costs(operator=6e-6, kernel=2e-6)


def costs_of(gpu: Gpu) -> Costs:
    """Return what is assumed for a GPU and the CPU beside it."""
    return _COSTS.get(gpu.name, _NEWER)


@dataclass(frozen=True)
class Prediction:
    """A decode step.

    Attributes:
        work: What it must move and compute at the least.
        traffic: The bytes that pass through its kernels, with activations.
        kernels: How many the GPU runs.
        operators: How many of these, and of graphs and copies, Python launches one by one.
        floor: The least time for `work` by the data sheet, in seconds.
        seconds: The time that is predicted.
        bound: What takes most of it.
    """

    shape: str
    seats: int
    graphs: bool
    work: Work
    traffic: int
    kernels: int
    operators: int
    floor: float
    seconds: float
    bound: str

    @property
    def name(self) -> str:
        """The name of the line of `--gpu-check` that measures it."""
        return step_name(self.shape, self.seats, self.graphs)


def step_name(shape: str, rows: int, graphs: bool) -> str:
    """Name a decode step: by model, rows, and how it is launched."""
    return f"step {shape} {rows} {'graphs' if graphs else 'eager'}"


@dataclass(frozen=True)
class MemoryPrediction:
    """What a default engine takes, in bytes, and how many blocks its pool has."""

    shape: str
    weights: int
    step: int
    num_blocks: int
    block: int


@dataclass
class PredictionReport(Report):
    """All decode steps on one GPU."""

    gpu: Gpu
    costs: Costs
    rows: list[Prediction]
    memory: list[MemoryPrediction]

    def __str__(self) -> str:
        gpu = self.gpu
        lines = [
            f"A decode step on a {gpu.name} ({gpu.bandwidth / 1e9:,.0f} GB/s, "
            f"{gpu.flops / 1e12:,.0f} TFLOP/s), half precision, {PROMPT} tokens in the cache of each "
            "row. Predicted, not measured.",
            self.costs.reasons,
            "",
            "| shape | seats | launched | kernels | by Python | MB | GFLOP | floor ms | predicted ms "
            "| tokens/s | most of it |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = (
                row.shape,
                row.seats,
                "graphs" if row.graphs else "eager",
                row.kernels,
                row.operators,
                f"{row.work.bytes / 1e6:,.0f}",
                f"{row.work.operations / 1e9:,.1f}",
                f"{1e3 * row.floor:.2f}",
                f"{1e3 * row.seconds:.1f}",
                f"{row.seats / row.seconds:,.0f}",
                row.bound,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
        lines += [
            f"{one.shape}: weights {one.weights / 1e9:.2f} GB, the widest step {one.step / 1e6:.0f} MB, a "
            f"default engine {one.num_blocks:,} blocks of {one.block / 1e6:.2f} MB."
            for one in self.memory
        ]
        return "\n".join(lines)


def predict(
    name: str, shapes: Sequence[str] = SHAPES, seats: Sequence[int] = SEATS, *, memory: bool = True
) -> PredictionReport:
    """Predict the decode steps of some shapes on a GPU.

    Args:
        name: The GPU, one of `GPUS`.
        shapes, seats: What is predicted, each shape with each number of seats.
        memory: Whether memory is predicted as well.

    Raises:
        ValueError: If the GPU is unknown.
    """
    if name not in GPUS:
        raise ValueError(f"no GPU {name!r}; there is {', '.join(GPUS)}")
    gpu, rows, taken = GPUS[name], [], []
    for shape in shapes:
        with FakeGpu(gpu, graph_bytes=_ONE_GRAPH) as fake:
            model = fake_model(shape)
            if memory:
                taken.append(_memory(fake, model, shape))
            for count in seats:
                rows += _steps(fake, model, shape, count)
            del model
            gc.collect()
    return PredictionReport({"gpu": name}, gpu, costs_of(gpu), rows, taken)


def _steps(fake: FakeGpu, model: LoadedModel, shape: str, seats: int) -> list[Prediction]:
    """Run an engine until all seats decode, then count a step with graphs, and one without."""
    gc.collect()  # an engine that is no longer used may still hold its graphs
    config = EngineConfig(
        model,
        max_num_seqs=seats,
        max_num_batched_tokens=max(512, 16 * seats),
        max_model_len=_LENGTH,
        num_blocks=seats * _LENGTH // 16,
    )
    engine = Engine(config, say=None)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine.add_request([5] * PROMPT, params)
    engine.step()
    for _ in range(seats - 1):  # they find the first one's blocks, which saves the fake GPU time
        engine.add_request([5] * PROMPT, params)
    while len(engine.scheduler.running) < seats or engine.trace.records[-1].total_tokens != seats:
        engine.step()
    found = []
    for graphs in (True, False):
        with fake.counting() as counts:
            record = engine.step()
        keys = StepWork.of(record).keys * model.module.kv_shape.bytes_per_token
        work = Shape.of(model).work(record)
        found.append(_prediction(fake.gpu, shape, seats, graphs, counts, keys, work))
        engine.runner.graphs = None
    return found


def _prediction(
    gpu: Gpu, shape: str, seats: int, graphs: bool, counts: Counts, keys: int, work: Work
) -> Prediction:
    costs = costs_of(gpu)
    traffic = counts.traffic.total() + keys  # these Triton's kernel reads, uncounted
    limits = gpu.bandwidth * costs.bandwidth, gpu.flops * costs.peak
    passing = Work(traffic, work.operations)
    parts = {"launches": counts.launches * costs.kernel, passing.bound(*limits): passing.seconds(*limits)}
    on_gpu, on_cpu = sum(parts.values()), counts.operators * costs.operator
    parts["Python"] = costs.step + seats * costs.row
    if on_cpu > on_gpu:  # Python launches ahead of the GPU, unless it is the slower of the two
        parts = {"Python": parts["Python"] + on_cpu}
    return Prediction(
        shape,
        seats,
        graphs,
        work,
        traffic,
        counts.launches,
        counts.operators,
        work.seconds(gpu.bandwidth, gpu.flops),
        sum(parts.values()),
        max(parts, key=parts.__getitem__),
    )


def _memory(fake: FakeGpu, model: LoadedModel, shape: str) -> MemoryPrediction:
    weights = fake.allocated
    engine = Engine(EngineConfig(model, cuda_graphs=False), say=None)
    step = activation_bytes(model.module, engine.runner.backend, engine.config)
    block = model.module.kv_shape.bytes_per_token * 16
    return MemoryPrediction(shape, weights, step, engine.pool.num_blocks, block)
