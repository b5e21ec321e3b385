"""DVD-Quant through transformers and the command line: a language model with integer weights and activations."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_lowbit import DVDQuantConfig, LowBitRecipe, RunOptions, packed_modules, set_act_bits
from hf_lowbit.cli import app
from tests.hf.test_transformers import logits
from tests.tiny import tiny_model

QUIET = RunOptions(progress=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dvd") / "dense"
    tiny_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(127)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


def compress(dense, config=None, **options):
    config = config or DVDQuantConfig(**{"preset": "w4a4", "run": QUIET, **options})
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def distance(found, want):
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "rotation_signs_seed": 1}], ids=str)
def test_compress_save_load_use(dense, tmp_path, options):
    model = compress(dense, **options)
    layers = packed_modules(model)
    assert len(layers) == 14
    assert all(layer.spec.activation == "token_group" for layer in layers.values())
    want = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), want)
    assert again.config.quantization_config == model.config.quantization_config
    # bits of activations are chosen in memory: the files do not change
    before = load_file(tmp_path / "packed" / "model.safetensors")
    assert set_act_bits(again, 8) == 14
    more = logits(again)
    assert torch.equal(more, want) == (again.config.quantization_config.delta is not None)  # 8 bits are stored then
    again.save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    set_act_bits(again, 16)
    unrounded = logits(again)
    assert distance(more, unrounded) < distance(want, unrounded) or torch.equal(more, want)
    rough = copy.deepcopy(again)
    assert torch.equal(logits(rough), unrounded)
    assert distance(logits(again.dequantize()), unrounded) < 1e-3


def test_scales_survive_a_cast_of_the_model(dense, tmp_path):
    model = compress(dense)
    model.save_pretrained(tmp_path / "packed")
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    for layer in packed_modules(cast).values():
        layer.float().bfloat16()
    for (name, layer), other in zip(packed_modules(model).items(), packed_modules(cast).values(), strict=True):
        for part, tensor in layer.packed.state().items():
            assert torch.equal(other.packed.state()[part], tensor), f"{name}.{part}"
    assert distance(logits(cast).float(), logits(model)) < 0.2  # codes of 4 bits flip


def test_compiled(dense):
    model = compress(dense)
    layer = packed_modules(model)["model.layers.0.self_attn.q_proj"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64)
    for bits in (None, 8, 4):
        layer.act_bits = bits
        assert torch.equal(compiled(x), layer(x))


def test_it_mixes_with_other_options_in_a_recipe(dense):
    rules = {"*.down_proj": DVDQuantConfig(delta=None, a_bits=16, w_bits=8), "*": DVDQuantConfig(preset="w4a8")}
    layers = packed_modules(compress(dense, LowBitRecipe(rules, skip=["lm_head"], run=QUIET)))
    assert layers["model.layers.0.mlp.down_proj"].spec.bits == 8
    assert layers["model.layers.0.mlp.up_proj"].spec.act_bits == 8
    assert layers["model.layers.0.mlp.down_proj"].spec.activation == "none"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_by_the_command(dense, tmp_path):
    words = ("--option", "preset=w4a4", "--option", "group_size=32", "--option", "delta=0.2", "--option", "a_bits=5")
    result = run("quantize", dense, tmp_path / "out", "--method", "dvd-quant", *words)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["delta"], config["group_size"], config["a_bits"]) == (0.2, 32, 5)
    content = json.loads(run("inspect", tmp_path / "out", "--json", "--layers").stdout)
    row = next(row for row in content["modules"] if row["name"].endswith("q_proj"))
    # 4 bits, a scale of 16 for 32 columns, zero points of 4; no column stands out, so there are no factors
    assert row["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 32)
    assert row["spec"]["rotation"] == 64
    fixed = run("quantize", dense, tmp_path / "w4a8", "--method", "dvd_quant", "--option", "delta=none")
    assert fixed.exit_code == 0
    assert json.loads((tmp_path / "w4a8" / "config.json").read_text())["quantization_config"]["delta"] is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("delta=-1", "delta must be None or a number from 0 to 1e6, got -1"),
        ("delta=much", "delta must be None or a number"),
        ("group_size=7", "group_size must be -1"),
        ("preset=w8a8", "preset must be one of default, paper"),
        ("a_bits=12", "a_bits must be from 2 to 8"),
        ("rotation_block=256", "rotation_block must be one of"),
    ],
)
def test_slips_on_the_command_line(dense, tmp_path, option, message):
    result = run("quantize", dense, tmp_path / "out", "--method", "dvd-quant", "--option", option)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_methods_lists_it():
    rows = {row["name"]: row for row in json.loads(run("methods", "--json").stdout)}
    assert rows["dvd_quant"]["needs"] == "none"
    options = {row["name"]: row for row in json.loads(run("methods", "dvd-quant", "--json").stdout)}
    assert options["delta"]["default"] == 0.09
    assert run("methods", "dvd_quant").exit_code == 0
