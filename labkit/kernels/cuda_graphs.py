"""CUDA graphs: a decode step that the GPU replays by itself, instead of launch by launch.

A step of a small model is hundreds of kernels of a few microseconds each, and Python takes longer to launch
one than the GPU to run it. A CUDA graph is recorded once and then launched as a whole. It is a recording:
the same kernels on the same memory, with every Python number that went into a launch frozen as it was. So
what changes from step to step must lie in tensors that stay where they are, and what cannot lie there must
be the same for all steps that use the graph:

- token ids, positions and block tables are copied into one buffer on the device, which all graphs share;
  slots and lengths are computed from them within the graph;
- the number of rows and the width of the block table are sizes, and sizes are frozen. A graph is recorded
  for each of a few pairs of them, its *bucket*, and so is everything that follows from the two (the splits of
  `flash_decoding`, the width of a mask). A step takes the smallest bucket that holds it. The rows left over
  are padding: one token at position 0 of the null page, of length 1, read by nobody.

All graphs record into one pool of memory, the largest first, so that smaller ones fit into what it took.
That makes the output of a graph good only until any other is replayed: it is copied at once. Steps with a
row of more than one token differ too much from each other to be recorded, and run eagerly, as does what is
wider than the largest bucket. Sampling stays outside.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from labkit.core.attention import AttentionMetadata, Span
from labkit.core.kv_cache import PagedKVCache
from labkit.core.model_runner import PagedModel
from labkit.kernels.backend import Backend

_MIN_WIDTH = 16  # pages of the narrowest bucket


class Capture(Protocol):
    """Records what a function launches."""

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns what launches it all again, and the tensor that this fills."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory taken by all that was recorded."""
        ...


class CudaCapture:
    """Records CUDA graphs of one device into one pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        self._free = torch.cuda.mem_get_info(device)[0]

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self._device):
            compute()  # eagerly first: kernels are compiled and libraries set up at their first call
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = compute()
        return graph.replay, out

    @property
    def nbytes(self) -> int:
        return max(0, self._free - torch.cuda.mem_get_info(self._device)[0])


class DecodeGraphs:
    """Graphs of steps in which every row computes one token.

    Args:
        model: of the Llama shape; its forward pass must not wait for the device.
        cache, backend: as the model is run with otherwise.
        max_num_seqs: rows of the largest bucket.
        max_model_len: tokens of a row in the widest bucket.
        memory_limit: bytes that all graphs may take; recording ends where they do.
        say: gets a line before recording and one after; None is silence.
        capture: what records; None: CUDA.
    """

    def __init__(
        self,
        model: PagedModel,
        cache: PagedKVCache,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        memory_limit: int,
        say: Callable[[str], None] | None = print,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.memory_limit = memory_limit
        self._say = say or (lambda line: None)
        self._capture = capture or CudaCapture(model.device)
        widest = -(-max_model_len // cache.block_size)
        # Gathered pages are as many as the table is wide; to a kernel that reads lengths, width is nothing.
        self.wanted = buckets(max_num_seqs, widest, growth=4 if backend.name == "triton" else 2)
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._inputs = torch.zeros(max_num_seqs * (2 + widest), dtype=torch.long, device=model.device)

    @property
    def captured(self) -> list[tuple[int, int]]:
        """The buckets (rows, width) that have a graph, smallest first."""
        return sorted(self._graphs)

    def warm_up(self) -> None:
        """Record the graphs, largest first, until there are all or they take too much memory.

        Raises:
            torch.OutOfMemoryError: if a step of the bucket's size does not fit.
        """
        began = time.perf_counter()
        rows, width = self.wanted[0]
        self._say(
            f"Capturing {len(self.wanted)} CUDA graphs of decode steps, for up to {rows} requests of "
            f"{width * self.cache.block_size} tokens."
        )
        for bucket in self.wanted:
            if self._capture.nbytes >= self.memory_limit:
                self._say(
                    f"CUDA graphs have reached their limit of {self.memory_limit / 2**20:.0f} MiB: no more "
                    "are captured, and steps that none fits run eagerly."
                )
                break
            self._fill(bucket, [], [])
            self._graphs[bucket] = self._capture(self._step(*bucket))
        self._say(
            f"Captured {len(self._graphs)} CUDA graphs in {time.perf_counter() - began:.1f} s, "
            f"{self._capture.nbytes / 2**20:.0f} MiB."
        )

    def run(self, token_ids: Sequence[int], rows: Sequence[Span]) -> Tensor | None:
        """Compute one token per row, and write its keys and values to the cache.

        Args:
            token_ids: one per row.
            rows: with one query each.

        Returns:
            Hidden states (rows, hidden_size), to keep; None if no graph is large enough.
        """
        size = self.cache.block_size
        width = -(-max(row.length for row in rows) // size)
        bucket = next((b for b in self.captured if b[0] >= len(rows) and b[1] >= width), None)
        if bucket is None:
            return None
        self._fill(bucket, token_ids, rows)
        replay, out = self._graphs[bucket]
        replay()
        return out[: len(rows)].clone()

    def _step(self, rows: int, width: int) -> Callable[[], Tensor]:
        """The step of a bucket: it knows sizes and tensors, and nothing that a step brings."""
        token_ids, positions = self._inputs[: 2 * rows].view(2, rows).unbind(0)
        tables = self._inputs[2 * rows : (2 + width) * rows].view(rows, width)
        size = self.cache.block_size

        @torch.inference_mode()
        def step() -> Tensor:
            page = tables.gather(1, (positions // size)[:, None])[:, 0]
            group = self.backend.static(tables, positions + 1, self.cache, self.model.windows)
            layout = AttentionMetadata(self.cache.slots(page, positions % size), [group])
            return self.model(token_ids, positions, self.cache, layout)

        return step

    def _fill(self, bucket: tuple[int, int], token_ids: Sequence[int], rows: Sequence[Span]) -> None:
        """Copy a step's values, and padding, to where the graph of a bucket reads them."""
        num_rows, width = bucket
        padding = array("q", [0]) * (num_rows - len(rows))
        nothing = array("q", [self.cache.null_block]) * width
        values = array("q", token_ids) + padding
        values.extend(row.start for row in rows)
        values += padding
        for row in rows:
            used = -(-row.length // self.cache.block_size)
            values.extend(row.table[:used])
            values += nothing[used:]
        values += nothing * (num_rows - len(rows))
        self._inputs[: len(values)].copy_(torch.frombuffer(values, dtype=torch.long))


def buckets(rows: int, width: int, *, growth: int) -> list[tuple[int, int]]:
    """Pairs (rows, width) up to these, largest first.

    Rows are 1, 2, 4, 8, and from there on doubled in two steps (12, 16, 24, 32); widths are divided by
    `growth` down to a few pages.
    """
    sizes, n = {rows}, 1
    while n < rows:
        sizes |= {n, n * 3 // 2} if n >= 8 and n * 3 // 2 < rows else {n}
        n *= 2
    widths = [width]
    while widths[-1] > _MIN_WIDTH:
        widths.append(-(-widths[-1] // growth))
    return [(n, w) for n in sorted(sizes, reverse=True) for w in widths]
