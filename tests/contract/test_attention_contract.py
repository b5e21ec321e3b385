"""The promises that every method of unit "attention" keeps, whatever it computes."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from hf_lowbit import LowBitConfig, PackedLinear, registry
from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.formats import FORMATS
from tests.contract.options_matrix import ATTENTION

METHODS = [name for name, method in registry.methods().items() if method.unit == "attention"]
CASES = [pytest.param(name, i, id=f"{name}-{i}") for name in METHODS for i in range(len(ATTENTION.get(name, [])))]
PARTS = ("key", "value")


def test_every_method_is_covered():
    assert set(METHODS) == set(ATTENTION)


def config_of(name: str, number: int, **changes: Any) -> LowBitConfig:
    return registry.get(name).config(**{**ATTENTION[name][number], **changes})


def unit_of(part: str = "key", heads: int = 4, rows: int = 6, columns: int = 40, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    name = f"model.layers.0.self_attn.{part[0]}_proj"
    weight = (torch.randn(heads * rows, columns) * torch.exp(0.5 * torch.randn(columns))).to(dtype)
    return registry.LinearUnit(name, weight, projection=registry.Projection(name, part, heads, tuple(weight.shape)))


def stats_of(columns: int) -> PairedStats:
    torch.manual_seed(1)
    x = torch.randn(1, 300, columns) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns))
    other = x + 0.1 * torch.randn_like(x)
    pair = []
    for rows in (x, other):
        stats = LinearStats("layer", columns)
        stats.update(rows)
        pair.append(stats)
    return PairedStats(*pair, x[0].double().T @ other[0].double())


def compressed(config: LowBitConfig, unit: Any, stats: Any = None) -> Any:
    packed = registry.get(config.method).compress(unit, stats or stats_of(unit.weight.shape[1]), config)
    packed.validate("layer")
    return packed


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_error_is_not_above_the_plain_decomposition(name, number, part):
    """At the same ranks and groups, all on one set of inputs."""
    unit, stats = unit_of(part), stats_of(40).dense
    same = PairedStats(stats, stats, stats.total)
    found, plain = (
        relative_errors(unit.weight, compressed(config, unit, same).unpack(), same)["output_error"]
        for config in (config_of(name, number), config_of(name, number, whiten=False, ocmf="off"))
    )
    assert found < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_dtypes_bias_and_dense_copy(name, number, part, dtype):
    unit = unit_of(part, dtype=dtype)
    layer = PackedLinear(compressed(config_of(name, number), unit), torch.randn(24).to(dtype), dtype)
    x = torch.randn(3, 40).to(dtype)
    dense = layer.dequantize()
    assert layer(x).dtype == dense.weight.dtype == dtype
    difference = (layer(x) - dense(x)).double().norm() / dense(x).double().norm()
    assert float(difference) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (1,)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_deterministic_and_weight_untouched(name, number, part):
    unit, config = unit_of(part), config_of(name, number)
    before = unit.weight.clone()
    assert save(compressed(config, unit).state()) == save(compressed(config, unit).state())
    assert torch.equal(unit.weight, before)


@pytest.mark.parametrize("rows", ["zero", "constant", "zero head"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_degenerate_rows_stay_finite(name, number, part, rows):
    unit = unit_of(part)
    unit.weight[: 6 if rows == "zero head" else 1] = 0.5 if rows == "constant" else 0.0
    assert torch.isfinite(compressed(config_of(name, number), unit).unpack()).all()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_same_bits_through_file_move_and_use(name, number):
    unit = unit_of()
    layer = PackedLinear(compressed(config_of(name, number), unit), None, torch.float32)
    stored = save(dict(layer.state_dict()))
    skeleton = PackedLinear.empty_like(nn.Linear(40, 24, bias=False, device="meta"), layer.format_type, layer.spec)
    skeleton.load_state_dict(load(stored), assign=True)
    skeleton.packed.validate("layer")
    x = torch.randn(3, 40)
    assert torch.equal(skeleton(x), layer(x))
    moved = copy.deepcopy(skeleton).to(torch.bfloat16)
    for key in layer.packed.state():
        assert torch.equal(moved.state_dict()[f"weight_{key}"], layer.state_dict()[f"weight_{key}"])


@pytest.mark.parametrize(("name", "number"), CASES)
def test_bytes_spec_and_config(name, number):
    packed = compressed(config_of(name, number), unit_of())
    blob = save({key: tensor.contiguous() for key, tensor in packed.state().items()})
    assert packed.nbytes == len(blob) - 8 - int.from_bytes(blob[:8], "little")
    assert packed.name == registry.get(name).format
    assert FORMATS[packed.name].spec_type.from_json(packed.spec.to_json(), "layer") == packed.spec
    assert LowBitConfig.from_dict(config_of(name, number).to_dict()) == config_of(name, number)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_non_finite_weights_are_refused_by_name(name, number):
    unit = unit_of()
    unit.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj: weight holds NaN or infinity"):
        compressed(config_of(name, number), unit)
