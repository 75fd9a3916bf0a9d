"""The peers of the engine on the same weights and jobs: `transformers` in padded batches, and with its own
continuous batching.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from labkit.analysis.reference import Run, TokenTimes, agreement
from labkit.analysis.workload import Job
from labkit.benchmark.engine.runs import System, middle, run_engine
from labkit.benchmark.engine.schedulers import spreads_of
from labkit.config import EngineConfig
from labkit.models.load import LoadedModel

BATCHES = (8, 32)
_BLOCK_SIZE = 256  # tokens; the default of generate_batch
_PATIENCE = 600.0  # seconds without any answer


@torch.inference_mode()
def run_padded(model: PreTrainedModel, size: int, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
    """Answer with `generate` on batches of `size` requests in order of arrival, padded on the left.

    A batch runs as long as its longest answer. What it writes beyond a request's own length does not count.
    """
    begin = time.perf_counter()
    tokens: list[list[int]] = []
    times: list[list[float]] = []
    for first in range(0, len(jobs), size):
        some = jobs[first : first + size]
        width = max(len(job.prompt) for job in some)
        rows = [[0] * (width - len(job.prompt)) + job.prompt for job in some]
        mask = [[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in some]
        streamer = TokenTimes()
        out = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max(job.max_tokens for job in some),
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        for job, row in zip(some, out[:, width:].tolist(), strict=True):
            tokens.append(row[: job.max_tokens])
            times.append(
                [t - begin for t in streamer.times[1 : 1 + job.max_tokens]]
            )  # the first is the prompts
        if bar is not None:
            bar.update(len(some))
    return Run(f"transformers, batches of {size}", time.perf_counter() - begin, tokens, times)


def run_generate_batch(
    model: PreTrainedModel, seats: int, budget: int, jobs: Sequence[Job], bar: tqdm | None = None
) -> Run:
    """Answer with the engine behind `generate_batch`, with blocks for all seats.

    Each request has its own length, while `generate_batch` itself takes one length for all. Starting and
    stopping the engine are not counted.

    Raises:
        ImportError: If this release of `transformers` has no such engine.
        RuntimeError: If it gives up.
    """
    from transformers import ContinuousBatchingConfig  # here, because older releases have none

    blocks = sorted((-(-(len(job.prompt) + job.max_tokens) // _BLOCK_SIZE) for job in jobs), reverse=True)
    config = ContinuousBatchingConfig(
        page_size=_BLOCK_SIZE,
        num_blocks=sum(blocks[:seats]) + 1,
        max_batch_tokens=budget,
        max_requests_per_batch=seats,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = {}
    with (
        _quiet(),
        torch.inference_mode(),
        model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config
        ) as manager,
    ):
        begin = last = time.perf_counter()
        names = [
            manager.add_request(job.prompt, max_new_tokens=job.max_tokens, record_timestamps=True)
            for job in jobs
        ]
        while len(answers) < len(names):
            answer = manager.get_result(timeout=1)
            now = time.perf_counter()
            if answer is not None and answer.is_finished():
                if answer.error:
                    raise RuntimeError(f"a request failed: {answer.error}")
                answers[answer.request_id] = answer
                last = now
                if bar is not None:
                    bar.update()
            elif answer is None and (not manager.is_running() or now - last > _PATIENCE):
                raise RuntimeError(f"it stopped after {len(answers)} of {len(names)} answers")
        seconds = last - begin
    found = [answers[name] for name in names]
    return Run(
        "transformers, generate_batch",
        seconds,
        [list(answer.generated_tokens) for answer in found],
        [[t - begin for t in answer.timestamps or ()] for answer in found],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings out of the progress bar. Errors are raised, not logged."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_ours(
    name: str, loaded: LoadedModel, seats: int, budget: int, jobs: Sequence[Job], bar: tqdm | None = None
) -> Run:
    """Answer with the engine in its default configuration, with so many seats."""
    config = EngineConfig(model=loaded, max_num_seqs=seats, max_num_batched_tokens=max(budget, seats))
    run = run_engine(config, jobs, bar)
    run.system = name
    return run


def peer_systems(
    reference: PreTrainedModel | None,
    ours: dict[str, LoadedModel],
    jobs: Sequence[Job],
    *,
    seats: int,
    budget: int,
    few: Sequence[Job] | None = None,
) -> list[System]:
    """`transformers` in batches, and the engine in its default configuration with fewer seats and with all.

    Args:
        reference: The weights as `transformers` runs them; None leaves its batches out.
        ours: The model in each precision, by its name.
        jobs: The workload.
        seats, budget: The sizes of the engine.
        few: The jobs that a single seat answers; None: all.
    """
    systems = []
    if reference is not None:
        for size in BATCHES:
            run = functools.partial(run_padded, reference, size)
            systems.append(System(f"transformers, batches of {size}", run, jobs, optional=True))
        run = functools.partial(run_generate_batch, reference, seats, budget)
        systems.append(System("transformers, generate_batch", run, jobs, optional=True))
    for number in sorted({1, 8, seats} if seats > 8 else {1, seats}):
        for precision, loaded in ours.items():
            name = f"labkit {precision}, {number} seat{'s' * (number > 1)}"
            run = functools.partial(run_ours, name, loaded, number, budget)
            systems.append(System(name, run, few if few and number == 1 else jobs, optional=True))
    return systems


@dataclass
class PeerRow:
    """A line of the table of peers: medians over the repeats.

    `equal` is the share of answers that equal those of the engine. TTFT, and ITL token by token, are of one
    repeat.
    """

    system: str
    failure: str = ""
    requests: int = 0
    tokens_per_second: float | None = None
    gain: float | None = None  # over transformers one by one
    seconds: float | None = None
    equal: float | None = None
    ttft_median: float | None = None
    itl_median: float | None = None
    itl_p95: float | None = None


def peer_row(name: str, runs: Sequence[Run], true: Run, baseline: float | None) -> PeerRow:
    """The line of a peer; `baseline` is what speed is compared with, in output tokens per second."""
    rate = statistics.median(run.rate for run in runs)
    run = middle(runs)
    ttft, itl = spreads_of(run)
    places = agreement(true, run)
    return PeerRow(
        name,
        requests=len(run.tokens),
        tokens_per_second=rate,
        gain=rate / baseline if baseline else None,
        seconds=statistics.median(run.seconds for run in runs),
        equal=sum(place is None for place in places) / len(places),
        ttft_median=ttft.median if ttft else None,
        itl_median=itl.median if itl else None,
        itl_p95=itl.p95 if itl else None,
    )
