"""Exercises of notebook 08: unite partial softmaxes, and attend over pages where they lie."""

from __future__ import annotations

from labkit.exercises.e08_merge import MERGE
from labkit.exercises.e08_paged import PAGED

EXERCISES = (MERGE, PAGED)
