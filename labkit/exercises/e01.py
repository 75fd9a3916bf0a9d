"""Exercises of notebook 01: a greedy loop that keeps its cache, and how to catch one that loses it."""

from __future__ import annotations

from labkit.exercises.e01_detector import DETECTOR
from labkit.exercises.e01_loop import LOOP

EXERCISES = (LOOP, DETECTOR)
