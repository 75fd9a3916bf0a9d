"""What is checked before an engine runs: whether its memory suffices."""

from __future__ import annotations

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine


def test_a_cache_that_does_not_fit_says_how_much_it_needs() -> None:
    with pytest.raises(ValueError, match=r"num_blocks=10000000000 needs [\d.]+ GiB for the KV cache"):
        Engine(EngineConfig("tiny-random", num_blocks=10**10))
