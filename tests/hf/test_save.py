"""Saving: complete or not at all, and refused early where it cannot work."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowbit import ARBConfig, quantize
from hf_lowbit.hf import save
from hf_lowbit.hf.save import check_shard_size, check_target, save_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_saved_model_comes_back_with_its_report(model: LlamaForCausalLM, tmp_path: Path) -> None:
    tokens = torch.randint(0, 128, (1, 8))
    report = quantize(model, ARBConfig(variant="rtn", calibration=None))
    with torch.no_grad():
        before = model(tokens).logits
    folder = save_model(model, tmp_path / "model", rows=report.rows)
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(folder)(tokens).logits, before)
    lines = [json.loads(line) for line in (folder / save.REPORT_FILE).read_text().splitlines()]
    assert [line["module"] for line in lines] == [row["module"] for row in report.rows]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_there_is_kept_unless_overwrite_is_said(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save_model(model, tmp_path / "model")
    (folder / "old.txt").write_text("of the old one")
    with pytest.raises(ValueError, match="model: exists and is not empty"):
        save_model(model, folder)
    save_model(model, folder, overwrite=True)
    assert not (folder / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_may_exist(model: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert (save_model(model, tmp_path / "model") / "config.json").is_file()


def fail(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_the_old_state(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    folder = tmp_path / "model"
    if exists:
        save_model(model, folder)
    before = content(folder) if exists else None

    class Tokenizer:
        save_pretrained = fail

    with pytest.raises(KeyboardInterrupt):
        save_model(model, folder, tokenizer=Tokenizer(), overwrite=True)
    assert (content(folder) if exists else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if exists else [])


def test_a_failed_rename_puts_the_old_folder_back(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(model, tmp_path / "model")
    before, rename = content(folder), Path.rename

    def only_once(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_once)
    with pytest.raises(OSError, match="the disk is gone"):
        save_model(model, folder, overwrite=True)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_targets_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(ValueError, match="is a file"):
        check_target(file)
    with pytest.raises(OSError, match=r"does not exist|is a file"):
        check_target(file / "below")
    with pytest.raises(FileNotFoundError, match="make it first"):
        check_target(tmp_path / "absent" / "model")
    with pytest.raises(ValueError, match="no saved model"):
        check_target(tmp_path, overwrite=True)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="cannot be written"):
        check_target(tmp_path / "model")


def test_shard_sizes() -> None:
    for size in ("5GB", "1.5 MB", "200kb", 10_000):
        check_shard_size(size)
    for size in ("5", "GB", "-1GB", "5GiB", 0):
        with pytest.raises(ValueError, match="max_shard_size"):
            check_shard_size(size)
