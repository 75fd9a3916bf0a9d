"""Exercises of notebook 07: what a step moves and computes, and when computing takes longer than moving."""

from __future__ import annotations

from labkit.exercises.e07_cost import COST
from labkit.exercises.e07_turning_point import TURNING_POINT

EXERCISES = (COST, TURNING_POINT)
