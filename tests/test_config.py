"""A configuration that cannot work is refused; the message names the field and the limit."""

from __future__ import annotations

import pytest

from labkit.config import EngineConfig


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(block_size=0), "block_size must be at least 1, not 0"),
        (dict(num_blocks=0), "num_blocks must be at least 1"),
        (dict(max_model_len=1), "max_model_len must be at least 2"),
        (dict(max_num_seqs=2.0), "max_num_seqs must be a whole number"),
        (dict(max_num_seqs=9, max_num_batched_tokens=8), r"max_num_seqs \(9\) must not exceed"),
        (dict(scheduler="fastest"), "scheduler must be one of continuous, static, .*, not 'fastest'"),
        (dict(kv_policy="all"), "kv_policy must be one of paged, reserved"),
        (dict(kv_cache_dtype="fp8"), "kv_cache_dtype must be None or 'auto' or 'int8', not 'fp8'"),
        (dict(audit="yes"), "audit must be True or False, not 'yes'"),
        (dict(max_trace_steps=0), "max_trace_steps must be at least 1"),
        (dict(seed=None), "seed must be a whole number"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)
