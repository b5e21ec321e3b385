"""Damage on disk is found when a model is loaded, and by ``verify``; never fluent nonsense."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

from hf_lowbit import CheckpointError, RunOptions, quantize
from hf_lowbit.cli import app
from hf_lowbit.compress.checksums import CONFIG_KEY, METADATA_KEY, checksum, damaged_tensors, metadata_of
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.verify import verify
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model, tokens

UNCHECKED = quick(calibration=None, run=RunOptions(verify=False))


@pytest.fixture(scope="module")
def packed_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checksums")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "dense")
    config = quick(calibration=None)
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return folder / "packed"


@pytest.fixture
def copied(packed_path, tmp_path):
    shutil.copytree(packed_path, tmp_path / "copy")
    return tmp_path / "copy"


def flip(file, position, bit):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def data_start(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_every_tensor_has_a_checksum(packed_path):
    file = packed_path / "model.safetensors"
    problems, compared = damaged_tensors([file])
    assert problems == []
    assert compared == len(load_file(file))


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_data_is_found_on_load(copied, seed):
    file = copied / "model.safetensors"
    rng = random.Random(seed)
    flip(file, rng.randrange(data_start(file), file.stat().st_size), rng.randrange(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not match its checksum"):
        AutoModelForCausalLM.from_pretrained(copied)
    assert len(verify(copied).problems) >= 1


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_header_is_found_or_harmless(copied, packed_path, seed):
    file = copied / "model.safetensors"
    rng = random.Random(seed)
    flip(file, rng.randrange(data_start(file)), rng.randrange(8))
    try:
        model = AutoModelForCausalLM.from_pretrained(copied)
    except Exception:  # whichever library notices first
        return
    assert logits(model).equal(logits(AutoModelForCausalLM.from_pretrained(packed_path)))


def test_the_check_can_be_put_off(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_sign"))
    table = metadata_of(tensors)
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt", **table})
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(copied)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(copied, quantization_config=UNCHECKED))).all()
    assert any(name in problem for problem in verify(copied).problems)


@pytest.mark.parametrize("metadata", [{}, {METADATA_KEY: "[]"}, {METADATA_KEY: "{"}, {METADATA_KEY: "null"}], ids=str)
def test_missing_or_broken_table_is_an_error(copied, metadata):
    file = copied / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", **metadata})
    with pytest.raises(CheckpointError, match="has no checksums"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_tensor_without_a_checksum_is_an_error(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    metadata = metadata_of({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
    save_file(tensors, file, metadata={"format": "pt", **metadata})
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight in model\.safetensors: has no checksum$"):
        AutoModelForCausalLM.from_pretrained(copied)
    assert verify(copied).problems == ("model.norm.weight in model.safetensors: has no checksum",)


def test_checksum_covers_dtype_shape_and_bytes():
    tensor = torch.randn(4, 6)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.T.contiguous().T)
    others = [-tensor, tensor.view(torch.int32), tensor.view(6, 4), tensor.reshape(-1), tensor.view(4, 6, 1)]
    others += [torch.zeros(0), torch.zeros(0, 2), torch.zeros(1), torch.tensor(0.0), torch.zeros(1, dtype=torch.bool)]
    others += [torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.float8_e5m2)]
    assert len({checksum(tensor), *map(checksum, others)}) == 1 + len(others)


@pytest.mark.parametrize("change", [{"dtype": "I32"}, {"shape": [1, 64]}, {"shape": [64, 1]}], ids=str)
def test_a_header_that_describes_the_same_bytes_otherwise_is_an_error(copied, change):
    file = copied / "model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : data_start(file)])
    header["model.norm.weight"].update(change)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[data_start(file) :])
    assert verify(copied).problems == ("model.norm.weight in model.safetensors: does not match its checksum",)
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight in model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copied)


# Names that transformers changes while saving --------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture():
    """A model whose experts are joined in memory and apart on disk, and called otherwise there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    quantize(model, quick(calibration=None))
    return model


def stored_names(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"save_original_format": False}], ids=str)
def test_converted_tensors_have_checksums(mixture, tmp_path, options):
    mixture.save_pretrained(tmp_path / "packed", **options)
    names = stored_names(tmp_path / "packed")
    assert (names == set(mixture.state_dict())) == ("save_original_format" in options)
    found = verify(tmp_path / "packed")
    assert found.problems == ()
    assert found.checksums == found.tensors == len(names)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(mixture))
    loaded.save_pretrained(tmp_path / "again", **options)
    assert stored_names(tmp_path / "again") == names
    assert torch.equal(logits(MixtralForCausalLM.from_pretrained(tmp_path / "again")), logits(mixture))


def test_damage_in_a_converted_tensor_is_found(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    name = next(name for name in sorted(tensors) if name not in mixture.state_dict())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"{name} in model.safetensors: does not match its checksum"):
        MixtralForCausalLM.from_pretrained(tmp_path)


def test_tensors_that_lie_on_disk_have_checksums(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "packed")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = MixtralForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(tensor.device.type == "meta" for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "again")
    found = verify(tmp_path / "again")
    assert (found.problems, found.checksums) == ((), found.tensors)
    assert torch.equal(logits(MixtralForCausalLM.from_pretrained(tmp_path / "again")), logits(mixture))


# The config files ------------------------------------------------------------------------------------------------


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(rms_norm_eps=2e-6),
        lambda config: config.update(max_position_embeddings=129),
        lambda config: config.update(bos_token_id=2),
        lambda config: config.pop("eos_token_id"),
        lambda config: config["quantization_config"].update(seed=5),
        lambda config: config.update(rope_parameters={"rope_theta": 20000.0, "rope_type": "default"}),
    ],
)
def test_a_changed_config_is_an_error_that_says_how_to_load_it(copied, change):
    edit(copied / "config.json", change)
    told = r"^config\.json: is not the one that was saved with model\.safetensors.*RunOptions\(verify=False\) loads"
    with pytest.raises(CheckpointError, match=told):
        AutoModelForCausalLM.from_pretrained(copied)
    assert [problem.partition(":")[0] for problem in verify(copied).problems] == ["config.json"]
    model = AutoModelForCausalLM.from_pretrained(copied, quantization_config=UNCHECKED)
    model.save_pretrained(copied)  # which records the config as it is now
    assert verify(copied).problems == ()
    AutoModelForCausalLM.from_pretrained(copied)


def test_what_a_config_says_counts_and_not_how(copied, caplog):
    for name in ("config.json", "generation_config.json"):
        content = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps(dict(reversed(content.items())), indent=7))
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        AutoModelForCausalLM.from_pretrained(copied)
    assert caplog.text == ""
    assert verify(copied).problems == ()


def test_fields_may_be_overridden_and_parts_loaded(packed_path):
    for options in ({"rms_norm_eps": 1e-3}, {"dtype": torch.bfloat16}, {"attn_implementation": "eager"}):
        AutoModelForCausalLM.from_pretrained(packed_path, **options)
    AutoModel.from_pretrained(packed_path)
    config = AutoConfig.from_pretrained(packed_path)
    config.rms_norm_eps = 1e-3
    assert AutoModelForCausalLM.from_pretrained(packed_path, config=config).config.rms_norm_eps == 1e-3


@pytest.mark.parametrize("content", ['{"max_new_tokens": 3}', "{", "\xff"], ids=["edited", "no JSON", "no text"])
def test_a_changed_generation_config_is_a_warning(copied, caplog, content):
    (copied / "generation_config.json").write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        AutoModelForCausalLM.from_pretrained(copied)  # transformers takes one that it cannot read for an absent one
    assert "generation_config.json: is not the one that was saved with model.safetensors" in caplog.text
    assert [problem.partition(":")[0] for problem in verify(copied).problems] == ["generation_config.json"]


def test_a_damaged_checksum_of_the_configs_is_an_error(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt", **metadata_of(tensors), CONFIG_KEY: "{"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its checksum of config\.json is damaged"):
        AutoModelForCausalLM.from_pretrained(copied)


class TinyOfOurOwn(LlamaForCausalLM):
    """Code of this kind is copied beside the weights, and config.json says so."""


def test_no_false_alarm_whatever_way_a_model_is_saved(packed_path, tmp_path, caplog, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(packed_path)
    expected = logits(model)

    def check(folder):
        with caplog.at_level(logging.WARNING, "hf_lowbit"):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert verify(folder).problems == ()
        assert caplog.text == ""
        return loaded

    model.save_pretrained(tmp_path / "twice")
    model.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(check(tmp_path / "twice")), expected)
    save_model(model, tmp_path / "saved", max_shard_size="20KB")
    check(tmp_path / "saved").save_pretrained(tmp_path / "saved")  # over itself
    assert torch.equal(logits(check(tmp_path / "saved")), expected)
    half = AutoModelForCausalLM.from_pretrained(packed_path, dtype=torch.bfloat16)
    half.config.rms_norm_eps = 1e-4
    half.generation_config.max_new_tokens = 7
    half.save_pretrained(tmp_path / "half")
    assert check(tmp_path / "half").dtype == torch.bfloat16
    in_memory = tiny_model(num_hidden_layers=1)
    quantize(in_memory, quick(calibration=None))
    in_memory.generate(tokens(1, 4), max_new_tokens=2, pad_token_id=0)
    in_memory.save_pretrained(tmp_path / "in_memory")
    check(tmp_path / "in_memory")
    model.save_pretrained(tmp_path / "repository" / "inner")
    AutoModelForCausalLM.from_pretrained(tmp_path / "repository", subfolder="inner")
    monkeypatch.setattr(TinyOfOurOwn, "_auto_class", "AutoModelForCausalLM")
    TinyOfOurOwn.from_pretrained(packed_path).save_pretrained(tmp_path / "own")
    assert "auto_map" in json.loads((tmp_path / "own" / "config.json").read_text())
    check(tmp_path / "own")


# What lies beside ------------------------------------------------------------------------------------------------


def test_changed_files_beside_are_named(packed_path, tmp_path, caplog):
    class Tokenizer:
        def save_pretrained(self, folder: Path):
            (folder / "tokenizer.json").write_text("{}")
            (folder / "chat_template.jinja").write_text("{{ messages }}")

    model = AutoModelForCausalLM.from_pretrained(packed_path)
    folder = save_model(model, tmp_path / "saved", Tokenizer())
    assert verify(folder).problems == ()
    (folder / "tokenizer.json").write_text("[]")
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["tokenizer.json"]
    assert [problem.partition(";")[0] for problem in verify(folder).problems] == [
        "tokenizer.json: is not the one that was saved with the model",
        "chat_template.jinja: is missing",
    ]


@pytest.mark.parametrize("line", [b"\xff", b"text", b"%s  ../config.json", b"%s  /etc/hosts", b"%s  a/../b", b"%s  *"])
def test_a_damaged_list_of_files_is_named(copied, line):
    (copied / "SHA256SUMS").write_bytes(line.replace(b"%s", b"0" * 64) + b"\n")
    assert verify(copied).problems == ("SHA256SUMS: is damaged",)


def test_verify_on_the_command_line(packed_path, copied):
    runner = CliRunner()
    sound = runner.invoke(app, ["verify", str(packed_path)])
    assert sound.exit_code == 0
    assert "sound; 7 packed layers" in sound.output
    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_row_scale"))
    tensors[name].fill_(float("inf"))
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt", **metadata_of(tensors)})
    damaged = runner.invoke(app, ["verify", str(copied), "--json"])
    assert damaged.exit_code == 1
    assert "row_scale holds NaN or infinity" in json.loads(damaged.output)["problems"][0]
    assert runner.invoke(app, ["verify", str(copied.parent)]).exit_code == 2
