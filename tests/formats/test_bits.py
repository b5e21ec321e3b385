"""Checks of scales: the quick one from the bits must agree with the slow one from the values."""

import pytest
import torch

from hf_lowbit.formats.bits import scale_problems

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (0,), (2, 0)])
def test_fine_scales_pass(dtype, shape):
    values = torch.rand(shape).to(dtype)
    for tensor in (values, values * 0, -values * 0, torch.full(shape, torch.finfo(dtype).max, dtype=dtype)):
        assert scale_problems("row_scale", tensor, signed=False) == []
        assert scale_problems("row_shift", -tensor, signed=True) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 17, 34])
def test_one_bad_scale_is_found(dtype, place):
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)
    for bad, said in [
        (float("nan"), "NaN or infinity"),
        (float("inf"), "NaN or infinity"),
        (float("-inf"), "NaN or infinity"),
        (-smallest, "negative scale"),
        (-1.0, "negative scale"),
    ]:
        tensor = torch.rand(35).to(dtype)
        tensor[place] = bad
        (found,) = scale_problems("row_scale", tensor, signed=False)
        assert found.startswith("row_scale holds") and said in found
        assert bool(scale_problems("row_shift", tensor, signed=True)) == (said == "NaN or infinity")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_with_its_sign_set_is_found(dtype):
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    tensor = torch.rand(8).to(dtype)
    tensor.view(integers)[3] = -1  # all bits set
    assert scale_problems("row_scale", tensor, signed=False) == ["row_scale holds NaN or infinity"]
