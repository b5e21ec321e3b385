"""Kernels of format ``integer`` against the reference, in Triton's interpreter; run by test_triton_interpreter.py."""

import pytest
import torch

from hf_lowbit.kernels import activation, integer, rounding
from hf_lowbit.kernels.activation import Sizes
from hf_lowbit.kernels.triton import integer as on_gpu
from hf_lowbit.kernels.tuning import Settings

SMALL = Settings(16, 16, 4, 2)


def weight(n, m, bits, group, symmetric, dtype=torch.float16):
    torch.manual_seed(n + m + bits)
    groups = -(-m // group) if group else 1
    zero = None if symmetric else integer.pack_codes(torch.randint(0, 2**bits, (n, groups)), bits)
    codes = integer.pack_codes(torch.randint(0, 2**bits, (n, m)), bits)
    return (codes, (torch.rand(n, groups) + 0.1).to(dtype), zero), (m, bits, group)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 48, 64, 128])
@pytest.mark.parametrize("bits", integer.BITS)
def test_products_with_floats(bits, group, symmetric):
    parts, sizes = weight(20, 200, bits, group, symmetric)
    assert on_gpu.unsupported(torch.float32, parts, sizes) is None
    x, bias = torch.randn(3, 200), torch.randn(20)
    want = x.double() @ integer._rebuilt(parts, sizes).double().T + bias.double()
    for splits in (1, 2):
        got = on_gpu.run(x, parts, bias, sizes, SMALL, splits)
        assert error(got, want) < 1e-6, splits
    if group != 64:
        return
    # bfloat16 tensors are read right, but computing in bfloat16 is beyond the interpreter
    low = x.bfloat16()
    want = low.double() @ integer._rebuilt(parts, sizes).double().T
    assert error(on_gpu.run(low, parts, None, sizes, SMALL, compute=torch.float32, result=torch.float32), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_scales_and_shapes_of_inputs(dtype):
    parts, sizes = weight(20, 130, 4, 64, False, dtype)
    dense = integer._rebuilt(parts, sizes).double()
    wide = torch.randn(2, 3, 260)[..., ::2]
    assert error(on_gpu.linear(wide, parts, None, sizes), wide.double() @ dense.T) < 1e-6
    assert on_gpu.linear(wide[:0], parts, None, sizes).shape == (0, 3, 20)
    half = torch.randn(4, 130).half()
    assert error(on_gpu.linear(half, parts, None, sizes), half.double() @ dense.T) < 1e-3


ROUNDED = [
    (4, 64, 64, 128, 300), (4, 128, 64, 0, 320), (4, 0, 64, 64, 192), (4, 64, 128, 32, 256), (4, 64, 0, 12, 300),
    (8, 32, 64, 16, 160), (8, 0, 0, 0, 100), (2, 128, 128, 256, 512), (3, 256, 256, 128, 512), (3, 0, 16, 16, 272),
    (4, 32, 64, 128, 256), (4, 64, 32, 32, 80), (4, 96, 96, 0, 130), (4, 32, 0, 12, 72), (2, 32, 64, 64, 128),
    (3, 32, 32, 16, 64), (2, 0, 32, 0, 50),
]  # fmt: skip


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("bits", "group", "act_group", "rotation", "columns"), ROUNDED)
def test_products_of_codes(bits, group, act_group, rotation, columns, act_bits):
    symmetric = bits == 8 or columns % 64 == 0
    columns = -(-columns // rotation) * rotation if rotation else columns
    parts, own = weight(20, columns, bits, group, symmetric)
    sizes = Sizes(*own, rotation, "token_group" if act_group else "token", act_bits, act_group)
    if on_gpu.unsupported_codes(parts, sizes):
        assert act_group == 16  # a product of bytes is longer than these groups
        return
    smooth, signs = (torch.rand(columns) + 0.5).half(), (torch.randint(0, 2, (columns,)) * 2 - 1).to(torch.int8)
    x, bias = torch.randn(5, columns) * torch.randn(columns).exp(), torch.randn(20)
    want = rounding.quantize_activation(
        rounding.transform(x, smooth, signs, rotation), sizes.mode, act_bits, act_group
    )
    codes, scale = on_gpu.in_parts(want.codes, sizes), want.token
    if on_gpu.fuses(sizes):
        made, step = on_gpu.round_rows(x, smooth, signs, sizes)
        steps = (made[:, : codes.shape[1]].int() - codes[:, : made.shape[1]].int()).abs()
        assert int(steps.max()) <= 1 and float(steps.float().mean()) < 2e-3
        torch.testing.assert_close(step, scale, rtol=1e-5, atol=0)
    exact = want.dequantized().double() @ integer._rebuilt(parts, own).double().T + bias.double()
    for splits in (1, 2):
        got = on_gpu.product(codes, scale, parts, bias, sizes, torch.float32, SMALL, splits)
        assert error(got, exact) < 1e-5


def test_what_is_not_finite_becomes_nan():
    sizes = Sizes(128, 4, 64, 64, "token_group", 4, 64)
    x = torch.randn(3, 128)
    x[1, 70] = float("inf")
    x[2, 3] = float("nan")
    _, scale = on_gpu.round_rows(x, None, None, sizes)
    assert scale.isnan().tolist() == [[False, False], [False, True], [True, False]]


def test_what_it_cannot_is_said():
    parts, sizes = weight(8, 128, 4, 64, False)
    assert "float64" in on_gpu.unsupported(torch.float64, parts, sizes)
    assert "expected torch.uint8 (8, 64)" in on_gpu.unsupported(torch.float32, (parts[0][:, 1:], *parts[1:]), sizes)
    grouped = Sizes(*sizes, 0, "token_group", 8, 48)
    assert on_gpu.unsupported_codes(parts, grouped) == "activations in groups of 48 columns, not a multiple of 32"
    eight, own = weight(8, 128, 8, 64, False)
    assert "do not fit into signed bytes" in on_gpu.unsupported_codes(eight, Sizes(*own, 0, "token", 8))


def test_the_way_of_the_op(monkeypatch):
    """As for tensors on a GPU, odd rotations through torch and others in one pass."""
    monkeypatch.setattr(activation, "triton_kernels", lambda device: (on_gpu, None))
    for rotation, group in ((0, 64), (12, 64), (64, 64), (64, 32), (12, 32)):
        parts, own = weight(20, 192, 4, group, False)
        sizes = Sizes(*own, rotation, "token_group", 8, 64)
        x, tensors = torch.randn(2, 3, 192), (*parts, torch.randn(20), None, None, None)
        assert activation._triton_why_not(torch.float32, "cuda", parts, sizes) is None
        got = activation._triton_linear(x, tensors, sizes)
        assert (
            error(got, activation.reference(x, tensors, sizes).double()) < 3e-3
        )  # a code of some may be the next one
    assert "mode channel" in activation._triton_why_not(torch.float32, "cuda", parts, sizes._replace(mode="channel"))
