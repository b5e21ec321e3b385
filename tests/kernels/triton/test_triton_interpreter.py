"""Runs the tests of the Triton kernels that need its interpreter, in a process that has it switched on.

``TRITON_INTERPRET`` is read when Triton's functions are defined, so one process cannot both interpret and compile.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("triton.language")

ROOT = Path(__file__).parent.parent.parent.parent


def interpreted(name: str, marks: str, folder: Path) -> int:
    """Run the tests of a file with these marks; the number that ran. None may fail or be skipped."""
    report, file = folder / "report.xml", Path(__file__).parent / f"interpreted_{name}.py"
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", marks, f"--junitxml={report}"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - written by pytest just now
    assert suite.get("skipped") == "0"
    return int(suite.get("tests", "0"))


@pytest.mark.timeout(600)
def test_kernels_of_format_binary(tmp_path):
    assert interpreted("binary", "not slow", tmp_path) > 80


@pytest.mark.slow
def test_larger_kernels_of_format_binary(tmp_path):
    assert interpreted("binary", "slow", tmp_path) == 1


@pytest.mark.timeout(300)
def test_kernels_of_format_low_rank(tmp_path):
    assert interpreted("low_rank", "not slow", tmp_path) > 15


@pytest.mark.timeout(600)
def test_kernels_of_format_integer(tmp_path):
    assert interpreted("integer", "not slow", tmp_path) > 60
