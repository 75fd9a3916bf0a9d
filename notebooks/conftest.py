"""Notebooks that a test run executes solve nothing for the user."""

import tests.own_progress  # noqa: F401
