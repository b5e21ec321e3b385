"""The module table of a stranger: which modules it names, and what it says of their tensors."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowbit.formats import BinarySpec
from tests.hostile.forge import LAYER, SINGLE, edit_config, edit_header, edit_tensors, refused


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("method", [None, 1, True, ["arb"], "", "nope", "recipe", "__class__", "\x1b[2J", "A" * 10**5]),
        ("format", [None, 1, True, ["binary"], "", "nope", "__class__", "BINARY", "A" * 10**5]),
        ("spec", [None, 1, True, [], "x", [["out_features", 64]], {}]),
        ("error", [True, "0.1", [0.1], float("nan"), float("inf"), float("-inf"), 10**400, {}]),
        ("surprise", [None, 1]),
    ],
)
def test_every_key_of_a_row(model: Path, key: str, values: list[Any]) -> None:
    for value in values:
        edit_config(model, lambda q, value=value: q["modules"][LAYER].update({key: value}))
        refused(model, LAYER, key, ways=("load", "inspect"))


@pytest.mark.parametrize("row", [None, [], "x", 1, True, {}])
def test_a_row_that_is_no_row(model: Path, row: Any) -> None:
    edit_config(model, lambda q: q["modules"].update({LAYER: row}))
    refused(model, LAYER, ways=("load", "inspect"))


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "model.", ".model", "model..layers", "../../model", "model\x00", "model\n", "\x1b[2Jmodel"],
        *["a" * 10**5, "a." * 10**4 + "a", "9" * 5000, "\ud800"],
    ],
    ids=lambda name: repr(name)[:30],
)
def test_names_that_are_no_names(model: Path, name: str) -> None:
    edit_config(model, lambda q: q["modules"].update({name: q["modules"][LAYER]}))
    refused(model, "not the name of a module", ways=("load", "inspect"))


def add_layer(folder: Path, name: str) -> None:
    """List a layer under a further name, and put its tensors there, so that only the name speaks against it."""

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{LAYER}.weight_")]:
            tensors[key.replace(LAYER, name)] = tensors[key].clone()

    edit_tensors(folder, double)
    edit_config(folder, lambda q: q["modules"].update({name: dict(q["modules"][LAYER])}))


@pytest.mark.parametrize(
    "name",
    [
        *["model.embed_tokens", "model.norm", "model.layers", "model.layers.0", "model.layers.0.self_attn", "model"],
        *["__class__", "model.__class__", "__dict__", "forward", "model.forward", "_modules.model", "lm_head.weight"],
        *["model.layers.-1", "model.layers.9", "model.layers.00.self_attn.q_proj", "MODEL.LAYERS", f"{LAYER}.weight"],
        *["/etc/passwd", "C:\\model", "model/layers", "*", "model.*", "%s", "{0.__class__}"],
    ],
)
def test_names_that_mean_no_linear_layer(model: Path, name: str) -> None:
    """An embedding, a norm, a list of modules, the model itself, an attribute, a path: none of them is replaced."""
    add_layer(model, name)
    refused(model, f"{name}: the model has no linear layer of this name", ways=("load",))


def test_a_layer_listed_under_two_names(model: Path) -> None:
    """transformers knows both; the second would replace the first."""
    name = LAYER.removeprefix("model.")
    add_layer(model, name)
    refused(model, f"{name}: the model has no linear layer of this name", ways=("load",))


def test_packed_tensors_that_the_table_does_not_list(model: Path) -> None:
    edit_config(model, lambda q: q["modules"].pop(LAYER))
    refused(model, f"{LAYER}: the files hold packed tensors of it, config.json does not list it")


# Specs -----------------------------------------------------------------------------------------------------------

# Out of range; or possible in itself, but not what the files hold. Blocks of 33 columns are as many as those of 32, so
# that only the checksum of config.json tells; see tests/hf/test_checksums.py.
SPEC: dict[str, list[Any]] = {
    "out_features": [0, -1, 2**24 + 1, 10**400, 63, 65, 2**24],
    "in_features": [0, -1, 2**24 + 1, 10**400, 63, 65, 2**24],
    "block_size": [0, -1, 2**24 + 1, 10**400, 1, 31, 64],
    "groups": [0, 5, -1, 1, 3, 4],
    "salient": [-1, 65, 2**24, 0, 1],
    "salient_groups": [-1, 3, 0, 1],
    "shift": [0, 1, "true", None, True],
    "col_scales": [0, 1, "true", None, False],
    "scale_dtype": ["float64", "int8", "", None, ["float16"], {}, "bfloat16", "float32", "A" * 10**5],
    "keep_n": [-1, 17, 2],
    "keep_m": [-1, 17, 4],
    "surprise": [1],
    "__class__": [1],
}
NUMBERS = ("out_features", "in_features", "block_size", "groups", "salient", "salient_groups", "keep_n", "keep_m")


def test_the_table_above_has_every_field_of_a_spec() -> None:
    assert set(SPEC) == {*BinarySpec.__dataclass_fields__, "surprise", "__class__"}


@pytest.mark.parametrize("field", SPEC)
def test_every_field_of_a_spec(model: Path, field: str) -> None:
    for value in [*SPEC[field], *([True, 1.0, "1", None, [1], float("nan")] if field in NUMBERS else [])]:
        edit_config(model, lambda q, value=value: q["modules"][LAYER]["spec"].update({field: value}))
        refused(model, LAYER, ways=("load", "inspect"))


@pytest.mark.parametrize(("keep_n", "keep_m"), [(0, 4), (2, 0), (5, 4), (16, 1), (-1, 4), (2, -4)])
def test_impossible_masks(model: Path, keep_n: int, keep_m: int) -> None:
    edit_config(model, lambda q: q["modules"][LAYER]["spec"].update(keep_n=keep_n, keep_m=keep_m))
    refused(model, LAYER, "keep_", ways=("load", "inspect"))


def test_a_spec_that_leaves_stored_tensors_out(model: Path) -> None:
    """Everything it asks for is there; without its column scales the weight would be another one all the same."""
    edit_config(model, lambda q: q["modules"][LAYER]["spec"].pop("col_scales"))
    refused(model, f"{LAYER}.weight_col_scale is in model.safetensors, the spec in config.json has no such tensor")


# Memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
import psutil
from tests.hostile.forge import load, refused
sound, *others = map(Path, sys.argv[1:])
load(sound)
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, resource.RLIM_INFINITY))
for folder in others:
    refused(folder)
    print(folder.name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_huge_claims_take_no_memory(models: Path, tmp_path: Path) -> None:
    """In a process that can have a quarter of a gigabyte more than the libraries take, and no byte beyond."""
    key = f"{LAYER}.weight_sign"

    def model(name: str) -> Path:
        return Path(shutil.copytree(models / "one", tmp_path / name))

    def claim(folder: Path, **spec: int) -> Path:
        return edit_config(folder, lambda q: q["modules"][LAYER]["spec"].update(spec))

    claim(model("spec"), out_features=2**24, in_features=2**24)
    claim(model("salient"), in_features=2**24, salient=2**24)
    edit_header(model("shape"), lambda h: h[key].update(shape=[2**40]))
    edit_header(model("square"), lambda h: h[key].update(shape=[2**31, 2**31]))
    edit_header(model("offsets"), lambda h: h[key].update(shape=[2**40], data_offsets=[0, 2**40]))
    both = claim(model("both"), out_features=2**24, in_features=2**24)
    edit_header(both, lambda h: h[key].update(shape=[2**24, 2**21]))
    length = model("length") / SINGLE
    length.write_bytes((2**62).to_bytes(8, "little") + length.read_bytes()[8:])
    folders = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, str(models / "one"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [folder.name for folder in folders], done.stderr[-3000:]
