"""The compiled libraries are there wherever they could be built; tests that need one are skipped without it."""

import importlib
import shutil
import sys
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
def test_it_opens_where_it_was_built_or_there_is_a_compiler(module, monkeypatch):
    """What a processor lacks is another matter: then a library opens and is not used."""
    family, opened = importlib.import_module(f"hf_lowbit.kernels.cpu.{module}"), []
    original = family.open_library
    monkeypatch.setattr(family, "open_library", lambda *which: opened.append(original(*which)) or opened[-1])
    getattr(family, "_library", family.load).__wrapped__()  # nothing that was kept
    ((library, reason),) = opened
    built = list(Path(cpu.__file__).parent.glob(f"{FAMILIES[module]}.*"))
    assert library is not None or not (built or shutil.which("g++")), reason


@pytest.mark.skipif(sys.platform != "linux", reason="triton is installed with the package on Linux only")
def test_triton_is_there():
    """Tests of its kernels are skipped without it."""
    assert importlib.import_module("triton.language")


def test_no_library_is_forgotten():
    sources = (Path(cpu.__file__).parents[3] / "setup.py").read_text()
    assert all(f'"{name}": (' in sources for name in FAMILIES.values())
    assert sources.count('": (') == len(FAMILIES)
