"""The demo runs from the first line to the last on the real model, with hardly any data."""

import pytest

from examples import demo


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
