"""Products that rotate and round their input, against loops in float64; and what they refuse."""

import math

import pytest
import torch
from torch.library import opcheck

from hf_lowbit import PackedLinear
from hf_lowbit.formats import IntegerFormat, IntegerSpec
from hf_lowbit.kernels.rounding import SCALE_MODES, integer_form, quantize_activation, transform
from hf_lowbit.layers import set_act_bits
from hf_lowbit.numerics.rotation import hadamard, random_signs

ROUNDED = SCALE_MODES


def group_of(mode):
    return 16 if mode == "token_group" else 0


def literal(x, mode, bits, group):
    """Rows on their grids, value by value: (codes, dequantized), float64 of what float32 divides."""
    most = 2 ** (bits - 1) - 1
    tokens, columns = x.shape
    codes, values = torch.zeros(tokens, columns), torch.zeros(tokens, columns, dtype=torch.float64)
    channel = [max(abs(float(x[i, j])) for i in range(tokens)) or 1.0 for j in range(columns)]
    for i in range(tokens):
        for j in range(columns):
            if mode == "token_group":
                first = j // group * group
                step = max(abs(float(v)) for v in x[i, first : first + group]) / most
            elif mode == "token":
                step = max(abs(float(v)) for v in x[i]) / most
            elif mode == "channel":
                step = channel[j] / most
            else:
                step = channel[j] * max(abs(float(x[i, c])) / channel[c] for c in range(columns)) / most
            step = step or 1.0
            codes[i, j] = max(-most, min(most, round(float(x[i, j]) / step)))
            values[i, j] = float(codes[i, j]) * step
    return codes, values


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("mode", ROUNDED)
def test_codes_and_scales(mode, bits):
    torch.manual_seed(0)
    x = torch.randn(9, 40) * torch.exp(torch.randn(40))
    x[2] = 0
    x[:, 5] = 0
    found = quantize_activation(x, mode, bits, group_of(mode))
    codes, values = literal(x, mode, bits, group_of(mode))
    # where a value lies in the middle between two codes, the division in float32 may take the other one
    assert int((found.codes != codes).sum()) == 0
    assert torch.allclose(found.dequantized().double(), values, rtol=1e-5, atol=1e-9)
    assert found.codes.dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_channel_mode_is_the_published_formula(bits):
    """X̂ = Q(X Λ⁻¹), Y = X̂ Λ Ŵᵀ with Q on a fixed grid of [-1, 1] (Eq. 10), rotation before and nothing after."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 128).double(), torch.randn(6, 128)
    spec = IntegerSpec(6, 128, 4, 0, False, "float32", rotation=128, activation="channel", act_bits=bits)
    form = IntegerFormat.pack(
        spec, torch.randint(0, 16, weight.shape), torch.rand(6, 1) + 0.1, torch.randint(0, 16, (6, 1))
    )
    rotated = x @ hadamard(128)
    scaling = rotated.abs().amax(0)
    most = 2 ** (bits - 1) - 1
    rounded = (rotated / scaling * most).round() / most
    stored = (form.unpack().double() @ hadamard(128)).float().double()
    want = (rounded * scaling) @ stored.T
    found = form.linear(x.float(), None).double()
    assert float((found - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", ["token_group", "token"])
@pytest.mark.parametrize(("group", "act_group"), [(32, 32), (32, 16), (16, 64), (24, 20), (0, 32), (32, 0)])
def test_integer_form_equals_the_dequantized_form(mode, group, act_group, symmetric):
    torch.manual_seed(0)
    x = torch.randn(7, 96)
    groups = -(-96 // group) if group else 1
    codes, scale = torch.randint(0, 16, (10, 96)), torch.rand(10, groups) + 0.1
    zero = None if symmetric else torch.randint(0, 16, (10, groups))
    form = IntegerFormat.pack(IntegerSpec(10, 96, 4, group, symmetric, "float32"), codes, scale, zero)
    for bits in (4, 8):
        found = quantize_activation(x, mode, bits, act_group or 96)
        want = found.dequantized().double() @ form.unpack().double().T
        have = integer_form(found, codes, scale, zero, 4, group).double()
        assert float((have - want).norm() / want.norm()) < 1e-6


def layer_of(mode="token_group", bits=4, n=10, m=96, bias=True, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    options = {"rotation": 32, "rotation_signs": True, "smooth": True, "group_size": 32, "symmetric": False}
    spec = IntegerSpec(
        n, m, 4, activation=mode, act_bits=bits, act_group_size=group_of(mode), **{**options, **changes}
    )
    smooth = (torch.rand(m) + 0.5).half() if spec.smooth else None
    signs = random_signs(m, 0) if spec.rotation_signs else None
    form = IntegerFormat.pack(
        spec,
        torch.randint(0, 16, (n, m)),
        torch.rand(n, spec.groups) + 0.1,
        None if spec.symmetric else torch.randint(0, 16, (n, spec.groups)),
        smooth,
        signs,
    )
    return PackedLinear(form, torch.randn(n).to(dtype) if bias else None, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ROUNDED)
def test_product_is_that_of_rounded_rows(mode, dtype):
    layer = layer_of(mode, dtype=dtype)
    x = torch.randn(2, 3, 96).to(dtype)
    spec = layer.packed.spec
    rows = x.reshape(-1, 96).double() / layer.weight_smooth.double() * layer.weight_rotation_signs.double()
    blocks = torch.block_diag(*[hadamard(32)] * 3)
    _, values = literal((rows @ blocks).float(), mode, 4, spec.act_group_size)
    stored = layer.packed.unpack().double() * layer.weight_smooth.double() * layer.weight_rotation_signs.double()
    want = (values @ (stored @ blocks).T + layer.bias.double()).reshape(2, 3, 10)
    out = layer(x)
    assert out.dtype == dtype
    assert float((out.double() - want).norm() / want.norm()) < {torch.float32: 1e-5, torch.float16: 1e-3}.get(
        dtype, 5e-3
    )


def test_unrounded_products_and_dense_copies_are_in_the_plain_basis():
    layer = layer_of()
    x = torch.randn(5, 96)
    dense = layer.dequantize()
    assert set_act_bits(layer, 16) == 1
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
    plain = layer_of("none", bits=8)
    torch.testing.assert_close(plain(x), plain.dequantize()(x), rtol=1e-4, atol=1e-4)
    set_act_bits(layer, None)
    assert float((layer(x) - dense(x)).norm() / dense(x).norm()) > 0.02


def test_bits_of_activations_are_chosen_per_call():
    layer = layer_of(bits=4)
    x = torch.randn(5, 96)
    dense = layer.dequantize()(x)
    errors = []
    for bits in (2, 3, 4, 5, 6, 7, 8, 16):
        set_act_bits(layer, bits)
        errors.append(float((layer(x) - dense).norm()))
    assert errors == sorted(errors, reverse=True)
    set_act_bits(layer, None)
    stored = layer(x)
    set_act_bits(layer, 4)
    assert torch.equal(layer(x), stored)
    assert "act_bits" not in layer.state_dict()
    torch._dynamo.reset()  # other tests have used up what it compiles of one forward
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for bits in (4, 8):
        set_act_bits(layer, bits)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 15, 4.0, True, "4"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="activations have 2 to 8 bits"):
        set_act_bits(layer_of(), bits)


def test_modes_without_scales_of_their_own_are_refused():
    with pytest.raises(ValueError, match=r"activation mode must be one of token_group, token, .* got 'static'"):
        quantize_activation(torch.ones(2, 8), "static", 4)
    with pytest.raises(ValueError, match="group_size must be at least 1 for mode token_group, got 0"):
        quantize_activation(torch.ones(2, 8), "token_group", 4)


def test_layers_that_do_not_round_activations_say_so():
    plain = layer_of("none", bits=8)
    with pytest.raises(ValueError, match="no packed layer of PackedLinear rounds activations"):
        set_act_bits(plain, 4)
    plain.act_bits = 4
    with pytest.raises(ValueError, match="format 'integer' does not round activations"):
        plain(torch.zeros(1, 96))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ("none", *SCALE_MODES))
def test_nan_and_infinity_are_handed_on(mode, bad):
    layer = layer_of(mode, bits=8 if mode == "none" else 4)
    x = torch.randn(4, 96)
    x[1, 50] = bad
    out = layer(x)
    assert not torch.isfinite(out[1]).any()
    others = out[[0, 2, 3]]
    if mode.startswith("channel"):
        assert torch.isnan(others).all()
    else:
        # a kernel that counts in integers leaves the whole call to another one
        torch.testing.assert_close(others, layer(x[[0, 2, 3]]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ("none", *SCALE_MODES))
def test_no_tokens_zeros_and_large_values(mode):
    layer = layer_of(mode, bits=8 if mode == "none" else 4, dtype=torch.float16)
    assert layer(torch.zeros(2, 0, 96)).shape == (2, 0, 10)
    assert torch.equal(layer(torch.zeros(3, 96)), layer.bias.float().expand(3, 10))
    # the largest half precision number: nothing inside overflows, and what leaves the range is infinite as in a
    # dense layer
    x = torch.full((2, 96), 65504.0)
    assert torch.isfinite(layer(x)).all()
    assert torch.isinf(layer(x.half())).any()
    tiny = torch.full((2, 96), 1e-45)
    assert torch.isfinite(layer(tiny)).all()


def test_schema_shapes_and_gradients_of_the_op():
    for mode, changes in (("token_group", {}), ("channel", {"smooth": False, "symmetric": True}), ("none", {})):
        layer = layer_of(mode, bits=8, **changes)
        form, spec = layer.packed, layer.packed.spec
        sizes = (96, 4, 32, 32, mode, 8, group_of(mode))
        tensors = [form.packed, form.scale, form.zero_point, layer.bias, form.smooth, form.rotation_signs, None]
        tensors = [None if t is None else t.detach() for t in tensors]
        opcheck(torch.ops.hf_lowbit.integer_act_linear.default, (torch.randn(3, 96), *tensors, *sizes))
        x = torch.randn(3, 96, requires_grad=True)
        layer.bias.requires_grad_()
        layer(x).square().sum().backward()
        grad = 2 * layer(x).detach()
        want = grad @ form.unpack()
        assert float((x.grad - want).norm() / want.norm()) < 1e-5  # sums in another order
        torch.testing.assert_close(layer.bias.grad, grad.sum(0))
        assert spec.activation == mode


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (torch.zeros(3, 95), {}, r"x has shape \(3, 95\), the weight has 96 columns"),
        (torch.zeros(3, 96, dtype=torch.int32), {}, "floating point"),
        (torch.zeros(3, 96, device="meta"), {}, "x is on meta"),
        (torch.zeros(3, 96), {"bias": torch.zeros(3)}, "bias has shape"),
        (torch.zeros(3, 96), {"smooth": torch.zeros(3)}, "smooth has shape"),
        (torch.zeros(3, 96), {"signs": torch.zeros(3)}, "signs has shape"),
        (torch.zeros(3, 96), {"bounds": torch.zeros(2)}, "act_bounds belong to mode static only"),
        (torch.zeros(3, 96), {"mode": "tokens"}, "mode must be one of none, token_group"),
        (torch.zeros(3, 96), {"group": 0}, "act_group_size is needed for mode token_group"),
        # blocks beyond the end of a row
        (torch.zeros(3, 96), {"rotation": 64}, "no Hadamard blocks of 64 columns make up 96"),
        (torch.zeros(3, 96), {"rotation": 3}, "no Hadamard blocks of 3 columns make up 96"),
        (torch.zeros(3, 96), {"rotation": -4}, "no Hadamard blocks of -4 columns make up 96"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_products_that_do_not_fit_are_refused(x, changes, message):
    form = layer_of().packed
    tensors = {"bias": None, "smooth": form.smooth, "signs": form.rotation_signs, "bounds": None}
    sizes = {"rotation": 32, "mode": "token_group", "bits": 4, "group": 16}
    rest = [changes.get(name, value) for name, value in {**tensors, **sizes}.items()]
    arguments = (form.packed, form.scale, form.zero_point, *rest[:4], 96, 4, 32, *rest[4:])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_lowbit.integer_act_linear(x, *arguments)


def test_transform_is_in_float32():
    x = torch.full((1, 32), 60000.0, dtype=torch.float16)
    found = transform(x, torch.full((32,), 0.5, dtype=torch.float16), None, 32)
    assert found.dtype == torch.float32
    assert float(found[0, 0]) == pytest.approx(60000 * 2 * 32**0.5, rel=1e-6)


@pytest.mark.parametrize("name", ["smooth", "signs"])
def test_strided_vectors_give_what_dense_ones_do(name):
    form = layer_of().packed
    dense = {"smooth": form.smooth, "signs": form.rotation_signs}[name].float()
    strided = torch.stack([dense, torch.full_like(dense, torch.nan)], 1)[:, 0]
    x, found = torch.randn(5, 96), []
    for vector in (dense, strided):
        given = {"smooth": None, "signs": None, name: vector}
        found.append(
            torch.ops.hf_lowbit.integer_act_linear(
                x, form.packed, form.scale, form.zero_point, None, given["smooth"], given["signs"], None,
                96, 4, 32, 32, "token_group", 4, 16,
            )
        )  # fmt: skip
    assert torch.equal(*found)
