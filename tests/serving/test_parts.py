"""The parts of a joined layer: what they are, how they are filled, and that they multiply as their layers do."""

import re

import pytest
import torch

from hf_lowbit import CheckpointError, PackedLinear
from hf_lowbit.formats import FORMATS
from hf_lowbit.formats.integer import IntegerFormat, IntegerSpec
from hf_lowbit.serving.checkpoint import StoredLayer
from hf_lowbit.serving.parts import Parts, parts_of

COLUMNS = 64
NAMES = ["a.q_proj", "a.k_proj", "a.v_proj"]


def integer(rows: int, bits: int, seed: int) -> IntegerFormat:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, COLUMNS), generator=generator)
    spec = IntegerSpec(rows, COLUMNS, bits=bits, group_size=16)
    return IntegerFormat.pack(spec, codes, torch.rand(rows, 4, generator=generator))


@pytest.fixture
def packed():
    return {"a.q_proj": integer(32, 4, 1), "a.v_proj": integer(16, 8, 2)}


@pytest.fixture
def layers(packed):
    return {name: StoredLayer(name, FORMATS["integer"], weight.spec) for name, weight in packed.items()}


def filled(parts: Parts, packed, dense: torch.Tensor) -> Parts:
    for index, name in enumerate(NAMES):
        if name in packed:
            parts.take("weight", index, torch.zeros(1))
            for leaf, tensor in packed[name].state().items():
                parts.take(f"weight_{leaf}", index, tensor)
        else:
            parts.take("weight", index, dense)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_joined_layer_returns_what_its_layers_return_side_by_side(packed, layers, dtype):
    found = parts_of("a.qkv_proj", NAMES, [32, 16, 16], layers)
    assert [part.layer is None for part in found] == [False, True, False]
    parts, dense, bias = Parts(found, COLUMNS, dtype, "cpu"), torch.randn(16, COLUMNS), torch.randn(64).to(dtype)
    assert parts.slots == {"weight": dtype, "weight_packed": torch.uint8, "weight_scale": torch.float16}
    filled(parts, packed, dense).finish(bias)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, COLUMNS).to(dtype)
        want = [
            PackedLinear(packed["a.q_proj"], bias[:32], dtype)(x),
            torch.nn.functional.linear(x, dense.to(dtype), bias[32:48]),
            PackedLinear(packed["a.v_proj"], bias[48:], dtype)(x),
        ]
        assert torch.equal(parts(x), torch.cat(want, -1))
        weight = torch.cat([packed["a.q_proj"].unpack(), dense, packed["a.v_proj"].unpack()]).double()
        exact = x.double() @ weight.T + bias.double()
        error = (parts(x).double() - exact).norm() / exact.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)  # rounding of inputs to the dtype apart


def test_a_layer_that_is_joined_in_the_checkpoint_too_is_one_part(layers):
    whole = StoredLayer("a.qkv_proj", FORMATS["integer"], IntegerSpec(64, COLUMNS))
    (part,) = parts_of("a.qkv_proj", NAMES, [32, 16, 16], {"a.qkv_proj": whole})
    assert (part.rows, part.layer) == (64, whole)
    with pytest.raises(
        ValueError, match=re.escape("a.qkv_proj: is packed as a whole and in parts (a.q_proj, a.v_proj)")
    ):
        parts_of("a.qkv_proj", NAMES, [32, 16, 16], {"a.qkv_proj": whole, **layers})


def test_a_layer_without_packed_parts_has_none(layers):
    assert parts_of("b.qkv_proj", ["b.q_proj"], [32], layers) == []


def test_what_an_engine_joins_otherwise_is_refused(layers):
    with pytest.raises(
        ValueError, match=re.escape("a.qkv_proj: joins 2 layers, of which the checkpoint has a.q_proj")
    ):
        parts_of("a.qkv_proj", NAMES, [32, 32], layers)
    with pytest.raises(ValueError, match=re.escape("a.q_proj: stored as 32 x 64, the engine's layer is 16 x 64")):
        Parts(parts_of("a.qkv_proj", NAMES, [16, 16, 16], layers), COLUMNS, torch.float32, "cpu")


def test_missing_and_wrong_tensors_are_named(packed, layers):
    found = parts_of("a.qkv_proj", NAMES, [32, 16, 16], layers)
    parts = Parts(found, COLUMNS, torch.float32, "cpu")
    with pytest.raises(
        CheckpointError, match=re.escape("5 tensors are missing from the checkpoint, first a.k_proj.weight")
    ):
        parts.finish(None)
    state = packed["a.q_proj"].state()
    with pytest.raises(CheckpointError, match=re.escape("a.q_proj.weight_packed: is torch.uint8 [31, 32], the layer")):
        parts.take("weight_packed", 0, state["packed"][:31])
    with pytest.raises(CheckpointError, match=re.escape("a.q_proj.weight_scale: is torch.float32")):
        parts.take("weight_scale", 0, state["scale"].float())
    with pytest.raises(
        CheckpointError, match=re.escape("a.v_proj.weight: is torch.float32 [16, 64], the layer wants")
    ):
        parts.take("weight", 2, torch.zeros(16, COLUMNS))
    with pytest.raises(CheckpointError, match=re.escape("a.k_proj.weight_packed: the layer has no such tensor")):
        parts.take("weight_packed", 1, state["packed"])


def test_values_that_the_format_does_not_allow_are_refused(packed, layers):
    parts = Parts(parts_of("a.qkv_proj", NAMES, [32, 16, 16], layers), COLUMNS, torch.float32, "cpu")
    packed["a.v_proj"].scale[3, 0] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape("damaged checkpoint: a.v_proj: scale")):
        filled(parts, packed, torch.zeros(16, COLUMNS)).finish(None)


def test_the_layer_compiles(packed, layers):
    parts = Parts(parts_of("a.qkv_proj", NAMES, [32, 16, 16], layers), COLUMNS, torch.float32, "cpu")
    filled(parts, packed, torch.randn(16, COLUMNS)).finish(None)
    x = torch.randn(3, COLUMNS)
    torch._dynamo.reset()
    compiled = torch.compile(parts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), parts(x))
    torch._dynamo.reset()
