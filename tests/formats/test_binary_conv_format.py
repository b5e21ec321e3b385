"""Format ``binary_conv``: bytes, values that are refused, and the way through a file."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from hf_lowbit.conv_layers import PackedConv2d
from hf_lowbit.formats import FORMATS, BinaryConvFormat, BinaryConvSpec
from hf_lowbit.kernels import unpack_plane
from hf_lowbit.kernels.geometry import ConvGeometry


def made(ins=6, outs=5, kernel=(3, 3), transposed=False, groups=1, seed=0, **options):
    torch.manual_seed(seed)
    geometry = ConvGeometry(ins, outs, kernel, (2, 2), (1, 1), groups=groups, transposed=transposed)
    spec = BinaryConvSpec.of(geometry, **options)
    weight = geometry.as_stored_by_torch(torch.randn(outs, geometry.columns))
    shift = {"none": None, "bias": torch.randn(ins), "affine": torch.randn(2, ins)}[spec.shift]
    act = torch.randn(3, outs) if spec.act == "rprelu" else None
    return BinaryConvFormat.pack(spec, weight, torch.randn(2, outs), shift, act), weight


def spec_bytes(spec):
    """The formula of the format's docstring."""
    side = {"float32": 4, "float16": 2}[spec.side_dtype]
    shift = {"none": 0, "bias": 1, "affine": 2}[spec.shift] * spec.in_channels
    act = 3 if spec.act == "rprelu" else 0
    return 16 * spec.out_features * -(-spec.in_features // 128) + side * ((2 + act) * spec.out_features + shift)


@pytest.mark.parametrize("side_dtype", ["float32", "float16"])
@pytest.mark.parametrize("act", ["none", "rprelu"])
@pytest.mark.parametrize("shift", ["none", "bias", "affine"])
@pytest.mark.parametrize("shape", [(64, 64, (3, 3)), (64, 256, (1, 1)), (7, 9, (3, 2))], ids=str)
def test_bytes_are_those_of_the_formula_and_of_a_file(shape, shift, act, side_dtype):
    packed, _ = made(*shape, shift=shift, act=act, side_dtype=side_dtype)
    assert packed.nbytes == spec_bytes(packed.spec)
    ins, outs, (rows, columns) = shape
    side = 4 if side_dtype == "float32" else 2
    shifts = {"none": 0, "bias": ins, "affine": 2 * ins}[shift]
    signs = outs * 16 * -(-ins * rows * columns // 128)
    assert packed.nbytes == signs + side * (2 * outs + (3 * outs if act == "rprelu" else 0) + shifts)
    blob = save({name: tensor.contiguous() for name, tensor in packed.state().items()})
    assert packed.nbytes == len(blob) - 8 - int.from_bytes(blob[:8], "little")
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / (outs * ins * rows * columns))


def test_bytes_of_the_units_of_a_resnet():
    """64 to 64 channels by 3 × 3 is 22 times smaller than float32, 64 to 256 by 1 × 1 only 6.9 times."""
    wide, narrow = made(64, 64, (3, 3))[0].nbytes, made(64, 256, (1, 1))[0].nbytes
    assert (wide, narrow) == (64 * 80 + 4 * (5 * 64 + 64), 256 * 16 + 4 * (5 * 256 + 64))
    assert round(4 * 64 * 64 * 9 / wide, 1) == 22.2
    assert round(4 * 64 * 256 / narrow, 1) == 6.9


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_signs_come_back(groups, transposed):
    packed, weight = made(8, 6, (3, 2), transposed, groups)
    geometry = packed.spec.geometry
    signs = torch.where(weight >= 0, 1.0, -1.0)
    rows = geometry.as_rows(signs)
    assert torch.equal(packed.unpack(), packed.affine[0][:, None] * rows)
    assert torch.equal(unpack_plane(packed.sign, geometry.columns), rows > 0)


def test_zero_is_positive():
    spec = BinaryConvSpec.of(ConvGeometry(1, 1, (1, 3)), shift="none", act="none")
    packed = BinaryConvFormat.pack(spec, torch.tensor([0.0, -0.0, -1.0]).view(1, 1, 1, 3), torch.ones(2, 1))
    assert packed.unpack().tolist() == [[1, 1, -1]]


@pytest.mark.parametrize("options", [{}, {"shift": "affine"}, {"act": "none", "residual": "none"}])
def test_spec_and_module_survive_a_file(options):
    packed, _ = made(**options)
    spec = BinaryConvSpec.from_json(packed.spec.to_json(), "layer")
    assert spec == packed.spec and hash(spec) == hash(packed.spec)
    assert FORMATS["binary_conv"] is BinaryConvFormat
    layer = PackedConv2d(packed, torch.float32)
    x = torch.randn(2, 6, 7, 8)
    expected = layer(x)
    blob = save(layer.state_dict())
    empty = PackedConv2d(BinaryConvFormat.empty(spec), torch.float32)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    empty.load_state_dict(load(blob), assign=True)
    empty.packed.validate("layer")
    assert torch.equal(empty(x), expected)
    assert save(empty.state_dict()) == blob
    moved = empty.to(torch.bfloat16)
    assert moved.weight.dtype == torch.bfloat16 and moved.weight.shape == (1,)
    assert torch.equal(moved.packed.affine, packed.affine)  # never rounded
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    assert "binary_conv" in repr(moved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sign", lambda t: t[:, :-16], r"sign is torch.uint8 \(5, 0\), expected torch.uint8 \(5, 16\)"),
        ("sign", lambda t: t.float(), "sign is torch.float32"),
        ("sign", lambda t: t | 128, "sign has padding bits set"),
        ("affine", lambda t: t * float("nan"), "affine holds NaN or infinity"),
        ("affine", lambda t: t[:1], "affine is torch.float32"),
        ("shift", lambda t: t / 0, "shift holds NaN or infinity"),
        ("shift", lambda t: t[:-1], "shift is"),
        ("act", lambda t: t.half(), "act is torch.float16"),
        ("act", lambda t: None, "act is missing"),
    ],
)
def test_damaged_tensors_are_refused(name, change, message):
    packed, _ = made()
    state = {**packed.state(), name: change(packed.state()[name])}
    with pytest.raises(ValueError, match=f"some.layer: .*{message}"):
        BinaryConvFormat.from_state(state, packed.spec).validate("some.layer")


def test_every_padding_bit_is_checked():
    packed, _ = made()  # 54 columns of 128
    for bit in range(128):
        byte, place = bit % 16, bit // 16
        sign = packed.sign.clone()
        before = bool(sign[2, byte] >> place & 1)
        sign[2, byte] |= 1 << place
        damaged = dataclasses.replace(packed, sign=sign)
        if bit >= 54:
            assert not before
            with pytest.raises(ValueError, match="padding bits set"):
                damaged.validate("layer")
        else:
            damaged.validate("layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": [3]}, "kernel must be two integers from 1 to 64"),
        ({"kernel": [3, 0]}, "kernel must be two integers"),
        ({"kernel": "33"}, "kernel must be two integers"),
        ({"stride": [1, 10**9]}, "stride must be two integers from 1 to 64"),
        ({"padding": [-1, 0]}, "padding must be two integers from 0"),
        ({"dilation": [True, 1]}, "dilation must be two integers"),
        ({"groups": 0}, "groups must be an integer from 1"),
        ({"groups": 4}, "groups 4 must divide 6 and 5 channels"),
        ({"in_channels": 2**40}, "in_channels must be an integer from 1 to 1048576"),
        ({"in_features": 55}, "in_features is 55, 6 channels in 1 groups"),
        ({"out_features": 2**30}, "out_features must be"),
        ({"shift": "x"}, "shift must be one of none, bias, affine"),
        ({"act": None}, "act must be one of none, rprelu"),
        ({"residual": ["none"]}, "residual must be one of"),
        ({"side_dtype": "int8"}, "side_dtype must be one of float32, float16"),
        ({"transposed": 1}, "transposed must be true or false"),
        ({"output_padding": [1, 1]}, "output_padding is for transposed convolutions"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_damaged_specs_are_refused(change, message):
    packed, _ = made()
    with pytest.raises(ValueError, match=f"some.layer: bad format spec: .*{message}"):
        BinaryConvSpec.from_json({**packed.spec.to_json(), **change}, "some.layer")


def test_parts_that_do_not_fit_are_refused():
    packed, weight = made()
    with pytest.raises(ValueError, match="affine is"):
        BinaryConvFormat.pack(packed.spec, weight, torch.zeros(2, 4), packed.shift, packed.act)
    with pytest.raises(ValueError, match="shift is missing"):
        BinaryConvFormat.pack(packed.spec, weight, packed.affine, None, packed.act)
    half = dataclasses.replace(packed.spec, side_dtype="float16")
    with pytest.raises(ValueError, match="affine holds NaN or infinity"):  # it leaves the range of float16
        BinaryConvFormat.pack(half, weight, packed.affine * 1e9, packed.shift, packed.act)
    with pytest.raises(ValueError, match=r"weight is \(5, 54\), expected \(5, 6, 3, 3\)"):
        BinaryConvFormat.pack(packed.spec, weight.reshape(5, 54), packed.affine, packed.shift, packed.act)
    with pytest.raises(ValueError, match=r"weight is \(5, 6, 1, 1\)"):  # its signs would fit into as many bytes
        BinaryConvFormat.pack(packed.spec, weight[..., :1, :1], packed.affine, packed.shift, packed.act)
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        BinaryConvFormat.pack(packed.spec, weight * float("nan"), packed.affine, packed.shift, packed.act)
    with pytest.raises(TypeError, match="no linear layer"):
        packed.linear(torch.zeros(2, 54), None)
