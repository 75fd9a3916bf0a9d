"""The block pool: which request holds which blocks of the KV cache. No tensors here: a block is a number.

Paging is from PagedAttention (Kwon et al. 2023, vLLM): the tokens of a request lie in blocks of a fixed size,
which its block table lists, so that memory is taken as tokens come, and any free block will do. The prefix
cache is a tree of full blocks: a block is found by the block before it and the tokens in it. Both are
compared exactly, so nothing can collide, as hashes can (compare RadixAttention, Zheng et al. 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

_ROOT = 0  # the node above every first block of the prefix tree


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class InvariantError(RuntimeError):
    """A rule of the engine is broken; the message names the rule and where."""


class BlockPool:
    """Hands out blocks, counts their owners, and remembers what full blocks hold.

    A block is in one of three places: `free` (it holds nothing of use), `cached` (it has no owner, but its
    tokens are known, and a later request may share it) or in block tables (`ref_counts` says in how many).
    `labkit.schedulers.audit.check_pool` checks this and all other rules. `block_size` is in tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, not {num_blocks}, {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        # The block table of each request: entry i holds tokens `[i * block_size, (i + 1) * block_size)`.
        self.tables: dict[str, list[int]] = {}
        self.ref_counts = [0] * num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is handed out first
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.forked: set[int] = set()  # shared by a fork, not through the prefix cache
        # The prefix tree. Each block in it is a node; its key is (node of the block before, its tokens).
        self.block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self.key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.node_of: dict[int, int] = {}
        self._next_node = _ROOT + 1
        # For each request: how many of its blocks are in the tree, and the node of the last.
        self._chain: dict[str, tuple[int, int]] = {}
        self._published: list[int] = []
        self._evicted: list[int] = []

    # -- taking and giving back -------------------------------------------------------------------

    @property
    def num_published(self) -> int:
        """How many blocks have been published so far, evicted ones included; it only grows."""
        return self._next_node - 1

    @property
    def num_free(self) -> int:
        """How many blocks can be taken now, cached ones included, because they can be evicted."""
        return len(self.free) + len(self.cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, request_id: str, count: int) -> list[int]:
        """Append `count` blocks to a request's table; return them. Takes none if it raises `OutOfBlocks`."""
        if count > self.num_free:
            raise OutOfBlocks(f"request {request_id!r} asks for {count} pages, {self.num_free} are free")
        blocks = [self._take() for _ in range(count)]
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks

    def release(self, request_id: str) -> list[int]:
        """Give back all blocks of a request; return its block table as it was. A double free raises."""
        if (table := self.tables.pop(request_id, None)) is None:
            raise InvariantError(f"double free: request {request_id!r} holds no pages")
        self._chain.pop(request_id, None)
        # The tail goes first, so that a prefix is evicted from its end: more requests share its beginning.
        for block in reversed(table):
            self._drop(block, request_id)
        return table

    def truncate(self, request_id: str, count: int) -> list[int]:
        """Give back a request's blocks after the first `count`; return them. They must be unpublished."""
        blocks = self.tables[request_id][count:]
        del self.tables[request_id][count:]
        for block in reversed(blocks):
            self._drop(block, request_id)
        return blocks

    def _take(self) -> int:
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.cached.popitem(last=False)  # the least recently used
            self._evict(block)
        self.ref_counts[block] = 1
        return block

    def _drop(self, block: int, request_id: str) -> None:
        if self.ref_counts[block] < 1:
            raise InvariantError(f"double free: block {block} of request {request_id!r} has no owner")
        self.ref_counts[block] -= 1
        if self.ref_counts[block] <= 1:
            self.forked.discard(block)  # one owner at most is left: nobody shares it
        if self.ref_counts[block] == 0:
            if block in self.key_of:
                self.cached[block] = None  # at the end, as the most recently used
            else:
                self.free.append(block)

    # -- sharing ----------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Return the blocks that already hold the longest known prefix of these tokens."""
        blocks: list[int] = []
        node, size = _ROOT, self.block_size
        # Never all of the tokens: at least one must be computed, because its logits are sampled from.
        for i in range((len(token_ids) - 1) // size if self.enable_prefix_caching else 0):
            block = self.block_of.get((node, tuple(token_ids[i * size : (i + 1) * size])))
            if block is None:
                break
            blocks.append(block)
            node = self.node_of[block]
        return blocks

    def num_free_without(self, shared: Sequence[int]) -> int:
        """Return how many blocks would be free once these matched ones are shared."""
        return self.num_free - sum(self.ref_counts[block] == 0 for block in shared)

    def share(self, request_id: str, shared: Sequence[int]) -> None:
        """Start a request's block table with the blocks that `match` found. Tables are append-only."""
        if request_id in self.tables:
            raise InvariantError(f"request {request_id!r} already has a block table")
        for block in shared:
            if self.ref_counts[block] == 0:
                del self.cached[block]
            self.ref_counts[block] += 1
        self.tables[request_id] = list(shared)
        self._chain[request_id] = (len(shared), self.node_of[shared[-1]] if shared else _ROOT)

    def publish(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Let later requests find a request's full blocks. Call it once their keys and values are written."""
        if not self.enable_prefix_caching:
            return
        size, table = self.block_size, self.tables[request_id]
        done, node = self._chain.get(request_id, (0, _ROOT))
        for i in range(done, num_computed_tokens // size):
            block = table[i]
            key = self.key_of.get(block) or (node, tuple(token_ids[i * size : (i + 1) * size]))
            # A request that ran at the same time may have published the same tokens. Then both blocks stay,
            # and the tree goes on from that one: to swap blocks would rewrite the table of a live request.
            block = self.block_of.setdefault(key, block)
            if block not in self.key_of:
                self.key_of[block] = key
                self.node_of[block] = self._next_node
                self._next_node += 1
                self._published.append(block)
            node = self.node_of[block]
        self._chain[request_id] = (max(done, num_computed_tokens // size), node)

    def fork(self, parent_id: str, child_id: str) -> list[int]:
        """Share all of a parent's blocks with a child; return them. `make_writable` separates them again."""
        if child_id in self.tables:
            raise InvariantError(f"request {child_id!r} already has a block table")
        table = self.tables[child_id] = list(self.tables[parent_id])
        for block in table:
            self.ref_counts[block] += 1
        self.forked.update(table)
        if parent_id in self._chain:
            self._chain[child_id] = self._chain[parent_id]
        return table

    def make_writable(self, request_id: str, index: int) -> tuple[int, int] | None:
        """Copy on write: if others share the block at this place in the table, put a new one there.

        Returns None if nobody shares it, else (old block, new block): the caller must copy old to new
        before it writes. Raises `OutOfBlocks` if none is free.
        """
        table = self.tables[request_id]
        old = table[index]
        if self.ref_counts[old] == 1:
            return None
        if self.num_free == 0:
            raise OutOfBlocks(f"request {request_id!r} needs a page of its own, none is free")
        new = table[index] = self._take()
        self._drop(old, request_id)
        return old, new

    def _evict(self, block: int) -> None:
        del self.block_of[self.key_of.pop(block)]
        del self.node_of[block]
        if block in self._published:  # since the last record, in which it can no longer be found
            self._published.remove(block)
        self._evicted.append(block)

    def drain_changes(self) -> dict[str, tuple[int, ...]]:
        """Return the blocks published and evicted since the last call, as fields of `StepRecord`."""
        changes = {"published": tuple(self._published), "evicted": tuple(self._evicted)}
        self._published, self._evicted = [], []
        return changes

    def forget(self, blocks: Iterable[int]) -> None:
        """Remove those of these blocks that have no owner from the prefix cache."""
        for block in blocks:
            if block in self.cached:
                del self.cached[block]
                self._evict(block)
                self.free.append(block)
