"""Evicted blocks that are kept: in host memory or in a file, from where a later prompt gets them back."""

from labkit.offload.pool import OffloadingPool, close_pool, make_pool, plain_parts

__all__ = ["OffloadingPool", "close_pool", "make_pool", "plain_parts"]
