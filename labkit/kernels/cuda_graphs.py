"""CUDA graphs: the GPU replays a whole decode step, which Python would otherwise launch kernel by kernel.

A step of a small model is hundreds of kernels of a few microseconds each, and Python takes longer to launch
one than the GPU takes to run it. A CUDA graph is recorded once and then launched as a whole. It repeats the
same kernels on the same memory, with every Python number that went into a launch frozen. So what changes from
step to step must be in tensors that stay where they are, and everything else must be the same for all steps
that use the graph:

- token ids, positions and block tables are copied into one buffer on the device, which all graphs share;
  slots and lengths are computed from them within the graph;
- the number of rows and the width of the block table are sizes, and sizes are frozen. A graph is recorded
  for each of a few pairs of them, its *bucket*, with everything that follows from the two (the splits of
  `flash_decoding`, the width of a mask). A step takes the smallest bucket that holds it. The rows that are
  left over are padding: each computes one token in the null block, and its result is dropped.

All graphs share one pool of memory. The largest is recorded first, so that the others fit into what it took.
Therefore the output of a graph is only valid until the next replay, and is copied at once. Steps in which a
row has more than one token differ too much from each other to be recorded: they run eagerly, and so do steps
that are wider than the largest bucket. Sampling is not recorded.
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

_MIN_WIDTH = 16  # blocks of the narrowest bucket


class Capture(Protocol):
    """Records what a function launches."""

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return a function that launches all of it again, and the tensor that it fills."""
        ...

    @property
    def nbytes(self) -> int:
        """The memory that all recordings take."""
        ...


class CudaCapture:
    """Records the CUDA graphs of a device, all in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        self._free = torch.cuda.mem_get_info(device)[0]

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # The present stream is set again even where the end of a failed capture raises.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            compute()  # eagerly first, because the first call compiles kernels and sets up libraries
            graph = torch.cuda.CUDAGraph()
            # "thread_local", because other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = compute()
        return graph.replay, out

    @property
    def nbytes(self) -> int:
        return max(0, self._free - torch.cuda.mem_get_info(self._device)[0])


class DecodeGraphs:
    """Graphs of steps in which every row computes one token.

    Args:
        model: a model of the Llama shape, whose forward pass does not wait for the device.
        cache, backend: the cache and the backend that eager steps use as well.
        max_num_seqs: the number of rows of the largest bucket.
        max_model_len: the number of tokens of a row in the widest bucket.
        memory_limit: the number of bytes that all graphs may take; recording stops when they are used up.
        say: a function that gets a line before recording and one after; None is silence.
        capture: a recorder; None records CUDA graphs.
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
        # Gathering copies as many blocks as the table is wide; a kernel that reads lengths ignores its width.
        self.wanted = buckets(max_num_seqs, widest, growth=4 if backend.name == "triton" else 2)
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._inputs = torch.zeros(max_num_seqs * (2 + widest), dtype=torch.long, device=model.device)

    @property
    def captured(self) -> list[tuple[int, int]]:
        """The buckets (rows, width) that have a graph, smallest first."""
        return sorted(self._graphs)

    def warm_up(self) -> None:
        """Record all graphs, the largest first, or as many as the memory limit allows.

        Raises:
            torch.OutOfMemoryError: if a step as large as a bucket does not fit into memory.
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
        """Compute one token of each row, and write its keys and values to the cache.

        Args:
            token_ids: the token of each row.
            rows: the rows, with one query each.

        Returns:
            Hidden states (rows, hidden_size), in memory of their own; None if no graph is large enough.
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
        """Return the step of a bucket: it uses sizes and tensors, but no value that changes between steps."""
        token_ids, positions = self._inputs[: 2 * rows].view(2, rows).unbind(0)
        tables = self._inputs[2 * rows : (2 + width) * rows].view(rows, width)
        size = self.cache.block_size

        @torch.inference_mode()
        def step() -> Tensor:
            block = tables.gather(1, (positions // size)[:, None])[:, 0]  # (rows,)
            group = self.backend.static(tables, positions + 1, self.cache, self.model.windows)
            metadata = AttentionMetadata(self.cache.slots(block, positions % size), [group], ())
            return self.model(token_ids, positions, self.cache, metadata)

        return step

    def _fill(self, bucket: tuple[int, int], token_ids: Sequence[int], rows: Sequence[Span]) -> None:
        """Copy the values of a step, and padding, to where the graph of a bucket reads them."""
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
    """Return pairs (rows, width) up to these, the largest first.

    Rows are 1, 2, 4, 8, and from there on doubled in two steps (12, 16, 24, 32). Widths are divided by
    `growth` down to a few blocks.
    """
    sizes, n = {rows}, 1
    while n < rows:
        sizes |= {n, n * 3 // 2} if n >= 8 and n * 3 // 2 < rows else {n}
        n *= 2
    widths = [width]
    while widths[-1] > _MIN_WIDTH:
        widths.append(-(-widths[-1] // growth))
    return [(n, w) for n in sorted(sizes, reverse=True) for w in widths]
