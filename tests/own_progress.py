"""What the tests and notebooks of a test run solve is nobody's progress: it goes into a file of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory(prefix="labkit-tests-")  # until the run ends
# Before any kernel or child process starts, which inherit it, and whatever the user's own environment says.
os.environ["LABKIT_PROGRESS"] = str(Path(_folder.name) / "progress.jsonl")
