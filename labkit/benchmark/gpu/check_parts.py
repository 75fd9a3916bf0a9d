"""The parts of `--gpu-check`. Each gives lines that begin with a name, so that two runs can be compared.

A line says what was found, and OK or NOT OK where there is something to be held.
"""

from __future__ import annotations

import functools
import gc
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.analysis.device_probe import measure_ceiling
from labkit.analysis.devices import GPUS
from labkit.analysis.reference import reference_model, run_reference
from labkit.analysis.shapes import SHAPES, random_model
from labkit.analysis.workload import Job, make_noise, make_workload
from labkit.benchmark.engine.ablations import ablations_for
from labkit.benchmark.engine.ladder import climb
from labkit.benchmark.engine.runs import check_answers, device_name, dtype_name, exactly, versions
from labkit.benchmark.gpu.predict import PROMPT, predict, step_name
from labkit.config import EngineConfig
from labkit.core.attention import Span, attend, build_metadata, reference_attention, row_order
from labkit.core.kv_cache import KVShape
from labkit.engine import Engine
from labkit.kernels.cuda_graphs import DecodeGraphs
from labkit.kernels.select import choose_backend
from labkit.models.load import LoadedModel, load_model


@dataclass
class Target:
    """What the parts run on, and how much of it.

    Attributes:
        rungs: The rungs of the ladder.
        gpu: Its name in `GPUS`; "" if it is none of them.
        predicted: The seconds that were predicted for each step, and the bytes of each shape's weights.
    """

    device: str
    model: str
    shapes: tuple[str, ...]
    rows: tuple[int, ...]
    answers: int
    tokens: int
    rungs: tuple[str, ...]
    gpu: str = ""
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def stands_in(self) -> bool:
        """Whether a CPU stands in for the GPU."""
        return self.device != "cuda"

    @property
    def backends(self) -> tuple[str, ...]:
        """The attention backends to be tried."""
        return ("sdpa",) if self.stands_in else ("sdpa", "triton")


_LADDER = ("continuous batching", "paged KV cache", "mixed prefill, decode", "fused projections")
CUDA = Target(
    "cuda", "smollm2-135m", SHAPES, (1, 8, 32), 20, 24, (*_LADDER, "CUDA graphs", "paged attention", "int8")
)
CPU = Target("cpu", "tiny-random", ("tiny",), (1, 4), 3, 6, ("mixed prefill, decode", "int8"))


def _verdict(fine: bool) -> str:
    return "OK" if fine else "NOT OK"


# -- engines --------------------------------------------------------------------------------------


class _Rerun:
    """Stands in for CUDA graphs on a CPU: what was captured is computed anew, into the same memory."""

    nbytes = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = compute().clone()

        def replay() -> None:
            out.copy_(compute())

        return replay, out


def _engine(target: Target, model: LoadedModel, *, graphs: bool, **settings: Any) -> Engine:
    small = {"max_num_seqs": 8, "max_model_len": 256, "num_blocks": 256, "max_num_batched_tokens": 256}
    engine = Engine(EngineConfig(model, cuda_graphs=graphs, **{**small, **settings}), say=None)
    if graphs and target.stands_in:
        engine.runner.graphs = _graphs_of(target, engine)
        engine.runner.graphs.warm_up()
    return engine


def _graphs_of(target: Target, engine: Engine) -> DecodeGraphs:
    return DecodeGraphs(
        engine.runner.model,
        engine.runner.cache,
        engine.runner.backend,  # type: ignore[arg-type]
        max_num_seqs=engine.config.max_num_seqs,
        max_model_len=engine.max_model_len,
        memory_limit=2**31,
        say=None,
        capture=_Rerun() if target.stands_in else None,
    )


def _answer(
    engine: Engine, jobs: Sequence[Job], *, between: Callable[[], object] = lambda: None
) -> list[list[int]]:
    """Answer the jobs; `between` is called after each step."""
    names = [engine.add_request(job.prompt, exactly(job.max_tokens)) for job in jobs]
    while engine.has_unfinished:
        engine.step()
        between()
    outputs = [engine.outputs[name] for name in names]
    check_answers(outputs, "of a part")
    return [output.token_ids for output in outputs]


def _load(target: Target, dtype: str = "auto", **more: Any) -> LoadedModel:
    return load_model(target.model, dtype=dtype, device=target.device, say=None, **more)


def _jobs(target: Target, model: LoadedModel) -> list[Job]:
    jobs = make_workload(model.tokenizer, target.answers, prompt_tokens=(4, 120))
    return [Job(job.prompt, target.tokens) for job in jobs]


def _same(what: str, true: Sequence[object], other: Sequence[object], *, must: bool = False) -> str:
    equal = sum(a == b for a, b in zip(true, other, strict=True))
    verdict = f" {_verdict(equal == len(true))}" if must else ""
    return f"{what}: {equal} of {len(true)} answers equal{verdict}"


# -- the parts ------------------------------------------------------------------------------------


def prediction(target: Target) -> Iterator[str]:
    """What each step should take, before anything is measured. The GPU is hidden from it."""
    name = target.gpu or "T4"
    report = predict(name, target.shapes, target.rows)
    target.predicted = {row.name: row.seconds for row in report.rows}
    target.predicted |= {f"weights {one.shape}": one.weights for one in report.memory}
    yield f"prediction: {len(report.rows)} steps for a {name}. {report.costs.reasons}"


def machine(target: Target) -> Iterator[str]:
    """What this is, and which GPU of the data sheets it is nearest to."""
    told = versions() | {"system": platform.platform(), "CPUs": str(os.cpu_count())}
    try:
        import triton

        told["triton"] = triton.__version__
    except ImportError:
        told["triton"] = "none"
    told["C compiler"] = shutil.which("cc") or shutil.which("gcc") or "none"
    yield f"machine: {device_name(torch.device(target.device))}"
    if not target.stands_in:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        told["CUDA"] = str(torch.version.cuda)
        yield (
            f"machine: sm_{properties.major}{properties.minor}, {properties.multi_processor_count} processors"
            f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        target.gpu = next((name for name in GPUS if name in properties.name), "")
    yield "machine: " + ", ".join(f"{name} {value}" for name, value in told.items())
    dtype = torch.float32 if target.stands_in else torch.float16
    small = {"read_bytes": 2**22, "gemm_size": 128} if target.stands_in else {"gemm_size": 4096}
    ceiling = measure_ceiling(torch.device(target.device), dtype, **small)
    peak = ", ".join(f"{value / 1e12:.2f} TFLOP/s in {kind}" for kind, value in ceiling.peak.items())
    yield f"machine: {ceiling.bandwidth / 1e9:.0f} GB/s read, {peak}"


def sdpa(target: Target) -> Iterator[str]:
    """Which of PyTorch's kernels computes attention, by dtype and by kind of call."""
    device = torch.device(target.device)
    calls = (("decode", 1, True), ("chunk", 20, True), ("prompt", 64, False))
    for dtype in (torch.float16, torch.float32):
        for kind, queries, masked in calls:
            q = torch.randn(2, 3, queries, 64, device=device, dtype=dtype)
            k = torch.randn(2, 3, 64, 64, device=device, dtype=dtype)
            mask = torch.zeros(2, 1, queries, 64, device=device, dtype=dtype) if masked else None
            with _Operators() as seen:
                F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=not masked)
            found = [name for name in seen.names if name.startswith("_scaled_dot_product")]
            yield f"sdpa {dtype_name(dtype)} {kind}: {', '.join(found) or 'written out (math)'}"


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def attention(target: Target) -> Iterator[str]:
    """Every backend against the reference: lengths at the borders of blocks, windows, groups of heads."""
    device = torch.device(target.device)
    dims, groups = ((16,), (3,)) if target.stands_in else ((64, 80, 128), (1, 3, 7))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 4e-3)):
        if target.stands_in and dtype == torch.float16:
            continue
        for wanted in target.backends:
            largest, cases = 0.0, 0
            for dim in dims:
                for group in groups:
                    for window in (None, 20):
                        largest = max(largest, _off(device, dtype, dim, group, window, wanted))
                        cases += 1
            fine = _verdict(largest <= tolerance)
            yield f"attention {wanted} {dtype_name(dtype)}: off by {largest:.1e} in {cases} cases {fine}"


def _off(
    device: torch.device, dtype: torch.dtype, dim: int, group: int, window: int | None, wanted: str
) -> float:
    """Return the largest difference between a backend and the reference."""
    torch.manual_seed(dim + group)
    cache = KVShape(1, 2, dim, dtype, device).new_cache(64, 16)
    cache.blocks.normal_()
    free = torch.randperm(64).tolist()
    # Rows that decode, then rows with a few queries, then a prompt.
    shape = ((0, 1), (15, 1), (16, 1), (300, 1), (7, 3), (30, 3), (0, 40))
    rows = [Span(start, n, [free.pop() for _ in range(-(-(start + n) // 16))]) for start, n in shape]
    rows = [rows[i] for i in row_order(rows)]
    q = torch.randn(sum(row.num_queries for row in rows), 2 * group, dim, device=device, dtype=dtype)
    backend = choose_backend(device, dtype, dim, wanted=wanted)
    metadata = build_metadata(rows, cache, backend, windows=[window])
    out = attend(q, cache, 0, metadata, scale=dim**-0.5, window=window)
    true = reference_attention(q, cache, 0, rows, scale=dim**-0.5, window=window)
    return float((out.float() - true.float()).abs().max())


def equality(target: Target) -> Iterator[str]:
    """In fp32, every backend, with graphs and without, against `generate` of `transformers`."""
    model = _load(target, "float32")
    jobs = _jobs(target, model)[:6]
    true = run_reference(reference_model(model, target.model), jobs).tokens
    for backend in target.backends:
        for graphs in (False, True):
            engine = _engine(target, model, graphs=graphs, attention_backend=backend)
            got, how = _answer(engine, jobs), "graphs" if graphs else "eager"
            yield _same(f"fp32 {backend} {how} against transformers", true, got, must=True)


def graphs(target: Target) -> Iterator[str]:
    """What graphs cost, and whether they give what eager steps give."""
    for quantization in (None, "int8"):
        model = _load(target, quantization=quantization)
        jobs, eager = _jobs(target, model), _engine(target, model, graphs=False)
        plain, captured = _answer(eager, jobs), _graphs_of(target, eager)
        before, began = _free(target), time.perf_counter()
        captured.warm_up()
        seconds, count = time.perf_counter() - began, len(captured.captured)
        name = quantization or dtype_name(model.dtype)
        yield (
            f"graphs {name}: {count} captured in {seconds:.1f} s, {1e3 * seconds / count:.0f} ms and "
            f"{max(0, before - _free(target)) / count / 2**20:.1f} MiB each"
        )
        engine = _engine(target, model, graphs=True)
        yield _same(f"graphs {name} against eager", plain, _answer(engine, jobs))


def _free(target: Target) -> int:
    return 0 if target.stands_in else torch.cuda.mem_get_info()[0]


def ladder(target: Target) -> Iterator[str]:
    """The upper rungs of the ladder, once, on a few requests."""
    load = functools.partial(load_model, target.model, device=target.device, say=None)
    jobs = _jobs(target, load())[: 4 if target.stands_in else 16]
    small = {"read_bytes": 2**20, "gemm_size": 64} if target.stands_in else {"gemm_size": 4096}
    report = climb(
        load,
        jobs,
        ablations_for(target.device, target.rungs),
        reference=functools.partial(reference_model, model=target.model),
        seats=8,
        repeats=1,
        slow_seconds=10,
        memory=False,
        progress=False,
        ceiling=functools.partial(measure_ceiling, **small),
    )
    yield f"ladder: {report.same_tokens}"
    for row in report.rungs:
        told = row.failure or (
            f"{row.tokens_per_second:,.0f} tokens/s, {row.gain_reference or 0:.1f}x transformers, "
            f"{row.roofline_share:.0%} of the roofline"
        )
        yield f"ladder {row.name}: {told}"


def steps(target: Target) -> Iterator[str]:
    """The median decode step, eager and with graphs, beside its prediction."""
    for shape in target.shapes:
        model = random_model(shape, device=target.device)
        most = max(target.rows)
        settings = {"max_num_seqs": most, "num_blocks": 16 * most, "max_num_batched_tokens": 1024}
        for with_graphs in (True, False):
            engine = _engine(target, model, graphs=with_graphs, **settings)
            for rows in target.rows:
                name = step_name(shape, rows, with_graphs)
                seconds = _median_step(engine, make_noise(model.config.vocab_size, rows, seed=rows))
                expected = target.predicted.get(name)
                beside = (
                    f", predicted {1e3 * expected:.2f} ms ({seconds / expected - 1:+.0%})" if expected else ""
                )
                yield f"{name}: {1e3 * seconds:.2f} ms, {rows / seconds:,.0f} tokens/s{beside}"
            del engine
            gc.collect()
        del model
        gc.collect()


def _median_step(engine: Engine, jobs: Sequence[Job]) -> float:
    """Return the median seconds of the steps in which all rows decode."""
    first = len(engine.trace.records)
    _answer(engine, [Job((job.prompt * PROMPT)[:PROMPT], 24) for job in jobs])
    full = [r.seconds for r in list(engine.trace.records)[first:] if r.num_tokens == (1,) * len(jobs)]
    return statistics.median(full[2:])


def memory(target: Target) -> Iterator[str]:
    """What an engine takes, and whether all of it comes back."""
    model = _load(target)
    weights = sum(x.nbytes for x in {id(x): x for x in model.module.parameters()}.values())
    said = target.predicted.get("weights SmolLM2-135M")
    yield f"memory weights: {weights / 1e6:.0f} MB" + (f", predicted {said / 1e6:.0f} MB" if said else "")
    left = []
    for _ in range(3):
        settings = {"num_blocks": None, "max_model_len": None} if not target.stands_in else {}
        engine = _engine(target, model, graphs=True, **settings)
        _answer(engine, [Job([5, 6, 7], 4)])
        blocks, used = engine.pool.num_blocks, _allocated(target)
        del engine
        gc.collect()
        left.append(_allocated(target))
        yield f"memory engine: {blocks:,} blocks, {used / 1e6:.0f} MB with it, {left[-1] / 1e6:.0f} after it"
    grown = left[-1] - left[0]
    yield f"memory built three times: {grown / 1e6:+.1f} MB left {_verdict(grown < 16 * 2**20)}"


def _allocated(target: Target) -> int:
    return 0 if target.stands_in else torch.cuda.memory_allocated()


def together(target: Target) -> Iterator[str]:
    """Two engines at once, built or running; and the collector within a run."""
    model = _load(target, "float32")
    jobs = _jobs(target, model)[:4]
    alone = _answer(_engine(target, model, graphs=True), jobs)
    yield _same(
        "together gc.collect between steps",
        alone,
        _answer(_engine(target, model, graphs=True), jobs, between=gc.collect),
        must=True,
    )
    found = _in_threads([lambda: _answer(_engine(target, model, graphs=True), jobs)] * 2)
    for number, answers in enumerate(found, 1):
        yield _same(f"together built at once, engine {number}", alone, answers, must=True)
    running = _engine(target, model, graphs=True)
    beside = [lambda: _answer(running, jobs), lambda: _answer(_engine(target, model, graphs=True), jobs)]
    for name, answers in zip(("that runs", "built beside it"), _in_threads(beside), strict=True):
        yield _same(f"together engine {name}", alone, answers, must=True)


def _in_threads(calls: Sequence[Callable[[], list[list[int]]]]) -> list[list[list[int]]]:
    """Run functions at once; raise what one of them raises."""
    results: list[list[list[int]] | BaseException] = [[] for _ in calls]

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


@dataclass(frozen=True)
class Part:
    """A part: a function that gives lines, and how many seconds it may take on a T4."""

    run: Callable[[Target], Iterator[str]]
    seconds: float
    hides_gpu: bool = False


PARTS = {
    "machine": Part(machine, 20),
    "prediction": Part(prediction, 70, hides_gpu=True),
    "sdpa": Part(sdpa, 20),
    "attention": Part(attention, 60),
    "equality": Part(equality, 80),
    "graphs": Part(graphs, 60),
    "steps": Part(steps, 90),
    "memory": Part(memory, 40),
    "together": Part(together, 40),
    "ladder": Part(ladder, 90),
}
