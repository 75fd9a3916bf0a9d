"""Notebook 13: answers that have a form. Its exercises, and what its cells call."""

from __future__ import annotations

from labkit.exercises.e13_forced import FORCED
from labkit.exercises.e13_mask import MASK, OwnForms, allowed, tree

__all__ = ["EXERCISES", "OwnForms", "allowed", "tree"]

EXERCISES = (MASK, FORCED)
