"""DVD-Quant in whole video pipelines of four families: loading, saving, what is packed, memory, other processes."""

import gc
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn
from torch.profiler import profile

import hf_lowbit
from hf_lowbit import DVDQuantConfig, LowBitRecipe, PackedLinear, RunOptions, delta_gbs_report, packed_modules
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from tests import pipelines
from tests.video import assert_same, free, rewrite, stored_tensors

QUIET = RunOptions(progress=False)
# what belongs into packed layers, written out for each family: (weights and activations, weights only)
PLACES = {
    "wan": (r"blocks\.\d\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))", None),
    "cogvideox": (
        r"transformer_blocks\.\d\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
        r"transformer_blocks\.\d\.norm[12]\.linear",
    ),
    "ltx": (r"transformer_blocks\.\d\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))", None),
    "hunyuan": (
        r"transformer_blocks\.0\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.0\.(attn\.to_[qkv]|proj_mlp|proj_out)",
        r"transformer_blocks\.0\.norm1(_context)?\.linear|single_transformer_blocks\.0\.norm\.linear",
    ),
}  # fmt: skip


def config(**changes):
    return DVDQuantConfig(**{"run": QUIET, **changes})


def mapping(**changes):
    return PipelineQuantizationConfig(quant_mapping={"transformer": config(**changes)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a dense pipeline by family; tests must not write to them."""
    found = {}
    for family in pipelines.FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        pipelines.build(family).save_pretrained(found[family])
    return found


@pytest.fixture
def wan(folders):
    """Folder of a dense transformer."""
    return folders["wan"] / "transformer"


def load_wan(folder, **changes):
    return diffusers.WanTransformer3DModel.from_pretrained(folder, quantization_config=config(**changes))


def modes(model):
    return {name: layer.spec.activation for name, layer in packed_modules(model).items()}


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_pipeline(folders, family, tmp_path):
    dense = DiffusionPipeline.from_pretrained(folders[family])
    expected = pipelines.clip(dense, family)
    pipeline = DiffusionPipeline.from_pretrained(folders[family], quantization_config=mapping())
    both, weights_only = PLACES[family]
    found = modes(pipeline.transformer)
    for name, module in dense.transformer.named_modules():
        if type(module) is nn.Linear and re.fullmatch(both, name):
            assert found.pop(name) == "token_group", name
        elif type(module) is nn.Linear and weights_only and re.fullmatch(weights_only, name):
            assert found.pop(name) == "none", name
    assert not found
    clip = pipelines.clip(pipeline, family)
    report = delta_gbs_report(pipeline.transformer)
    assert len(report.bits) == pipelines.STEPS  # also where guidance takes two calls a step
    error = float((clip.double() - expected.double()).norm() / expected.double().norm())
    assert 1e-4 < error < 0.1  # of random weights after three steps: there is something, and it is small
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same(loaded.transformer.state_dict(), pipeline.transformer.state_dict())
    assert torch.equal(pipelines.clip(loaded, family), clip)
    assert delta_gbs_report(loaded.transformer) == report
    assert not packed_modules(loaded.vae)


def test_backend_by_name(folders):
    options = {"method": "dvd_quant", "preset": "w4a8", "modules_to_not_convert": ["attn2"], "run": QUIET}
    given = PipelineQuantizationConfig("hf_lowbit", options, components_to_quantize=["transformer"])
    pipeline = diffusers.LTXPipeline.from_pretrained(folders["ltx"], quantization_config=given)
    found = packed_modules(pipeline.transformer)
    assert len(found) == 12
    assert not any("attn2" in name for name in found)
    assert {layer.spec.act_bits for layer in found.values()} == {8}
    assert not hasattr(pipeline.transformer, "delta_gbs")


def test_one_process_saves_and_another_loads(folders, tmp_path):
    """The other one imports diffusers alone."""
    pipeline = DiffusionPipeline.from_pretrained(folders["wan"], quantization_config=mapping(a_bits_low=3))
    pipeline.save_pretrained(tmp_path / "packed")
    expected = pipelines.clip(pipeline, "wan")
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "from tests import pipelines\n"
        "torch.save(pipelines.clip(pipeline, 'wan'), sys.argv[2])\n"
    )
    place = tmp_path / "clip.pt"
    command = [sys.executable, "-c", script, str(tmp_path / "packed"), str(place)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(place), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(wan, tmp_path, dtype):
    """Packed tensors are those of the weights as they are loaded, and stay so through every dtype afterwards."""
    load = diffusers.WanTransformer3DModel.from_pretrained
    model = load(wan, quantization_config=config(), dtype=dtype)
    before = stored_tensors(model)
    assert {tensor.dtype for name, tensor in before.items() if "scale" in name} == {torch.float16}
    model.save_pretrained(tmp_path)
    for other in (None, torch.float32, torch.float16, torch.bfloat16):
        loaded = load(tmp_path, dtype=other)
        assert_same(stored_tensors(loaded), before)
        assert loaded.blocks[0].attn1.to_q.weight.dtype == (other or dtype)
        with torch.no_grad():
            latents, words = torch.ones(1, 16, 2, 4, 4), torch.ones(1, 3, 32)
            found = loaded(latents.to(loaded.dtype), torch.tensor([500]), words.to(loaded.dtype)).sample
        assert found.dtype == loaded.dtype
        assert torch.isfinite(found).all()


# What is packed --------------------------------------------------------------------------------------------------


def test_modules_to_not_convert(wan, tmp_path):
    for names in (["attn2", "blocks.1.ffn"], ["*.attn2.*", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2"]):
        model = load_wan(wan, modules_to_not_convert=names)
        found = packed_modules(model)
        assert len(found) == 20 - 8 - 2
        assert not any("attn2" in name or name.startswith("blocks.1.ffn") for name in found)
    assert len(packed_modules(load_wan(wan, modules_to_not_convert="attn2"))) == 12
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["skip"] == names
    stored = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).hf_quantizer.quantization_config
    assert stored.modules_to_not_convert == names
    with pytest.raises(ValueError, match=r"skip 'attn7' .*: no module of WanTransformer3DModel matches"):
        load_wan(wan, modules_to_not_convert=["attn7"])


@pytest.mark.parametrize(("option", "counts"), [("weight_only", (12, 4)), ("full", (16, 0)), ("skip", (12, 0))])
def test_modulation(folders, option, counts):
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        folders["cogvideox"] / "transformer", quantization_config=config(modulation=option)
    )
    found = [*modes(model).values()]
    assert (found.count("token_group"), found.count("none")) == counts


def test_layers_that_do_not_fit_are_listed_once(tmp_path, caplog):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32}
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, **sizes).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_lowbit"):
        model = load_wan(tmp_path)
    assert sorted(packed_modules(model)) == [f"blocks.{n}.ffn.net.2" for n in (0, 1)]  # the only ones with 32 columns
    left = model.hf_quantizer.report.dense
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear) and not isinstance(module, PackedLinear):
            assert left[name] == "in_features 24 is not a multiple of 16"
    told = [record for record in caplog.records if "in_features 24 is not a multiple of 16" in record.getMessage()]
    assert len(told) == 1
    assert model.hf_quantizer.quantization_config.left_dense == left


def test_nothing_fits(tmp_path):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 20}
    model = diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes)
    model.save_pretrained(tmp_path)
    message = r"no layer would be compressed, all stay dense .*in_features 12 is not a multiple of 16"
    for run in (lambda: load_wan(tmp_path), lambda: hf_lowbit.quantize(model, config())):
        with pytest.raises(hf_lowbit.UnsupportedModelError, match=message):
            run()


def test_recipes(wan, monkeypatch):
    rules = {"*.ffn": free(), "*.attn1": config(delta=0.2, warmup_steps=1), "blocks": config(preset="w4a8")}
    model = diffusers.WanTransformer3DModel.from_pretrained(
        wan, quantization_config=LowBitRecipe(rules, skip=["condition_embedder", "proj_out"], run=QUIET)
    )
    assert len(packed_modules(model)) == 20
    hook = model.delta_gbs.hook
    assert (hook.delta, hook.warmup) == (0.2, 1)
    assert sorted(hook.layers) == sorted(name for name in packed_modules(model) if ".attn1." in name)
    rules = {"*.attn1": config(delta=0.2), "blocks": config(delta=0.1)}
    recipe = LowBitRecipe(rules, skip=["condition_embedder", "proj_out"], run=QUIET)
    dense = diffusers.WanTransformer3DModel.from_pretrained(wan)
    monkeypatch.setattr("hf_lowbit.compress.Intake.take", None)  # nothing is compressed before
    monkeypatch.setattr("hf_lowbit.hf.diffusers.compress_model", None)
    with pytest.raises(ValueError, match="rules of a recipe differ in delta"):
        diffusers.WanTransformer3DModel.from_pretrained(wan, quantization_config=recipe)
    with pytest.raises(ValueError, match="rules of a recipe differ in delta"):
        hf_lowbit.quantize(dense, recipe)


# Later life ------------------------------------------------------------------------------------------------------


def test_dequantized(folders, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["wan"], quantization_config=mapping(a_bits_low=8))
    model = pipeline.transformer
    hf_lowbit.disable_delta_gbs(model)
    hf_lowbit.set_act_bits(model, 16)
    expected = pipelines.clip(pipeline, "wan")
    hf_lowbit.enable_delta_gbs(model)
    model.dequantize()
    assert not hasattr(model, "delta_gbs")
    assert not packed_modules(model)
    torch.testing.assert_close(pipelines.clip(pipeline, "wan"), expected, rtol=0, atol=1e-4)  # of another sum order
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(pipelines.clip(loaded, "wan"), pipelines.clip(pipeline, "wan"))


@pytest.mark.parametrize("way", ["block_level", "leaf_level", "disk"])
def test_places(folders, way, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folders["wan"], quantization_config=mapping())
    expected = pipelines.clip(pipeline, "wan")
    report = delta_gbs_report(pipeline.transformer)
    if way == "disk":
        pipeline.transformer.save_pretrained(tmp_path / "packed")
        others = [
            "rope",
            "patch_embedding",
            "condition_embedder",
            "norm_out",
            "proj_out",
            "scale_shift_table",
            "blocks.0",
        ]
        pipeline.transformer = diffusers.WanTransformer3DModel.from_pretrained(
            tmp_path / "packed", device_map={**dict.fromkeys([*others, "blocks.0"], "cpu"), "blocks.1": "disk"},
            offload_folder=str(tmp_path / "offload"),
        )  # fmt: skip
    else:
        blocks = {"num_blocks_per_group": 1} if way == "block_level" else {}
        pipeline.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), way, **blocks)
    for _ in range(2):
        assert torch.equal(pipelines.clip(pipeline, "wan"), expected)
        assert delta_gbs_report(pipeline.transformer) == report


def test_layerwise_casting(folders):
    pipeline = DiffusionPipeline.from_pretrained(folders["ltx"], quantization_config=mapping())
    before = {name: tensor.clone() for name, tensor in stored_tensors(pipeline.transformer).items()}
    expected = pipelines.clip(pipeline, "ltx")
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipeline.transformer.time_embed.linear.weight.dtype == torch.float8_e4m3fn
    found = pipelines.clip(pipeline, "ltx")
    assert_same(stored_tensors(pipeline.transformer), before)
    assert len(delta_gbs_report(pipeline.transformer).bits) == pipelines.STEPS
    assert float((found - expected).norm() / expected.norm()) < 0.2  # embedders in eight bits


def test_pushed_and_pulled(wan, hub):
    model = load_wan(wan)
    model.push_to_hub("user/wan-w4a4", license="mit", base_model="org/wan")
    loaded = diffusers.WanTransformer3DModel.from_pretrained("user/wan-w4a4")
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.delta_gbs.hook.delta == 0.09
    page = hub.files("user/wan-w4a4")["README.md"].decode()
    assert "library_name: diffusers" in page


def test_packed_size(wan, tmp_path):
    """Bits per weight as the format says: 4, 16 + 4 for each group of 32 columns, and factors where columns differ."""
    model = load_wan(wan)
    model.save_pretrained(tmp_path)
    rows = {module.name: module for module in inspect(tmp_path).modules}
    for name, layer in packed_modules(model).items():
        columns = layer.in_features
        groups, factors = -(-columns // 32), 2 * columns * layer.spec.smooth
        codes, zeros = columns * 4 // 8, -(-groups * 4 // 8)
        assert layer.packed.nbytes == layer.out_features * (codes + 2 * groups + zeros) + factors
        assert rows[name].bits_per_weight == pytest.approx(8 * layer.packed.nbytes / (layer.out_features * columns))


# Memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(run):
    """Bytes that torch held on the CPU at most during a call, beyond those it held before."""
    gc.collect()  # models of other tests that went meanwhile would count as given back by the call
    with profile(profile_memory=True) as record:
        kept = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert kept is not None
    return held, most


def test_memory_while_loading_is_that_of_a_layer_above_the_packed_model(tmp_path):
    """Whatever the depth: what is held beyond the result is the work on the largest layer."""
    beyond = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        diffusers.WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
            ffn_dim=512, num_layers=layers,
        ).save_pretrained(folder, max_shard_size="300KB")  # fmt: skip  # diffusers maps one file at a time
        held, most = peak_bytes(lambda folder=folder: load_wan(folder))
        beyond[layers] = most - held
    layer = 4 * 128 * 512
    assert beyond[8] == pytest.approx(beyond[2], abs=layer)
    dense = 4 * 8 * (8 * 128 * 128 + 2 * 128 * 512)
    assert beyond[8] < dense / 2  # so that holding all dense weights would be seen


def test_adapters_train_on_it_and_steps_are_still_judged(folders):
    pipeline = DiffusionPipeline.from_pretrained(folders["wan"], quantization_config=mapping(delta=0.0))
    before = pipelines.clip(pipeline, "wan")
    pipeline.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "net.2"], init_lora_weights=False)
    )
    adapted = pipelines.clip(pipeline, "wan")
    assert not torch.equal(adapted, before)
    assert delta_gbs_report(pipeline.transformer).bits == (8, 8, 8)
    hf_lowbit.enable_delta_gbs(pipeline.transformer, delta=1e6)
    assert not torch.equal(pipelines.clip(pipeline, "wan"), adapted)
    assert delta_gbs_report(pipeline.transformer).bits == (8, 8, 4)
    assert {layer.act_bits for layer in packed_modules(pipeline.transformer).values()} == {4}


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("weight_packed", lambda t: t[:, 1:].contiguous(), r"attn1\.to_q.*weight_packed"),
        ("weight_packed", lambda t: t.to(torch.int32), r"attn1\.to_q.*weight_packed"),
        ("weight_scale", lambda t: t.fill_(float("inf")), r"attn1\.to_q.*scale"),
        ("weight_smooth", lambda t: t.fill_(0), r"attn1\.to_q.*smooth"),
        ("weight_zero_point", None, r"attn1\.to_q.*weight_zero_point"),
    ],
)
def test_damaged_files_are_refused(wan, tmp_path, leaf, change, message):
    load_wan(wan, balance_beyond=1.0).save_pretrained(tmp_path)  # all columns have a factor
    name = f"blocks.0.attn1.to_q.{leaf}"

    def damage(tensors):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])

    rewrite(tmp_path, damage)  # with checksums that fit
    with pytest.raises(hf_lowbit.CheckpointError, match=message):
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path)


def test_save_that_breaks_off_leaves_the_old_model(wan, tmp_path, monkeypatch):
    model = load_wan(wan)
    save_model(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(load_wan(wan, preset="w4a8"), tmp_path / "model", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
