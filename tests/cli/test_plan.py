"""Budgets on the command line: a plan is shown before the run, kept by it, and slips end in one line."""

import json
import sys

import pytest
from typer.testing import CliRunner

from hf_lowbit.cli import app
from hf_lowbit.report.inspect import inspect
from tests.tiny import save_words, tiny_model

LOOK = ("--samples", 4, "--sequence-length", 16)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    tiny_model().save_pretrained(folder)
    save_words(folder)
    (folder.parent / "text.txt").write_text(" ".join(f"w{number * 7 % 127}" for number in range(400)))
    return folder


def test_a_plan_is_what_the_run_then_does(dense, tmp_path):
    words = (dense, "--target-bits", 3.3, "--calibration", dense.parent / "text.txt", *LOOK, "--json")
    looked = run("plan", *words)
    assert looked.exit_code == 0, looked.output
    done = run("quantize", dense, tmp_path / "out", *words[1:])
    assert done.exit_code == 0, done.output
    plan = json.loads(looked.stdout)["plan"]
    assert json.loads(done.stdout)["plan"] == plan
    found = inspect(tmp_path / "out")
    assert found.bits_per_weight <= 3.3
    assert found.packed_bytes == sum(row["bytes"] for row in plan)
    assert [dict(row) for row in found.config.plan] == plan


def test_the_table_comes_before_the_run(dense, tmp_path):
    done = run("quantize", dense, tmp_path / "out", "--target-bits", 4, "--calibration", "none")
    assert done.exit_code == 0, done.output
    assert done.stdout.index("all of") < done.stdout.index("packed 14 layers") < done.stdout.index("saved to")
    seen = run("plan", dense, "--target-bytes", 200_000)
    assert seen.exit_code == 0 and "nothing was compressed" in seen.stdout
    assert "w_bits=" in seen.stdout


def test_a_target_of_the_command_replaces_that_of_the_file(dense, tmp_path):
    rules = [{"method": "dvd_quant", "w_bits": bits, "delta": None, "a_bits": 16} for bits in (2, 4)]
    recipe = {"method": "recipe", "rules": [{"pattern": "*", "candidates": rules}], "target_bytes": 1}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    assert "target_bytes=1 cannot be met" in run("plan", dense, "--recipe", file).output
    looked = run("plan", dense, "--recipe", file, "--target-bits", 3.5, "--json")
    assert looked.exit_code == 0, looked.output
    assert {row["settings"] for row in json.loads(looked.stdout)["plan"]} == {"w_bits=2", "w_bits=4"}


def test_the_recipe_of_a_chosen_model_can_be_used_again(dense, tmp_path):
    assert run("quantize", dense, tmp_path / "out", "--target-bits", 4, "--calibration", "none").exit_code == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    again = run("quantize", dense, tmp_path / "again", "--recipe", tmp_path / "recipe.json")
    assert again.exit_code == 0, again.output
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    tables = [inspect(file.parent).modules for file in files]
    assert [(m.name, m.spec, m.bytes) for m in tables[0]] == [(m.name, m.spec, m.bytes) for m in tables[1]]
    refused = run("plan", dense, "--recipe", tmp_path / "recipe.json", "--target-bits", 3)
    assert refused.exit_code == 2 and "no rule has several configs" in refused.output


def test_without_the_solver_one_line_says_so(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    result = run("plan", dense, "--target-bits", 3)
    assert result.exit_code == 2
    assert "pip install 'hf-lowbit[budget]'" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan",), "give --target-bits or --target-bytes"),
        (("plan", "--target-bits", 0.1), "is the nearest target"),
        (("plan", "--target-bits", 3, "--target-bytes", 3), "either target_bits_per_weight or target_bytes"),
        (("plan", "--target-bits", -1), "above 0 and at most 64"),
        (("quantize", "OUT", "--target-bits", 3, "--method", "arb"), "leave --method out"),
        (("quantize", "OUT", "--target-bits", 3, "--option", "w_bits=2"), "belongs to --method"),
        (("quantize", "OUT"), "give either --method NAME"),
    ],
)
def test_slips(dense, tmp_path, words, said):
    first, *rest = (tmp_path / "out" if word == "OUT" else word for word in words)
    result = run(first, dense, *rest)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("out*"))
