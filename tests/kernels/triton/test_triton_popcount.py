"""Triton kernels of convolutions of signs: run in the interpreter, and compiled for GPUs that are not there."""

import pytest
import torch

pytest.importorskip("triton.language")

from benchmarks.kernels.compiled import TARGETS, ahead_of_time
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.kernels.triton import popcount
from hf_lowbit.kernels.tuning import Settings
from tests.kernels.triton.test_triton_interpreter import interpreted


@pytest.mark.timeout(300)
def test_kernels_of_format_binary_conv(tmp_path):
    assert interpreted("popcount", "not slow", tmp_path) == 13


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_kernels_of_format_binary_conv(tmp_path):
    assert interpreted("popcount", "slow", tmp_path) == 5


def compiled(name, dtype=torch.bfloat16):
    target = TARGETS[name]
    geometry = ConvGeometry(256, 256, (3, 3), (1, 1), (1, 1))

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    packed, weight = meta(2, 196, 1, 8, dtype=torch.int32), meta(1, 9, 8, 256, dtype=torch.int32)
    settings, options = Settings(32, 32, 4, 2), {"num_warps": 4, "num_stages": 2}
    first = popcount.pack_arguments(meta(2, 256, 14, 14, dtype=dtype), meta(256), packed, geometry)
    second = popcount.conv_arguments(
        packed,
        weight,
        meta(2, 256),
        meta(3, 256),
        meta(2, 256, 14, 14),
        (14, 14),
        geometry,
        not name.startswith("gfx"),
    )
    return [
        ahead_of_time(kernel, arguments, target, settings, **options).kernel
        for kernel, arguments in ((popcount.pack_kernel, first), (popcount.conv_kernel, second))
    ]


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_kernels_compile_and_count_bits_in_hardware(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert not popcount.INTERPRETED
    for kernel in compiled(name):
        assert kernel.metadata.shared <= TARGETS[name].shared
    code = kernel.asm["ptx" if name.startswith("sm") else "amdgcn"]
    assert ("popc.b32" if name.startswith("sm") else "v_bcnt") in code


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_target(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype in (torch.float32, torch.float16):
        assert len(compiled(name, dtype)) == 2
