"""A plan to tensors to tokens: which drafts are kept."""

from __future__ import annotations

from labkit.core.model_runner import accept


def test_accept_counts_up_to_the_first_that_differs() -> None:
    assert accept((), ()) == 0
    assert accept((1, 2, 3), (1, 2, 3)) == 3
    assert accept((1, 2, 3), (1, 9, 3)) == 1
    assert accept((1, 2), (9, 2)) == 0
