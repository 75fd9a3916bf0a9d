"""The process that computes prompts. It ends when its standard input does."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from operator import add
from typing import BinaryIO

from labkit.config import EngineConfig
from labkit.disaggregated.messages import Computed, Forget, Leaving, Load, Progress, Prompt
from labkit.engine import Engine
from labkit.outputs import in_one_line
from labkit.parallel.processes import answer, send
from labkit.sampling_params import SamplingParams
from labkit.trace.records import Holding, OtherPool, StepRecord
from labkit.transfer import export_kv

_ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)  # its logits are there, and nobody wants it


def run(messages: BinaryIO, answers: BinaryIO) -> None:
    """Compute the prompts that arrive, as one batch that they join and leave."""
    load: Load = pickle.load(messages)
    engine = Engine(EngineConfig(**load.config), say=None)
    send(answers, Progress(_pool(engine)))  # ready
    inbox: queue.SimpleQueue[Prompt | Forget | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages, inbox), daemon=True).start()
    began: dict[str, float] = {}
    while True:
        while not inbox.empty() or not engine.has_unfinished:
            message = inbox.get()
            if message is None:
                return
            if isinstance(message, Forget):
                engine.abort(message.request_id)
                continue
            try:
                engine.add_request(
                    message.token_ids, _ONE_TOKEN, request_id=message.request_id, priority=message.priority
                )
                began[message.request_id] = time.perf_counter()
            except ValueError as error:
                send(answers, Computed(message.request_id, b"", 0.0, in_one_line(error)))
        record = engine.step()
        send(answers, Progress(_pool(engine, record)))
        for request_id, reason, _ in record.finished:
            output = engine.outputs.pop(request_id)
            seconds = time.perf_counter() - began.pop(request_id)
            if reason != "abort":
                pages, error = b"", output.error or ""
                if not error:
                    pages = export_kv(engine, output.prompt_token_ids).to_bytes()
                    send(answers, Leaving(request_id, len(pages)))
                send(answers, Computed(request_id, pages, seconds, error))
        if record.finished:
            send(answers, Progress(_pool(engine)))


def _pool(engine: Engine, record: StepRecord | None = None) -> OtherPool:
    """Return who holds which blocks now; with the record of a step, also those who ended in it."""
    tables = [
        Holding(
            request.request_id, request.num_computed_tokens, tuple(engine.pool.tables[request.request_id])
        )
        for request in engine.scheduler.running
    ]
    computed = (
        dict(zip(record.requests, map(add, record.starts, record.num_tokens), strict=True)) if record else {}
    )
    ended = record.finished if record else ()
    tables += [Holding(name, computed.get(name, 0), blocks) for name, _, blocks in ended]
    return OtherPool(engine.pool.num_blocks, tuple(tables))


def _read(messages: BinaryIO, inbox: queue.SimpleQueue[Prompt | Forget | None]) -> None:
    try:
        while True:
            inbox.put(pickle.load(messages))
    except EOFError:
        inbox.put(None)


if __name__ == "__main__":
    answer(run)
