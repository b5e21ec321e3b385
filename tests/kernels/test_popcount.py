"""Convolutions of signs: integers equal to a float64 definition, on every instruction set, borders included."""

import random

import pytest
import torch

from hf_lowbit.kernels import conv, dispatch, pack_plane
from hf_lowbit.kernels.conv import CONV_KERNELS, binary_conv2d, binary_conv_dot
from hf_lowbit.kernels.cpu import popcount as cpu
from hf_lowbit.kernels.geometry import ConvGeometry

ISAS = range(len(cpu.ISAS) if cpu.load()[0] is not None else 0)


def definition(x, positive, shift, geometry):
    """Sum over taps inside the image of sign times sign, in float64, one tap after the other."""
    x = x.double()
    if shift is not None:
        shift = shift.double()[..., None, None]
        x = x + shift if shift.dim() == 3 else x * shift[0] + shift[1]
    a = torch.where(x >= 0, 1.0, -1.0).double()
    g = geometry
    w = torch.where(positive, 1.0, -1.0).double().view(g.out_channels, g.group_channels, *g.kernel)
    height, width = g.output_size(*x.shape[2:])
    out = torch.zeros(x.shape[0], g.out_channels, height, width, dtype=torch.float64)
    each = g.out_channels // g.groups
    for ky in range(g.kernel[0]):
        for kx in range(g.kernel[1]):
            for y in range(height):
                for z in range(width):
                    if g.transposed:
                        top, left = y + g.padding[0] - ky * g.dilation[0], z + g.padding[1] - kx * g.dilation[1]
                        if top % g.stride[0] or left % g.stride[1]:
                            continue
                        top, left = top // g.stride[0], left // g.stride[1]
                    else:
                        top = y * g.stride[0] - g.padding[0] + ky * g.dilation[0]
                        left = z * g.stride[1] - g.padding[1] + kx * g.dilation[1]
                    if not (0 <= top < x.shape[2] and 0 <= left < x.shape[3]):
                        continue
                    for group in range(g.groups):
                        rows = slice(group * each, (group + 1) * each)
                        ins = slice(group * g.group_channels, (group + 1) * g.group_channels)
                        out[:, rows, y, z] += a[:, ins, top, left] @ w[rows, :, ky, kx].T
    return out.to(torch.int32)


# the four shapes of the named modules, odd sizes, strides, groups, padding, dilation, transposed ones
CASES = {
    "down scale": (ConvGeometry(16, 16, (3, 3), (2, 2), (1, 1)), (8, 6)),
    "down sample": (ConvGeometry(16, 32, (3, 3), (2, 2), (1, 1)), (7, 7)),
    "fusion increase": (ConvGeometry(16, 64, (1, 1)), (5, 9)),
    "fusion decrease": (ConvGeometry(65, 13, (1, 1)), (5, 3)),
    "up sample": (ConvGeometry(24, 8, (4, 4), (2, 2), (1, 1), transposed=True), (4, 3)),
    "7 x 7": (ConvGeometry(3, 9, (7, 7), (2, 2), (3, 3)), (11, 13)),
    "5 x 5, no padding": (ConvGeometry(8, 4, (5, 5)), (6, 5)),
    "two groups": (ConvGeometry(132, 18, (3, 3), (1, 1), (1, 1), groups=2), (5, 4)),
    "depth-wise": (ConvGeometry(6, 6, (3, 3), (1, 1), (1, 1), groups=6), (5, 12)),
    "wide row": (ConvGeometry(8, 8, (3, 3), (1, 1), (1, 1)), (2, 35)),
    "oblong, dilated": (ConvGeometry(70, 5, (3, 2), (2, 1), (2, 0), (2, 3)), (9, 8)),
    "more padding than image": (ConvGeometry(8, 8, (3, 3), (1, 1), (3, 4)), (1, 2)),
    "transposed, dilated, in groups": (
        ConvGeometry(12, 20, (3, 4), (3, 2), (2, 1), (2, 1), 4, True, (1, 1)),
        (3, 5),
    ),
}


def parts(geometry, size, shift="bias", batch=2, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, geometry.in_channels, *size)
    x[x.abs() < 0.3] = 0.0  # zeros are common, after ReLU and padding, and have a sign
    x[:, :, 0, 0] = -0.0
    positive = torch.randn(geometry.out_channels, geometry.columns) > 0
    given = {"none": None, "bias": torch.randn(geometry.in_channels), "affine": torch.randn(2, geometry.in_channels)}
    return x, positive, given[shift]


@pytest.mark.parametrize("shift", ["none", "bias", "affine"])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_equals_the_definition(name, shift):
    geometry, size = CASES[name]
    x, positive, given = parts(geometry, size, "none")
    sign = pack_plane(positive)
    if shift != "none":  # halves are exact in float32, so that the float64 definition has the same signs
        x, given = (x * 4).round() / 4, parts(geometry, size, shift)[2].mul(4).round() / 4
    expected = definition(x, positive, given, geometry)
    with dispatch.forced("reference"):
        assert torch.equal(binary_conv_dot(x, sign, given, geometry), expected)
    for isa in ISAS:
        assert torch.equal(cpu.binary_conv(x, sign, given, None, None, geometry, isa), expected), cpu.ISAS[isa]
    assert expected.abs().max() <= geometry.columns


def test_the_library_was_built():
    """A missing library leaves a working install, but not a tested one."""
    assert len(ISAS) == 3
    assert CONV_KERNELS["cpu"].why_not(torch.float32, "cpu", CASES["7 x 7"][0]) is None


def test_without_the_library_the_reference_runs(monkeypatch):
    geometry, size = CASES["down scale"]
    x, positive, shift = parts(geometry, size)
    arguments = (x, pack_plane(positive), shift, torch.randn(2, 16), torch.randn(3, 16), geometry)
    expected = binary_conv2d(*arguments)
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    assert conv.choose_conv(x.dtype, "cpu", geometry).name == "reference"
    assert torch.equal(binary_conv2d(*arguments), expected)  # the same roundings, too
    with dispatch.forced("cpu"), pytest.raises(RuntimeError, match="no compiled library: it was not built"):
        binary_conv2d(*arguments)


def test_random_shapes():
    generator = random.Random(1)
    for number in range(60):
        groups, transposed = generator.choice([1, 1, 2, 3]), generator.random() < 0.3
        stride = (generator.randint(1, 3), generator.randint(1, 3))
        geometry = ConvGeometry(
            groups * generator.choice([1, 7, 64, 65, 130]),
            groups * generator.choice([1, 3, 8, 17]),
            (generator.randint(1, 5), generator.randint(1, 5)),
            stride,
            (generator.randint(0, 3), generator.randint(0, 3)),
            (generator.randint(1, 2), generator.randint(1, 2)),
            groups,
            transposed,
            (generator.randrange(stride[0]), generator.randrange(stride[1])) if transposed else (0, 0),
        )
        size = (generator.randint(1, 19), generator.randint(1, 19))
        if min(geometry.output_size(*size)) < 1:
            continue
        x, positive, shift = parts(geometry, size, generator.choice(["none", "bias", "affine"]), 2, number)
        sign = pack_plane(positive)
        expected = conv.reference_dot(x, sign, shift, geometry)
        for isa in ISAS:
            assert torch.equal(cpu.binary_conv(x, sign, shift, None, None, geometry, isa), expected), geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("name", ["down sample", "two groups", "up sample", "wide row"])
def test_scales_and_activation(name, act, dtype):
    geometry, size = CASES[name]
    x, positive, shift = parts(geometry, size)
    sign, outs = pack_plane(positive), geometry.out_channels
    affine, slopes = torch.randn(2, outs), torch.randn(3, outs) if act else None
    x = x.to(dtype)
    dot = conv.reference_dot(x, sign, shift, geometry).double()
    y = affine[0, :, None, None].double() * dot + affine[1, :, None, None].double()
    if slopes is not None:
        slope, before, after = slopes.double()[..., None, None]
        y = torch.where(y + before >= 0, y + before, slope * (y + before)) + after
    for isa in ISAS:
        out = cpu.binary_conv(x, sign, shift, affine, slopes, geometry, isa)
        assert out.dtype == dtype
        # float32: roundings of two sums and two products; the result is rounded once to a smaller dtype
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        torch.testing.assert_close(out.double(), y, rtol=limit, atol=limit)
    with dispatch.forced("reference"):
        torch.testing.assert_close(
            binary_conv2d(x, sign, shift, affine, slopes, geometry).double(), y, rtol=limit, atol=limit
        )


def test_a_sum_that_bfloat16_cannot_hold():
    geometry = ConvGeometry(513, 1, (3, 3))
    x, sign = torch.ones(1, 513, 3, 3, dtype=torch.bfloat16), pack_plane(torch.ones(1, 4617, dtype=torch.bool))
    affine = torch.tensor([[1.0], [-4616.0]])
    assert binary_conv2d(x, sign, None, affine, None, geometry).item() == 1.0  # 4617 in bfloat16 would be 4608
    assert binary_conv_dot(x, sign, None, geometry).item() == 4617


def test_results_do_not_depend_on_threads():
    geometry = ConvGeometry(64, 64, (3, 3), (1, 1), (1, 1))
    x, positive, shift = parts(geometry, (40, 40), batch=3)
    sign, affine, act = pack_plane(positive), torch.randn(2, 64), torch.randn(3, 64)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(binary_conv2d(x, sign, shift, affine, act, geometry))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_other_memory_layouts_and_empty_batches():
    geometry, size = CASES["down sample"]
    x, positive, shift = parts(geometry, size)
    sign, affine = pack_plane(positive), torch.randn(2, 32)
    expected = binary_conv2d(x, sign, shift, affine, None, geometry)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(binary_conv2d(other, sign, shift, affine, None, geometry), expected)
    assert binary_conv2d(x[:0], sign, shift, affine, None, geometry).shape == (0, 32, 4, 4)


def test_a_changed_weight_is_seen():
    geometry, size = CASES["down scale"]
    x, positive, _ = parts(geometry, size)
    sign = pack_plane(positive)
    first = binary_conv_dot(x, sign, None, geometry)
    sign.copy_(pack_plane(~positive))
    assert torch.equal(binary_conv_dot(x, sign, None, geometry), -first)


def test_the_op_is_sound():
    geometry, size = CASES["down sample"]
    x, positive, shift = parts(geometry, size)
    arguments = (x, pack_plane(positive), shift, torch.randn(2, 32), torch.randn(3, 32), list(geometry.numbers))
    torch.library.opcheck(torch.ops.hf_lowbit.binary_conv2d.default, arguments)
    torch.library.opcheck(torch.ops.hf_lowbit.binary_conv_dot.default, (*arguments[:3], list(geometry.numbers)))
    transposed, small = CASES["up sample"]
    meta = torch.empty(2, 24, *small, device="meta")
    sign = torch.empty(8, transposed.plane_bytes, dtype=torch.uint8, device="meta")
    assert torch.ops.hf_lowbit.binary_conv_dot(meta, sign, None, list(transposed.numbers)).shape == (2, 8, 8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 16, 8, 8, dtype=torch.int32)}, "x must be floating point, got torch.int32"),
        ({"x": torch.zeros(1, 15, 8, 8)}, r"x has shape \(1, 15, 8, 8\), expected \(batch, 16, height, width\)"),
        ({"x": torch.zeros(16, 8, 8)}, "x has shape"),
        ({"sign": torch.zeros(32, 15, dtype=torch.uint8)}, r"sign has shape \(32, 15\), expected \(32, 32\)"),
        ({"sign": torch.zeros(32, 32)}, "sign must be uint8"),
        ({"shift": torch.zeros(3)}, "shift has shape"),
        ({"affine": torch.zeros(2, 31)}, "affine has shape"),
        ({"act": torch.zeros(2, 32)}, "act has shape"),
        ({"x": torch.zeros(1, 16, 2, 8)}, "smaller than the kernel"),
    ],
)
def test_what_no_kernel_may_see_is_refused(change, message):
    geometry = ConvGeometry(16, 32, (3, 3))
    given = {
        "x": torch.zeros(1, 16, 8, 8),
        "sign": torch.zeros(32, 32, dtype=torch.uint8),
        "shift": None,
        "affine": torch.zeros(2, 32),
        "act": None,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        binary_conv2d(*given.values(), geometry)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, 65, "kernel must be two integers from 1 to 64"),
        (4, 0, "stride must be two integers from 1 to 64"),  # a division by zero in a library ends the process
        (6, -1, "padding must be two integers from 0"),
        (8, 0, "dilation must be two integers"),
        (10, 0, "groups must be an integer from 1"),
        (10, 3, "groups 3 must divide 8 and 8 channels"),
        (12, 1, "output_padding is for transposed convolutions"),
        (None, None, "geometry must be 14 integers, got 13"),
    ],
)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_geometries_that_are_none_are_refused(place, value, message, transposed, device):
    numbers = list(ConvGeometry(8, 8, (1, 1)).numbers)
    numbers[11] = transposed
    if place is None:
        numbers.pop()
    else:
        numbers[place] = value
    x, sign = torch.zeros(1, 8, 4, 4, device=device), torch.zeros(8, 16, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_lowbit.binary_conv_dot(x, sign, None, numbers)


def test_a_forced_kernel_says_why_it_cannot():
    geometry = ConvGeometry(4, 4, (1, 1))
    x, sign = torch.zeros(1, 4, 2, 2, dtype=torch.float64), torch.zeros(4, 16, dtype=torch.uint8)
    assert binary_conv_dot(x, sign, None, geometry).eq(-4).all()  # the reference takes it
    with dispatch.forced("cpu"), pytest.raises(RuntimeError, match=r"cannot convolve: activations of torch\.float64"):
        binary_conv_dot(x, sign, None, geometry)
    with dispatch.forced("triton"), pytest.raises(RuntimeError, match="cannot convolve: tensors on cpu"):
        binary_conv_dot(x.float(), sign, None, geometry)


def test_geometry_reads_modules():
    module = torch.nn.Conv2d(4, 8, (3, 5), 2, "valid", groups=2)
    assert ConvGeometry.of_module(module) == ConvGeometry(4, 8, (3, 5), (2, 2), groups=2)
    assert ConvGeometry.of_module(module).weight_shape == tuple(module.weight.shape)
    module = torch.nn.ConvTranspose2d(4, 8, (3, 5), groups=2)
    assert ConvGeometry.of_module(module).weight_shape == tuple(module.weight.shape)
    same = ConvGeometry.of_module(torch.nn.Conv2d(4, 8, (3, 5), padding="same", dilation=(1, 2)))
    assert same.padding == (1, 4)
    with pytest.raises(ValueError, match="differs from side to side"):
        ConvGeometry.of_module(torch.nn.Conv2d(4, 8, 2, padding="same"))
    with pytest.raises(ValueError, match="padding_mode 'reflect' is not supported"):
        ConvGeometry.of_module(torch.nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    for geometry, size in CASES.values():
        kind = torch.nn.ConvTranspose2d if geometry.transposed else torch.nn.Conv2d
        extra = {"output_padding": geometry.output_padding} if geometry.transposed else {}
        made = kind(
            geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride, geometry.padding,
            dilation=geometry.dilation, groups=geometry.groups, bias=False, **extra,
        )  # fmt: skip
        assert ConvGeometry.of_module(made) == geometry
        assert tuple(made(torch.zeros(1, geometry.in_channels, *size)).shape[2:]) == geometry.output_size(*size)
        weight = made.weight.detach()
        assert torch.equal(geometry.as_stored_by_torch(geometry.as_rows(weight)), weight)
