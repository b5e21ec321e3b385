"""Format ``integer``: codes survive, sizes are exact, products are right, nothing damaged passes ``validate``."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save
from torch.library import opcheck

from hf_lowbit import PackedLinear
from hf_lowbit.formats import FORMATS, IntegerFormat, IntegerSpec
from hf_lowbit.kernels.integer import BITS, code_bytes, integer_linear, pack_codes, unpack_codes
from hf_lowbit.numerics import integer

FORMS = [
    {"bits": bits, "group_size": group, "symmetric": symmetric}
    for bits in BITS
    for group in (0, 16, 7)
    for symmetric in (True, False)
]


def parts(n, m, bits, group_size, symmetric, seed=0):
    torch.manual_seed(seed)
    groups = -(-m // group_size) if group_size else 1
    codes = torch.randint(0, 2**bits, (n, m))
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups))
    return codes, torch.rand(n, groups) + 0.1, zero


def packed(n=6, m=40, dtype="float32", **form):
    form = {"bits": 4, "group_size": 16, "symmetric": False, **form}
    return IntegerFormat.pack(IntegerSpec(n, m, scale_dtype=dtype, **form), *parts(n, m, **form))


def literal(codes, scale, zero, bits, group_size):
    """Value by value, in Python."""
    out = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            g = j // group_size if group_size else 0
            middle = 2 ** (bits - 1) if zero is None else int(zero[i, g])
            out[i, j] = float(scale[i, g]) * (int(codes[i, j]) - middle)
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 3, 8, 13])
def test_codes_are_packed_first_column_low(columns, bits):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    stored = pack_codes(codes, bits)
    assert stored.shape == (5, code_bytes(columns, bits))
    for row, bytes_ in zip(codes.tolist(), stored.tolist(), strict=True):
        number = sum(code << (bits * j) for j, code in enumerate(row))
        assert bytes_ == list(number.to_bytes(len(bytes_), "little"))
    assert torch.equal(unpack_codes(stored, columns, bits), codes)


@pytest.mark.parametrize("shape", [(6, 40), (1, 9), (3, 1), (2, 130)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_file_and_exact_bytes(form, shape):
    n, m = shape
    codes, scale, zero = parts(n, m, **form)
    spec = IntegerSpec(n, m, scale_dtype="float32", **form)
    found = IntegerFormat.pack(spec, codes, scale, zero)
    want = literal(codes, scale, zero, form["bits"], form["group_size"])
    assert torch.allclose(found.unpack().double(), want, rtol=1e-6)
    assert torch.equal(found.codes().long(), codes)
    groups = scale.shape[1]
    assert found.nbytes == n * (
        -(-m * form["bits"] // 8) + 4 * groups + (0 if zero is None else -(-groups * form["bits"] // 8))
    )
    assert IntegerSpec.from_json(spec.to_json(), "layer") == spec
    again = IntegerFormat.from_state(load(save(found.state())), spec)
    again.validate("layer")
    assert torch.equal(again.unpack(), found.unpack())
    empty = IntegerFormat.empty(spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in empty.state().items()} == IntegerFormat.shapes(spec)
    x, bias = torch.randn(2, 3, m), torch.randn(n)
    for dtype in (torch.float32, torch.bfloat16):
        out = found.linear(x.to(dtype), bias)
        assert out.dtype == dtype
        exact = x.to(dtype).double() @ want.T + bias.to(dtype).double()
        # weights may be rounded to the dtype or not, and sums of any order cancel; so to the largest value
        assert (out - exact).abs().max() < (1e-5 if dtype is torch.float32 else 1e-2) * exact.abs().max()


def test_schema_shapes_and_gradients_of_the_ops():
    for form in (packed(), packed(symmetric=True, group_size=0)):
        sizes = (40, 4, form.spec.group_size)
        x, bias = torch.randn(3, 40), torch.randn(6)
        tensors = (form.packed, form.scale, form.zero_point)
        opcheck(torch.ops.hf_lowbit.integer_linear.default, (x, *tensors, bias, *sizes))
        opcheck(torch.ops.hf_lowbit.integer_linear.default, (x[0], *tensors, None, *sizes))
        opcheck(torch.ops.hf_lowbit.integer_dequantize.default, (*tensors, *sizes))
        x, bias = x.requires_grad_(), bias.requires_grad_()
        integer_linear(x, *tensors, bias, sizes).square().sum().backward()
        grads = x.grad.clone(), bias.grad.clone()
        x.grad = bias.grad = None
        torch.nn.functional.linear(x, form.unpack(), bias).square().sum().backward()
        # squares of sums to some hundreds, which two kernels add in different orders
        torch.testing.assert_close(grads, (x.grad, bias.grad), rtol=1e-4, atol=1e-3)
        layer = PackedLinear(form, None, torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": True}, "bits must be"),
        ({"bits": "4"}, "bits must be"),
        ({"group_size": -1}, "group_size must be"),
        ({"group_size": 2**40}, "group_size must be"),
        ({"symmetric": 1}, "symmetric must be"),
        ({"scale_dtype": "int8"}, "scale_dtype must be"),
        ({"act_bit": 4}, "unknown key 'act_bit'"),
    ],
    ids=str,
)
def test_hostile_specs_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        IntegerSpec.from_json({"out_features": 6, "in_features": 40, **data}, "layer")


def test_damaged_tensors_are_refused():
    form = packed(m=41, group_size=7)
    for change, message in (
        ({"packed": form.packed | 0x80}, "packed has padding bits set"),
        ({"scale": -form.scale}, "scale holds a negative"),
        ({"scale": form.scale * float("nan")}, "scale holds NaN"),
        ({"scale": form.scale[:, :-1]}, r"scale is torch.float32 \(6, 5\)"),
        ({"zero_point": None}, "zero_point is missing"),
    ):
        with pytest.raises(ValueError, match=f"layer: {message}"):
            dataclasses.replace(form, **change).validate("layer")
    odd = packed(m=40, group_size=16)  # three groups, so one and a half bytes of zero points
    with pytest.raises(ValueError, match="zero_point has padding bits set"):
        dataclasses.replace(odd, zero_point=odd.zero_point | 0x80).validate("layer")
    codes, scale, zero = parts(6, 40, 4, 16, False)
    spec = IntegerSpec(6, 40, group_size=16, symmetric=False)
    for bad, message in (
        ((codes + 9, scale, zero), "codes must be integers from 0 to 15"),
        ((codes[:, 1:], scale, zero), r"codes has shape \(6, 39\)"),
        ((codes, scale, None), "zero_point is needed"),
        ((codes, scale, zero.float()), "zero_point must be integers"),
        ((codes, scale * 1e9, zero), "scale holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            IntegerFormat.pack(spec, *bad)
    assert FORMATS["integer"] is IntegerFormat


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 39), None, r"x has shape \(3, 39\), the weight has 40 columns"),
        (torch.zeros(3, 40, dtype=torch.int32), None, "floating point"),
        (torch.zeros(3, 40, device="meta"), None, "x is on meta"),
        (torch.zeros(3, 40), torch.zeros(1), "bias has shape"),
    ],
    ids=str,
)
def test_products_that_do_not_fit_are_refused(x, bias, message):
    with pytest.raises(RuntimeError, match=message):
        packed().linear(x, bias)


# Fits ------------------------------------------------------------------------------------------------------------


def problem(n=12, m=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, m, generator=generator) * torch.randn(m, generator=generator).exp()
    inputs = torch.randn(900, m, generator=generator) @ (torch.eye(m) + 0.3 * torch.randn(m, m, generator=generator))
    return weight.double(), (inputs.T @ inputs).double()


def fitted(weight, moment, bits=4, group_size=0, symmetric=True, scale_dtype=torch.float32):
    fit = integer.fit(
        weight,
        moment,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        damping=0.01,
        where="layer",
    )
    name = str(scale_dtype).removeprefix("torch.")
    return IntegerFormat.pack(
        IntegerSpec(*weight.shape, bits, group_size, symmetric, name), fit.codes, fit.scale, fit.zero
    ).unpack()


def output_error(weight, moment, found):
    residual = weight - found.double()
    return float(((residual @ moment) * residual).sum() / ((weight @ moment) * weight).sum())


def test_rounding_without_data_is_the_nearest_point_of_a_grid_that_was_searched():
    weight, _ = problem()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = torch.maximum(-low / 128, high / 127).float().double()
    want = scale * (weight / scale).round().clamp(-128, 127)
    assert torch.allclose(fitted(weight, None, bits=8).double(), want, rtol=1e-6)
    scale = ((high - low) / 255).float().double()
    zero = (-low / scale).round()
    want = scale * ((weight / scale + zero).round().clamp(0, 255) - zero)
    assert torch.allclose(fitted(weight, None, bits=8, symmetric=False).double(), want, rtol=1e-6, atol=1e-9)
    scale = torch.maximum(-low / 8, high / 7)
    full = scale * (weight / scale).round().clamp(-8, 7)
    searched = fitted(weight, None).double()
    assert bool(((weight - searched).square().sum(1) < (weight - full).square().sum(1)).all())


@pytest.mark.parametrize("group_size", [0, 64, 20])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_columns_make_up_for_each_other(bits, group_size):
    weight, moment = problem()
    alone, together = (fitted(weight, g, bits, group_size) for g in (None, moment))
    assert output_error(weight, moment, together) < 0.95 * output_error(weight, moment, alone)


def test_blocks_of_columns_are_only_a_matter_of_speed(monkeypatch):
    weight, moment = problem()
    want = fitted(weight, moment)
    monkeypatch.setattr(integer, "BLOCK", 1)
    assert torch.equal(fitted(weight, moment), want)


def test_more_bits_and_smaller_groups_lower_the_error():
    weight, moment = problem()
    errors = [output_error(weight, moment, fitted(weight, moment, bits)) for bits in (2, 4, 8)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    groups = [output_error(weight, moment, fitted(weight, moment, 4, size)) for size in (0, 32)]
    assert groups[1] < groups[0]


def test_degenerate_rows():
    weight, moment = problem()
    weight[0], weight[1] = 0.0, 0.25
    weight[2] = 1e-12  # its scale would vanish in half precision
    found = fitted(weight, moment, symmetric=False, scale_dtype=torch.float16)
    assert not found[0].any()
    assert torch.allclose(found[1].double(), weight[1], atol=1e-3)
    assert torch.isfinite(found).all()
    with pytest.raises(ValueError, match=r"layer: a scale leaves the range of float16"):
        fitted(weight * 1e9, None, scale_dtype=torch.float16)
