"""What of a checkpoint is served and what is refused, and by which words, before an engine reads a weight."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lowbit import BiDRNConfig, CheckpointError, CondiQuantConfig, DVDQuantConfig, LowBitRecipe, ReCalKVConfig
from hf_lowbit.serving.checkpoint import check_files, renamed, stored_layers, weight_files
from tests.hostile.forge import INDEX, SINGLE, edit_config, edit_tensors
from tests.serving import cases

LAYER = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def test_the_table_of_a_model_has_every_packed_layer(served):
    layers = stored_layers(config_of(served))
    assert {layer.format_type.name for layer in layers.values()} == {"binary", "integer", "low_rank"}
    assert len(layers) == 8 and LAYER in layers
    assert (layers[DOWN].spec.out_features, layers[DOWN].spec.in_features) == (64, 96)


def test_sound_files_pass_under_their_own_names(served):
    layers = stored_layers(config_of(served))
    assert check_files(served, layers) == {name: name for name in layers}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ReCalKVConfig(ratio=0.5, calibration=None), "'recalkv' is not served (its cache holds latents"),
        (BiDRNConfig(), "'bidrn' is not served (its convolutions are binary"),
        (CondiQuantConfig(), "'condiquant' is not served (it is for models of images)"),
        (
            LowBitRecipe({"*.self_attn": ReCalKVConfig(ratio=0.5, calibration=None), "*": cases.INTEGER}),
            "'recalkv' is not served",
        ),
    ],
)
def test_methods_that_are_more_than_linear_layers_are_refused_by_name(config, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        stored_layers({**config.to_dict(), "modules": {}})
    assert str(caught.value).endswith("it can be used with transformers")


@pytest.mark.parametrize("mode", ["channel", "channel_token", "dynamic"])
def test_rounding_over_the_tokens_of_a_call_is_refused(served, mode):
    config = config_of(served)
    config["modules"][DOWN] = {
        "method": "dvd_quant",
        "format": "integer",
        "spec": {"out_features": 64, "in_features": 96, "activation": mode},
    }
    with pytest.raises(ValueError, match=rf"{re.escape(DOWN)}: activations are rounded .* \({mode}\)"):
        stored_layers(config)


def test_rounding_of_each_token_is_served(tmp_path):
    folder = cases.save(tmp_path / "model", DVDQuantConfig(preset="w4a8", weight_init="minmax"), num_hidden_layers=1)
    layers = stored_layers(config_of(folder))
    assert {layer.spec.activation for layer in layers.values()} == {"token_group"}


def test_other_formats_and_experts_are_refused_by_name(served):
    config = config_of(served)
    row = config["modules"][LAYER]
    config["modules"][LAYER] = {**row, "format": "binary_conv"}
    with pytest.raises(
        ValueError, match=r"q_proj: format 'binary_conv' is not served, only binary, integer, low_rank"
    ):
        stored_layers(config)
    config["modules"][LAYER] = {**row, "format": "octal"}
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: unknown format 'octal'; known: "):
        stored_layers(config)
    expert = "model.layers.0.mlp.experts.each_gate_up_proj.0"
    with pytest.raises(ValueError, match=rf"{re.escape(expert)}: experts of a mixture are not served"):
        stored_layers({**config, "modules": {expert: row}})
    with pytest.raises(ValueError, match=r"^quantization_config in config\.json: .*unknown key 'sparks'"):
        stored_layers({**config_of(served), "sparks": 1})
    with pytest.raises(CheckpointError, match="lists no packed modules"):
        stored_layers({**config_of(served), "modules": None})
    with pytest.raises(ValueError, match="format_version 9"):
        stored_layers({**config_of(served), "format_version": 9})


def _drop(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def _cut(folder):
    return edit_tensors(folder, lambda t: t.update({f"{DOWN}.weight_up": t[f"{DOWN}.weight_up"][:-1]}))


def _flip(folder):
    content = bytearray((folder / SINGLE).read_bytes())
    content[-1] ^= 1
    (folder / SINGLE).write_bytes(content)


def _unlist(folder):
    return edit_config(folder, lambda config: config["modules"].pop(LAYER))


def _edit(folder):
    text = (folder / "config.json").read_text("utf-8")
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop(f"{LAYER}.weight_sign"), f"{LAYER}.weight_sign is in none of the weight files"),
        (_cut, f"{DOWN}.weight_up in model.safetensors is F32"),
        (_flip, "does not match its checksum"),
        (_unlist, f"{LAYER}: the files hold packed tensors of it, config.json does not list it"),
        (_edit, "config.json: is not the one that was saved"),
        (lambda folder: (folder / SINGLE).unlink(), "has no safetensors files"),
        (lambda folder: (folder / SINGLE).write_bytes(b"x" * 64), "not a readable safetensors file"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: is damaged"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'), "is damaged"),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "names 'b.safetensors', which",
        ),
        (
            lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "b" * 5000}})),
            "which is not there",
        ),
    ],
)
def test_damage_is_named_before_a_weight_is_read(copy, damage, words):
    damage(copy)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        check_files(copy, stored_layers(config_of(copy)))
    assert len(str(caught.value)) < 600


def test_a_dense_tensor_that_is_gone_is_missed(copy):
    """An engine would leave the memory of such a layer as it found it."""
    with safe_open(copy / SINGLE, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(copy / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, copy / SINGLE, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: has a checksum, but is in none of the files"):
        check_files(copy, stored_layers(config_of(copy)))


def test_shards_are_those_of_the_index(tmp_path):
    folder = cases.save(tmp_path / "model", cases.INTEGER, num_hidden_layers=1, shards="20KB")
    assert len(weight_files(folder)) > 1
    (folder / "stray.safetensors").write_bytes(b"")
    layers = stored_layers(config_of(folder))
    assert set(check_files(folder, layers)) == set(layers)


def test_two_layers_may_not_get_one_name(served):
    layers = stored_layers(config_of(served))
    with pytest.raises(CheckpointError, match="one and the same"):
        renamed(layers, ["same"] * len(layers))
