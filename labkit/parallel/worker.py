"""A process of a parallel model that is not the first: it loads its part, and computes what it is told.

It ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import pickle
from typing import BinaryIO

import torch

from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.int8_kv import kv_shape
from labkit.kernels.warmup import backend_for
from labkit.models.load import load_model
from labkit.outputs import in_one_line
from labkit.parallel.group import Group
from labkit.parallel.load import spread_over
from labkit.parallel.messages import Forward, Load, Logits
from labkit.parallel.processes import answer, send


class Worker:
    """Computes this process's part of each step.

    Args:
        message: what to load.
    """

    def __init__(self, message: Load) -> None:
        torch.set_num_threads(message.threads)
        arguments = message.arguments
        self.loaded = load_model(**arguments, say=None)
        self.caches: dict[int, PagedKVCache] = {}

    def meet(self, message: Load) -> None:
        """Make the group with the others, which takes as long as the slowest of them."""
        arguments, self.model = message.arguments, self.loaded.module
        self.group = Group(message.meeting, arguments["rank"], arguments["world_size"], self.model.device)
        spread_over(self.loaded, self.group)
        self.backend = backend_for(self.model, EngineConfig(model=self.loaded))

    @torch.inference_mode()
    def forward(self, message: Forward) -> None:
        """Compute the tokens of a step."""
        for number in message.dropped:
            self.caches.pop(number, None)
        cache = self.caches.get(message.cache)
        if cache is None:
            shape = kv_shape(self.model, "int8" if message.int8_kv else None)
            cache = shape.new_cache(message.num_blocks, message.block_size)
            self.caches[message.cache] = cache
        for method, argument in message.edits:
            getattr(cache, method)(argument)
        rows = [Span(*row) for row in message.rows]
        padding = len(message.token_ids) - sum(row.num_queries for row in rows)
        metadata = build_metadata(rows, cache, self.backend, windows=self.model.windows, num_padding=padding)
        inputs = torch.tensor([message.token_ids, message.positions], device=cache.device)
        self.model(inputs[0], inputs[1], cache, metadata)

    @torch.inference_mode()
    def logits(self, message: Logits) -> None:
        """Compute the logits of this part of the vocabulary, for the first process."""
        model = self.model
        size = message.rows, model.shape.hidden_size
        hidden = torch.empty(size, dtype=model.dtype, device=model.device)
        self.group.collect(model.lm_head(self.group.broadcast(hidden)))


def run(messages: BinaryIO, answers: BinaryIO) -> None:
    """Obey messages until there are no more. An error is the last answer."""
    try:
        load = pickle.load(messages)
        worker = Worker(load)
        _answer(answers, None)
        worker.meet(load)
        while True:
            message = pickle.load(messages)
            worker.forward(message) if isinstance(message, Forward) else worker.logits(message)
    except EOFError:
        return
    except Exception as error:
        _answer(answers, in_one_line(error))
        raise SystemExit(1) from None


def _answer(answers: BinaryIO, what: str | None) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        send(answers, what)


if __name__ == "__main__":
    answer(run)
