"""Weights and activations on grids with two ends: ``integer`` with ``parts``, modes static and dynamic."""

import dataclasses
import math

import pytest
import torch
from torch.library import opcheck

from hf_lowbit import PackedLinear
from hf_lowbit.formats import IntegerFormat
from hf_lowbit.formats.integer import IntegerSpec
from hf_lowbit.kernels.activation import TABLE, Sizes, integer_act_linear, reference
from hf_lowbit.kernels.cpu import integer as cpu
from hf_lowbit.kernels.rounding import integer_form, on_range, quantize_range, range_codes, range_step

BOUNDS = torch.tensor([-1.3, 2.1])


def form_of(bits=4, rows=12, columns=50, parts=3, activation="static", act_bits=4):
    weight = torch.randn(rows, columns)
    ends = torch.tensor([[-2.0, 1.5], [-0.5, 3.0], [0.25, 0.25]])[:parts]
    codes = [range_codes(part, end, bits) for part, end in zip(weight.chunk(parts), ends, strict=True)]
    rounds = {} if activation == "none" else {"activation": activation, "act_bits": act_bits}
    spec = IntegerSpec(out_features=rows, in_features=columns, bits=bits, parts=parts, **rounds)
    bounds = BOUNDS if activation == "static" else None
    form = IntegerFormat.pack(spec, torch.cat(codes).to(torch.uint8), bounds=ends, act_bounds=bounds)
    want = torch.cat([on_range(part, end, bits) for part, end in zip(weight.chunk(parts), ends, strict=True)])
    return form, want


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("parts", [1, 3])
def test_weight_is_what_was_packed(bits, parts):
    form, want = form_of(bits, parts=parts)
    torch.testing.assert_close(form.unpack(), want, atol=1e-6, rtol=1e-6)
    assert set(form.state()) == {"packed", "bounds", "act_bounds"}
    assert form.nbytes == 12 * math.ceil(50 * bits / 8) + 8 * parts + 8


@pytest.mark.parametrize("act_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("activation", ["static", "dynamic"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_form_equals_dequantized_form(bits, activation, act_bits):
    """``s s_w Σ q q_w + s l_w Σ q + l s_w Σ q_w + d l l_w``, written out here, is the product of the dequantized."""
    form, _ = form_of(bits, parts=2, activation=activation, act_bits=act_bits)
    x, bias = 2 * torch.randn(7, 50), torch.randn(12)
    found = PackedLinear(form, bias, torch.float32)(x)
    bounds = BOUNDS if activation == "static" else None
    codes = quantize_range(x, bounds, act_bits)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) <= 2**act_bits - 1
    scale, zero = form._grid()
    own = integer_form(codes, form.codes(), scale, zero, bits, 0) + bias
    assert float((own - found).norm() / found.norm()) < 1e-6  # float32 sums in another order

    low, high = BOUNDS.double() if activation == "static" else torch.stack([x.min(), x.max()]).double()
    step = (high - low) / (2**act_bits - 1)
    q, q_w = codes.codes.double(), form.codes().double()
    low_w, high_w = form.bounds.double().repeat_interleave(6, 0).unbind(1)
    step_w = (high_w - low_w) / (2**bits - 1)
    want = step * step_w * (q @ q_w.T) + step * low_w * q.sum(1, keepdim=True)
    want = want + low * step_w * q_w.sum(1) + 50 * low * low_w + bias.double()
    assert float((found.double() - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("activation", ["static", "dynamic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_are_multiplied_where_there_is_a_library(bits, activation):
    """Grids of any ends go through the kernel for centred ones, and a product of sums behind it."""
    form, _ = form_of(bits, rows=36, columns=130, activation=activation)
    scale, zero = form._grid()
    bounds = form.act_bounds
    tensors = (form.packed, scale, zero, torch.randn(36), None, None, bounds)
    sizes = Sizes(130, bits, 0, 0, activation, 4, 0)
    x = torch.randn(5, 3, 130)
    kernel = TABLE.choose(torch.float32, "cpu", tensors[:3], sizes)
    assert kernel.name == ("cpu" if cpu.load()[0] is not None else "reference")
    found, want = kernel.linear(x, tensors, sizes), reference(x, tensors, sizes)
    assert found.shape == want.shape == (5, 3, 36)
    # a part of one value has step 1, of which 128 cancels at 8 bits
    assert float((found - want).norm() / want.norm()) < 1e-4


def test_values_outside_are_clipped_and_none_are_lost():
    form, want = form_of(8, parts=1)
    layer = PackedLinear(form, None, torch.float32)
    x = torch.full((1, 50), 100.0)
    torch.testing.assert_close(layer(x), BOUNDS[1].expand(1, 50) @ want.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(torch.zeros(0, 50)), torch.zeros(0, 12))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_handed_on(bad):
    layer = PackedLinear(form_of(parts=1)[0], None, torch.float32)
    x = torch.randn(3, 50)
    x[1, 7] = bad
    out = layer(x)
    assert torch.isnan(out[1]).all()
    torch.testing.assert_close(out[[0, 2]], layer(x[[0, 2]]))
    dynamic = PackedLinear(form_of(parts=1, activation="dynamic")[0], None, torch.float32)
    assert torch.isnan(dynamic(x)).all()


def test_a_range_of_one_value():
    ends = torch.tensor([2.5, 2.5])
    assert float(range_step(*ends, 4)) == 1
    assert torch.equal(quantize_range(torch.randn(2, 3), ends, 4).dequantized(), torch.full((2, 3), 2.5))
    assert torch.isfinite(quantize_range(torch.zeros(2, 3), None, 2).dequantized()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    layer = PackedLinear(form_of(parts=1)[0], None, dtype)
    x = torch.randn(5, 50, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, layer(x.float()).to(dtype))
    assert layer.to(torch.bfloat16).weight_act_bounds.dtype == torch.float32


def test_op_schema_and_gradient():
    form, _ = form_of(parts=1)
    scale, zero = form._grid()
    tensors = [form.packed, scale, zero, torch.randn(12), None, None, form.act_bounds]
    sizes = Sizes(50, 4, 0, 0, "static", 4, 0)
    opcheck(torch.ops.hf_lowbit.integer_act_linear.default, (torch.randn(3, 50), *tensors, *sizes))
    x = torch.randn(3, 50, requires_grad=True)
    PackedLinear(form, None, torch.float32)(x).sum().backward()
    torch.testing.assert_close(x.grad, form.unpack().sum(0).expand(3, 50))


def test_misfits_are_refused():
    form, _ = form_of(parts=1)
    scale, zero = form._grid()
    tensors = (form.packed, scale, zero, None, None, None)
    with pytest.raises(RuntimeError, match="static needs act_bounds"):
        integer_act_linear(torch.zeros(1, 50), (*tensors, None), Sizes(50, 4, 0, 0, "static", 4, 0))
    with pytest.raises(RuntimeError, match="expected \\(2,\\)"):
        integer_act_linear(torch.zeros(1, 50), (*tensors, torch.zeros(3)), Sizes(50, 4, 0, 0, "static", 4, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": -1}, "parts must be an integer"),
        ({"parts": True}, "parts must be an integer"),
        ({"parts": 5}, "parts 5 must divide out_features 12"),
        ({"group_size": 10}, "with neither groups nor zero points"),
        ({"symmetric": False}, "with neither groups nor zero points"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, message):
    spec = dataclasses.replace(form_of(parts=1)[0].spec, **change)
    assert any(message in problem for problem in spec.problems())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("bounds", [[math.nan, 1.0]], "bounds holds NaN or infinity"),
        ("bounds", [[2.0, 1.0]], "an upper end lies below the lower"),
        ("act_bounds", [0.0, math.inf], "act_bounds holds NaN or infinity"),
        ("act_bounds", [1.0, 0.0], "an upper end lies below the lower"),
    ],
)
def test_damaged_ends_are_refused(name, values, message):
    form, _ = form_of(parts=1)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(form, **{name: torch.tensor(values)}).validate("layer")


def test_compiled_and_exported():
    layer = PackedLinear(form_of(parts=1)[0], torch.randn(12), torch.float32)
    x = torch.randn(4, 50)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
