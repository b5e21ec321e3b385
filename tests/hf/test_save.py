"""Saving: complete or not at all, and refused early where it cannot work."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
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
    monkeypatch.setattr(save, "_exchange", lambda *paths: False)
    with pytest.raises(OSError, match="the disk is gone"):
        save_model(model, folder, overwrite=True)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_folder_is_replaced_with_and_without_an_exchange(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(model, tmp_path / "model")
    for number, exchange in enumerate([save._exchange, lambda *paths: False]):
        monkeypatch.setattr(save, "_exchange", exchange)
        model.model.norm.weight.data.fill_(number)
        save_model(model, folder, overwrite=True)
        assert torch.equal(LlamaForCausalLM.from_pretrained(folder).model.norm.weight, model.model.norm.weight)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_exchange_swaps_or_changes_nothing(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert not save._exchange(tmp_path / "first", tmp_path / "absent")
    swapped = save._exchange(tmp_path / "first", tmp_path / "second")
    assert swapped or not sys.platform.startswith("linux")
    assert (tmp_path / "first" / ("second" if swapped else "first")).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from hf_lowbit.hf import save

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
rename, count = Path.rename, int(sys.argv[2])

def rename_and_die(self, target):
    global count
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    return rename(self, target)

Path.rename = rename_and_die
save._exchange = lambda *paths: False
save.save_model(model, sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize(("renames", "made_anew"), [(0, False), (1, False), (1, True)])
def test_a_kill_before_and_between_the_renames(
    model: LlamaForCausalLM, tmp_path: Path, renames: int, made_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no exchange can be had, the target is gone for a moment; the next look at it puts the old one back."""
    folder = save_model(model, tmp_path / "model")
    before = content(folder)
    process = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert folder.exists() == (renames == 0)
    if made_anew:  # by a user who wonders where it is; an empty folder may be saved to
        folder.mkdir()
    with caplog.at_level(logging.WARNING):
        assert check_target(folder, overwrite=True) == folder
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert ("model: put back" in caplog.text) == (renames == 1)
    assert ".partial: removed; a killed save left it behind" in caplog.text


def test_leftovers_are_removed_but_not_those_of_a_running_save(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    mine = [".model.0123abcd.partial", ".model.0123abce.old"]
    others = [".model.0123abcf.partial", ".model.2.0123abcd.partial", ".model.12.old", "model.0123abcd.old"]
    for name in mine + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    running = os.open(tmp_path / others[0], os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    save_model(model, tmp_path / "model", overwrite=True)
    os.close(running)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", *others])


def test_files_beside_the_weights_are_listed_for_sha256sum(model: LlamaForCausalLM, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")
            (folder / "templates").mkdir()
            (folder / "templates" / "of tools.jinja").write_text("{{ tools }}")

    folder = save_model(model, tmp_path / "model", tokenizer=Tokenizer(), rows=[])
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == [save.REPORT_FILE, "templates/of tools.jinja", "tokenizer.json"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert not (save_model(model, tmp_path / "bare") / "SHA256SUMS").exists()


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


def test_a_model_in_memory_is_not_lost_for_a_missing_folder(model: LlamaForCausalLM, tmp_path: Path) -> None:
    assert (save_model(model, tmp_path / "absent" / "also" / "model") / "config.json").is_file()
    file = tmp_path / "file"
    file.write_text("text")
    for target, message in ((file, "is a file"), (file / "below", "above it is a file"), (file / "a" / "b", "exist")):
        with pytest.raises((ValueError, OSError), match=message):
            save_model(model, target)
    with pytest.raises(ValueError, match="max_shard_size"):
        save_model(model, tmp_path / "other" / "model", max_shard_size="5")
    assert {path.name for path in tmp_path.iterdir()} == {"absent", "file"}
    assert file.read_text() == "text"


def test_shard_sizes() -> None:
    for size in ("5GB", "1.5 MB", "200kb", 10_000):
        check_shard_size(size)
    for size in ("5", "GB", "-1GB", "5GiB", 0):
        with pytest.raises(ValueError, match="max_shard_size"):
            check_shard_size(size)


def test_an_index_counts_weights_not_packed_elements(model: LlamaForCausalLM, tmp_path: Path) -> None:
    parameters = model.num_parameters()
    quantize(model, ARBConfig(variant="rtn", calibration=None))
    folder = save_model(model, tmp_path / "model", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert model.num_parameters() != parameters
    assert index["metadata"]["total_parameters"] == parameters
    assert LlamaForCausalLM.from_pretrained(folder).num_parameters() == model.num_parameters()
