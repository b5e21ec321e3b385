"""The Triton kernels over latents: in the interpreter, and what the compiled ones contain."""

import pytest

pytest.importorskip("triton.language")

from benchmarks.kernels.compiled import TARGETS, figures
from benchmarks.kv.cases import SHAPES
from benchmarks.kv.compiled import case_of, compile_kernels, wrong
from tests.kernels.triton.test_triton_interpreter import interpreted


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.timeout(600)
def test_in_the_interpreter(tmp_path):
    assert interpreted("latent", "not slow", tmp_path) > 20


def check(shape, bits, target):
    for name, compiled in compile_kernels(case_of(SHAPES[shape], bits), TARGETS[target]).items():
        found = figures(compiled)
        assert wrong(name, found, TARGETS[target]) == [], (name, found)
        assert found["registers"] > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiled_kernels(target, own_cache):
    check("SmolLM2-135M", 4, target)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8, 4, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_compiled_kernel(target, shape, bits, own_cache):
    check(shape, bits, target)


def test_what_is_wrong_is_found():
    good = {"stack": 0, "spills": 0, "shared": 1000, "matrix": {"HMMA": 8}}
    assert wrong("scores", good, TARGETS["sm_80"]) == []
    assert wrong("scores", {**good, "matrix": {}}, TARGETS["sm_80"]) == ["no matrix instructions"]
    assert wrong("results", {**good, "matrix": {}}, TARGETS["sm_80"]) == []
    assert wrong("scores", {**good, "spills": 4}, TARGETS["sm_80"]) == ["4 spills, 0 bytes of stack"]
