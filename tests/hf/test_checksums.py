"""Damage on disk is found when a model is loaded, and by ``verify``; never fluent nonsense."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lowbit import CheckpointError, RunOptions
from hf_lowbit.cli import app
from hf_lowbit.compress.checksums import METADATA_KEY, checksum, damaged_tensors, metadata_of
from hf_lowbit.report.verify import verify
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model


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
    config = quick(calibration=None, run=RunOptions(verify=False))
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(copied, quantization_config=config))).all()
    assert any(name in problem for problem in verify(copied).problems)


@pytest.mark.parametrize("metadata", [{}, {METADATA_KEY: "[]"}, {METADATA_KEY: "{"}, {METADATA_KEY: "null"}], ids=str)
def test_missing_or_broken_table_is_an_error(copied, metadata):
    file = copied / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", **metadata})
    with pytest.raises(CheckpointError, match="has no checksums"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_checksum_depends_on_bytes_alone():
    tensor = torch.randn(4, 6)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.T.contiguous().T)
    assert checksum(tensor) != checksum(-tensor)
    assert len({checksum(torch.zeros(0)), checksum(torch.zeros(1)), checksum(torch.tensor(1.0))}) == 3


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
