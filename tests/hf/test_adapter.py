"""What compression has left out, as an adapter of peft: it loads, and the model comes nearer to the dense one."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hf_lowbit
from hf_lowbit import AdaSVDConfig, ARBConfig, CheckpointError, RunOptions, packed_modules
from hf_lowbit.hf import adapter
from hf_lowbit.hf.adapter import dense_weights, save_remainder
from tests.hf.test_transformers import logits
from tests.tiny import tiny_model, tokens

CONFIGS = {
    "low rank": AdaSVDConfig(
        ratio=0.4, calibration=tokens(8), samples=8, dense_target=0.0, run=RunOptions(progress=False)
    ),
    "signs": ARBConfig(variant="rtn", calibration=None, run=RunOptions(progress=False)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and packed ones by method."""
    root = tmp_path_factory.mktemp("adapter")
    tiny_model().save_pretrained(root / "dense")
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(root / "dense")
        hf_lowbit.quantize(model, config)
        model.save_pretrained(root / name)
    return root


def distance(model, reference):
    return float((logits(model) - reference).norm())


@pytest.mark.parametrize("given", [None, tokens(8)], ids=["weights", "outputs"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_model_with_adapter_is_nearer_to_the_dense_one(folders, tmp_path, kind, given):
    reference = logits(AutoModelForCausalLM.from_pretrained(folders / "dense"))
    model = AutoModelForCausalLM.from_pretrained(folders / kind)
    before = distance(model, reference)
    found = []
    for rank in (4, 16):
        out = tmp_path / str(rank)
        left = save_remainder(model, dense_weights(folders / "dense", "model"), out, rank, given)
        assert set(left) == set(packed_modules(model))
        assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        fresh = AutoModelForCausalLM.from_pretrained(folders / kind)
        found.append(distance(PeftModel.from_pretrained(fresh, out), reference))
        assert all(0 <= share < 1 for share in left.values())
    assert found[1] < found[0] < before


def test_an_adapter_of_full_rank_gives_the_dense_model_back(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "low rank")
    left = save_remainder(model, dense_weights(folders / "dense", "model"), tmp_path / "full", 1000)
    assert max(left.values()) < 1e-9
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert config["rank_pattern"]["model.layers.0.mlp.up_proj"] == 64
    assert config["base_model_name_or_path"] is None
    restored = PeftModel.from_pretrained(model, tmp_path / "full")
    reference = logits(AutoModelForCausalLM.from_pretrained(folders / "dense"))
    assert torch.allclose(logits(restored), reference, atol=1e-3)


def test_weights_that_make_up_for_each_other_are_warned_of(folders, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(folders / "dense")
    run = RunOptions(progress=False)
    for target in (0.0, 0.5):
        packed = copy.deepcopy(model)
        hf_lowbit.quantize(packed, AdaSVDConfig(calibration=tokens(8), samples=8, dense_target=target, run=run))
        save_remainder(packed, dense_weights(folders / "dense", "model"), tmp_path / str(target), 4)
        assert ("make up for each other's errors" in caplog.text) == bool(target)


def test_moments_may_be_gathered_in_portions(folders, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folders / "low rank")
    files = []
    for limit in (2**31, 3 * 8 * 64**2):
        monkeypatch.setattr(adapter, "MOMENT_BYTES", limit)
        save_remainder(model, dense_weights(folders / "dense", "model"), tmp_path / str(limit), 4, tokens(8))
        files.append((tmp_path / str(limit) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_transposed_layers(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    reference = logits(model)
    hf_lowbit.quantize(model, AdaSVDConfig(ratio=0.4, calibration=None, run=RunOptions(progress=False)))
    left = save_remainder(model, dense_weights(tmp_path / "dense", "transformer"), tmp_path / "out", 1000)
    assert max(left.values()) < 1e-9
    assert torch.allclose(logits(PeftModel.from_pretrained(model, tmp_path / "out")), reference, atol=1e-3)


def test_what_cannot_be_done_is_refused(folders, tmp_path):
    dense = dense_weights(folders / "dense", "model")
    model = AutoModelForCausalLM.from_pretrained(folders / "low rank")
    for rank in (0, True, 1.5):
        with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
            save_remainder(model, dense, tmp_path / "out", rank)
    with pytest.raises(ValueError, match="has no packed layers"):
        save_remainder(tiny_model(), dense, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_remainder(model, dense, tmp_path / "full")
    with pytest.raises(ValueError, match=r"cannot be made, since .*letter\.txt is no folder"):
        save_remainder(model, dense, tmp_path / "full" / "letter.txt" / "out")
    for given, message in (
        (torch.zeros(5, dtype=torch.int64), r"got \(5,\) of torch.int64"),
        (torch.zeros(0, 5, dtype=torch.int64), r"got \(0, 5\) of torch.int64"),
        (torch.zeros(2, 5), r"got \(2, 5\) of torch.float32"),
        ([[1, 2]], "got list"),
        (torch.full((2, 5), 10**6), "ids go from 1000000 to 1000000; the model knows 0 to"),
        (torch.full((2, 5), -1), "ids go from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=f"tokens.* {message}"):
            save_remainder(model, dense, tmp_path / "out", tokens=given)
    with pytest.raises(CheckpointError, match=r"q_proj: dense weight is \(1,\), packed as \(64, 64\)"):
        save_remainder(model, dense_weights(folders / "low rank", "model"), tmp_path / "out")
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"lacks 14 packed layers: model\.layers\.0"):
        save_remainder(model, dense_weights(tmp_path / "other", "model"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        dense_weights(tmp_path / "empty")
    assert not (tmp_path / "out").exists()
