"""Products with packed integers on a real GPU, against float64 on the same device."""

import pytest
import torch

pytest.importorskip("triton.language")

from hf_lowbit.kernels import activation, integer, rounding
from hf_lowbit.kernels.activation import Sizes
from hf_lowbit.kernels.triton import integer as on_gpu

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# The result is rounded to the dtype, and so is the weight; sums are float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
FORMS = [(4, 32, False), (4, 64, False), (4, 0, True), (3, 128, False), (2, 64, True), (8, 0, True)]
# bits, group, group of activations, rotation, rows, columns
CODES = [
    (4, 32, 64, 128, 1536, 1536), (4, 64, 64, 128, 200, 8960), (4, 0, 0, 12, 65, 300), (4, 32, 32, 64, 130, 4160),
    (2, 128, 128, 256, 64, 512), (2, 32, 64, 64, 40, 192), (3, 32, 32, 16, 96, 320), (8, 0, 0, 0, 129, 100),
]  # fmt: skip


def weight(rows, columns, bits, group, symmetric):
    groups = -(-columns // group) if group else 1
    codes, zero = (torch.randint(0, 2**bits, (rows, count), device=DEVICE) for count in (columns, groups))
    scale = (torch.rand(rows, groups, device=DEVICE) + 0.1).half()
    parts = (integer.pack_codes(codes, bits), scale, None if symmetric else integer.pack_codes(zero, bits))
    return parts, (columns, bits, group)


def apart(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_with_floats(form, dtype):
    for rows, columns in ((130, 200), (1536, 1536)):
        parts, sizes = weight(rows, columns, *form)
        dense = integer._rebuilt(parts, sizes).double()
        bias = torch.randn(rows, device=DEVICE)
        for tokens in (1, 17, 300):
            x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
            got = on_gpu.linear(x, parts, bias, sizes)
            assert got.dtype == dtype
            assert apart(got, x.double() @ dense.T + bias.to(dtype).double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("case", CODES, ids=str)
def test_products_of_codes(case, act_bits):
    bits, group, act_group, rotation, rows, columns = case
    parts, own = weight(rows, columns, bits, group, bits == 8)
    sizes = Sizes(*own, rotation, "token_group" if act_group else "token", act_bits, act_group)
    assert activation._triton_why_not(torch.float32, DEVICE, parts, sizes) is None
    dense = integer._rebuilt(parts, own).double()
    for tokens in (1, 33, 300):
        x = torch.randn(tokens, columns, device=DEVICE)
        found = rounding.quantize_activation(
            rounding.transform(x, None, None, rotation), sizes.mode, act_bits, act_group
        )
        got = on_gpu.product(on_gpu.in_parts(found.codes, sizes), found.token, parts, None, sizes, torch.float32)
        assert apart(got, found.dequantized().double() @ dense.T) < 1e-5
        # a code of a few hundred may be the next one: what is rotated differs in the last digit
        whole = activation._triton_linear(x, (*parts, None, None, None, None), sizes)
        assert apart(whole, found.dequantized().double() @ dense.T) < 1e-2
