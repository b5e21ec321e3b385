"""Convolutions of signs in Triton's interpreter, against the reference; run by ``test_triton_popcount.py``."""

import pytest
import torch

from hf_lowbit.kernels import conv, pack_plane
from hf_lowbit.kernels.triton import popcount
from tests.kernels.test_popcount import CASES, parts


def test_the_interpreter_is_on():
    assert popcount.INTERPRETED


SLOW = ("7 x 7", "transposed, dilated, in groups", "oblong, dilated", "wide row", "more padding than image")
NUMBERS = [
    pytest.param(number, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for number, name in enumerate(CASES)
]


@pytest.mark.parametrize("number", NUMBERS)
def test_integers_are_equal(number):
    geometry, size = list(CASES.values())[number]
    x, positive, given = parts(geometry, size, ("bias", "none", "affine")[number % 3], batch=1)
    sign = pack_plane(positive)
    out = popcount.binary_conv(x, sign, given, None, None, geometry)
    assert torch.equal(out, conv.reference_dot(x, sign, given, geometry))


@pytest.mark.parametrize(("name", "act"), [("down sample", True), ("two groups", False), ("up sample", True)])
def test_scales_and_activation(name, act):
    geometry, size = CASES[name]
    x, positive, shift = parts(geometry, size)
    sign, affine = pack_plane(positive), torch.randn(2, geometry.out_channels)
    slopes = torch.randn(3, geometry.out_channels) if act else None
    out = popcount.binary_conv(x, sign, shift, affine, slopes, geometry)
    torch.testing.assert_close(out, conv._reference(x, sign, shift, affine, slopes, geometry), rtol=1e-5, atol=1e-5)


def test_half_precision_and_empty_batches():
    geometry, size = CASES["down sample"]
    x, positive, shift = parts(geometry, size)
    sign = pack_plane(positive)
    for dtype in (torch.float16, torch.bfloat16):
        out = popcount.binary_conv(x.to(dtype), sign, shift, None, None, geometry)
        assert torch.equal(out, conv.reference_dot(x.to(dtype), sign, shift, geometry))
    assert popcount.binary_conv(x[:0], sign, shift, None, None, geometry).shape == (0, 32, 4, 4)
