"""The auditor's own checks of a pool: what is broken is named."""

from __future__ import annotations

import pytest

from labkit.core.block_pool import BlockPool, InvariantError
from labkit.schedulers.audit import check_pool


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda pool: pool.ref_counts.__setitem__(0, 2), "reference count 2, but it is in 1 tables"),
        (lambda pool: pool.free.append(0), "block 0 is in 2 of"),
        (lambda pool: pool.free.pop(), "is in 0 of"),
        (lambda pool: pool.free.append(pool.free[-1]), "in the free list twice"),
        (lambda pool: pool.tables["a"].append(0), "holds a block twice"),
        (
            lambda pool: (pool.tables.update(b=[1]), pool.ref_counts.__setitem__(1, 2)),
            "2 owners, but nobody shared it",
        ),
    ],
)
def test_a_broken_pool_is_found_out(breakage, message: str) -> None:
    pool = BlockPool(6, 2)
    pool.allocate("a", 2)
    check_pool(pool)
    breakage(pool)
    with pytest.raises(InvariantError, match=message):
        check_pool(pool)
