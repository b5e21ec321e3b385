"""Integer weights of a stranger, checksums fitting: bases and activations that no run would write."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_lowbit import DVDQuantConfig, RunOptions
from tests.hf.test_transformers import logits
from tests.hostile.forge import LAYER, SINGLE, edit_config, edit_tensors, load, refused
from tests.tiny import tiny_model

VALUE_WAYS = ("load", "verify")  # inspect reads no values


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with every tensor of the format."""
    folder = tmp_path_factory.mktemp("integer")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "dense")
    options = {"group_size": 16, "rotation_signs_seed": 0, "balance_beyond": 1.0}  # factors for all columns
    config = DVDQuantConfig(preset="w4a4", **options, run=RunOptions(progress=False))
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(folder / "one")
    return folder / "one"


@pytest.fixture
def model(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "model"))


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    key = f"{LAYER}.weight_{name}"
    edit_tensors(folder, lambda tensors: tensors.update({key: how(tensors[key].clone())}))


def at_end(value: float) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return how


def test_the_untouched_copy_is_sound(model: Path) -> None:
    """Else everything below would pass for a wrong reason."""
    found = load(model)
    assert torch.isfinite(logits(found)).all()
    assert set(found.get_submodule(LAYER).packed.state()) == {
        "packed", "scale", "zero_point", "smooth", "rotation_signs"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["packed", "scale", "zero_point", "smooth", "rotation_signs"])
@pytest.mark.parametrize(
    "how",
    [
        lambda t: t[..., :-1],
        lambda t: t.unsqueeze(0),
        lambda t: torch.cat([t, t], -1),
        lambda t: t.double(),
        lambda t: t[..., :0],
    ],
    ids=["column", "dimension", "twice", "double", "empty"],
)
def test_wrong_shape_or_dtype(model: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    change(model, name, how)
    refused(model, f"{LAYER}.weight_{name} in {SINGLE}", ways=("load", "inspect"))


@pytest.mark.parametrize("name", ["packed", "scale", "zero_point", "smooth", "rotation_signs"])
def test_a_missing_tensor(model: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(f"{LAYER}.weight_{name}"))
    refused(model, f"{LAYER}.weight_{name} is in none of the weight files")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", float("nan"), "scale holds NaN or infinity"),
        ("scale", float("inf"), "scale holds NaN or infinity"),
        ("scale", -6e-8, "scale holds a negative scale"),
        ("smooth", float("nan"), "smooth holds NaN or infinity"),
        ("smooth", -1.0, "smooth holds a negative scale"),
        ("smooth", 0.0, "smooth holds a zero"),
        ("rotation_signs", 0, "rotation_signs holds other values than +1 and -1"),
        ("rotation_signs", 2, "rotation_signs holds other values"),
        ("rotation_signs", -128, "rotation_signs holds other values"),
    ],
)
def test_values_that_no_run_writes(model: Path, name: str, value: float, message: str) -> None:
    change(model, name, at_end(value))
    refused(model, f"{LAYER}: {message}", ways=VALUE_WAYS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rotation": 48}, "rotation 48 does not divide in_features 64"),
        ({"rotation": 2}, ""),  # sound: another rotation than the run's, as any weight could be another
        ({"rotation": 1}, "no Hadamard matrix of order 1"),
        ({"rotation": 128}, "rotation must be an integer from 0 to 64"),
        ({"rotation": -64}, "rotation must be an integer from 0 to 64"),
        ({"rotation": 64.0}, "rotation must be an integer"),
        ({"rotation": 2**70}, "rotation must be an integer"),
        ({"rotation": 0}, "rotation_signs need a rotation"),
        ({"rotation_signs": 1}, "rotation_signs must be true or false"),
        ({"smooth": "yes"}, "smooth must be true or false"),
        ({"activation": "tokens"}, "activation must be one of none, token_group"),
        ({"activation": ["token"]}, "activation must be one of"),
        ({"activation": "token"}, "act_group_size must be an integer from 0 to 0 for activation 'token'"),
        ({"activation": "none"}, "act_bits 4 without an activation mode"),
        ({"act_bits": 9}, "act_bits must be an integer from 2 to 8"),
        ({"act_bits": 1}, "act_bits must be an integer from 2 to 8"),
        ({"act_bits": True}, "act_bits must be an integer from 2 to 8"),
        ({"act_group_size": 0}, "act_group_size must be an integer from 1"),
        ({"act_group_size": 2**40}, "act_group_size must be an integer from 1"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8"),
        ({"group_size": 24}, f"{LAYER}.weight_scale in {SINGLE}"),
        ({"smooth": False}, f"{LAYER}.weight_smooth is in {SINGLE}, the spec in config.json has no such tensor"),
    ],
    ids=str,
)
def test_specs_that_no_run_writes(model: Path, entry: dict[str, Any], message: str) -> None:
    edit_config(model, lambda q: q["modules"][LAYER]["spec"].update(entry))
    if message:
        refused(model, LAYER, message, ways=("load", "inspect"))
    else:
        assert torch.isfinite(logits(load(model))).all()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("delta", -1, "delta must be None or a number from 0 to 1e6"),
        ("delta", "0.1", "delta must be"),
        ("group_size", 7, "group_size must be -1"),
        ("a_bits", 32, "a_bits must be from 2 to 8, or 16"),
        ("rotation_signs_seed", 2**70, "rotation_signs_seed must be None or an integer"),
        ("preset", "paper", "unknown key 'preset'"),
        ("w_bits", [4], "w_bits must be one of"),
    ],
)
def test_options_that_no_run_writes(model: Path, option: str, value: Any, message: str) -> None:
    edit_config(model, lambda q: q.update({option: value}))
    refused(model, "DVDQuantConfig", message, ways=("load", "inspect"))
