"""The compiled operations, where this machine can compile them."""

from __future__ import annotations

import pytest

from labkit.kernels.cpu.build import why_not
from labkit.models.cache_dir import cache_dir

LACKING = why_not(cache_dir() / "kernels")
needs_compiler = pytest.mark.skipif(LACKING is not None, reason=f"no CPU kernels: {LACKING}")
