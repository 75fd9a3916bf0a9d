"""Which page of the KV cache belongs to whom. No tensors here: a page is a number.

Paging is from PagedAttention (Kwon et al. 2023, vLLM): a request's tokens lie in fixed-size pages listed in
its block table, so memory is taken as tokens come and given back whole. The prefix cache is a tree of full
pages: a page is found by the page before it and the tokens in it, both compared exactly, so unlike with a
hash there is no collision to fear (compare RadixAttention, Zheng et al. 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

_ROOT = 0  # parent of every first page in the prefix tree


class OutOfBlocks(RuntimeError):
    """More pages were asked for than are free."""


class InvariantError(RuntimeError):
    """A rule of the engine is broken; the message names the rule and where."""


class BlockPool:
    """Hands out pages, counts their owners, and remembers what full pages hold.

    A page is in one of three places: `free` (holds nothing of use), `cached` (no owner, but its tokens are
    known and a later request may share it) or in block tables (`ref_counts` says in how many).

    Args:
        num_blocks: pages in the pool.
        block_size: tokens to a page.
        enable_prefix_caching: remember full pages after their owners are gone.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, not {num_blocks}, {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.tables: dict[str, list[int]] = {}
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: page 0 is handed out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._forked: set[int] = set()  # pages shared by a fork, not through the prefix cache
        # The prefix tree. A key is (node of the page before, tokens of this page).
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._node_of: dict[int, int] = {}
        self._next_node = _ROOT + 1
        self._chain: dict[str, tuple[int, int]] = {}  # request -> (full pages in the tree, node of the last)
        self._published: list[int] = []
        self._evicted: list[int] = []

    # -- taking and giving back -------------------------------------------------------------------

    @property
    def num_published(self) -> int:
        """Pages ever made known to later requests; only grows."""
        return self._next_node - 1

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, those that cache an ownerless prefix included."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-num_tokens // self.block_size)

    def table(self, request_id: str) -> list[int]:
        """The block table of a request: page i holds tokens `[i * block_size, (i + 1) * block_size)`."""
        return self.tables[request_id]

    def allocate(self, request_id: str, count: int) -> list[int]:
        """Append `count` pages to a request's block table and return them.

        Raises:
            OutOfBlocks: if fewer are free; nothing is taken then.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"request {request_id!r} asks for {count} pages, {self.num_free} are free")
        blocks = [self._take() for _ in range(count)]
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks

    def release(self, request_id: str) -> list[int]:
        """Give back all pages of a request; returns its block table as it was.

        Raises:
            InvariantError: if the request holds no pages, or one of them has no owner (a double free).
        """
        table = self.tables.pop(request_id, None)
        if table is None:
            raise InvariantError(f"double free: request {request_id!r} holds no pages")
        self._chain.pop(request_id, None)
        # Tail first: the end of a prefix is evicted before its beginning, which more requests share.
        for block in reversed(table):
            self._drop(block, request_id)
        return table

    def truncate(self, request_id: str, count: int) -> list[int]:
        """Give back all pages of a request but the first `count`; returns them, in table order.

        The pages must not be known to the prefix cache: nothing that may be taken back is published.
        """
        table = self.tables[request_id]
        blocks = table[count:]
        del table[count:]
        for block in reversed(blocks):
            self._drop(block, request_id)
        return blocks

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self.ref_counts[block] = 1
        return block

    def _drop(self, block: int, request_id: str) -> None:
        if self.ref_counts[block] < 1:
            raise InvariantError(f"double free: block {block} of request {request_id!r} has no owner")
        self.ref_counts[block] -= 1
        if self.ref_counts[block] <= 1:
            self._forked.discard(block)
        if self.ref_counts[block] == 0:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    # -- sharing ----------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """The pages that already hold the longest known prefix of these tokens.

        Never all of the tokens: at least one is left to compute, or there would be no logits to sample from.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching:
            return blocks
        node, size = _ROOT, self.block_size
        for i in range((len(token_ids) - 1) // size):
            block = self._block_of.get((node, tuple(token_ids[i * size : (i + 1) * size])))
            if block is None:
                break
            blocks.append(block)
            node = self._node_of[block]
        return blocks

    def num_free_without(self, shared: Sequence[int]) -> int:
        """Pages that would be free if these matched ones were shared."""
        return self.num_free - sum(self.ref_counts[block] == 0 for block in shared)

    def share(self, request_id: str, shared: Sequence[int]) -> None:
        """Start a request's block table with pages that `match` found.

        Raises:
            InvariantError: if the request already has a block table (tables are append-only).
        """
        if request_id in self.tables:
            raise InvariantError(f"request {request_id!r} already has a block table")
        for block in shared:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1
        self.tables[request_id] = list(shared)
        self._chain[request_id] = (len(shared), self._node_of[shared[-1]] if shared else _ROOT)

    def publish(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Let later requests find a request's full pages. Call it once their keys and values are written.

        A page with the same tokens may be known already, from a request that ran at the same time. Then
        both stay: swapping pages under a live request would be a rewrite of its block table.
        """
        if not self.enable_prefix_caching:
            return
        size, table = self.block_size, self.tables[request_id]
        done, node = self._chain.get(request_id, (0, _ROOT))
        for i in range(done, num_computed_tokens // size):
            block = table[i]
            key = self._key_of.get(block) or (node, tuple(token_ids[i * size : (i + 1) * size]))
            block = self._block_of.setdefault(key, block)
            if block not in self._key_of:
                self._key_of[block] = key
                self._node_of[block] = self._next_node
                self._next_node += 1
                self._published.append(block)
            node = self._node_of[block]
        self._chain[request_id] = (max(done, num_computed_tokens // size), node)

    def fork(self, parent_id: str, child_id: str) -> list[int]:
        """Give a child all of its parent's pages, shared; returns them. See `make_writable`."""
        if child_id in self.tables:
            raise InvariantError(f"request {child_id!r} already has a block table")
        table = self.tables[child_id] = list(self.tables[parent_id])
        for block in table:
            self.ref_counts[block] += 1
        self._forked.update(table)
        if parent_id in self._chain:
            self._chain[child_id] = self._chain[parent_id]
        return table

    def make_writable(self, request_id: str, index: int) -> tuple[int, int] | None:
        """Copy on write: if others share the page at this place in the table, put a page of its own there.

        Returns (old page, new page), whose contents the caller must copy before writing, or None.

        Raises:
            OutOfBlocks: if no page is free.
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

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        del self._node_of[block]
        self._evicted.append(block)

    def drain_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Pages (published, evicted) since the last call, for the trace."""
        changes = tuple(self._published), tuple(self._evicted)
        self._published.clear()
        self._evicted.clear()
        return changes

    def forget(self, blocks: Iterable[int]) -> None:
        """Take those of these pages that nobody owns out of the prefix cache."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self._forget(block)
                self._free.append(block)

    # -- rules ------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Check every rule of the pool; slow, for tests and for pools that a learner wrote.

        Raises:
            InvariantError: naming the rule, the block and the request.
        """
        counted = [0] * self.num_blocks
        for request_id, table in self.tables.items():
            if len(set(table)) != len(table):
                raise InvariantError(f"request {request_id!r} holds a block twice: {table}")
            for block in table:
                counted[block] += 1
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            twice = next(block for block in self._free if self._free.count(block) > 1)
            raise InvariantError(f"block {twice} is in the free list twice")
        for block, count in enumerate(counted):
            if count != self.ref_counts[block]:
                raise InvariantError(
                    f"block {block}: reference count {self.ref_counts[block]}, but it is in {count} tables"
                )
            places = (count > 0) + (block in free) + (block in cached)
            if places != 1:
                raise InvariantError(f"block {block} is in {places} of: free, cached, owned")
            if count > 1 and block not in self._key_of and block not in self._forked:
                raise InvariantError(f"block {block} has {count} owners, but nobody shared it")
            if block in free and block in self._key_of:
                raise InvariantError(f"block {block} is in the free list and in the prefix cache")
        if not (cached <= self._key_of.keys() == self._node_of.keys()):
            raise InvariantError("a block in the prefix cache has no place in the prefix tree")
        for block, key in self._key_of.items():
            if self._block_of.get(key) != block:
                raise InvariantError(f"block {block} is known by a key that leads elsewhere")
        if len(self._block_of) != len(self._key_of):
            raise InvariantError("the prefix tree holds a key without a block")
