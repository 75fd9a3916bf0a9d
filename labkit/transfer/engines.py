"""Pages out of one engine's cache, and into another's.

What arrives goes to the prefix cache: a request whose prompt begins with the same tokens finds it there, as
if this engine had computed it, and a request that does not loses nothing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from labkit.core.attention import Span, build_metadata
from labkit.engine import Engine
from labkit.kernels.int8_kv import SCALE_BYTES, dequantize, kv_shape
from labkit.models.cache_dir import written_whole
from labkit.parallel.model import ParallelTransformer
from labkit.transfer.pages import KVPages, TransferError

_SIZES = ("layers", "kv_heads", "block_size", "head_dim")
_EXACT, _ROUNDED = 1e-3, 0.03  # how far keys and values may differ in fp32, and in fewer bits


def export_kv(engine: Engine, token_ids: Sequence[int]) -> KVPages:
    """Copy the pages of a text out of an engine, as far as its cache still has them.

    Args:
        engine: the engine, between two steps.
        token_ids: the text: of a request, `output.prompt_token_ids + output.token_ids`.

    Raises:
        TransferError: if the cache has no whole page of it, or the engine cannot share pages.
    """
    _check(engine)
    blocks = engine.pool.match([*token_ids, 0])  # one more token, because it never returns all of them
    if not blocks:
        raise TransferError(
            f"the cache has no whole page of these {len(token_ids)} tokens: it keeps pages of "
            f"{engine.pool.block_size} tokens, until it needs their place"
        )
    where = torch.tensor(blocks, device=engine.runner.cache.device)
    copied = engine.runner.cache.blocks.index_select(1, where).cpu()
    known = list(token_ids[: len(blocks) * engine.pool.block_size])
    return KVPages(known, copied, engine.model.name)


def import_kv(engine: Engine, pages: KVPages, *, compare: bool = True) -> int:
    """Put pages into an engine's prefix cache; return how many tokens of the text it holds now.

    That is less than all of them if the pool has fewer free pages. Pages that nobody uses are evicted as
    usual, the least recently used first.

    Args:
        engine: the engine, between two steps.
        pages: what `export_kv` returned, in this process or another.
        compare: whether the first page is computed here, too, and compared. It tells models apart, and takes
            as long as a step.

    Raises:
        TransferError: if the pages are of another model, dtype or layout; the message names what differs.
    """
    _check(engine)
    cache, pool = engine.runner.cache, engine.pool
    ours, theirs = cache.blocks.dtype, pages.blocks.dtype
    if ours != theirs:
        name = "kv_cache_dtype" if torch.int8 in (ours, theirs) else "dtype"
        raise TransferError(f"{name} must be {ours}, as in this engine, not {theirs}")
    for name, own, found in zip(_SIZES, _sizes(cache.blocks), _sizes(pages.blocks), strict=True):
        if own != found:
            raise TransferError(f"{name} must be {own}, as in this engine, not {found}")
    vocab_size = engine.model.module.vocab_size
    if not all(0 <= token < vocab_size for token in pages.token_ids):
        raise TransferError(f"token_ids must be below {vocab_size}, the size of this model's vocabulary")
    if compare:
        _check_values(engine, pages)
    known = pool.match([*pages.token_ids, 0])
    total = min(pages.blocks.shape[1], len(known) + pool.num_free_without(known))
    name = f"import {uuid.uuid4()}"
    pool.share(name, known)
    new = pool.allocate(name, total - len(known))
    cache.blocks[:, torch.tensor(new, dtype=torch.long, device=cache.device)] = pages.blocks[
        :, len(known) : total
    ].to(cache.device)
    pool.publish(name, pages.token_ids, total * pool.block_size)
    pool.release(name)
    return total * pool.block_size


def save_session(engine: Engine, token_ids: Sequence[int], path: str | os.PathLike[str]) -> int:
    """Keep the pages of a text in a file; return how many tokens that is. Raises as `export_kv` does."""
    pages = export_kv(engine, token_ids)
    with written_whole(Path(path)) as part:
        part.write_bytes(pages.to_bytes())
    return len(pages.token_ids)


def load_session(engine: Engine, path: str | os.PathLike[str]) -> list[int]:
    """Put the pages of a file into an engine's prefix cache; return the tokens that it holds now.

    Raises as `import_kv` does, and for a file that is damaged or something else.
    """
    pages = KVPages.from_bytes(Path(path).read_bytes())
    return pages.token_ids[: import_kv(engine, pages)]


def _sizes(blocks: Tensor) -> tuple[int, ...]:
    layers, _, _, kv_heads, size, width = blocks.shape
    return layers, kv_heads, size, width - SCALE_BYTES if blocks.dtype == torch.int8 else width


def _values(blocks: Tensor) -> Tensor:
    """Return keys and values in fp32, on the CPU."""
    return (dequantize(blocks, torch.float32) if blocks.dtype == torch.int8 else blocks.float()).cpu()


def _check_values(engine: Engine, pages: KVPages) -> None:
    """Compute the first page here, and compare: weights tell themselves apart, whatever they are called."""
    module, size = engine.model.module, engine.pool.block_size
    cache = kv_shape(module, engine.config.kv_cache_dtype).new_cache(1, size)
    device = cache.device
    metadata = build_metadata([Span(0, size, [0])], cache, engine.runner.backend, windows=module.windows)
    tokens = torch.tensor(pages.token_ids[:size], device=device)
    module(tokens, torch.arange(size, device=device), cache, metadata)
    ours, theirs = _values(cache.blocks[:, 0]), _values(pages.blocks[:, 0])
    limit = _EXACT if pages.blocks.dtype == torch.float32 else _ROUNDED
    if not (ours - theirs).norm() < limit * ours.norm():  # NaN neither
        raise TransferError(f"model: these pages are of {pages.model}, and not of this {engine.model.name}")


def _check(engine: Engine) -> None:
    if isinstance(engine.model.module, ParallelTransformer):
        raise TransferError("the pages of a parallel model lie in several processes, and cannot be moved")
    if not (engine.pool.enable_prefix_caching and engine.scheduler.uses_prefix_cache):
        raise TransferError("enable_prefix_caching must be on, and the scheduler one that uses it")
