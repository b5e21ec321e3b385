"""Dense weights on their way into a model: compressed or put off at once, never held."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_lowbit import RunOptions, packed_modules
from hf_lowbit.compress.dense import DenseWeights
from hf_lowbit.compress.engine import Run
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model


@pytest.fixture(params=["llama", "gpt2", "mixtral", "gpt_oss"])
def architecture(request):
    return request.param


@pytest.fixture
def dense(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def held(run):
    """Names of the targets whose dense weight is in memory; parts of a fused weight count as one."""
    found = {}
    for name in run.targets.methods:
        try:
            weight = run.model.get_submodule(name).weight
        except AttributeError:  # an expert that is still part of a fused weight on meta
            continue
        if weight.dim() == 2 and weight.device.type != "meta":
            found[weight.untyped_storage().data_ptr()] = name
    return list(found.values())


def watched(monkeypatch):
    """Record what is held whenever layers are about to be compressed."""
    seen = []
    original = Run.compress_layers
    monkeypatch.setattr(
        Run, "compress_layers", lambda run, names, stats: (seen.append(held(run)), original(run, names, stats))[1]
    )
    return seen


def test_without_data_a_weight_is_compressed_as_it_arrives(dense, monkeypatch):
    seen = watched(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick(calibration=None))
    assert len(seen) == len(packed_modules(model))  # one thread, one layer at a time
    assert max(map(len, seen)) == 1


def test_with_data_one_block_is_held(dense, architecture, monkeypatch):
    seen = watched(monkeypatch)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick())
    assert len(seen) == 2
    for block, names in enumerate(seen):
        assert names
        assert all(f".{block}." in name for name in names)


@pytest.mark.parametrize("with_journal", [True, False])
def test_scratch_files_are_removed(tmp_path, monkeypatch, with_journal):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    journal = tmp_path / "journal" if with_journal else None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    place = journal or tmp_path / "scratch"
    seen = []
    original = DenseWeights.materialize

    def watch(weights, names):
        seen.append(sorted(path.name for path in place.glob("dense-0-*/*")))
        return original(weights, names)

    monkeypatch.setattr(DenseWeights, "materialize", watch)
    run = RunOptions(progress=False, journal=journal)
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick(run=run))
    assert seen[0] == [f"0000{i}.safetensors" for i in range(4)]  # two fused weights in each of two blocks
    gc.collect()
    assert not list(place.glob("dense-*"))


def test_scratch_files_of_a_killed_run_are_removed(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    stale = tmp_path / "journal" / "dense-0-killed"
    stale.mkdir(parents=True)
    (stale / "00000.safetensors").write_bytes(b"half")
    run = RunOptions(progress=False, journal=tmp_path / "journal")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick(run=run))
    assert not stale.exists()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(
    ("architecture", "key", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, calibrated, architecture, key, name):
    tiny_model(architecture).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = quick() if calibrated else quick(calibration=None)
    with pytest.raises(ValueError, match=rf"{name}: weight holds NaN or infinity"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(
    ("architecture", "key", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_weight_that_is_missing_is_named(tmp_path, calibrated, architecture, key, name):
    """transformers would go on with random values and a warning."""
    tiny_model(architecture).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = quick() if calibrated else quick(calibration=None)
    with pytest.raises(ValueError, match=rf"not in the dense checkpoint: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_dense_checkpoint_of_another_file_format(dense, tmp_path, calibrated):
    config = quick() if calibrated else quick(calibration=None)
    expected = logits(AutoModelForCausalLM.from_pretrained(dense, quantization_config=config))
    tensors = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    torch.save(tensors, Path(dense) / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert torch.equal(logits(model), expected)
    run = RunOptions(progress=False, journal=tmp_path / "journal")
    with pytest.raises(ValueError, match="a journal needs a dense checkpoint in safetensors files"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick(run=run))
