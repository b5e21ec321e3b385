"""What is refused in diffusers, by which words: what cannot work, damage, programs without registration."""

import copy
import json
import os
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel as Video
from safetensors.torch import load_file, save_file

import hf_lowbit
from hf_lowbit import (
    CheckpointError,
    LowBitConfig,
    LowBitRecipe,
    packed_modules,
)
from hf_lowbit.compress.checksums import metadata_of
from tests.hf.test_transformers import edit_config, quick
from tests.video import (
    FILE,
    FIRST,
    free,
    rewrite,
    tiny_pipeline,
    tiny_video,
)


def python(code, **environment):
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


# Refusals --------------------------------------------------------------------------------------------------------


def test_calibrated_methods_are_refused_before_work(dense_path, tmp_path):
    shutil.copy(dense_path / "config.json", tmp_path)  # without weights
    for config in (hf_lowbit.ARBConfig(), quick(), LowBitRecipe({"*.ff": free(), "*": quick()})):
        with pytest.raises(ValueError, match=r"asks for calibration \(tokens\).*calibration=None"):
            Video.from_pretrained(tmp_path, quantization_config=config)
        with pytest.raises(ValueError, match="asks for calibration"):
            hf_lowbit.quantize(tiny_video(), config)
    with pytest.raises(ValueError, match="quantized already"):
        hf_lowbit.quantize(Video.from_pretrained(dense_path, quantization_config=free()), free())


def test_a_pipeline_is_not_compressed_as_a_whole():
    with pytest.raises(TypeError, match=r"got LTXPipeline; of a pipeline, pass one of its models"):
        hf_lowbit.quantize(tiny_pipeline(), free())


def test_packed_projections_are_not_fused():
    model = tiny_video()
    hf_lowbit.quantize(model, free())
    before = set(model.state_dict())
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"fuse_qkv_projections: queries, keys and values of 2 attention modules"):
            one.fuse_qkv_projections()
        assert set(one.state_dict()) == before
    model.dequantize()
    before = set(model.state_dict())
    model.fuse_qkv_projections()
    assert set(model.state_dict()) > before


def test_dense_projections_of_a_packed_model_are_fused():
    model = tiny_video()
    hf_lowbit.quantize(model, free(skip=["attn1", "attn2"]))
    before = set(model.state_dict())
    model.fuse_qkv_projections()
    assert set(model.state_dict()) > before


def test_a_model_with_fused_projections_is_not_compressed():
    model = tiny_video()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn1: its projections are fused.*unfuse_qkv_projections"):
        hf_lowbit.quantize(model, free())
    assert not packed_modules(model)
    model.unfuse_qkv_projections()
    hf_lowbit.quantize(model, free())


def test_weights_that_another_program_has_rounded_are_refused():
    model = tiny_video().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=rf"{FIRST}: weight is torch.float8_e4m3fn, not a dense one"):
        hf_lowbit.quantize(model, free())
    assert not packed_modules(model)


def test_dense_weights_that_cannot_be_compressed_are_named(tmp_path):
    model = tiny_video()
    model.get_submodule(FIRST).weight.data[0, 0] = float("nan")
    model.proj_in.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"proj_in: weight holds NaN or infinity; {FIRST}: weight holds"):
        Video.from_pretrained(tmp_path, quantization_config=free())
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        Video.from_single_file(str(tmp_path / FILE), config=str(tmp_path), quantization_config=free())


@pytest.mark.parametrize("name", [f"{FIRST}.weight", f"{FIRST}.bias", "scale_shift_table"])
def test_dense_checkpoint_without_a_tensor(dense_path, name, tmp_path):
    shutil.copytree(dense_path, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / FILE)
    del tensors[name]
    save_file(tensors, tmp_path / "copy" / FILE)
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing from the checkpoint.*{name}"):
        Video.from_pretrained(tmp_path / "copy", quantization_config=free())


def test_pickled_files_are_neither_written_nor_read(packed, copied):
    with pytest.raises(ValueError, match="safe_serialization=False is not"):
        packed.save_pretrained(copied, safe_serialization=False)
    torch.save(packed.state_dict(), copied / "diffusion_pytorch_model.bin")
    (copied / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"packed checkpoints are safetensors files; not opened: \['diffusion"):
        Video.from_pretrained(copied, use_safetensors=False)


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.weight_sign"), rf"{FIRST}\.weight_sign is in none of the weight files"),
        (lambda t: t.pop(f"{FIRST}.weight"), rf"{FIRST}\.weight is in none of the weight files"),
        (lambda t: t.pop("proj_out.bias"), r"proj_out\.bias is in none of the weight files"),
        (lambda t: t.update(surplus=torch.zeros(2)), rf"surplus: is in {FILE}, the model has no such tensor"),
        (lambda t: t.update({f"{FIRST}.weight_sign": torch.zeros(1)}), rf"weight_sign in {FILE} is F32 \[1\]"),
        (lambda t: t.update({f"{FIRST}.weight": torch.zeros(32, 32)}), rf"{FIRST}\.weight in {FILE}.*has a stub"),
        (lambda t: t.update({f"{FIRST}.weight_shift": torch.zeros(32)}), f"{FIRST}.*has no such tensor"),
        (lambda t: t[f"{FIRST}.weight_row_scale"].fill_(float("nan")), f"{FIRST}: row_scale holds NaN"),
        (lambda t: t[f"{FIRST}.weight_salient"].fill_(10**6), f"{FIRST}: salient must hold ascending"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(CheckpointError, match=message):
        Video.from_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("modules"), "lists no packed modules"),
        (lambda q: q["modules"].pop(FIRST), f"{FIRST}: the files hold packed tensors of it"),
        (lambda q: q["modules"].update({"blocks.9.q": q["modules"][FIRST]}), r"blocks\.9\.q: the model has no linear"),
        (lambda q: q["modules"][FIRST]["spec"].update(out_features=65), f"{FIRST}: stored as 65 x 32"),
        (lambda q: q["modules"][FIRST].update(format="other"), "unknown format 'other'"),
        (lambda q: q.update(surprise=1), "unknown key 'surprise'"),
        (lambda q: q.update(method="nonsense"), "unknown method 'nonsense'"),
    ],
)
def test_bad_config_is_refused(copied, change, message):
    edit_config(copied, change)
    with pytest.raises((ValueError, CheckpointError), match=message):
        Video.from_pretrained(copied)


def test_flipped_bit_is_named_by_tensor_and_file(copied):
    data = bytearray((copied / FILE).read_bytes())
    data[-3] ^= 1
    (copied / FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf" in {FILE}: does not match its checksum"):
        Video.from_pretrained(copied)


def test_edited_config_is_refused_unless_asked_for(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match=r"config\.json: is not the one.*with hf_lowbit\.unverified\(\)"):
        Video.from_pretrained(copied)
    with hf_lowbit.unverified():
        model = Video.from_pretrained(copied)
    assert model.config.norm_eps == 0.1
    model.save_pretrained(copied)
    Video.from_pretrained(copied)


def test_edited_config_in_a_pipeline(paths, tmp_path):
    """Its text encoder is loaded by transformers, to which a pipeline passes no options of ours, either."""
    shutil.copytree(paths / "packed", tmp_path / "copy")
    for part in ("transformer", "text_encoder"):
        file = tmp_path / "copy" / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "note": "edited"}))
    with pytest.raises(CheckpointError, match=r"config\.json: is not the one"):
        diffusers.LTXPipeline.from_pretrained(tmp_path / "copy")
    with hf_lowbit.unverified():
        diffusers.LTXPipeline.from_pretrained(tmp_path / "copy")


def test_shards_of_two_models_are_refused(packed, tmp_path):
    packed.save_pretrained(tmp_path / "one", max_shard_size="10KB")
    packed.get_submodule(FIRST).weight_row_scale.data.mul_(2)
    packed.save_pretrained(tmp_path / "two", max_shard_size="10KB")
    name = "diffusion_pytorch_model-00001-of"
    shard = next(path for path in (tmp_path / "two").iterdir() if path.name.startswith(name))
    shutil.copy(shard, tmp_path / "one")
    with pytest.raises(CheckpointError, match="was not saved together with"):
        Video.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"proj_out.bias": "../secret.safetensors"}), "contains a path separator"),
        (lambda m: m.pop("proj_out.bias"), "1 tensors are missing from the checkpoint.*proj_out"),
        (lambda m: m.update({"proj_out.bias": "other.safetensors"}), "other.safetensors"),
    ],
    ids=["elsewhere", "not listed", "no such file"],
)
def test_hostile_index(packed, change, message, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="10KB")
    file = tmp_path / f"{FILE}.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises((CheckpointError, ValueError, OSError), match=message):
        Video.from_pretrained(tmp_path)


def test_tensor_in_two_shards_is_refused(packed, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = [path for path in sorted(tmp_path.glob("*.safetensors"))]
    state = packed.state_dict()
    twice = {**load_file(shards[0]), "proj_out.bias": state["proj_out.bias"]}
    if "proj_out.bias" in load_file(shards[0]):
        twice = {**load_file(shards[1]), "proj_out.bias": state["proj_out.bias"]}
        shards.reverse()
    save_file(twice, shards[0], metadata={"format": "pt", **metadata_of(state)})
    with pytest.raises(CheckpointError, match=r"proj_out\.bias: is in diffusion.* and in diffusion"):
        Video.from_pretrained(tmp_path)


def test_a_diffusers_without_the_calls_is_named(packed_path, monkeypatch):
    from diffusers.quantizers.base import DiffusersQuantizer

    monkeypatch.delattr(DiffusersQuantizer, "maybe_update_loaded_keys")
    with pytest.raises(ImportError, match=r"diffusers .* 0\.42 or newer"):
        Video.from_pretrained(packed_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_file_is_named(packed, sharded, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "10GB")
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((CheckpointError, OSError), match=file.name):
        Video.from_pretrained(tmp_path)


def test_sizes_that_do_not_fit_are_not_passed_over(copied):
    """``ignore_mismatched_sizes`` leaves tensors out, which would then be empty."""
    rewrite(copied, lambda t: t.update({"scale_shift_table": torch.zeros(3, 32)}))
    with pytest.raises((CheckpointError, ValueError), match="scale_shift_table"):
        Video.from_pretrained(copied, ignore_mismatched_sizes=True)


# Registration ----------------------------------------------------------------------------------------------------


def test_registration_twice_changes_nothing():
    from diffusers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    hf_lowbit.register()
    assert auto.AUTO_QUANTIZER_MAPPING == before
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hf_lowbit"] is LowBitConfig


LOAD = """
from diffusers import LTXPipeline
pipeline = LTXPipeline.from_pretrained({path!r})
query = pipeline.text_encoder.encoder.block[0].layer[0].SelfAttention.q
print(type(pipeline.transformer.proj_in).__name__, type(query).__name__)
"""


def test_pipeline_loads_without_importing_the_package(paths):
    done = python(LOAD.format(path=str(paths / "packed")))
    assert done.stdout.split() == ["PackedLinear", "PackedLinear"], done.stderr[-2000:]
    assert "hf_lowbit could not" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["diffusers.quantizers.auto", "transformers.modeling_utils", "torch", "hf_lowbit"])
def test_in_whatever_order_things_are_imported(paths, first):
    switch = {"HF_LOWBIT_AUTOLOAD": "0"} if first == "hf_lowbit" else {}
    done = python(f"import {first}\n" + LOAD.format(path=str(paths / "packed")), **switch)
    assert done.stdout.split() == ["PackedLinear", "PackedLinear"], done.stderr[-2000:]


@pytest.mark.slow
def test_switched_off_fails_loudly(packed_path):
    code = f"from diffusers import LTXVideoTransformer3DModel as M; M.from_pretrained({str(packed_path)!r})"
    done = python(code, HF_LOWBIT_AUTOLOAD="0")
    assert "Unknown quantization type, got hf_lowbit" in done.stderr


@pytest.mark.slow
def test_diffusers_is_not_imported_and_need_not_be_there():
    code = "import sys; sys.modules['diffusers'] = None\nimport transformers.modeling_utils, hf_lowbit\n"
    done = python(code + "hf_lowbit.register(); print('registered')")
    assert done.stdout.split() == ["registered"]
    assert done.stderr == ""
    done = python("import sys, hf_lowbit, transformers.modeling_utils; print('diffusers' in sys.modules)")
    assert done.stdout.split() == ["False"]
