"""A block pool whose evicted blocks are not lost: a prompt that begins as they did gets them back."""

from __future__ import annotations

import hashlib
import uuid
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.int8_kv import Int8KVCache
from labkit.models.progress import Say
from labkit.offload.stores import FileStore, HostStore, Store

_PLAIN = ("ref_counts", "free", "cached", "forked", "block_of", "key_of", "node_of")


class OffloadingPool(BlockPool):
    """Copies a block of the prefix cache into a store before it evicts it, and back when it is looked up.

    Both happen while a step is planned, before it writes to any block. What comes back goes into a block
    like any other, and into the prefix tree: from there on, it is a block that was never away.

    In the store a block has a name of 256 bits, which stands for all tokens up to its end: the nodes of the
    tree do not last as long. (Compare LMCache, vLLM's `OffloadingConnector` and SGLang's HiCache, which copy
    blocks when they are full, beside the steps, where this copies them late, and within a step.)

    Args:
        num_blocks, block_size: the sizes, as of any pool.
        store: the store of the blocks' contents.
    """

    def __init__(self, num_blocks: int, block_size: int, store: Store) -> None:
        super().__init__(num_blocks, block_size)
        self.store = store
        self._names = [b""] * num_blocks  # of what each block in the tree holds
        self._named: dict[str, tuple[int, bytes]] = {}  # how many of a request's blocks, and the last name
        self._restored: list[int] = []

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Return the blocks that hold the longest known prefix, with those that it gets back for it.

        It gets them back if there is room for all of these tokens; they are then cached like others.
        """
        known = super().match(token_ids)
        names = self._kept_after(known, token_ids)
        if not names or self.blocks_for(len(token_ids)) - len(known) > self.num_free_without(known):
            return known
        holder = f"restore {uuid.uuid4()}"  # of all these blocks, so that none of them is evicted for another
        self.share(holder, known)
        for name in names:
            try:
                content = self.store.take(name)  # before the place is found: what goes for it fits in
            except LookupError:
                break
            (block,) = self.allocate(holder, 1)
            self.store.fill(block, content)
            self._restored.append(block)
        self.publish(holder, token_ids, len(self.tables[holder]) * self.block_size)
        self.release(holder)
        return super().match(token_ids)

    def share(self, request_id: str, shared: Sequence[int]) -> None:
        super().share(request_id, shared)
        self._named[request_id] = len(shared), self._names[shared[-1]] if shared else b""

    def publish(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        super().publish(request_id, token_ids, num_computed_tokens)
        size, table = self.block_size, self.tables[request_id]
        done, name = self._named.get(request_id, (0, b""))
        for i in range(done, num_computed_tokens // size):
            name = self._names[table[i]] = _name(name, token_ids[i * size : (i + 1) * size])
            self._named[request_id] = i + 1, name

    def release(self, request_id: str) -> list[int]:
        self._named.pop(request_id, None)
        return super().release(request_id)

    def drain_changes(self) -> dict[str, tuple[int, ...]]:
        changes = super().drain_changes() | {"restored": tuple(self._restored)}
        self._restored = []
        return changes

    def _take(self) -> int:
        if not self.free:
            oldest = next(iter(self.cached))
            self.store.keep(self._names[oldest], oldest)
        return super()._take()

    def _evict(self, block: int) -> None:
        super()._evict(block)
        if block in self._restored:  # since the last record: it came and went
            self._restored.remove(block)

    def _kept_after(self, known: Sequence[int], token_ids: Sequence[int]) -> list[bytes]:
        """Return the names of the blocks in the store that go on with these tokens after the known blocks."""
        names: list[bytes] = []
        name, size = self._names[known[-1]] if known else b"", self.block_size
        for i in range(len(known), (len(token_ids) - 1) // size):
            name = _name(name, token_ids[i * size : (i + 1) * size])
            if name not in self.store:
                break
            names.append(name)
        return names


def _name(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of the block that holds these tokens after the block with the name `before`."""
    return hashlib.sha256(before + array("q", token_ids).tobytes()).digest()


def make_pool(
    own: Callable[..., BlockPool] | None, config: EngineConfig, cache: PagedKVCache, say: Say | None
) -> BlockPool:
    """Make the pool of a cache, as the configuration asks for it.

    Args:
        own: a class of the caller's own, or None.
        config, cache: the settings, and the cache that has the pool's blocks.
        say: the function that gets a line if evicted blocks cannot be kept.

    Raises:
        ValueError: if `kv_offloading_size` is less than a block, or cannot work with this pool or cache.
    """
    if config.kv_offloading_size is None:
        return (own or BlockPool)(cache.num_blocks, config.block_size)
    if own or type(cache) not in (PagedKVCache, Int8KVCache):
        raise ValueError("kv_offloading_size needs labkit's own pool, and pages that lie in this process")
    block_bytes = cache.blocks[:, 0].nbytes
    capacity = int(config.kv_offloading_size * 2**30 // block_bytes)
    if not capacity:
        raise ValueError(
            f"kv_offloading_size must be at least {block_bytes / 2**30:.2g} (GiB), which one page takes, "
            f"not {config.kv_offloading_size}"
        )
    if config.kv_offloading_dir is None:
        store = HostStore(cache, capacity, say)
    else:
        store = FileStore(cache, capacity, config.kv_offloading_dir, say)
    return OffloadingPool(cache.num_blocks, config.block_size, store)


def close_pool(pool: BlockPool) -> None:
    """Give back the memory that a pool keeps evicted blocks in, if it does."""
    if isinstance(pool, OffloadingPool):
        pool.store.close()


def plain_parts(pool: BlockPool) -> list[Any]:
    """Return what a pool holds of plain values alone; nothing of a pool whose class is not known here."""
    names = _PLAIN if type(pool) in (BlockPool, OffloadingPool) else ()
    return [getattr(pool, name) for name in names]
