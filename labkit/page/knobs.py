"""The settings of an engine that the page can change, and the values that each may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.config import KV_POLICIES, EngineConfig
from labkit.sampling_params import check_flag, check_number

# A number's least and greatest value, or a choice of values.
SIZES = {
    "block_size": (1, 256),
    "num_blocks": (4, 4096),
    "max_num_seqs": (1, 256),
    "max_num_batched_tokens": (1, 8192),
}
CHOICES = {
    "scheduler": ("continuous", "static", "naive"),
    "kv_policy": KV_POLICIES,
    "speculative": (None, "ngram"),
    "max_step_seconds": (None, 0.02, 0.05, 0.1, 0.2, 0.5),
}
FLAGS = ("enable_prefix_caching", "enable_chunked_prefill")
KNOBS = (*CHOICES, *SIZES, *FLAGS)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming the field and the limit, unless these are knobs with possible values."""
    for name, value in settings.items():
        if name in SIZES:
            check_number(name, value, *SIZES[name], whole=True)
        elif name in CHOICES:
            if value not in CHOICES[name]:
                known = ", ".join(map(str, CHOICES[name]))
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        elif name in FLAGS:
            check_flag(name, value)
        else:
            raise ValueError(f"{str(name)[:40]!r} is no setting: known are {', '.join(KNOBS)}")


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """Return what the knobs stand at in a configuration."""
    return {name: getattr(config, name) for name in KNOBS}
