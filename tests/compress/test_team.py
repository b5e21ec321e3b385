"""Several processes that share a run end with what one process gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import AdaSVDConfig, ReCalKVConfig, RunOptions
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.team import Team
from hf_lowbit.hf.save import REPORT_FILE, save_model
from hf_lowbit.report.evaluate import evaluate
from tests.compress.test_planning import sparse
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model, tokens

# What each process runs. Several cases in one start, because a start takes longer than all of them.
WORKER = """
import json, sys, torch
torch.set_num_threads(1)
import torch.distributed as dist
from pathlib import Path
from transformers import AutoModelForCausalLM
from hf_lowbit import AdaSVDConfig, RunOptions
from hf_lowbit.compress.team import join, leave
from hf_lowbit.hf.save import REPORT_FILE, save_model
from hf_lowbit.report.evaluate import evaluate
from tests.compress.test_team import config_of
folder = Path(sys.argv[1])
join()
for case, changes in json.loads(sys.argv[2]).items():
    architecture = case.partition("-")[0]
    journal = folder / f"journal-{case}"
    run = RunOptions(progress=False, batch_size=1, journal=journal, report=folder / f"{case}.jsonl", resume=True)
    model = AutoModelForCausalLM.from_pretrained(folder / architecture, quantization_config=config_of(changes, run))
    if dist.get_rank() == 0:
        save_model(model, folder / case)
leave()
"""
CASES = {
    "llama-free": {"calibration": None},
    "mixtral-free": {"calibration": None},
    "llama-data": {},
    "mixtral-data": {},
    "llama-sparse": {"n": 4},
    "llama-ratio": {"ratio": 0.5},
    "llama-latent": {"rank_multiple": 4, "ocmf": "cross"},
}


def config_of(changes, run):
    if "rank_multiple" in changes:
        return ReCalKVConfig(calibration=tokens(8), samples=8, run=run, **changes)
    if "ratio" in changes:
        return AdaSVDConfig(calibration=tokens(8), samples=8, run=run, **changes)
    return (sparse if "n" in changes else quick)(run=run, **changes)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    for architecture in ("llama", "mixtral"):
        tiny_model(architecture).save_pretrained(folder / architecture)
    (folder / "worker.py").write_text(WORKER)
    done = torchrun(str(folder / "worker.py"), str(folder), json.dumps(CASES))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def by_one(folder, case, target):
    run = RunOptions(progress=False, batch_size=1)
    config = config_of(CASES[case], run)
    model = AutoModelForCausalLM.from_pretrained(folder / case.partition("-")[0], quantization_config=config)
    save_model(model, target)
    return model


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_data_free_run_gives_the_same_bytes(by_two, architecture, tmp_path):
    case = f"{architecture}-free"
    by_one(by_two, case, tmp_path / "one")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (by_two / case / name).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_calibrated_run_gives_the_same_within_rounding(by_two, architecture, tmp_path):
    """The order of a float32 sum differs: so may a sign, where both are equally good."""
    case = f"{architecture}-data"
    alone = by_one(by_two, case, tmp_path / "one")
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", by_two / case))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    rows = {row["module"]: row for row in alone.hf_quantizer.report.rows}
    shared = [json.loads(line) for line in (by_two / f"{case}.jsonl").read_text().splitlines()]
    assert {row["module"] for row in shared} == set(rows)
    for row in shared:
        assert row["calibration_tokens"] == rows[row["module"]]["calibration_tokens"]
        assert row["output_error"] == pytest.approx(rows[row["module"]]["output_error"], rel=0.02)
    loaded = AutoModelForCausalLM.from_pretrained(by_two / case)
    difference = (logits(loaded) - logits(alone)).square().mean() / logits(alone).square().mean()
    assert float(difference) < 1e-3


def test_two_processes_give_latents_the_same_ranks(by_two, tmp_path):
    """Gradients, moments and products of both models' inputs are summed over all."""
    alone = by_one(by_two, "llama-latent", tmp_path / "one").config.quantization_config
    shared = AutoModelForCausalLM.from_pretrained(by_two / "llama-latent").config.quantization_config
    assert shared.layers == alone.layers
    for name, row in alone.modules.items():
        assert shared.modules[name]["error"] == pytest.approx(row["error"], rel=1e-3)


def test_two_processes_plan_as_one(by_two, tmp_path):
    """Cosines are summed over all; the number of weights kept in each block comes out alike."""
    alone = by_one(by_two, "llama-sparse", tmp_path / "one").config.quantization_config
    shared = AutoModelForCausalLM.from_pretrained(by_two / "llama-sparse").config.quantization_config
    assert shared.layers == alone.layers
    for name, row in alone.modules.items():
        assert shared.modules[name]["error"] == pytest.approx(row["error"], rel=0.02)


def test_two_processes_follow_the_dense_model_as_one(by_two, tmp_path):
    """Products of dense and compressed inputs are summed over all, layer after layer of a block."""
    alone = by_one(by_two, "llama-ratio", tmp_path / "one")
    shared = AutoModelForCausalLM.from_pretrained(by_two / "llama-ratio")
    assert shared.config.quantization_config.layers == pytest.approx(alone.config.quantization_config.layers)
    difference = (logits(shared) - logits(alone)).square().mean() / logits(alone).square().mean()
    assert float(difference) < 1e-6


def test_journal_of_two_processes_serves_one(by_two, tmp_path):
    run = RunOptions(progress=False, batch_size=1, journal=by_two / "journal-llama-data", resume=True)
    model = AutoModelForCausalLM.from_pretrained(by_two / "llama", quantization_config=quick(run=run))
    save_model(model, tmp_path / "resumed")
    expected = (by_two / "llama-data" / "model.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == expected


def test_failure_in_one_process_ends_all(by_two, tmp_path):
    """More processes than batches; and a message, not a hang."""
    config = {"llama-few": {"calibration": [[5, 6, 7]], "samples": 1}}
    done = torchrun(str(by_two / "worker.py"), str(by_two), json.dumps(config))
    assert done.returncode != 0
    assert "1 calibration batches cannot be shared by 2 processes; lower run.batch_size" in done.stderr
    assert not (by_two / "llama-few").exists()


@pytest.mark.slow
def test_real_model_on_the_command_line(smollm2_path, wikipedia_calibration, wikipedia_heldout, tmp_path):
    """Four blocks of SmolLM2 by one process and by two: the same perplexity."""
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_pretrained(smollm2_path, num_hidden_layers=4).save_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.save_pretrained(dense)
    options = ["--method", "arb", "--calibration", str(wikipedia_calibration), "--samples", "16"]
    options += ["--sequence-length", "256", "--option", "iterations=5"]
    subprocess.run([sys.executable, "-m", "hf_lowbit", "quantize", dense, tmp_path / "one", *options], check=True)
    done = torchrun("-m", "hf_lowbit", "quantize", str(dense), str(tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    assert not (tmp_path / ".two.run").exists()
    rows = [
        {row["module"]: row for row in map(json.loads, (tmp_path / name / REPORT_FILE).read_text().splitlines())}
        for name in ("one", "two")
    ]
    for name, row in rows[0].items():
        assert rows[1][name]["output_error"] == pytest.approx(row["output_error"], rel=1e-4), name
    found = [evaluate(tmp_path / name, str(wikipedia_heldout), speed=False) for name in ("one", "two")]
    one, two = (row["perplexity"] for result in found for row in result["models"].values())
    print(f"perplexity {one:.2f} with one process, {two:.2f} with two")
    assert two == pytest.approx(one, rel=1e-6)


def test_one_process_is_a_team_of_one():
    team = Team()
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    assert team.share([1, 2, 3]) == [1, 2, 3]
    stats = LinearStats("layer", 2)
    stats.update(torch.ones(1, 3, 2))
    team.add_up([stats, stats])
    assert stats.tokens == 3
    assert team.smallest(5) == 5
    error = ValueError("reason")
    with pytest.raises(ValueError, match="reason"):
        team.exchange(["layer"], {}, error)
