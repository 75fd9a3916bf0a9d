"""The process that computes prompts. It ends when its standard input does."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from typing import BinaryIO

from labkit.config import EngineConfig
from labkit.disaggregated.messages import Computed, Forget, Load, Prompt
from labkit.engine import Engine
from labkit.outputs import in_one_line
from labkit.parallel.processes import answer, send
from labkit.sampling_params import SamplingParams
from labkit.transfer import export_kv

_ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)  # its logits are there, and nobody wants it


def run(messages: BinaryIO, answers: BinaryIO) -> None:
    """Compute the prompts that arrive, as one batch that they join and leave."""
    load: Load = pickle.load(messages)
    engine = Engine(EngineConfig(**load.config), say=None)
    send(answers, Computed("", b"", 0.0))  # ready
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
        for request_id, reason, _ in engine.step().finished:
            output = engine.outputs.pop(request_id)
            seconds = time.perf_counter() - began.pop(request_id)
            if reason != "abort":
                pages, error = b"", output.error or ""
                if not error:
                    pages = export_kv(engine, output.prompt_token_ids).to_bytes()
                send(answers, Computed(request_id, pages, seconds, error))


def _read(messages: BinaryIO, inbox: queue.SimpleQueue[Prompt | Forget | None]) -> None:
    try:
        while True:
            inbox.put(pickle.load(messages))
    except EOFError:
        inbox.put(None)


if __name__ == "__main__":
    answer(run)
