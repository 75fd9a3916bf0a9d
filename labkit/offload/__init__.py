"""Evicted blocks that are kept: in host memory or in a file, from where a later prompt gets them back."""

from labkit.offload.pool import OffloadingPool, offloading_pool

__all__ = ["OffloadingPool", "offloading_pool"]
