"""Packed tensors of a stranger, all checksums fitting: what no run would write must not reach a kernel."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.kernels import pack_plane, unpack_plane
from tests.formats.test_binary_format import parts_of, specs
from tests.hf.test_transformers import logits
from tests.hostile.forge import LAYER, SINGLE, edit_config, edit_tensors, load, refused

# 64 columns, of which 32 are kept: every plane has padding, and every tensor of the format is there.
FULL = BinarySpec(
    64, 64, block_size=32, groups=3, salient=5, salient_groups=2, shift=True, col_scales=True, keep_n=2, keep_m=4
)


def put(folder: Path, spec: BinarySpec = FULL) -> Path:
    """Replace a layer by one of another make, which no method writes: every tensor of the format, an N:M mask too."""

    def replace(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{LAYER}.weight_")]:
            del tensors[key]
        state = BinaryFormat.pack(spec, **parts_of(spec)).state()
        tensors.update({f"{LAYER}.weight_{name}": tensor for name, tensor in state.items()})

    edit_tensors(folder, replace)
    edit_config(folder, lambda q: q["modules"][LAYER].update(spec=spec.to_json()))
    return folder


@pytest.fixture(scope="module")
def full_once(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(Path(shutil.copytree(models / "one", tmp_path_factory.mktemp("full") / "full")))


@pytest.fixture
def full(full_once: Path, tmp_path: Path) -> Path:
    """A copy of a model in which one layer has every tensor of the format."""
    return Path(shutil.copytree(full_once, tmp_path / "full"))


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    key = f"{LAYER}.weight_{name}"
    edit_tensors(folder, lambda tensors: tensors.update({key: how(tensors[key].clone())}))


def test_the_layer_of_another_make_is_sound(full: Path) -> None:
    """Else everything below would pass for a wrong reason."""
    model = load(full)
    assert torch.isfinite(logits(model)).all()
    layer = model.get_submodule(LAYER)
    assert set(layer.packed.state()) == set(BinaryFormat.tensor_names)


# Shapes and dtypes -----------------------------------------------------------------------------------------------

SAME_WIDTH = {torch.uint8: torch.int8, torch.float16: torch.bfloat16, torch.int32: torch.float32}


@pytest.mark.parametrize(
    "how",
    [
        lambda t: t.unsqueeze(0),
        lambda t: t[..., :-1],
        lambda t: t[:-1],
        lambda t: torch.cat([t, t]),
        lambda t: t[..., :0],
        lambda t: t.flatten()[0],
        lambda t: t.view(SAME_WIDTH[t.dtype]),
        lambda t: t.double(),
    ],
    ids=["dimension", "column", "row", "twice", "empty", "scalar", "dtype", "double"],
)
@pytest.mark.parametrize("name", BinaryFormat.tensor_names)
def test_wrong_shape_or_dtype(full: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    change(full, name, how)
    refused(full, f"{LAYER}.weight_{name} in {SINGLE}", ways=("load", "inspect"))


@pytest.mark.parametrize("name", BinaryFormat.tensor_names)
def test_a_missing_tensor(full: Path, name: str) -> None:
    edit_tensors(full, lambda tensors: tensors.pop(f"{LAYER}.weight_{name}"))
    refused(full, f"{LAYER}.weight_{name} is in none of the weight files")


@pytest.mark.parametrize("name", ["group", "row_shift", "col_scale", "salient", "sign2", "col_scale2", "mask"])
def test_a_tensor_too_many(full: Path, model: Path, name: str) -> None:
    extra = load_file(full / SINGLE)[f"{LAYER}.weight_{name}"].clone()
    put(model, BinarySpec(64, 64))
    edit_tensors(model, lambda tensors: tensors.update({f"{LAYER}.weight_{name}": extra}))
    refused(model, f"{LAYER}.weight_{name} is in {SINGLE}, the spec in config.json has no such tensor")


@pytest.mark.parametrize("module", ["model.norm", "lm_head", "model.layers.0", "elsewhere", "__class__"])
def test_packed_tensors_of_what_is_not_packed(model: Path, module: str) -> None:
    edit_tensors(model, lambda tensors: tensors.update({f"{module}.weight_sign": torch.zeros(1, dtype=torch.uint8)}))
    refused(model, f"{module}: the files hold packed tensors of it, config.json does not list it")


@pytest.mark.parametrize(
    "stub", [torch.zeros(64, 64), torch.zeros(2), torch.zeros(0), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int8)]
)
def test_a_stub_that_is_none(model: Path, stub: Tensor) -> None:
    edit_tensors(model, lambda tensors: tensors.update({f"{LAYER}.weight": stub}))
    refused(model, f"{LAYER}.weight in {SINGLE} is", "a packed layer has a stub")


# Values ----------------------------------------------------------------------------------------------------------


def at_end(value: float) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return how


VALUE_WAYS = ("load", "verify")  # inspect reads no values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["row_scale", "row_shift", "col_scale", "col_scale2"])
def test_scales_that_are_no_numbers(full: Path, name: str, value: float) -> None:
    change(full, name, at_end(value))
    refused(full, f"{LAYER}: {name} holds NaN or infinity", ways=VALUE_WAYS)


@pytest.mark.parametrize("name", ["row_scale", "col_scale", "col_scale2"])
def test_negative_scales(full: Path, name: str) -> None:
    change(full, name, at_end(-6e-8))  # the smallest there is
    refused(full, f"{LAYER}: {name} holds a negative scale", ways=VALUE_WAYS)


@pytest.mark.parametrize("value", [0.0, 6e-8, 65504.0])
def test_denormal_zero_and_largest_scales_are_sound(full: Path, value: float) -> None:
    change(full, "row_scale", lambda tensor: tensor.fill_(value))
    assert torch.isfinite(load(full).get_submodule(LAYER).packed.unpack()).all()


@pytest.mark.parametrize(
    "indices",
    [
        *[[-1, 1, 2, 3, 4], [0, 1, 2, 3, 64], [0, 1, 2, 3, 2**31 - 1], [-(2**31), 1, 2, 3, 4], [5, 4, 3, 2, 1]],
        *[[1, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 2, 1, 3, 4]],
    ],
    ids=str,
)
def test_salient_columns_that_are_none(full: Path, indices: list[int]) -> None:
    change(full, "salient", lambda _: torch.tensor(indices, dtype=torch.int32))
    refused(full, f"{LAYER}: salient must hold ascending column indices below 64", ways=VALUE_WAYS)


@pytest.mark.parametrize("name", ["sign", "group", "sign2", "mask"])
def test_padding_bits(full: Path, name: str) -> None:
    """The last byte of a plane holds the columns 15, 31, ..., 127; that of bit 7 is padding in each of these."""
    change(full, name, lambda tensor: at_end(int(tensor.view(-1)[-1]) | 128)(tensor))
    refused(full, f"{LAYER}: {name} has padding bits set", ways=VALUE_WAYS)


def test_codes_without_a_scale(full: Path) -> None:
    change(full, "group", lambda tensor: tensor | pack_plane(torch.ones(2, 64, FULL.kept, dtype=torch.bool)))
    refused(full, f"{LAYER}: group holds code 3", ways=VALUE_WAYS)


def test_codes_of_salient_columns_without_a_scale(full: Path) -> None:
    """Code 2 is the third group; salient columns have two."""

    def third(tensor: Tensor) -> Tensor:
        ones = torch.ones(64, FULL.kept, dtype=torch.bool)
        return torch.stack([pack_plane(~ones), pack_plane(ones)])

    change(full, "group", third)
    refused(full, f"{LAYER}: group holds a code of 2 or more in a salient column", ways=VALUE_WAYS)


def swapped(mask: Tensor) -> Tensor:
    """Move a kept column of the first group of four to the second, in one row; the total stays."""
    bits = unpack_plane(mask, 64)
    give, take = int(bits[0, :4].nonzero()[0]), 4 + int((~bits[0, 4:8]).nonzero()[0])
    bits[0, give], bits[0, take] = False, True
    return pack_plane(bits)


@pytest.mark.parametrize(
    "how",
    [
        torch.zeros_like,
        lambda mask: pack_plane(torch.ones(64, 64, dtype=torch.bool)),
        lambda mask: pack_plane(~unpack_plane(mask, 64) | (torch.arange(64) == 0)),
        swapped,
    ],
    ids=["nothing kept", "everything kept", "one too many", "uneven"],
)
def test_masks_with_impossible_counts(full: Path, how: Callable[[Tensor], Tensor]) -> None:
    """Kept signs are stored one after the other: a wrong count shifts all that follow, or reads past the end."""
    change(full, "mask", how)
    refused(full, f"{LAYER}: mask does not keep 2 of every 4 columns", ways=VALUE_WAYS)


def test_a_mask_read_by_another_rule(full: Path) -> None:
    """1 of 2 keeps as many as 2 of 4, but not of the same columns."""
    edit_config(full, lambda q: q["modules"][LAYER]["spec"].update(keep_n=1, keep_m=2))
    refused(full, f"{LAYER}: mask does not keep 1 of every 2 columns", ways=VALUE_WAYS)


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_what_passes_the_check_can_be_used(spec: BinarySpec, data: Any) -> None:
    """Any bytes in any tensor: either refused by name, or a weight of the right shape."""
    form = BinaryFormat.pack(spec, **parts_of(spec))
    name = data.draw(st.sampled_from(sorted(form.state())))
    tensor = form.state()[name].clone()
    raw = tensor.view(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    form = dataclasses.replace(form, **{name: tensor})
    try:
        form.validate("forged")
    except ValueError as error:
        assert str(error).startswith("forged: ")
        return
    assert form.unpack().shape == (spec.out_features, spec.in_features)
