"""One engine in a process of its own, which answers jobs that it reads line by line.

It is run by path, `PYTHON worker.py NAME SETTINGS`, so that `PYTHON` may be one that has the other engine but
not `labkit`: nothing but the standard library is imported before the engine is known. A line in asks for
`{"jobs": [[prompt, max_tokens], ...], "seats": n, "adaptive": bool}`. A line out has the answers or an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Asked = dict[str, Any]
Answers = dict[str, Any]
Engine = tuple[
    dict[str, str], Callable[[Asked], Answers]
]  # the versions of what it runs on, and how it answers


def labkit_engine(settings: dict[str, Any]) -> Engine:
    """The engine of this package, built anew for each run, on weights that are loaded once."""
    from labkit.analysis.workload import Job
    from labkit.benchmark.engine.runs import run_engine, versions
    from labkit.config import EngineConfig
    from labkit.models.load import load_model

    quantization = "int8" if settings["precision"] == "int8" else None
    dtype = "float32" if quantization else settings["precision"]
    loaded = load_model(
        settings["model"], dtype=dtype, device="cpu", quantization=quantization, say=_to_stderr
    )

    def answer(asked: Asked) -> Answers:
        config = EngineConfig(
            model=loaded,
            max_num_seqs=asked["seats"],
            max_num_batched_tokens=max(settings["budget"], asked["seats"]),
            num_threads=settings["threads"],
            adaptive_threads=asked["adaptive"],
        )
        run = run_engine(config, [Job(*job) for job in asked["jobs"]])
        return {"seconds": run.seconds, "tokens": run.tokens, "times": run.token_times}

    return versions(), answer


def transformers_engine(settings: dict[str, Any]) -> Engine:
    """`generate` of `transformers`, one request after the other."""
    import torch

    from labkit.analysis.reference import reference_model, run_reference
    from labkit.analysis.workload import Job
    from labkit.benchmark.engine.runs import versions
    from labkit.models.load import load_model

    torch.set_num_threads(settings["threads"])
    plain = {"fused_projections": False, "packed_weights": False, "cpu_kernels": False}
    loaded = load_model(settings["model"], dtype=settings["precision"], device="cpu", say=_to_stderr, **plain)
    model = reference_model(loaded, settings["model"])
    del loaded

    def answer(asked: Asked) -> Answers:
        run = run_reference(model, [Job(*job) for job in asked["jobs"]])
        return {"seconds": run.seconds, "tokens": run.tokens, "times": run.token_times}

    return versions(), answer


def vllm_engine(settings: dict[str, Any]) -> Engine:
    """vLLM with the `LLM` class, of which no more than `seats` requests are in flight."""
    import torch
    import vllm

    llm = vllm.LLM(
        model=settings["folder"],
        dtype=settings["precision"],
        max_model_len=settings["longest"],
        max_num_seqs=settings["seats"],
        max_num_batched_tokens=max(settings["budget"], settings["longest"]),
        enable_prefix_caching=False,  # no two prompts start alike
        skip_tokenizer_init=True,
        generation_config="vllm",
        seed=0,
    )
    engine = llm.llm_engine

    def answer(asked: Asked) -> Answers:
        jobs, seats = asked["jobs"], asked["seats"]
        tokens: list[list[int]] = [[] for _ in jobs]
        times: list[list[float]] = [[] for _ in jobs]
        begin, given, running = time.perf_counter(), 0, 0
        while given < len(jobs) or running:
            while given < len(jobs) and running < seats:
                prompt, most = jobs[given]
                exactly = vllm.SamplingParams(
                    temperature=0, max_tokens=most, ignore_eos=True, detokenize=False
                )
                engine.add_request(str(given), {"prompt_token_ids": prompt}, exactly)
                given, running = given + 1, running + 1
            for output in engine.step():
                index, so_far = int(output.request_id), list(output.outputs[0].token_ids)
                now = time.perf_counter() - begin
                times[index] += [now] * (len(so_far) - len(tokens[index]))
                tokens[index] = so_far
                running -= output.finished
        return {"seconds": time.perf_counter() - begin, "tokens": tokens, "times": times}

    return {"vllm": vllm.__version__, "its torch": torch.__version__}, answer


ENGINES = {"labkit": labkit_engine, "transformers": transformers_engine, "vllm": vllm_engine}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    """Build the engine that the command line names, say so, and answer until there is nothing to read."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is for the log
    name, settings = sys.argv[1], json.loads(sys.argv[2])

    def send(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    versions, answer = ENGINES[name](settings)
    send({"versions": versions})
    for line in sys.stdin:
        try:
            send(answer(json.loads(line)))
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main()
