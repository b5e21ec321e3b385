"""Several processes that share a run end with what one process gets; one that dies takes the others with it."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.team import Team
from hf_lowbit.hf.save import REPORT_FILE, save_model
from hf_lowbit.report.evaluate import evaluate
from tests.compress.team_cases import CASES, DATA, EXACT, FAILING, compressed, save_dense

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TOGETHER = [case for case in CASES if case not in FAILING]
# Sums of float64 in another order: a float32 may differ in its last bit, and with it a sign that decides nothing.
DIFFERING_BYTES, ERROR = 1e-3, 1e-4


def launch(*arguments, launcher=TORCHRUN):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


together = functools.partial(launch, "-m", "tests.compress.team_cases")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Every case by two processes, in one start, which takes longer than all of them."""
    folder = tmp_path_factory.mktemp("team")
    save_dense(folder, {CASES[case][0] for case in TOGETHER})
    done = together(folder, *CASES)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tables(folder):
    """Return the module table of a saved model, with its errors apart."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = config.pop("modules")
    return config, modules, {name: row.pop("error") or 0.0 for name, row in modules.items()}


@pytest.mark.parametrize("case", TOGETHER)
def test_two_processes_end_with_what_one_gets(by_two, case, tmp_path):
    """The very bytes without data, within rounding with data: weights, ranks and plans, errors, grids of attention."""
    save_model(compressed(by_two[0], case), tmp_path / "one")
    two = by_two[0] / case
    if case in EXACT:
        for file in [*(tmp_path / "one").glob("*.safetensors"), tmp_path / "one" / "config.json"]:
            assert file.read_bytes() == (two / file.name).read_bytes()
        return
    ours, theirs = weights(tmp_path / "one"), weights(two)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    bytes_of = [torch.cat([part[k].contiguous().view(torch.uint8).flatten() for k in ours]) for part in (ours, theirs)]
    assert float((bytes_of[0] != bytes_of[1]).double().mean()) <= DIFFERING_BYTES
    (_, modules, errors), (_, others, found) = tables(tmp_path / "one"), tables(two)
    assert modules == others
    assert found == pytest.approx(errors, rel=ERROR)


def test_statistics_are_of_all_tokens(by_two):
    folder, _ = by_two
    for case in ("llama-data", "llama-latent", "mixtral-data"):
        rows = [json.loads(line) for line in (folder / f"{case}.jsonl").read_text().splitlines()]
        counts = {row["calibration_tokens"] for row in rows if "experts" not in row["module"]}
        assert counts - {None} == {DATA["calibration"].numel()}, case


def test_experts_that_no_process_sends_a_token_to(by_two):
    """Counts are summed: an expert that one process reaches is calibrated in all; the first one none does."""
    folder, said = by_two
    rows = {row["module"]: row for row in map(json.loads, (folder / "closed-data.jsonl").read_text().splitlines())}
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        up = [rows[f"{experts}.each_gate_up_proj.{i}"] for i in range(4)]
        assert up[0]["calibration_tokens"] == 0
        assert up[0]["output_error"] is None
        assert sum(row["calibration_tokens"] for row in up) == DATA["calibration"].numel()
        assert said.count(f"from their weights alone ({experts}.each_gate_up_proj.0") == 1  # the leading process alone


def test_each_process_writes_the_file_of_what_it_packed(by_two):
    """A block is two files, with as many weights in either as seven layers of such sizes allow."""
    folder, _ = by_two
    lines = (folder / "journal-llama-data" / "journal.jsonl").read_text().splitlines()[1:]
    sizes = [sum(row["weights"] for row in json.loads(line)["rows"]) for line in lines]
    assert len(sizes) == 4
    assert all(0.8 < sizes[i] / sizes[i + 1] < 1.25 for i in (0, 2))
    alone = (folder / "journal-llama-one-layer" / "journal.jsonl").read_text().splitlines()[1:]
    assert len(alone) == 1


def test_journal_of_two_processes_serves_one(by_two, tmp_path):
    folder, _ = by_two
    model = compressed(folder, "llama-data", journal=folder / "journal-llama-data", resume=True)
    save_model(model, tmp_path / "resumed")
    expected = (folder / "llama-data" / "model.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == expected


def test_a_process_that_is_killed_ends_the_run_which_can_go_on(by_two):
    """The other one stops and says so; nothing half-written is left; resumed by another launcher, the same bytes."""
    folder, _ = by_two
    expected = (folder / "llama-data").rename(folder / "expected")
    for name in ("journal-llama-data", "llama-data.jsonl"):
        (folder / name).rename(folder / f"expected-{name}")
    died = together(folder, "--die-after", "1", "llama-data")
    assert died.returncode != 0
    said = re.search(r"(another process of this run has ended).*the same command again with --resume", died.stderr)
    assert said, died.stderr[-3000:]
    assert not (folder / "llama-data").exists()
    left = folder / "journal-llama-data"
    assert {path.name for path in left.iterdir()} == {"journal.jsonl", "00000.safetensors", "00001.safetensors"}
    went_on = together(folder, "llama-data", launcher=ACCELERATE)
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert (folder / "llama-data" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (folder / "llama-data" / "config.json").read_bytes() == (expected / "config.json").read_bytes()


def test_a_failure_in_one_process_is_told_to_all(by_two):
    """Each ends with an error, none waits: where it happened with that, elsewhere with whose it is."""
    said = by_two[1]
    assert re.search(r"llama-broken, process 1: ValueError: model\.layers\.0\S+: meant to fail", said)
    assert re.search(r"llama-broken, process 0: TeamError: process 1: ValueError: model\.layers\.0\S+: meant to", said)


def test_more_processes_than_calibration_batches_are_refused(by_two):
    for rank in range(2):
        message = (
            f"llama-few, process {rank}: ValueError: 1 calibration batches cannot be shared by 2 processes; lower"
        )
        assert message in by_two[1]
    assert not (by_two[0] / "llama-few").exists()


def test_large_layers_go_to_whoever_has_least():
    team = Team()
    team.size = 2
    sizes = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 56, "up": 56, "down": 56}
    owners = team.owners(sizes)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(2)]
    assert sorted(loads) == [96, 112]
    team.size = 9  # more than there are layers
    assert sorted(team.owners(sizes).values()) == list(range(7))


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
    done = launch("-m", "hf_lowbit", "quantize", str(dense), str(tmp_path / "two"), *options)
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
    assert team.gather({"a": 1}) == [{"a": 1}]
    stats = LinearStats("layer", 2)
    stats.update(torch.ones(1, 3, 2))
    team.add_up({"layer": stats, "twin": stats})
    assert stats.tokens == 3
    assert team.smallest(5) == 5
    error = ValueError("reason")
    with pytest.raises(ValueError, match="reason"):
        team.exchange(["layer"], {}, error)
