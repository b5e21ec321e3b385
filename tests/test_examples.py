"""The examples run from the first line to the last on the real model, with hardly any data."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from examples import binary_convs, demo, long_context, recipe_mixed, super_resolution_w2a2, video_cached, video_w4a4
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import shares_of


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--fast", "--out", str(tmp_path)])
    demo.main()
    shown = capsys.readouterr().out
    assert "Every model gave the same logits, bit for bit" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"rounding", "billm", "arb-rc"}
    for line in ("dense, bfloat16", "plain 1-bit rounding", "BiLLM-style", "ARB-LLM_RC"):
        assert line in shown


def test_a_folder_that_cannot_be_made_is_said_first(tmp_path, monkeypatch, capsys):
    """All examples parse alike."""
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for out in (taken, taken / "below"):
        monkeypatch.setattr("sys.argv", ["recipe_mixed", "--tiny", "--out", str(out)])
        with pytest.raises(SystemExit):
            recipe_mixed.main()
        assert f"--out {out}: " in capsys.readouterr().err
    assert taken.read_text() == "a file"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_context(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["long_context", "--fast", "--out", str(tmp_path)])
    long_context.main()
    shown = capsys.readouterr().out
    for line in ("23,040", "11,716", "1.97", "latents of 4 bits", "it wrote was the same with the cache from the"):
        assert line in shown
    assert [path.name for path in tmp_path.iterdir()] == ["article.safetensors"]


@pytest.mark.slow
def test_push_and_pull():
    """A process of its own: the clients of the Hub read where it is when they are imported."""
    command = [sys.executable, "-m", "examples.push_and_pull"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same logits, bit for bit" in done.stdout
    assert "hf_T0ken" not in done.stdout + done.stderr


def test_video_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["video_cached", "--tiny", "--out", str(tmp_path)])
    video_cached.main()
    shown = capsys.readouterr().out
    rows = {
        name: line.split("│") for line in shown.splitlines() for name in ("QuantCache", "both") if f"│ {name} " in line
    }
    assert all(int(row[2]) < 24 for row in rows.values())
    assert all(float(row[6].split()[0]) > 30 for row in rows.values())
    assert Image.open(tmp_path / "timeline.png").size[0] > 500
    monkeypatch.setattr("sys.argv", ["video_cached", "--tiny", "--steps", "0"])
    with pytest.raises(SystemExit):
        video_cached.main()
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_video_w4a4(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["video_w4a4", "--tiny", "--out", str(tmp_path)])
    video_w4a4.main()
    shown = capsys.readouterr().out
    rows = {name: line for line in shown.splitlines() for name in video_w4a4.VERSIONS if f"│ {name} " in line}
    apart = {name: float(line.split("dB")[0].split("│")[-1]) for name, line in rows.items() if "dB" in line}
    assert apart["DVD-Quant, W4A4"] > apart["rounding, W4A4"] + 10
    assert apart["DVD-Quant, δ-GBS"] > apart["rounding, W4A4"] + 10
    bits = float(rows["DVD-Quant, W4A4"].split("│")[3])  # factors of columns only in layers where some stand out
    assert 4.62 < bits < 4.75
    sheet, moving = (Image.open(tmp_path / name) for name in ("videos.png", "videos.gif"))
    assert sheet.size == (8 * 100 + 4, 3 * 4 * 100 + 4)  # frames, and three prompts of four versions
    assert moving.size == (4 * 100 + 4, 3 * 100 + 4)
    assert moving.n_frames == 8
    assert len(sheet.getcolors(1 << 20)) > 100


def test_super_resolution_w2a2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["super_resolution_w2a2", "--tiny", "--out", str(tmp_path)])
    super_resolution_w2a2.main()
    shown = capsys.readouterr().out
    for line in ("bicubic", "dense", "W4A4", "W3A3", "W2A2"):
        assert line in shown
    assert " 2.04 " in shown
    strip = Image.open(tmp_path / "strip.png")
    assert strip.size == (6 * 132 + 4, 2 * 132 + 4)  # bicubic, dense, three widths, truth; two photographs
    assert {path.name for path in tmp_path.iterdir()} == {"w4a4", "w3a3", "w2a2", "strip.png"}


def test_recipe_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe_mixed", "--tiny", "--out", str(tmp_path)])
    recipe_mixed.main()
    shown = capsys.readouterr().out
    for line in (
        "the plan: the first rule that matches a layer has it",
        "none, which is allowed here",
        "the same logits, bit for bit, and the same tokens",
        "10 × dvd_quant, integer",
        "6 × recalkv, latent",
    ):
        assert line in shown
    held = {(share.layers, share.method, share.held_as) for share in shares_of(inspect(tmp_path / "packed"))}
    assert held == {
        (10, "dvd_quant", "integer"),
        (6, "recalkv", "latent"),
        (3, "adasvd", "low_rank of integer"),
        (1, "pbs2p", "binary, 6:8"),
        (1, "arb", "binary"),
    }
    monkeypatch.setattr("sys.argv", ["recipe_mixed", "--tiny", "--samples", "1"])
    with pytest.raises(SystemExit):
        recipe_mixed.main()
    assert "--samples must be at least 4, got 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_binary_convs(monkeypatch, capsys, tmp_path):
    file = tmp_path / "digits.json"
    monkeypatch.setattr("sys.argv", ["binary_convs", "--tiny", "--json", str(file)])
    binary_convs.main()
    shown = capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))["accuracy"]
    assert found["bidrb"][0] > found["bnn"][0] + 0.15
    for line in ("both residuals (BiDRB), seed 0", "packed 18 convolutions", "accuracy of the packed network"):
        assert line in shown
