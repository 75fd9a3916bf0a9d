"""What a machine, or many, can serve: a price for each step, and the real scheduler against that clock.

`fit` takes a clock from a trace, `Roofline` one from a data sheet; `replay` sends a workload through the
scheduler and the block pool, and says what its users would have seen. No torch.
"""

from labkit.analysis.capacity.clock import TERMS, Clock, FittedClock, StepWork, fit
from labkit.analysis.capacity.replay import ROUTERS, Demand, Replay, Router, draw_demands, replay
from labkit.analysis.capacity.replica import Replica, Settings
from labkit.analysis.capacity.roofline import GPUS, MODELS, Gpu, ModelSize, Roofline

__all__ = [
    "GPUS",
    "MODELS",
    "ROUTERS",
    "TERMS",
    "Clock",
    "Demand",
    "FittedClock",
    "Gpu",
    "ModelSize",
    "Replay",
    "Replica",
    "Roofline",
    "Router",
    "Settings",
    "StepWork",
    "draw_demands",
    "fit",
    "replay",
]
