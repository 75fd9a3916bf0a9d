"""The kernels in Triton compile for every GPU, without spills and with wide loads.

Triton interprets kernels where the tests run, so they are compiled in processes of their own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import labkit.kernels
from labkit.benchmark.gpu import kernel_table
from labkit.benchmark.gpu.kernel_table import MOST_SHARED, TARGETS, Compiled, KernelReport, why_not

README = Path(labkit.kernels.__file__).with_name("README.md")
COMPILE = """
import json, sys
from labkit.benchmark.gpu.kernel_table import kernel_report
print(json.dumps(kernel_report([int(sys.argv[1])]).to_json()))
"""


def missing() -> str:
    """What the compiler lacks here, apart from being told to interpret."""
    reason = why_not()
    return "" if "TRITON_INTERPRET" in reason else reason


@functools.cache
def compiled_for(sm: int) -> KernelReport:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(sm)],
        env=env,
        capture_output=True,
        text=True,
        cwd=Path(labkit.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    rows = [
        Compiled(**row | {"loads": {int(bits): count for bits, count in row["loads"].items()}})
        for row in told["rows"]
    ]
    return KernelReport(told["settings"], rows)


def cells(text: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The table: from kernel, shape and dtype to what each GPU has."""
    lines = [line for line in text.splitlines() if line.startswith(("| kernel | shape", "| _"))]
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {
        tuple(row[:3]): {sm: cell for sm, cell in zip(head[3:], row[3:], strict=True) if cell} for row in rows
    }


@pytest.mark.skipif(bool(missing()), reason=missing() or "there is a compiler")
@pytest.mark.parametrize("sm", TARGETS)
def test_all_that_engines_ask_for_compiles_and_is_as_the_table_says(sm: int) -> None:
    report = compiled_for(sm)
    kernels = {row.kernel for row in report.rows}
    assert kernels >= {"_split_kernel", "_unite_kernel"}
    assert {row.shape for row in report.rows} == {*kernel_table.architectures(), "all"}
    for row in report.rows:
        assert row.spilled == 0, row
        assert row.shared <= MOST_SHARED, row
        assert row.registers <= 255 and row.programs >= 1, row
        if row.reads_cache:
            assert row.loads[128] >= 2, row  # keys and values
            assert row.loads.get(8, 0) + row.loads.get(16, 0) <= 1, row  # the query, once in a program
    assert not report.faults
    written = README.read_text(encoding="utf-8")
    if f"({report.settings_line})" not in written:
        pytest.skip(f"the table was made by another compiler than {report.settings_line}")
    name = f"sm_{sm}"
    there = {key: found[name] for key, found in cells(written).items() if name in found}
    here = {key: found[name] for key, found in cells(str(report)).items()}
    assert there == here, "python -m labkit.benchmark --kernels makes the table anew"


def test_a_kernel_that_spills_or_reads_in_small_pieces_is_named() -> None:
    fine = Compiled("_split_kernel", "a", "float16", 75, 167, 0, 1024, 3, {32: 2, 128: 4})
    report = KernelReport({"Triton": "0"}, [fine])
    assert report.faults == [] and "Nothing is spilled" in str(report)
    for change in (
        {"spilled": 8},
        {"shared": MOST_SHARED + 1},
        {"loads": {32: 4}},
        {"loads": {16: 2, 128: 4}},
    ):
        bad = Compiled(**vars(fine) | change)
        assert KernelReport({}, [fine, bad]).faults == [bad]
        assert "NOT AS IT SHOULD BE" in str(KernelReport({}, [bad]))
