"""What the compiled kernels of format ``integer`` contain, for GPUs that are not there."""

import pytest

pytest.importorskip("triton.language")

from benchmarks.kernels.compiled import TARGETS
from benchmarks.kernels.compiled_integer import cases, wrong


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def check(name: str, use: str) -> None:
    build, matrix = cases(name)[use]
    row = build()
    assert wrong(row, name, matrix) == [], row
    assert row["registers"] > 0


@pytest.mark.parametrize("use", ["integer-4 decode", "codes-4 decode", "codes-4/32 decode", "rounding chunk"])
def test_compiled_kernel(use):
    check("sm_90", use)


@pytest.mark.slow
@pytest.mark.parametrize("use", list(cases("sm_90")))
@pytest.mark.parametrize("name", TARGETS)
def test_every_compiled_kernel(name, use):
    check(name, use)
