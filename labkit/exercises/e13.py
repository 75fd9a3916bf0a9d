"""Notebook 13: answers that have a form. Its exercises, and its runs."""

from __future__ import annotations

from labkit.exercises.e13_forced import FORCED
from labkit.exercises.e13_mask import MASK

EXERCISES = (MASK, FORCED)
