"""Where evicted blocks are kept: in host memory, or in a file.

A block comes here when it is evicted, and leaves when it goes back. So the blocks that came first are those
whose last use is longest ago, and they make room first.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.core.kv_cache import PagedKVCache
from labkit.models.errors import is_out_of_memory
from labkit.models.progress import Say, tell


class Store:
    """The names of the kept blocks, least recently used first. By itself it moves no contents.

    Args:
        capacity: the most blocks that it keeps.
        say: the function that gets a line, once, if they cannot be kept as they should be.
    """

    def __init__(self, capacity: int, say: Say | None = None) -> None:
        self.capacity, self._say = capacity, say
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: bytes) -> bool:
        return name in self._kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        """Return a store of the names alone, in which a plan can be tried out."""
        twin = Store(self.capacity)
        twin._kept = OrderedDict.fromkeys(self._kept)
        return twin

    def keep(self, name: bytes, block: int) -> None:
        """Keep what a block of the cache holds now. Where that fails, it is as if there were no room."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        while self._kept and len(self._kept) >= self.capacity:
            self._discard(self._kept.popitem(last=False)[1])
        if not self.capacity:
            return
        try:
            self._kept[name] = self._save(block)
        except (OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            self.capacity = len(self._kept)  # what there is room for
            self._complain(error)

    def take(self, name: bytes) -> Any:
        """Take a kept block out; return what `fill` wants. Raises `LookupError` if it cannot be read."""
        return self._kept.pop(name)

    def fill(self, block: int, content: Any) -> None:
        """Put what `take` returned into a block of the cache."""

    def close(self) -> None:
        """Forget all blocks, and give their memory back."""
        self.capacity = 0
        self._kept.clear()

    def _save(self, block: int) -> Any:
        return None

    def _discard(self, kept: Any) -> None:
        pass

    def _complain(self, error: Exception) -> None:
        tell(self._say, f"Evicted pages cannot all be kept, and are computed again: {error}")
        self._say = None


class HostStore(Store):
    """Keeps blocks of a cache in host memory, each as (layers, 2, kv_heads, block_size, head_dim)."""

    def __init__(self, cache: PagedKVCache, capacity: int, say: Say | None = None) -> None:
        super().__init__(capacity, say)
        self.cache: PagedKVCache | None = cache

    def fill(self, block: int, content: Tensor) -> None:
        self.cache.blocks[:, block] = content.to(self.cache.device)

    def close(self) -> None:
        super().close()
        self.cache = None

    def _save(self, block: int) -> Any:
        return self.cache.blocks[:, block].clone(memory_format=torch.contiguous_format).cpu()


class FileStore(HostStore):
    """Keeps blocks of a cache in a file without a name, which is gone when the process is, however it ends.

    Nobody else writes to it, but a disk can fail: what does not have its checksum is not used.

    Args:
        folder: the folder on whose disk the file lies; it is made if there is none.
    """

    def __init__(
        self, cache: PagedKVCache, capacity: int, folder: str | os.PathLike[str], say: Say | None = None
    ) -> None:
        super().__init__(cache, capacity, say)
        self._sizes = cache.blocks[:, 0].shape
        self._free: list[int] = []  # places in the file that held blocks
        self._num_places = 0
        self._file = None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        except OSError as error:
            self.capacity = 0
            self._complain(error)

    def take(self, name: bytes) -> Tensor:
        place, checksum = kept = self._kept.pop(name)
        self._discard(kept)
        content = torch.empty(self._sizes, dtype=self.cache.blocks.dtype)
        data = _bytes_of(content)
        try:
            self._file.seek(place * len(data))
            whole = self._file.readinto(data) == len(data) and _checksum(data) == checksum
            if not whole:
                raise OSError("a page in the file is damaged")
        except OSError as error:
            self._complain(error)
            raise LookupError(name) from None
        return content

    def close(self) -> None:
        super().close()
        if self._file:
            self._file.close()

    def _save(self, block: int) -> tuple[int, bytes]:
        data = _bytes_of(super()._save(block))
        place = self._free.pop() if self._free else self._num_places
        try:
            self._file.seek(place * len(data))
            left = data
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            if place < self._num_places:
                self._free.append(place)
            raise
        self._num_places = max(self._num_places, place + 1)
        return place, _checksum(data)

    def _discard(self, kept: tuple[int, bytes]) -> None:
        self._free.append(kept[0])


def _bytes_of(content: Tensor) -> memoryview:
    return memoryview(content.flatten().view(torch.uint8).numpy())


def _checksum(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()
