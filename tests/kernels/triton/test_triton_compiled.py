"""What the compiled kernels contain, for GPUs that are not there: they compile, use the matrix units, spill nothing.

Every shipped setting of every variant is marked slow; a few run always. ``python -m benchmarks.kernels.compiled``
prints and records the figures.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton.language")

from benchmarks.kernels import compiled
from benchmarks.kernels.compiled import BATCHES, TARGETS, VARIANTS, compile_binary, figures, problems

# Arithmetic instructions per weight in the loop over groups, rounded up from the figures of Triton 3.9 by a third:
# code that does its work twice, or through memory, has more. Instructions of AMD's GPUs do less each.
CEILING = {"rtn": 3, "billm": 9, "arb": 9, "rc": 10, "rc-4-groups": 18, "rc-2:4": 12, "arb-4:8": 12}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not compiled.binary.INTERPRETED, "run without TRITON_INTERPRET"


def check(variant: str, use: str, name: str) -> None:
    target = TARGETS[name]
    found = figures(compile_binary(VARIANTS[variant], BATCHES[use], torch.bfloat16, target))
    assert problems(found, target) == [], found
    assert found["registers"] > 0
    assert found["matrix_in_loop"] >= 8, found  # one product per plane and more
    assert 1 < found["alu_per_weight"] < CEILING[variant] * (2 if name.startswith("gfx") else 1), found


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("variant", "use"), [("rtn", "decode"), ("arb", "prefill")])
def test_compiled_kernel(variant, use, name):
    check(variant, use, name)


@pytest.mark.slow
@pytest.mark.parametrize("use", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_compiled_kernel(variant, use, name):
    check(variant, use, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("use", ["decode", "prefill"])
@pytest.mark.parametrize("name", TARGETS)
def test_other_compute_types(dtype, use, name):
    target = TARGETS[name]
    found = figures(compile_binary(VARIANTS["rc"], BATCHES[use], dtype, target))
    assert problems(found, target, matrix=dtype == torch.float16) == [], found


# What the sizes above leave out: ragged columns, blocks of less than a group, shifts together with column scales.
OTHERS = {
    "ragged": dataclasses.replace(VARIANTS["rtn"], in_features=580),
    "small blocks": dataclasses.replace(VARIANTS["rc"], block_size=48),
    "shift and columns": dataclasses.replace(VARIANTS["rc"], shift=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", ["decode", "prefill"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", TARGETS)
def test_other_forms_of_the_kernel(other, use, name):
    found = figures(compile_binary(OTHERS[other], BATCHES[use], torch.bfloat16, TARGETS[name]))
    assert problems(found, TARGETS[name]) == [], found


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_small_kernels(name):
    helpers = compiled.compile_helpers(VARIANTS["rc"], 16, torch.bfloat16, TARGETS[name])
    assert set(helpers) == {"columns", "reduce"}
    for helper in helpers.values():
        assert problems(figures(helper), TARGETS[name], matrix=False) == []


def test_problems_are_found():
    good = {"stack": 0, "spills": 0, "shared": 1000, "matrix": {"HMMA": 8}}
    assert problems(good, TARGETS["sm_80"]) == []
    assert problems({**good, "stack": 8}, TARGETS["sm_80"]) == ["0 spills, 8 bytes of stack"]
    assert problems({**good, "spills": 2}, TARGETS["sm_80"]) == ["2 spills, 0 bytes of stack"]
    assert problems(good, TARGETS["sm_90"]) == ["no HGMMA, only {'HMMA': 8}"]
    assert problems({**good, "matrix": {}}, TARGETS["sm_80"], matrix=False) == []
    too_much = {**good, "shared": 100 * 1024}
    assert problems(too_much, TARGETS["sm_80"]) == []
    assert problems(too_much, TARGETS["sm_89"]) == ["102400 bytes of shared memory, the limit is 101376"]


@pytest.mark.slow
def test_a_setting_that_spills_is_found():
    target = TARGETS["sm_80"]
    large = compiled.Settings(128, 256, 8, 2)
    found = figures(compile_binary(VARIANTS["rc"], 2048, torch.bfloat16, target, large))
    assert any("spills" in problem for problem in problems(found, target))


def test_the_loop_is_found():
    outer = [(0, "MOV", None), (1, "HMMA", None), (2, "LOP3", None), (3, "BRA", 1), (4, "HMMA", None), (5, "BRA", 0)]
    # the outer jump spans both products, the inner one has half of them: the shorter body counts
    assert compiled._loop(outer) == ["HMMA", "LOP3", "BRA"]
    assert compiled._loop([(0, "MOV", None), (1, "BRA", 0)]) == []


@pytest.mark.parametrize("use", ["decode", "few"])
@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_compiled_kernel_of_two_factors(name, use):
    check_low_rank(name, use, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("use", ["decode", "few"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_compiled_kernel_of_two_factors(name, use, dtype):
    check_low_rank(name, use, dtype)


def check_low_rank(name: str, use: str, dtype: torch.dtype) -> None:
    """Little arithmetic: nothing is unpacked. Ceilings are the figures of Triton 3.9 and a third."""
    target = TARGETS[name]
    found = figures(compiled.compile_low_rank(BATCHES[use], dtype, target))
    half = dtype != torch.float32
    assert problems(found, target, matrix=half) == [], found
    if half:
        assert found["matrix_in_loop"] >= 8, found
        assert found["alu_per_weight"] < (24 if name.startswith("gfx") else 2.3), found
