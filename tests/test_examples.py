"""The examples run from the first line to the last on the real model, with hardly any data."""

import subprocess
import sys

import pytest

from examples import demo, long_context


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_context(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["long_context", "--fast", "--out", str(tmp_path)])
    long_context.main()
    shown = capsys.readouterr().out
    for line in ("23,040", "11,640", "1.98", "latents of 4 bits", "it wrote was the same with the cache from the"):
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
