"""What a machine, or many, can serve: a clock says what each step takes, and the real scheduler runs on it.

`fit` takes a clock from a trace, `Roofline` one from a data sheet. `replay` sends a workload through the
scheduler and the block pool, and says what its users would have seen. No torch.
"""

from labkit.analysis.capacity.clock import TERMS, Clock, FittedClock, Roofline, fit
from labkit.analysis.capacity.replay import ROUTERS, Demand, Replay, Router, draw_demands, replay
from labkit.analysis.capacity.replica import Replica, Settings
from labkit.analysis.devices import GPUS, LINKS, Gpu, Link
from labkit.analysis.roofline import MODELS, ModelSize, StepWork, Traffic, Work

__all__ = [
    "GPUS",
    "LINKS",
    "MODELS",
    "ROUTERS",
    "TERMS",
    "Clock",
    "Demand",
    "FittedClock",
    "Gpu",
    "Link",
    "ModelSize",
    "Replay",
    "Replica",
    "Roofline",
    "Router",
    "Settings",
    "StepWork",
    "Traffic",
    "Work",
    "draw_demands",
    "fit",
    "replay",
]
