"""The command line: what it prints, and that every slip ends in one line and exit code 2 before the long work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit.cli import app
from tests.tiny import save_words

QUICK = ("iterations=1", "quantiles=3", "max_salient_per_block=4", "block_size=32")


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of the words w0 to w126."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense") / "dense"
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    save_words(folder)
    return folder


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    file = dense.parent / "text.txt"
    file.write_text(" ".join(f"w{number * 7 % 127}" for number in range(400)))
    return file


@pytest.fixture(scope="module")
def packed(dense: Path, text: Path) -> Path:
    """The dense model, compressed by the command."""
    out = dense.parent / "packed"
    options = [word for option in QUICK for word in ("--option", option)]
    sizes = ("--samples", 4, "--sequence-length", 16)
    result = run("quantize", dense, out, "--method", "arb", *options, "--calibration", text, *sizes, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["total_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert list(content["left_dense"].values()) == ["output head"]
    return out


def test_pbs2p_by_the_command(dense: Path, text: Path, tmp_path: Path) -> None:
    """The method's own options, the N of every block in the saved config, and in what inspect lists."""
    options = [word for option in (*QUICK, "n=5", "m=8", "groups=billm") for word in ("--option", option)]
    sizes = ("--samples", 4, "--sequence-length", 16)
    result = run("quantize", dense, tmp_path / "out", "--method", "pbs2p", *options, "--calibration", text, *sizes)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sum(stored["layers"].values()) == 10
    result = run("inspect", tmp_path / "out", "--layers", "--json")
    masks = {row["name"]: row["spec"].get("keep_n", 8) for row in json.loads(result.stdout)["modules"]}
    assert len(masks) == 14
    assert all(n == stored["layers"][name.rpartition(".")[0].rpartition(".")[0]] for name, n in masks.items())
    assert run("verify", tmp_path / "out").exit_code == 0
    for slip, message in (
        ("n=9", "n must not exceed m"),
        ("m=5", "multiple of m = 5"),
        ("n_low=5", "the mean cannot be n"),
    ):
        words = ("--method", "pbs2p", "--option", slip, "--calibration", "none")
        result = run("quantize", dense, tmp_path / "no", *words)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_adasvd_by_the_command(dense: Path, text: Path, tmp_path: Path) -> None:
    """A ratio for every block in the saved config, the rank of every layer in what inspect lists."""
    options = ("--method", "adasvd", "--option", "ratio=0.5", "--option", "factor_dtype=bfloat16")
    sizes = ("--samples", 8, "--sequence-length", 16)
    result = run("quantize", dense, tmp_path / "out", *options, "--calibration", text, *sizes)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(stored["layers"]) == 2
    result = run("inspect", tmp_path / "out", "--layers", "--json")
    rows = json.loads(result.stdout)["modules"]
    assert len(rows) + sum("save nothing" in reason for reason in stored["left_dense"].values()) == 14
    assert all(row["bytes"] == 2 * row["spec"]["rank"] * sum(_shape(row["spec"])) for row in rows)
    assert run("verify", tmp_path / "out").exit_code == 0
    assert "adasvd" in [row["name"] for row in json.loads(run("methods", "--json").stdout)]
    for slip, message in (("ratio=1.5", "ratio must be from"), ("min_ratio=0.9", "min_ratio must not exceed ratio")):
        words = ("--method", "adasvd", "--option", slip, "--calibration", "none")
        result = run("quantize", dense, tmp_path / "no", *words)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_recalkv_by_the_command(dense: Path, text: Path, tmp_path: Path) -> None:
    """A rank for every projection in the saved config; ranks and bytes of the cache in what inspect shows."""
    options = ("--method", "recalkv", "--option", "ratio=0.5", "--option", "rank_multiple=4")
    sizes = ("--samples", 8, "--sequence-length", 16)
    result = run("quantize", dense, tmp_path / "out", *options, "--calibration", text, *sizes)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sum(stored["layers"].values()) == 2 * 32
    cache = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["cache"]
    assert cache["bytes_per_token"] * 2 == cache["dense_bytes_per_token"] == 2 * 2 * 2 * 32
    shown = " ".join(run("inspect", tmp_path / "out").output.split())
    assert "cache: ranks by layer" in shown
    assert "█" in shown
    assert run("verify", tmp_path / "out").exit_code == 0
    assert "recalkv" in [row["name"] for row in json.loads(run("methods", "--json").stdout)]
    slips = {
        "ratio=0.1": "ratio 0.1 leaves rank 3 of 32, below the least, 8",
        "key_group_size=2": "does not divide its 1 heads",
        "latent_bits=5": "latent_bits must be one of 16, 8, 4, 3",
        "recent_window=8": "recent_window needs latent_bits below 16",
    }
    for slip, message in slips.items():
        words = ("--method", "recalkv", "--option", slip, "--calibration", text)
        result = run("quantize", dense, tmp_path / "no", *words)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "no").exists()


def _shape(spec: dict[str, int]) -> tuple[int, int]:
    return spec["out_features"], spec["in_features"]


def test_quantize_makes_a_model_that_loads_and_tells_nothing_of_this_machine(packed: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert len(hf_lowbit.packed_modules(model)) == 14
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (stored["iterations"], stored["samples"], stored["calibration"]["kind"]) == (1, 4, "text file")
    assert len((packed / "compression_report.jsonl").read_text().splitlines()) == 14
    for file in packed.glob("*.json*"):
        assert str(text.parent) not in file.read_text()


def test_a_recipe_from_a_file(dense: Path, tmp_path: Path) -> None:
    rule = {"pattern": "*", "config": {"method": "arb", "variant": "rtn", "calibration": None}}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"method": "recipe", "rules": [rule], "skip": ["*.up_proj"]}))
    result = run("quantize", dense, tmp_path / "out", "--recipe", recipe, "--skip", "*.down_proj")
    assert result.exit_code == 0, result.output
    assert "packed 10 layers" in result.stdout
    assert "bits per parameter" in result.stdout


def refused(result: Result, *parts: str) -> None:
    """Check that a command ended in one line on stderr that holds ``parts``."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_bad_options_are_all_in_one_message(tmp_path: Path) -> None:
    options = ("itertions=3", "quantiles=many", "damping=5", "column_group_bitmap=perhaps", "oops", "seed=1")
    words = [word for option in options for word in ("--option", option)]
    result = run("quantize", "no/model", tmp_path / "o", "--method", "arb", *words, "--seed", 2, "--samples", 0)
    refused(
        result,
        "unknown option 'itertions' (did you mean 'iterations'?)",
        "quantiles must be an integer, got 'many'",
        "damping must be from 1e-08 to 1.0, got 5.0",
        "column_group_bitmap must be true or false, got 'perhaps'",
        "'oops' must be name=value",
        "seed is given twice",
        "samples must be at least 1, got 0",
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "either --method"),
        (("--method", "nope"), "unknown method 'nope'"),
        (("--method", "arb", "--recipe", "r.json"), "either --method"),
        (("--recipe", "absent.json"), "absent.json"),
        (("--method", "arb", "--calibration", "absent.txt"), "absent.txt"),
        (("--method", "arb", "--calibration", "none", "--option", "variant=x"), "needs calibration data"),
        (("--method", "arb", "--calibration", "none", "--dtype", "int4"), "--dtype must be one of"),
        (("--method", "arb", "--calibration", "none", "--max-shard-size", "5"), "max_shard_size"),
        (("--method", "arb", "--calibration", "none", "--batch-size", "0"), "batch_size"),
        (("--method", "arb", "--calibration", "none", "--skip", "*.nope"), "no module of"),
    ],
)
def test_slips_are_found_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("quantize", dense, "out", *words), part)
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_looked_at_before_the_model(packed: Path, dense: Path, tmp_path: Path) -> None:
    rest = ("--method", "arb", "--calibration", "none")
    refused(run("quantize", "no/model", packed, *rest), "exists and is not empty")
    refused(run("quantize", "no/model", tmp_path / "a" / "b", *rest), "does not exist")
    refused(run("quantize", dense, dense, *rest, "--overwrite"), "is the dense model itself")
    refused(run("quantize", "./no-such-model", tmp_path / "a", *rest), "no such folder")


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--debug")
    assert isinstance(result.exception, hf_lowbit.CheckpointError)
    refused(run("inspect", tmp_path), "no config.json")


def test_inspect(packed: Path, tmp_path: Path) -> None:
    content = json.loads(run("inspect", packed, "--json", "--layers").stdout)
    assert content["total_bytes"] == sum(file.stat().st_size for file in packed.iterdir())
    assert len(content["modules"]) == 14
    assert "modules" not in json.loads(run("inspect", packed, "--json").stdout)
    result = run("inspect", packed, "--layers", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0
    assert f"{content['total_bytes']:,}" in result.stdout
    assert (tmp_path / "plot.png").is_file()


def test_eval(packed: Path, dense: Path, text: Path) -> None:
    sizes = ("--samples", 2, "--sequence-length", 16, "--no-speed")
    content = json.loads(run("eval", packed, "--against", dense, "--data", text, *sizes, "--json").stdout)
    assert content["ratios"]["packed"]["bytes"] < 1
    result = run("eval", packed, "--data", text, *sizes)
    assert result.exit_code == 0
    assert f"{content['models']['packed']['perplexity']:.3f}" in result.stdout


def test_a_model_without_tokenizer(packed: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    refused(run("eval", tmp_path, "--data", tmp_path), "no tokenizer could be loaded")
    refused(run("generate", tmp_path, "--prompt", "w1"), "no tokenizer could be loaded")


def test_generate(packed: Path) -> None:
    result = run("generate", packed, "--prompt", "w1 w2", "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert result.stdout.strip()
    refused(run("generate", packed, "--prompt", "w1", "--chat"), "no chat template")


def test_methods() -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert "arb" in [row["name"] for row in rows]
    options = {row["name"]: row for row in json.loads(run("methods", "arb", "--json").stdout)}
    assert options["iterations"]["default"] == 15
    assert "billm" in options["variant"]["allowed"]
    assert run("methods").exit_code == run("methods", "arb").exit_code == 0
    refused(run("methods", "nope"), "unknown method 'nope'; known:")


def test_help_and_version() -> None:
    assert run("--version").stdout.strip() == f"hf-lowbit {hf_lowbit.__version__}"
    for command in ("quantize", "inspect", "eval", "generate", "methods"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Example:" in result.stdout
        assert "--debug" not in result.stdout


def test_interrupted_quantize_is_resumed(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowbit.compress.engine import Run

    original = Run.compress_layers

    def fail(self: Run, names: list[str], stats: dict[str, Any]) -> None:
        if any(".layers.1." in name for name in names):
            raise ValueError("stopped here")
        original(self, names, stats)

    options = [word for option in QUICK for word in ("--option", option)]
    arguments = ("quantize", dense, tmp_path / "out", "--method", "arb", "--calibration", "none", *options)
    monkeypatch.setattr(Run, "compress_layers", fail)
    assert "stopped here" in run(*arguments).stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Run, "compress_layers", original)
    assert "unfinished run" in run(*arguments).stderr
    assert run(*arguments, "--resume").exit_code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run("verify", tmp_path / "out").exit_code == 0


def test_an_encoder_decoder_is_loaded_by_its_own_class(dense: Path, text: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "t5")
    options = [word for option in QUICK for word in ("--option", option)]
    words = ("--method", "arb", *options, "--calibration", text, "--samples", 2, "--sequence-length", 8)
    result = run("quantize", tmp_path / "t5", tmp_path / "packed", *words)
    assert result.exit_code == 0, result.output
    assert "packed 14 layers" in result.output  # all but "wo", which T5 keeps in float32
    written = run("generate", tmp_path / "packed", "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert written.exit_code == 0, written.output
    measured = run("eval", tmp_path / "packed", "--data", text, "--no-speed")
    assert measured.exit_code == 2
    assert "this is an encoder-decoder" in measured.output


def test_a_model_that_writes_no_text_is_refused(dense: Path, tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path / "vit")
    result = run("quantize", tmp_path / "vit", tmp_path / "out", "--method", "arb", "--calibration", "none")
    assert result.exit_code == 2
    assert "'vit' is not a kind of model that writes text" in result.output


def test_bench_lists_the_kernel_of_every_kind_of_layer(packed: Path) -> None:
    result = run("bench", packed, "--list")
    assert result.exit_code == 0, result.output
    assert "64 × 64" in result.stdout
    assert "reference" in result.stdout
    other = run("bench", "--list", "--device", "cuda")
    assert "tensors on cuda" in " ".join(other.stdout.split())


def test_bench_measures(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lowbit.report.bench.speed_table.__defaults__", ((1, 2), 0.01))
    result = run("bench", packed)
    assert result.exit_code == 0, result.output
    assert "× dense" in result.stdout


def test_what_was_left_out_becomes_an_adapter(dense: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    sizes = ("--samples", 4, "--sequence-length", 16)
    for name, data in (("weights", ()), ("outputs", ("--data", text, *sizes))):
        result = run("adapter", packed, dense, tmp_path / name, "--rank", 4, *data)
        assert result.exit_code == 0, result.output
        assert f"of what 14 layers had lost of their {name}" in result.output
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    result = run("adapter", packed, dense, tmp_path / "weights")
    assert result.exit_code == 2
    assert "exists and is not empty" in result.output


def test_a_folder_for_an_adapter_is_looked_at_before_any_model(packed: Path, tmp_path: Path) -> None:
    taken = run("adapter", tmp_path / "absent", tmp_path / "absent", packed)
    assert taken.exit_code == 2
    assert f"error: {packed}: exists and is not empty; choose another folder" in taken.output
