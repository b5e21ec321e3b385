"""transformers' life cycle: compress while loading, save, shard, load packed, generate, refuse what is damaged."""

import functools
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_lowbit
from hf_lowbit import (
    ARBConfig,
    CalibrationError,
    CalibrationRecord,
    CheckpointError,
    LowBitRecipe,
    PackedLinear,
    RunOptions,
    packed_modules,
)
from hf_lowbit.compress.checksums import metadata_of
from tests.tiny import ARCHITECTURES, tiny_model, tokens

QUIET = RunOptions(progress=False, batch_size=2)


def quick(**changes):
    options = {
        "calibration": tokens(), "samples": 4, "block_size": 32, "iterations": 2, "quantiles": 5,
        "max_salient_per_block": 6, "run": QUIET,
    }  # fmt: skip
    return ARBConfig(**{**options, **changes})


@pytest.fixture
def dense_path(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(scope="module")
def packed_path(tmp_path_factory):
    """A tiny compressed model; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_model().save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=quick())
    model.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.fixture
def copied(packed_path, tmp_path):
    shutil.copytree(packed_path, tmp_path / "copy")
    return tmp_path / "copy"


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compress_save_shard_load_generate(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings()
    assert all(isinstance(m, PackedLinear) or m is head for m in linears)
    assert len(packed_modules(model)) == len(linears) - 1 == len(model.hf_quantizer.report.rows)
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), expected)
    ids = tokens(2, 8)
    generated = [m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, loaded)]
    assert torch.equal(*generated)
    loaded.save_pretrained(tmp_path / "again")  # after use
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_sequential_run_equals_one_written_out_by_hand(architecture, tmp_path):
    """Layer by layer with hooks on the whole model: each block sees what the compressed blocks before it make."""
    from hf_lowbit.methods.arb.algorithm import quantize

    config = quick()
    model = tiny_model(architecture)
    by_hand = tiny_model(architecture)
    hf_lowbit.quantize(model, config)
    names = list(packed_modules(model))
    blocks = sorted({name.split(".layers.")[1].split(".")[0] for name in names}, key=int)
    for block in blocks:
        own = [name for name in names if f".layers.{block}." in name]
        moments = dict.fromkeys(own, 0)

        def add(module, args, name, moments=moments):
            rows = args[0].reshape(-1, args[0].shape[-1])
            moments[name] = moments[name] + (rows.T @ rows).double()

        handles = [
            by_hand.get_submodule(name).register_forward_pre_hook(functools.partial(add, name=name)) for name in own
        ]
        for batch in tokens().split(QUIET.batch_size):
            logits(by_hand, batch)
        for handle in handles:
            handle.remove()
        for name in own:
            linear = by_hand.get_submodule(name)
            moment = (moments[name] * (2 / len(tokens()))).float()
            linear.weight.data = quantize(linear.weight.detach(), moment, config, name).unpack()
    assert torch.equal(logits(model), logits(by_hand))


def test_in_memory_and_while_loading_give_the_same_bits(dense_path):
    loaded = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick())
    model = AutoModelForCausalLM.from_pretrained(dense_path)
    report = hf_lowbit.quantize(model, quick())
    assert [row["module"] for row in report.rows] == [row["module"] for row in loaded.hf_quantizer.report.rows]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert logits(model).equal(logits(loaded))
    with pytest.raises(ValueError, match="quantized already"):
        hf_lowbit.quantize(model, quick())


def test_dense_weights_are_deferred(dense_path, monkeypatch):
    """While the run is on, only the block at work holds dense weights; everything else is packed or not yet read."""
    from hf_lowbit.compress.engine import Run

    held = []
    original = Run.compress_layers

    def watch(run, names, stats):
        held.append([n for n in run.targets.methods if run.model.get_submodule(n).weight.dim() == 2])
        return original(run, names, stats)

    monkeypatch.setattr(Run, "compress_layers", watch)
    AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick())
    assert len(held) == 2
    for block, names in enumerate(held):
        assert names
        assert all(f".layers.{block}." in name for name in names)


def test_data_free_run(dense_path):
    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick(calibration=None))
    assert all(row["output_error"] is None and row["weight_error"] < 1 for row in model.hf_quantizer.report.rows)
    assert model.config.quantization_config.to_dict()["calibration"] is None


def test_report_file_has_one_row_per_layer(dense_path, tmp_path):
    report = tmp_path / "rows.jsonl"
    run = RunOptions(progress=False, report=report)
    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick(run=run))
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["module"] for row in rows] == list(packed_modules(model))
    for row in rows:
        assert row["bytes"] == model.get_submodule(row["module"]).packed.nbytes
        assert row["seconds"] >= 0
        assert row["resident_bytes"] > 0
        steps = row["trace"][0]["plain_0"]
        assert len(steps) == 3  # start and two iterations
        assert steps[-1] <= steps[0]


def test_saved_config_says_what_was_done_but_not_where(dense_path, tmp_path):
    text = tmp_path / "secret-name.txt"
    text.write_text(" ".join(str(i % 50 + 3) for i in range(400)))

    class Tokenizer:
        def __call__(self, texts, **_):
            return {"input_ids": [[int(word) for word in texts[0].split()]]}

    config = quick(calibration=str(text), sequence_length=16, run=RunOptions(progress=False, tokenizer=Tokenizer()))
    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    stored = (tmp_path / "packed" / "config.json").read_text()
    assert "secret" not in stored
    assert str(tmp_path) not in stored
    found = json.loads(stored)["quantization_config"]
    assert found["calibration"]["kind"] == "text file"
    assert found["calibration"]["tokens"] == 4 * 16
    assert set(found["modules"]) == set(packed_modules(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.config.quantization_config == model.config.quantization_config
    assert isinstance(loaded.config.quantization_config.calibration, CalibrationRecord)


def test_rules_with_different_calibrations_are_refused(dense_path):
    other = torch.flip(tokens(), dims=[1])
    recipe = LowBitRecipe({"*.down_proj": quick(calibration=other), "*": quick()}, run=QUIET)
    with pytest.raises(ValueError, match="calibration differs between them"):
        AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=recipe)


def test_recipe_mixes_options_and_skips(dense_path, tmp_path):
    recipe = LowBitRecipe({"*.down_proj": quick(variant="x"), "*": quick()}, skip=["layers.1.self_attn"], run=QUIET)
    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=recipe)
    for name, layer in packed_modules(model).items():
        assert layer.spec.shift == name.endswith("down_proj")
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
    model.save_pretrained(tmp_path / "packed")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")).equal(logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_load_in_any_dtype_keeps_the_stored_scales(packed_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(packed_path, dtype=dtype)
    stored = load_file(packed_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if ".weight_" in name:
            assert torch.equal(tensor, stored[name]), name
            assert tensor.dtype == stored[name].dtype
    assert logits(model).dtype == dtype
    assert torch.isfinite(logits(model)).all()


def test_base_model_of_a_packed_checkpoint(packed_path):
    base = AutoModel.from_pretrained(packed_path)
    full = AutoModelForCausalLM.from_pretrained(packed_path)
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, full.model(tokens()).last_hidden_state)


def test_dequantize_gives_the_same_model_dense(packed_path):
    model = AutoModelForCausalLM.from_pretrained(packed_path)
    expected = logits(model)
    model.dequantize()
    assert not packed_modules(model)
    assert torch.equal(logits(model), expected)


def test_gradient_reaches_the_input_but_not_the_weights(packed_path):
    model = AutoModelForCausalLM.from_pretrained(packed_path)
    states = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=states).logits.sum().backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 0
    for layer in packed_modules(model).values():
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_something_else_than_a_config_is_refused():
    with pytest.raises(TypeError, match="config must be a config of hf_lowbit, such as ARBConfig, got dict"):
        hf_lowbit.quantize(tiny_model(), {"method": "arb"})


def test_registration_twice_changes_nothing():
    hf_lowbit.register()
    hf_lowbit.register()


# Damage ----------------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata_of(tensors)})


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


FIRST = "model.layers.0.self_attn.q_proj"


def test_missing_packed_tensor_is_named(copied):
    rewrite(copied, lambda t: t.pop(f"{FIRST}.weight_row_scale"))
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.weight_row_scale is in none"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", f"{FIRST}.weight"])
def test_missing_other_tensor_is_named(copied, name):
    rewrite(copied, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(copied)


def test_wrong_shape_names_tensor_and_file(copied):
    rewrite(copied, lambda t: t.update({f"{FIRST}.weight_sign": t[f"{FIRST}.weight_sign"][:, :8].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.weight_sign in model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_non_finite_scale_is_refused(copied):
    rewrite(copied, lambda t: t[f"{FIRST}.weight_row_scale"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{FIRST}: row_scale holds NaN"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_salient_index_out_of_range_is_refused(copied):
    rewrite(copied, lambda t: t[f"{FIRST}.weight_salient"].fill_(10**6))
    with pytest.raises(CheckpointError, match=rf"{FIRST}: salient must hold ascending"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(surprise=1), "unknown key 'surprise'"),
        (lambda q: q.update(format_version=99), "format_version 99 is not supported"),
        (lambda q: q.update(method="nonsense"), "unknown method 'nonsense'"),
        (lambda q: q.update(iterations="many"), "iterations must be of type int"),
        (lambda q: q.pop("modules"), "lists no packed modules"),
        (lambda q: q["modules"].update({"model.layers.9.q": q["modules"][FIRST]}), r"model\.layers\.9\.q: the model"),
        (lambda q: q["modules"][FIRST].update(format="other"), "unknown format 'other'"),
        (lambda q: q["modules"][FIRST]["spec"].update(out_features=10**9), "out_features must be an integer"),
        (lambda q: q["modules"][FIRST]["spec"].update(out_features=65), "stored as 65 x 64"),
        (lambda q: q["modules"][FIRST]["spec"].update(groups=4), "weight_group"),
    ],
)
def test_bad_config_is_refused(copied, change, message):
    edit_config(copied, change)
    with pytest.raises((ValueError, CheckpointError), match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_module_missing_from_the_table_fails_loudly(copied):
    """Its layer would be dense with a weight of one element, which some versions of transformers let pass."""
    edit_config(copied, lambda q: q["modules"].pop(FIRST))
    with pytest.raises(CheckpointError, match=rf"{FIRST}: the files hold packed tensors of it"):
        AutoModelForCausalLM.from_pretrained(copied)


# Early refusals --------------------------------------------------------------------------------------------------


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is on the meta device.*load the model first"):
        hf_lowbit.quantize(model, quick(calibration=None))


def test_non_finite_weights_are_all_named_before_the_run(tmp_path):
    model = tiny_model()
    for name in ("q_proj", "o_proj"):
        getattr(model.model.layers[1].self_attn, name).weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*layers\.1\.self_attn\.o_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty"),
        (["   "], "empty"),
        ("no-such-file.txt", "neither a file or folder nor a known dataset"),
        (torch.full((2, 8), 999), "the model knows 0 to 127"),
        (torch.rand(2, 8), "must be integers"),
        ([torch.tensor([1, 2, 3]), torch.tensor([1, 2])], "equally long"),
    ],
    ids=["nothing", "blank", "file", "vocabulary", "float", "ragged"],
)
def test_bad_calibration_is_refused(dense_path, calibration, message):
    run = RunOptions(progress=False, tokenizer=lambda *args, **kwargs: {"input_ids": [[]]})
    config = quick(calibration=calibration, run=run)
    with pytest.raises(CalibrationError, match=message):
        AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=config)


def test_pattern_that_matches_nothing_is_refused(dense_path):
    with pytest.raises(ValueError, match="skip 'q_porj'"):
        AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick(skip=["q_porj"]))


def test_disk_offload_while_compressing_is_refused(dense_path):
    with pytest.raises(ValueError, match="disk offload"):
        AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick(), device_map={"": "disk"})


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(dense_path, packed_path, device_map):
    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=quick(), device_map=device_map)
    loaded = AutoModelForCausalLM.from_pretrained(packed_path, device_map=device_map)
    assert logits(model).equal(logits(loaded))


def test_packed_layers_can_be_offloaded_to_disk(packed_path, tmp_path):
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(packed_path, device_map=device_map, offload_folder=tmp_path)
    assert logits(model).equal(logits(AutoModelForCausalLM.from_pretrained(packed_path)))


# The real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_two_blocks(smollm2_path, tmp_path_factory):
    """The first two blocks of SmolLM2, as a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("real") / "smollm2-2-blocks"
    AutoModelForCausalLM.from_pretrained(smollm2_path, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(folder)
    return folder


def test_real_model_from_text_to_generation(real_two_blocks, wikipedia_calibration, tmp_path, caplog):
    run = RunOptions(progress=False, batch_size=4)
    config = ARBConfig(
        calibration=str(wikipedia_calibration), samples=8, sequence_length=128, iterations=3, quantiles=21, run=run
    )
    with caplog.at_level(logging.INFO, logger="hf_lowbit"):
        model = AutoModelForCausalLM.from_pretrained(real_two_blocks, quantization_config=config)
    assert "packed 14 layers" in caplog.text
    assert "output head" in caplog.text
    errors = {row["module"]: row["output_error"] for row in model.hf_quantizer.report.rows}
    assert max(errors.values()) < 0.2  # plain rounding loses 0.3 to 0.8 of the output on these layers
    tokenizer = AutoTokenizer.from_pretrained(real_two_blocks)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    before = logits(model, ids)
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert logits(loaded, ids).equal(before)
    text = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert text.shape[1] == ids.shape[1] + 5
    assert logits(loaded, ids).equal(before)  # and after use
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
