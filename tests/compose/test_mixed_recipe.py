"""One config, one set of files, one card: all weight methods and the cache in one model, which comes back the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import CheckpointError, LowBitConfig, LowBitRecipe, packed_modules
from hf_lowbit.cache import cache_bytes
from hf_lowbit.cli import app
from hf_lowbit.hf.card import CardFields, facts_of
from hf_lowbit.hf.card_page import render
from hf_lowbit.hf.record import run_record
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import inspection_json, inspection_tables, shares_of
from hf_lowbit.report.verify import verify
from tests.compose.mixed import HELD, everything
from tests.hf.conftest import hub  # noqa: F401 - the Hub of our own
from tests.hf.test_transformers import logits
from tests.tiny import save_words, tiny_model, tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the dense model and of the one that a calibrated recipe made of it, with the latter in memory."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_model(num_hidden_layers=3, dtype=torch.bfloat16).save_pretrained(folder / "dense")
    save_words(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=everything())
    report = model.hf_quantizer.report
    save_model(model, folder / "packed", rows=report.rows, record=run_record("org/model", report.seconds))
    return folder, model


def written(model, **options):
    """Tokens of a batch of two, the first padded on the left, and what the cache holds then."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    out = model.generate(
        tokens(2, 8), attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **options
    )
    return out.sequences, cache_bytes(out.past_key_values)


def test_each_layer_is_held_as_its_rule_says(folders):
    folder, model = folders
    held = {
        module.name.removeprefix("model."): (module.method, module.held_as)
        for module in inspect(folder / "packed").modules
    }
    assert held == HELD
    assert set(packed_modules(model)) == {f"model.{name}" for name in HELD}


def test_it_comes_back_bit_for_bit(folders, tmp_path):
    folder, model = folders
    loaded = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert loaded.config.quantization_config == model.config.quantization_config
    assert torch.equal(logits(loaded), logits(model))
    found, held = written(loaded)
    assert torch.equal(found, written(model)[0])
    assert held["codes"] > 0
    assert held["dense"] == held["latents"] == 0  # attention works on latents of 4 bits, whatever holds q and o
    save_model(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "packed" / name).read_bytes()
    assert not verify(folder / "packed").problems


def test_saved_in_shards_and_by_transformers(folders, tmp_path):
    model = folders[1]
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits(model))
    assert not verify(tmp_path / "shards").problems


def test_a_damaged_tensor_of_any_method_is_found(folders, tmp_path):
    from safetensors import safe_open

    folder, _ = folders
    content = bytearray((folder / "packed" / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    by_method = {}
    for name, (method, held_as) in HELD.items():
        key = next(key for key in header if key.startswith(f"model.{name}.weight_"))
        by_method[method, held_as] = key
    assert len(by_method) == 8
    target = tmp_path / "copy"
    target.mkdir()
    (target / "config.json").write_bytes((folder / "packed" / "config.json").read_bytes())
    for key in by_method.values():
        damaged = content.copy()
        damaged[start + header[key]["data_offsets"][0]] ^= 1
        (target / "model.safetensors").write_bytes(damaged)
        with safe_open(target / "model.safetensors", "pt") as file:
            assert key in file.keys()
        with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(target)


def test_streamed_and_in_memory_give_the_same_bytes(folders, tmp_path):
    folder, _ = folders
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    hf_lowbit.quantize(model, everything())
    save_model(model, tmp_path / "memory")
    name = "model.safetensors"
    assert (tmp_path / "memory" / name).read_bytes() == (folder / "packed" / name).read_bytes()


def test_a_recipe_file_is_plain_and_comes_back(folders):
    config = folders[1].config.quantization_config
    assert LowBitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_without_data_it_works_too(folders, tmp_path):
    folder, _ = folders
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=everything(calibrated=False))
    save_model(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(written(loaded)[0], written(model)[0])
    dense = loaded.dequantize()
    assert not packed_modules(dense)
    # in bfloat16 the packed product and the dense one round apart, block after block
    assert float((logits(dense) - logits(model)).norm() / logits(model).norm()) < 0.1


# Card and tables -----------------------------------------------------------------------------------------------------


def test_shares_add_up(folders):
    found = inspect(folders[0] / "packed")
    shares = shares_of(found)
    assert sum(share.bytes for share in shares) == found.packed_bytes
    assert sum(share.weights for share in shares) == found.packed_weights
    assert sum(share.layers for share in shares) == len(HELD)
    assert sum(share.weights_share for share in shares) == pytest.approx(found.packed_share)
    assert {(share.method, share.held_as) for share in shares} == set(HELD.values())
    assert json.loads(json.dumps(inspection_json(found)))["methods"][0]["method"] == shares[0].method
    titles = [table.title for table in inspection_tables(found)]
    assert titles[1] == "packed layers by method"


def test_one_card_lists_every_method_with_its_share(folders):
    folder, _ = folders
    page = render(facts_of(folder / "packed", "me/mixed", CardFields(base_model="org/model", license="mit")))
    for share in shares_of(inspect(folder / "packed")):
        held_as = share.held_as.replace("_", r"\_")
        row = next(
            line
            for line in page.splitlines()
            if line.startswith(f"| {share.method.replace('_', chr(92) + '_')} | {held_as} |")
        )
        assert f"| {share.layers} | {100 * share.weights_share:.1f} % | {share.bytes:,} |" in row
    for paper in ("2410.03129", "2502.01705", "2502.01403", "2505.24357", "2505.18663"):
        assert f"arxiv.org/abs/{paper}" in page
    assert page.count("```bibtex") == 5
    assert "cache per token" in page


def test_a_card_of_one_method_has_no_such_table(tmp_path):
    from tests.hf.test_transformers import quick

    model = tiny_model(num_hidden_layers=1)
    report = hf_lowbit.quantize(model, quick(calibration=None))
    save_model(model, tmp_path / "packed", rows=report.rows)
    page = render(facts_of(tmp_path / "packed", "me/one", CardFields(base_model="org/model", license="mit")))
    assert "| method | held as |" not in page


# Hub and command line ------------------------------------------------------------------------------------------------


def test_pushed_and_pulled(folders, hub, tmp_path):  # noqa: F811
    folder, model = folders
    run = CliRunner().invoke(app, ["push", str(folder / "packed"), "me/mixed", "--license", "mit"])
    assert run.exit_code == 0, run.output
    loaded = AutoModelForCausalLM.from_pretrained("me/mixed")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(written(loaded)[0], written(model)[0])
    assert {(share.method, share.held_as) for share in shares_of(inspect("me/mixed"))} == set(HELD.values())


def test_the_command_line_takes_a_recipe_file(folders, tmp_path):
    folder, _ = folders
    recipe = LowBitRecipe({pattern: rule for pattern, rule in everything(calibrated=False).rules})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    command = ["quantize", str(folder / "dense"), str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.json")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert {
        module.name.removeprefix("model."): (module.method, module.held_as)
        for module in inspect(tmp_path / "out").modules
    } == HELD
    in_memory = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=everything(calibrated=False)
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(in_memory))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "packed layers by method" in shown.output
    misspelt = recipe.to_dict()
    misspelt["rules"][0]["pattern"] = "*.self_atn"
    (tmp_path / "bad.json").write_text(json.dumps(misspelt), encoding="utf-8")
    command[2:] = [str(tmp_path / "bad"), "--recipe", str(tmp_path / "bad.json")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2
    assert "rule '*.self_atn' (close: self_attn" in " ".join(run.output.split())
