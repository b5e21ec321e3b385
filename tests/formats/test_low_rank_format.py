"""Format ``low_rank``: factors survive, sizes are exact, products are right, nothing damaged passes ``validate``."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.library import opcheck

from hf_lowbit import PackedLinear
from hf_lowbit.formats import FORMATS, BinarySpec, IntegerFormat, IntegerSpec, LowRankFormat, LowRankSpec
from hf_lowbit.formats.low_rank import FACTOR_DTYPES
from hf_lowbit.kernels.low_rank import low_rank_linear
from hf_lowbit.report.bench import random_weight

SHAPES = [(24, 40, 7), (1, 64, 1), (8, 72, 8), (130, 9, 5), (1, 1, 1)]


def packed(n=24, m=40, r=7, dtype=torch.float32, **changes):
    form = LowRankFormat.pack(torch.randn(n, r), torch.randn(r, m), dtype)
    return dataclasses.replace(form, **changes)


@pytest.mark.parametrize("dtype", FACTOR_DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_file_meta_and_exact_bytes(shape, dtype):
    n, m, r = shape
    form = packed(*shape, dtype)
    assert form.nbytes == r * (n + m) * dtype.itemsize
    assert form.bits_per_weight == pytest.approx(8 * dtype.itemsize * r * (n + m) / (n * m))
    assert LowRankSpec.from_json(form.spec.to_json(), "layer") == form.spec
    empty = LowRankFormat.empty(form.spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in empty.state().items()} == LowRankFormat.shapes(form.spec)
    again = LowRankFormat.from_state(load(save(form.state())), form.spec)
    again.validate("layer")
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in form.state().items())


@pytest.mark.parametrize("stored", FACTOR_DTYPES.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_against_float64(shape, dtype, stored):
    """Tolerance: three roundings to ``dtype`` (factor, middle, result), each about 0.3 units of its last digit."""
    n, m, r = shape
    form, bias = packed(n, m, r, stored), torch.randn(n)
    dense = form.up.double() @ form.down.double()
    assert torch.allclose(form.unpack().double(), dense, rtol=1e-5, atol=1e-5)
    for x in (torch.randn(3, 5, m).to(dtype), torch.randn(m).to(dtype), torch.randn(0, m).to(dtype)):
        out, want = form.linear(x, bias), x.double() @ dense.T + bias.double()
        assert out.dtype == dtype
        assert out.shape == want.shape
        if x.numel():
            assert float((out.double() - want).norm() / want.norm()) < 4 * torch.finfo(dtype).eps


def test_schema_shapes_and_gradients_of_the_op():
    form, x, bias = packed(), torch.randn(3, 40), torch.randn(24)
    opcheck(torch.ops.hf_lowbit.low_rank_linear.default, (x, form.up, form.down, bias))
    opcheck(torch.ops.hf_lowbit.low_rank_linear.default, (x[0], form.up, form.down, None))
    opcheck(torch.ops.hf_lowbit.low_rank_dequantize.default, (form.up, form.down))
    leaves = [t.double().requires_grad_() for t in (x, form.up, form.down, bias)]
    assert torch.autograd.gradcheck(torch.ops.hf_lowbit.low_rank_linear, leaves)
    assert torch.autograd.gradcheck(lambda up: low_rank_linear(leaves[0].detach(), up, *leaves[2:]), leaves[1])


def test_layer_is_frozen_and_its_factors_can_be_trained():
    layer = PackedLinear(packed(), torch.randn(24), torch.float32)
    x = torch.randn(5, 40)
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name.startswith("weight"))
    assert not layer.requires_grad_(False)(x).requires_grad
    layer.weight_up.requires_grad_()
    layer.weight_down.requires_grad_()
    layer(x).square().sum().backward()
    assert layer.weight_up.grad.abs().sum() > 0
    assert layer.weight_down.grad.abs().sum() > 0
    dense = layer.dequantize()
    assert type(dense) is nn.Linear
    assert torch.allclose(dense(x), layer(x), atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rank": 0}, "rank must be an integer from 1 to 24"),
        ({"rank": 25}, "rank must be an integer from 1 to 24"),
        ({"rank": True}, "rank must be"),
        ({"rank": 2**40}, "rank must be"),
        ({"rank": "7"}, "rank must be"),
        ({"dtype": "int8"}, "dtype must be one of float16"),
        ({"dtype": ["float16"]}, "dtype must be"),
        ({"out_features": 2**30}, "out_features must be"),
        ({"up_format": "integer"}, "unknown key 'up_format'"),
        ({"up": {"format": "integer", "bits": 5}}, "layer: up: bad format spec: bits must be one of"),
        ({"up": {"format": "integer", "in_features": 7}}, "layer: up: in_features follows from the weight"),
        ({"down": {"format": "low_rank", "rank": 3}}, "layer: down: must name a format of binary, integer"),
        ({"down": {"format": "latent"}}, "layer: down: must name a format"),
        ({"down": {"format": ["integer"]}}, "layer: down: must name a format"),
        ({"down": {"bits": 4}}, "layer: down: must name a format"),
        ({"down": "integer"}, "layer: down: must name a format"),
        ({"down": {"format": "binary", "salient": 41, "salient_groups": 1}}, "layer: down: .*salient must be"),
        ({"down": {"format": "integer"}, "rank": 99}, "rank must be an integer from 1 to 24"),
    ],
    ids=str,
)
def test_hostile_specs_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        LowRankSpec.from_json({"out_features": 24, "in_features": 40, "rank": 7, **data}, "layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FACTOR_DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", ["up", "down"])
def test_values_that_are_not_finite_are_refused(name, dtype, value):
    form = packed(dtype=dtype)
    form.state()[name][3, 5] = value
    with pytest.raises(ValueError, match=f"layer: {name} holds NaN or infinity"):
        form.validate("layer")


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match=r"down is torch.float32 \(7, 39\), expected torch.float32 \(7, 40\)"):
        packed(down=torch.zeros(7, 39)).validate("layer")
    with pytest.raises(ValueError, match=r"up is torch.float16"):
        packed(up=torch.zeros(24, 7).half()).validate("layer")
    with pytest.raises(ValueError, match="down is missing"):
        packed(down=None).validate("layer")
    with pytest.raises(ValueError, match="holds NaN or infinity"):  # beyond the range of float16
        LowRankFormat.pack(torch.full((2, 1), 1e6), torch.ones(1, 3), torch.float16)
    with pytest.raises(ValueError, match=r"as torch\.int8"):
        LowRankFormat.pack(torch.ones(2, 1), torch.ones(1, 3), torch.int8)
    assert FORMATS["low_rank"] is LowRankFormat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 39),), r"x has shape \(3, 39\), the weight has 40 columns"),
        ((torch.zeros(3, 40, dtype=torch.int64),), "floating point"),
        ((torch.zeros(3, 40), torch.zeros(24, 6)), "factors of rank 6 and 7"),
        ((torch.zeros(3, 40), torch.zeros(24, 7), torch.zeros(7, 40), torch.zeros(1)), "bias has shape"),
        ((torch.zeros(3, 40, device="meta"),), "x is on meta"),
    ],
    ids=str,
)
def test_products_that_do_not_fit_are_refused(arguments, message):
    given = (*arguments, *(torch.zeros(3, 40), torch.zeros(24, 7), torch.zeros(7, 40), None)[len(arguments) :])
    with pytest.raises(RuntimeError, match=message):
        low_rank_linear(*given)


# Factors that are held in a format themselves --------------------------------------------------------------------


def integers(n, m, bits=4, **form):
    spec = IntegerSpec(n, m, bits, scale_dtype="float32", **form)
    return IntegerFormat.pack(spec, torch.randint(0, 2**bits, (n, m)), 0.1 * torch.rand(n, spec.groups) + 0.01)


def signs(n, m):
    return random_weight(BinarySpec(n, m, groups=2, salient=2, salient_groups=1, shift=True))


HELD = {
    "int4 down": lambda: LowRankFormat.pack(torch.randn(24, 7), integers(7, 40, group_size=16), torch.float32),
    "int8 both": lambda: LowRankFormat.pack(integers(24, 7, 8), integers(7, 40, 8), torch.float16),
    "signs": lambda: LowRankFormat.pack(signs(24, 7), signs(7, 40), torch.float16),
    "mixed": lambda: LowRankFormat.pack(signs(24, 7), integers(7, 40), torch.float16),
}


@pytest.mark.parametrize("kind", HELD)
def test_factors_in_other_formats(kind):
    form = HELD[kind]()
    dense = [f.double() if isinstance(f, torch.Tensor) else f.unpack().double() for f in (form.up, form.down)]
    torch.testing.assert_close(form.unpack().double(), dense[0] @ dense[1], rtol=1e-5, atol=1e-5)
    x, bias = torch.randn(3, 40), torch.randn(24)
    torch.testing.assert_close(form.linear(x, bias), x @ form.unpack().T + bias, rtol=1e-4, atol=1e-4)
    held = [f.nbytes for f in (form.up, form.down)]
    assert form.nbytes == sum(held)
    assert form.nbytes == sum(len(t.numpy().tobytes()) for t in form.state().values())
    assert LowRankSpec.from_json(form.spec.to_json(), "layer") == form.spec
    assert set(form.state()) <= set(LowRankFormat.tensor_names)
    assert {name: (tuple(t.shape), t.dtype) for name, t in form.state().items()} == LowRankFormat.shapes(form.spec)
    again = LowRankFormat.from_state(load(save(form.state())), form.spec)
    again.validate("layer")
    assert torch.equal(again.unpack(), form.unpack())
    layer = PackedLinear(form, bias, torch.float32)
    skeleton = PackedLinear.empty_like(nn.Linear(40, 24, device="meta"), LowRankFormat, form.spec)
    skeleton.load_state_dict(load(save(layer.state_dict())), assign=True)
    assert torch.equal(skeleton(x), layer(x))
    assert torch.equal(layer.dequantize().weight, form.unpack())
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, form.unpack().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_damaged_factors_are_named():
    form = HELD["mixed"]()
    form.down.scale[2, 0] = float("nan")
    form.up.row_scale[0, 0, 1] = -1.0
    with pytest.raises(ValueError, match=r"layer: up: row_scale holds a negative scale; down: scale holds NaN"):
        form.validate("layer")
    state = form.state()
    with pytest.raises(ValueError, match="are not those of this spec"):
        LowRankFormat.from_state({**state, "down": torch.zeros(7, 40)}, form.spec)
    with pytest.raises(ValueError, match=r"down_packed is torch\.uint8"):
        LowRankFormat.from_state({**state, "down_packed": state["down_packed"][:, 1:]}, form.spec).validate("layer")
    with pytest.raises(ValueError, match=r"down must be of shape \(6, 40\)"):
        LowRankFormat.pack(torch.randn(24, 6), integers(7, 40), torch.float32)
