"""What only loading can get wrong: files elsewhere, shards of another model, values that stay on disk, huge claims."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lowbit import CheckpointError
from hf_lowbit.cli import app
from tests.hf.test_transformers import quick
from tests.hostile.forge import LAYER, SINGLE, edit_config, edit_index, edit_tensors, refused, seal
from tests.hostile.test_hostile_files import SHARDS, Bomb
from tests.hostile.test_hostile_journal import compress, edit, holder
from tests.hostile.test_hostile_journal import refused as journal_refused


@pytest.mark.parametrize("place", ["../out.safetensors", "sub/../../out.safetensors", "absolute"])
@pytest.mark.parametrize("dense", [False, True])
def test_an_index_that_leads_elsewhere(models: Path, shards: Path, place: str, dense: bool) -> None:
    """The file there is sound, and holds what is missing here; so for a dense model that is to be compressed."""
    if dense:
        shutil.rmtree(shards)
        AutoModelForCausalLM.from_pretrained(models / "one-dense").save_pretrained(shards, max_shard_size="20KB")
    files = sorted(shards.glob("*.safetensors"))
    (shards / "sub").mkdir()
    out = files[0].rename(shards.parent / "out.safetensors")
    name = str(out) if place == "absolute" else place
    edit_index(
        shards, lambda i: i["weight_map"].update({k: name for k, v in i["weight_map"].items() if v == files[0].name})
    )
    config = {"quantization_config": quick(calibration=None)} if dense else {}
    with pytest.raises(CheckpointError, match="outside its folder"):
        AutoModelForCausalLM.from_pretrained(shards, **config)


@pytest.mark.parametrize("name", ["x.bin", "config.json", ".", ""])
def test_an_index_that_names_other_files(shards: Path, name: str) -> None:
    torch.save({"x": torch.zeros(1)}, shards / "x.bin")
    edit_index(shards, lambda index: index["weight_map"].update({"x": name}))
    refused(shards, "safetensors", ways=("load",))


def test_an_index_that_names_nothing(shards: Path) -> None:
    edit_index(shards, lambda index: index.update(weight_map={}))
    refused(shards, "safetensors", ways=("load",))


def test_pickled_weights_are_not_even_read(model: Path) -> None:
    """Sound ones neither: they have no header to compare and no checksums."""
    torch.save(load_file(model / SINGLE), model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    refused(model, "packed checkpoints are safetensors files", ways=("load",))


def test_weights_only_cannot_be_switched_off(model: Path) -> None:
    """Without a dtype in config.json, transformers unpickles the file to find one, before it asks anybody."""
    mark = model.parent / "mark"
    torch.save({"x": Bomb(mark)}, model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype", None)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights_only=False is refused"):
        AutoModelForCausalLM.from_pretrained(model, weights_only=False)
    assert not mark.exists()


def test_a_tensor_in_two_shards_is_not_loaded(shards: Path) -> None:
    first, second = load_file(shards / SHARDS[0]), load_file(shards / SHARDS[1])
    key = next(iter(first))
    save_file({**second, key: first[key] + 1}, shards / SHARDS[1])
    seal(shards)
    refused(shards, f"{key}: is in {SHARDS[0]} and in {SHARDS[1]}", ways=("load",))


@pytest.mark.parametrize("number", range(4))
def test_a_shard_of_another_model(models: Path, shards: Path, number: int) -> None:
    """Same make, same names, its own checksums right: half of one model and half of another would talk fluently."""
    shutil.copy(models / "other-shards" / SHARDS[number], shards / SHARDS[number])
    refused(shards, *(["was not saved together with"] if number == 0 else []), ways=("load", "verify"))


def on_disk(folder: Path) -> Any:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={**device_map, "model.layers.0": "disk"}, offload_folder=folder.parent / "offload"
    )


def test_values_of_layers_that_stay_on_disk(model: Path) -> None:
    on_disk(model)
    edit_tensors(model, lambda t: t[f"{LAYER}.weight_salient"].add_(10**6))
    with pytest.raises(CheckpointError, match=f"{LAYER}: salient must hold ascending column indices"):
        on_disk(model)


@pytest.mark.parametrize("change", [{"vocab_size": 2**31}, {"num_hidden_layers": 40}, {"vocab_size": 10**5}], ids=str)
def test_a_config_of_a_bigger_model_takes_no_memory(model: Path, change: dict[str, int]) -> None:
    """transformers makes room for what is missing, fills it at random, and only then somebody can complain."""
    config = json.loads((model / "config.json").read_text())
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps({**config, **change}))
    edit_tensors(model, lambda t: (t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight")))
    refused(model, "config.json describes a model of", ways=("load",))


def test_a_recorded_layer_of_another_size(models: Path, tmp_path: Path) -> None:
    compress(models, tmp_path / "journal", resume=False)
    other = "model.layers.0.mlp.up_proj"

    def change(entries: list[dict[str, Any]]) -> None:
        for entry in entries[1:]:
            if other not in entry["modules"]:
                continue
            source = holder(entries)
            tensors = load_file(tmp_path / "journal" / source["file"])
            moved = {key.replace(LAYER, other): t for key, t in tensors.items() if key.startswith(LAYER)}
            file = tmp_path / "journal" / entry["file"]
            rest = {key: t for key, t in load_file(file).items() if not key.startswith(other)}
            save_file({**rest, **moved}, file)
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            entry["modules"][other] = source["modules"][LAYER]

    edit(tmp_path / "journal", change)
    journal_refused(models, tmp_path / "journal", f"{other} is recorded as 64 x 64")


def test_markup_in_names_is_shown_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (model / "[red].txt").write_text("x")
    edit_config(model, lambda q: q.update(left_dense={"lm_head": "[/link] :smile:"}))
    result = CliRunner().invoke(app, ["inspect", str(model), "--layers"])
    assert result.exit_code == 0, result.exception
    assert "[/link] :smile:" in result.stdout
    assert "[red].txt" in result.stdout
