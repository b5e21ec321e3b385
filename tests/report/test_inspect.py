"""Inspection: the parts add up to the bytes on disk, and a damaged folder is an error that names the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowbit import AdaSVDConfig, ARBConfig, CheckpointError, LowBitRecipe, PBS2PConfig, quantize
from hf_lowbit.hf.save import save_model
from hf_lowbit.report import plots, tables
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.plots import save_plot


def tiny(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings})).to(torch.bfloat16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with calibration, an untied head, biases and one kind of layer left dense."""
    model = tiny(attention_bias=True, tie_word_embeddings=False)
    quick: dict[str, Any] = {"iterations": 1, "quantiles": 3, "max_salient_per_block": 4, "block_size": 32}
    config = ARBConfig(calibration=torch.randint(0, 128, (4, 16)), skip=("*.down_proj",), **quick)
    report = quantize(model, config)
    return save_model(model, tmp_path_factory.mktemp("saved") / "tiny", rows=report.rows)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_parts_add_up_to_the_bytes_on_disk(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "more.txt").write_text("something else")
    found = inspect(folder)
    assert found.total_bytes == on_disk(folder)
    assert sum(size for *_, size in tables.parts_of(found)) == found.total_bytes
    assert found.other_files["notes/more.txt"] == 14


def test_a_sharded_model_adds_up_too(tmp_path: Path) -> None:
    model = tiny()
    quantize(model, ARBConfig(variant="rtn", calibration=None))
    folder = save_model(model, tmp_path / "sharded", max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = inspect(folder)
    assert found.total_bytes == on_disk(folder) == sum(size for *_, size in tables.parts_of(found))


def test_what_it_says_of_modules_and_other_tensors(saved: Path) -> None:
    found = inspect(saved)
    model = LlamaForCausalLM.from_pretrained(saved)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "packed_tensors")}
    assert {module.name for module in found.modules} == set(packed)
    for module in found.modules:
        assert module.bits_per_weight == packed[module.name].packed.bits_per_weight
        assert module.bytes == packed[module.name].packed.nbytes
        assert module.error is not None and 0 < module.error < 1
    dense = tiny(attention_bias=True, tie_word_embeddings=False)
    assert found.parameters == sum(parameter.numel() for parameter in dense.parameters())
    reasons = {(group.kind, group.reason): group.tensors for group in found.groups}
    assert reasons[("dense linear layers", "output head")] == 1
    assert reasons[("dense linear layers", "skip pattern '*.down_proj'")] == 2
    assert reasons[("embeddings", "")] == 1
    assert reasons[("norms", "")] == 5
    assert reasons[("stubs and biases", "")] == 12 + 8  # 6 packed layers a block; 4 of them have a bias


def test_blocks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = tiny(num_hidden_layers=11)
    quantize(model, ARBConfig(variant="rtn", calibration=None))
    found = inspect(save_model(model, tmp_path / "model"))
    numbers = [int(module.name.split(".")[2]) for module in found.modules]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 10


def test_tables_and_json_hold_every_layer(saved: Path) -> None:
    found = inspect(saved)
    assert len(tables.inspection_tables(found, layers=True)) == 3
    content = json.loads(json.dumps(tables.inspection_json(found)))
    assert len(content["modules"]) == 12
    assert content["total_bytes"] == on_disk(saved)


def test_a_run_without_data_has_no_errors_but_tables(tmp_path: Path) -> None:
    model = tiny()
    quantize(model, LowBitRecipe({"*": ARBConfig(variant="rtn", calibration=None)}))
    found = inspect(save_model(model, tmp_path / "model"))
    assert all(module.error is None for module in found.modules)
    assert "tied" in found.groups[0].reason or not model.config.tie_word_embeddings
    tables.inspection_tables(found, layers=True)


def test_masks_are_listed_and_drawn_layer_by_layer(tmp_path: Path) -> None:
    layers = {"model.layers.0": 5, "model.layers.1": 8}
    model = tiny()
    quantize(model, PBS2PConfig(layers=layers, calibration=None, iterations=1, quantiles=3, block_size=32))
    found = inspect(save_model(model, tmp_path / "sparse"))
    assert [module.mask for module in found.modules] == ["5:8"] * 7 + [""] * 7
    assert [module.kept_share for module in found.modules] == [0.625] * 7 + [1.0] * 7
    assert found.modules[0].highlights.startswith("5:8, block size 32")
    assert "keep" not in found.modules[0].highlights
    listed = tables.inspection_json(found, layers=True)["modules"]
    assert listed[0]["spec"]["keep_n"] == 5
    assert save_plot(found, tmp_path / "sparse.png").stat().st_size > 1000


def test_ranks_are_drawn_beside_layers_that_stayed_dense(tmp_path: Path) -> None:
    layers = {"model.layers.0": 1.0, "model.layers.1": 0.5}
    model = tiny()
    quantize(model, AdaSVDConfig(layers=layers, calibration=None))
    found = inspect(save_model(model, tmp_path / "low-rank"))
    for module in found.modules:
        rows, columns = module.spec["out_features"], module.spec["in_features"]
        assert module.rank_share == pytest.approx(
            int(0.5 * rows * columns / (rows + columns)) * (1 / rows + 1 / columns)
        )
    figure = Figure()
    plots._by_layer(figure.subplots(), found, "rank_share", "share")
    for line in figure.axes[0].get_lines():
        places, shares = line.get_data()
        assert list(places) == [0.0, 1.0]
        assert shares[0] == 1.0
        assert shares[1] < 0.52
    assert save_plot(found, tmp_path / "ranks.png").stat().st_size > 1000
    assert plots._place("model.layers.3.mlp.experts.each_up.12") == pytest.approx(3.012)


def test_a_plot_is_a_png_file(saved: Path, tmp_path: Path) -> None:
    assert save_plot(inspect(saved), tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png"):
        save_plot(inspect(saved), tmp_path / "plot.pdf")


def test_a_dense_model_is_refused_with_its_size(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"not compressed.* 16\.\d\d bits"):
        inspect(tmp_path / "dense")


def test_no_folder_and_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        inspect(tmp_path / "absent")


def change_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json of model: is not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors: not a readable"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            "model.safetensors: not a readable",
        ),
        (
            lambda f: save_file({"model.norm.weight": torch.ones(64)}, f / "model.safetensors"),
            "weight_sign is in none of the weight files",
        ),
        (
            lambda f: change_config(f, lambda c: c["quantization_config"]["modules"][NAME]["spec"].update(groups=3)),
            f"{NAME}.weight_row_scale in model.safetensors is",
        ),
        (
            lambda f: change_config(f, lambda c: c["quantization_config"]["modules"][NAME].update(format="x")),
            "unknown format 'x'",
        ),
        (lambda f: change_config(f, lambda c: c["quantization_config"].pop("modules")), "lists no packed modules"),
        (
            lambda f: change_config(f, lambda c: c["quantization_config"].update(format_version=99)),
            "format_version 99",
        ),
        (lambda f: change_config(f, lambda c: c["quantization_config"].update(quant_method="gptq")), "'gptq'"),
    ],
)
def test_damage_is_an_error_that_names_the_file(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        inspect(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("shard", ["absent.safetensors", "../other.safetensors", 3])
def test_an_index_names_files_of_the_folder(folder: Path, shard: Any) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing|plain file names"):
        inspect(folder)
