"""A run that is killed goes on and ends with the same bytes; a journal of another run is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowbit import CheckpointError, RunOptions
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.journal import LINES
from hf_lowbit.hf.save import save_model
from tests.hf.test_transformers import quick
from tests.tiny import tiny_model, tokens


class Killed(Exception):
    pass


@pytest.fixture
def dense(tmp_path):
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(dense, journal, resume=False, **changes):
    options = RunOptions(progress=False, batch_size=2, journal=journal, resume=resume)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick(run=options, **changes))
    return model


def saved(model, folder):
    save_model(model, folder)
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_run_ends_with_the_same_bytes(dense, tmp_path, monkeypatch, after, calibrated):
    changes = {} if calibrated else {"calibration": None}
    expected = saved(run(dense, tmp_path / "whole", **changes), tmp_path / "expected")
    original, calls = Run.compress_layers, []

    def fail(self, names, stats):
        if len(calls) == after:
            raise Killed
        calls.append(names)
        return original(self, names, stats)

    monkeypatch.setattr(Run, "compress_layers", fail)
    with pytest.raises(Killed):
        run(dense, tmp_path / "journal", **changes)
    monkeypatch.setattr(
        Run, "compress_layers", lambda self, names, stats: done.append(names) or original(self, names, stats)
    )
    done: list[list[str]] = []
    model = run(dense, tmp_path / "journal", resume=True, **changes)
    assert not {name for names in calls for name in names} & {name for names in done for name in names}
    assert saved(model, tmp_path / "resumed") == expected
    assert len(model.hf_quantizer.report.rows) == 21


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.7, 0.999])
def test_torn_journal_line_is_ignored(dense, tmp_path, keep):
    """A kill while a line is written leaves any part of it."""
    expected = saved(run(dense, tmp_path / "journal"), tmp_path / "expected")
    lines = (tmp_path / "journal" / LINES).read_bytes().splitlines(keepends=True)
    torn = b"".join(lines[:2]) + lines[2][: int(keep * len(lines[2]))]
    (tmp_path / "journal" / LINES).write_bytes(torn)
    assert saved(run(dense, tmp_path / "journal", resume=True), tmp_path / "resumed") == expected


def test_run_killed_from_outside(dense, tmp_path):
    """SIGKILL at a moment of its own choosing, a few times over."""
    expected = saved(run(dense, tmp_path / "whole"), tmp_path / "expected")
    code = (
        "import sys; from pathlib import Path; from tests.compress.test_journal import run\n"
        f"run(Path({str(dense)!r}), Path({str(tmp_path / 'journal')!r}), resume=True)\n"
    )
    lines = tmp_path / "journal" / LINES
    for wanted in (1, 2):  # killed as soon as this many lines are there, whatever is being done then
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if lines.exists() and lines.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert lines.exists()
    assert saved(run(dense, tmp_path / "journal", resume=True), tmp_path / "resumed") == expected


def test_without_resume_an_unfinished_run_is_kept(dense, tmp_path):
    run(dense, tmp_path / "journal")
    with pytest.raises(ValueError, match="journal: an unfinished run is recorded here"):
        run(dense, tmp_path / "journal")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"iterations": 3}, "another config"),
        ({"calibration": torch.flip(tokens(), dims=[1])}, "another calibration data"),
        ({}, "another dense checkpoint"),
    ],
)
def test_journal_of_another_run_is_refused(dense, tmp_path, changes, part):
    run(dense, tmp_path / "journal")
    if not changes:
        model = tiny_model(num_hidden_layers=3)
        model.model.norm.weight.data[0] += 1
        model.save_pretrained(dense)
    with pytest.raises(ValueError, match=f"belongs to a run with {part}$"):
        run(dense, tmp_path / "journal", resume=True, **changes)


@pytest.mark.parametrize("damage", ["flip", "remove", "line"])
def test_damaged_journal_is_refused(dense, tmp_path, damage):
    run(dense, tmp_path / "journal")
    file = tmp_path / "journal" / "00001.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        lines = tmp_path / "journal" / LINES
        entries = lines.read_text().splitlines()
        entries[1] = json.dumps({"file": "../../dense/model.safetensors"})
        lines.write_text("\n".join(entries) + "\n")
    with pytest.raises(CheckpointError, match="damaged"):
        run(dense, tmp_path / "journal", resume=True)


def test_journal_holds_packed_layers_only(dense, tmp_path):
    run(dense, tmp_path / "journal")
    files = sorted((tmp_path / "journal").glob("*.safetensors"))
    assert len(files) == 3
    assert all(".weight_" in key for file in files for key in load_file(file))
