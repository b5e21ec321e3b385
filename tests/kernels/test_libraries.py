"""The compiled libraries are there wherever they could be built; tests that need one are skipped without it."""

import importlib
import shutil
from pathlib import Path

import pytest

from hf_lowbit.kernels import cpu

FAMILIES = {
    "library": "_binary",
    "integer": "_integer",
    "popcount": "_popcount",
    "latent": "_latent",
    "low_rank": "_low_rank",
}


@pytest.mark.parametrize("module", FAMILIES)
def test_it_was_built_where_there_is_a_compiler(module):
    library, *_, reason = importlib.import_module(f"hf_lowbit.kernels.cpu.{module}").load()
    assert library is not None or shutil.which("g++") is None, reason


def test_no_library_is_forgotten():
    sources = (Path(cpu.__file__).parents[3] / "setup.py").read_text()
    assert all(f'"{name}": (' in sources for name in FAMILIES.values())
    assert sources.count('": (') == len(FAMILIES)
