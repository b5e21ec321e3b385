"""The promises that every registered method keeps, whatever it computes."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from hf_lowbit import LowBitConfig, PackedLinear, registry
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.formats import FORMATS
from hf_lowbit.kernels import dispatch
from hf_lowbit.layers import set_act_bits
from tests.contract.options_matrix import ATTENTION, BASELINE, CONV, OPTIONS, PIPELINE, REBUILT, SHARED

LINEAR = [name for name, method in registry.methods().items() if method.unit == "linear"]
CASES = [pytest.param(name, i, id=f"{name}-{i}") for name in LINEAR for i in range(len(OPTIONS.get(name, [])))]


def test_every_method_is_covered():
    assert set(LINEAR) == set(OPTIONS)
    assert set(registry.methods()) == set(OPTIONS) | set(ATTENTION) | PIPELINE | CONV


def config_of(name: str, number: int) -> LowBitConfig:
    return registry.get(name).config(**OPTIONS[name][number])


def linear(rows: int = 24, columns: int = 130, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns) * torch.exp(0.5 * torch.randn(columns)))
    return layer.to(dtype).requires_grad_(False)


def inputs_of(columns: int, count: int = 300) -> torch.Tensor:
    return torch.randn(count, columns) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns))


def stats_of(inputs: torch.Tensor) -> LinearStats:
    stats = LinearStats("layer", inputs.shape[-1], keep=64)
    stats.update(inputs.unsqueeze(0))
    return stats


def packed_layer(config: LowBitConfig, layer: nn.Linear, inputs: torch.Tensor) -> PackedLinear:
    unit = registry.LinearUnit("layer", layer.weight.detach())
    packed = registry.get(config.method).compress(unit, stats_of(inputs), config)
    packed.validate("layer")
    return PackedLinear(packed, layer.bias, layer.weight.dtype)


def bits(module: nn.Module) -> bytes:
    return save(dict(module.state_dict()))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_error_is_not_above_the_baseline(name, number):
    layer, inputs = linear(48, 256), inputs_of(256)
    unit = registry.LinearUnit("layer", layer.weight)
    stats = stats_of(inputs)
    method = registry.get(name)

    def error(config):
        return relative_errors(layer.weight, method.compress(unit, stats, config).unpack(), stats)["output_error"]

    shared = {key: OPTIONS[name][number][key] for key in SHARED.get(name, ()) if key in OPTIONS[name][number]}
    assert error(config_of(name, number)) <= error(method.config(**BASELINE[name], **shared))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (8, 72), (24, 130), (1, 64), (200, 8)], ids=str)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_odd_sizes_bias_and_dtypes(name, number, shape, dtype, bias):
    layer, inputs = linear(*shape, bias=bias, dtype=dtype), inputs_of(shape[1])
    packed = packed_layer(config_of(name, number), layer, inputs)
    x = inputs[:5].to(dtype)
    dense = packed.dequantize()
    assert dense.weight.dtype == dtype
    assert packed(x).dtype == dtype
    if packed.format_type.rounds_activations(packed.spec):  # not what a dense copy does: compared without it
        assert torch.isfinite(packed(x)).all()
        set_act_bits(packed, 16)
    # The reference op rounds the weight to the input's dtype, as the dense layer does: the same product. Other
    # kernels do not round the weight, and factors are multiplied one after the other.
    if packed.format_type.name in REBUILT:
        with dispatch.forced("reference"):
            torch.testing.assert_close(packed(x), dense(x), rtol=0, atol=0)
    difference = (packed(x) - dense(x)).double().norm() / dense(x).double().norm()
    assert float(difference) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert isinstance(packed, nn.Linear)
    assert packed.weight.shape == (1,)
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_deterministic_and_weight_untouched(name, number):
    layer, inputs = linear(), inputs_of(130)
    before = copy.deepcopy(layer.state_dict())
    config = config_of(name, number)
    assert bits(packed_layer(config, layer, inputs)) == bits(packed_layer(config, layer, inputs))
    assert torch.equal(layer.weight, before["weight"])


@pytest.mark.parametrize("rows", ["zero", "constant"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_degenerate_rows_stay_finite(name, number, rows):
    layer, inputs = linear(), inputs_of(130)
    layer.weight[3] = 0.0 if rows == "zero" else 0.5
    packed = packed_layer(config_of(name, number), layer, inputs)
    assert torch.isfinite(packed.packed.unpack()).all()
    assert torch.isfinite(packed(inputs)).all()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_same_bits_through_file_move_and_use(name, number):
    """Save, load on a skeleton built on ``meta``, use, move and cast: the stored bits never change."""
    layer, inputs = linear(bias=True), inputs_of(130)
    packed = packed_layer(config_of(name, number), layer, inputs)
    stored = bits(packed)
    skeleton = PackedLinear.empty_like(nn.Linear(130, 24, device="meta"), packed.format_type, packed.spec)
    assert {parameter.device.type for parameter in skeleton.parameters()} <= {"meta", "cpu"}
    skeleton.load_state_dict(load(stored), assign=True)
    skeleton.packed.validate("layer")
    assert bits(skeleton) == stored
    expected = packed(inputs)
    assert torch.equal(skeleton(inputs), expected)
    assert bits(skeleton) == stored
    moved = copy.deepcopy(skeleton).to("cpu").to(torch.bfloat16)
    names = {f"weight_{part}" for part in packed.packed.state()}
    after = moved.state_dict()
    for part in names:
        assert torch.equal(after[part], packed.state_dict()[part]), f"{part} changed when the model was cast"
    assert moved.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "number"), CASES)
def test_reported_bits_are_the_bytes_of_the_file(name, number):
    layer, inputs = linear(), inputs_of(130)
    packed = packed_layer(config_of(name, number), layer, inputs).packed
    blob = save({key: tensor.contiguous() for key, tensor in packed.state().items()})
    header = int.from_bytes(io.BytesIO(blob).read(8), "little")
    assert packed.nbytes == len(blob) - 8 - header
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / layer.weight.numel(), rel=1e-12)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_spec_and_config_survive_json(name, number):
    layer, inputs = linear(), inputs_of(130)
    config = config_of(name, number)
    packed = packed_layer(config, layer, inputs).packed
    assert packed.name == registry.get(name).format
    assert FORMATS[packed.name].spec_type.from_json(packed.spec.to_json(), "layer") == packed.spec
    assert LowBitConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("name", "number"), CASES)
def test_non_finite_weights_are_refused_by_name(name, number):
    layer, inputs = linear(), inputs_of(130)
    layer.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer: weight holds NaN or infinity"):
        packed_layer(config_of(name, number), layer, inputs)
