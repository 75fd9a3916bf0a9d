"""Exercises of notebook 03: hand out pages and take them back, and find the slot of a token in them."""

from __future__ import annotations

from labkit.exercises.e03_pool import POOL
from labkit.exercises.e03_slots import SLOTS

EXERCISES = (POOL, SLOTS)
