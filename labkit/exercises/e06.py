"""Exercises of notebook 06: whose pages to take, and by what name a full page is found again."""

from __future__ import annotations

from labkit.exercises.e06_hash import HASH
from labkit.exercises.e06_victim import VICTIM

EXERCISES = (VICTIM, HASH)
