"""diffusers' life cycle: compress while loading, save, shard, load packed, pipelines, offloading, adapters."""

import copy
import json
import os

import diffusers
import peft
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel as Video
from diffusers import PipelineQuantizationConfig
from safetensors import safe_open
from torch import nn

import hf_lowbit
from hf_lowbit import (
    LowBitConfig,
    LowBitRecipe,
    PackedLinear,
    UnsupportedModelError,
    packed_modules,
)
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.verify import verify
from tests.hf.test_transformers import quick
from tests.tiny import tokens
from tests.video import (
    FILE,
    FIRST,
    WORDS,
    assert_same,
    free,
    latents,
    outputs,
    rewrite,
    stored_tensors,
    tiny_pipeline,
    tiny_video,
    tiny_wan,
    wan_outputs,
)

ON_CPU = ["proj_in", "time_embed", "caption_projection", "rope", "norm_out", "proj_out", "scale_shift_table"]
DISK = {**dict.fromkeys(ON_CPU, "cpu"), "transformer_blocks": "disk"}

# Compress, save, load --------------------------------------------------------------------------------------------


def test_compress_save_shard_load(dense_path, packed_path, tmp_path):
    model = Video.from_pretrained(dense_path, quantization_config=free())
    report = model.hf_quantizer.report
    assert len(packed_modules(model)) == len(report.rows) == 17
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert_same(model.state_dict(), Video.from_pretrained(packed_path).state_dict())  # as compressed in memory
    model.save_pretrained(tmp_path / "packed", max_shard_size="10KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    loaded = Video.from_pretrained(tmp_path / "packed")
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(outputs(loaded), outputs(model))
    assert not any(parameter.requires_grad for m in packed_modules(loaded).values() for parameter in m.parameters())
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="10KB")  # after use, into its own folder
    again = Video.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(again), outputs(model))
    assert again.config["quantization_config"] == loaded.hf_quantizer.quantization_config
    assert set(again.hf_quantizer.quantization_config.modules) == set(packed_modules(model))


def test_result_is_that_of_the_dense_weights_it_stands_for(packed):
    dense = tiny_video()
    for name, layer in packed_modules(packed).items():
        dense.get_submodule(name).weight.data = layer.packed.unpack()
    # float32 sums in another order, over one block
    torch.testing.assert_close(outputs(packed), outputs(dense), rtol=1e-4, atol=1e-5)


def test_config_as_dict_and_as_object(dense_path, packed, tmp_path):
    config = free()
    twin = copy.deepcopy(config)
    for given in (config, config.to_dict(), config):
        model = Video.from_pretrained(dense_path, quantization_config=given)
        assert_same(stored_tensors(model), stored_tensors(packed))
    assert config == twin
    Video.from_pretrained(dense_path, quantization_config=config.to_dict()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["modules"].keys() == packed_modules(packed).keys()
    assert stored["format_version"] == 1


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_scales_keep_their_dtype(dense_path, scale_dtype, tmp_path):
    stored = getattr(torch, scale_dtype)
    config = free(scale_dtype=scale_dtype)
    for source in (torch.float32, torch.bfloat16):
        model = Video.from_pretrained(dense_path, quantization_config=config, dtype=source)
        before = stored_tensors(model)
        assert {tensor.dtype for name, tensor in before.items() if "scale" in name} == {stored}
        model.save_pretrained(tmp_path / str(source))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, None):
            loaded = Video.from_pretrained(tmp_path / str(source), dtype=dtype)
            assert_same(stored_tensors(loaded), before)
            assert loaded.dtype == outputs(loaded).dtype == (dtype or source)
            assert loaded.bfloat16().dtype == torch.bfloat16  # which diffusers lets pass, unlike .to() and .half()
            assert_same(stored_tensors(loaded), before)


def test_modules_that_a_model_keeps_in_float32_stay_so(tmp_path):
    tiny_wan().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    load = diffusers.WanTransformer3DModel.from_pretrained
    model = load(tmp_path / "dense", quantization_config=free(), dtype=torch.bfloat16)
    left = model.hf_quantizer.report.dense
    assert left["condition_embedder.time_embedder.linear_1"] == "kept in float32 by the model"
    assert left["patch_embedding"] == "layers of type Conv3d are not supported"
    assert not left.keys() & {"", "blocks.0"}  # which have tables of shifts of three dimensions, no layers
    model.save_pretrained(tmp_path / "packed")
    for dtype in (torch.bfloat16, None):
        loaded = load(tmp_path / "packed", dtype=dtype)
        assert loaded.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert_same(loaded.state_dict(), model.state_dict())


def test_parts_kept_in_float32_do_not_widen_a_file(tmp_path):
    tiny_wan().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    load = diffusers.WanTransformer3DModel.from_pretrained
    model = load(tmp_path / "dense", quantization_config=free(), dtype=torch.bfloat16)
    first, second = "condition_embedder.time_embedder.linear_1.bias", "condition_embedder.time_embedder.linear_2.bias"
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert exact[first].dtype == exact[second].dtype == torch.float32
    model.get_parameter(second).data[0] = exact[second][0] = 1 / 3  # more digits than bfloat16 has
    model.save_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert (file.get_tensor(first).dtype, file.get_tensor(second).dtype) == (torch.bfloat16, torch.float32)
    for dtype in (None, torch.bfloat16):
        again = load(tmp_path / "packed", dtype=dtype).state_dict()
        assert {name: tensor.dtype for name, tensor in again.items()} == {name: t.dtype for name, t in exact.items()}
        assert all(torch.equal(again[name], tensor) for name, tensor in exact.items())


def test_recipe_and_skips(dense_path, tmp_path):
    recipe = LowBitRecipe({"*.ff": free(variant="rtn"), "*": free()}, skip=["proj_out", "time_embed"])
    model = Video.from_pretrained(dense_path, quantization_config=recipe)
    assert type(model.proj_out) is nn.Linear
    assert isinstance(model.proj_in, PackedLinear)
    model.save_pretrained(tmp_path)
    loaded = Video.from_pretrained(tmp_path)
    assert type(loaded.time_embed.linear) is nn.Linear
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match=r"skip 'proj_oot' .*: no module of LTXVideoTransformer3DModel matches"):
        Video.from_pretrained(dense_path, quantization_config=free(skip=["proj_oot"]))


def test_saved_at_once_with_report(dense_path, tmp_path):
    model = Video.from_pretrained(dense_path, quantization_config=free())
    save_model(model, tmp_path / "packed", rows=model.hf_quantizer.report.rows)
    assert {"SHA256SUMS", "compression_report.jsonl", "config.json", FILE} == set(os.listdir(tmp_path / "packed"))
    assert torch.equal(outputs(Video.from_pretrained(tmp_path / "packed")), outputs(model))


def test_variant_and_parallel_loading(packed, tmp_path, monkeypatch):
    packed.save_pretrained(tmp_path, variant="lowbit", max_shard_size="10KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    assert_same(Video.from_pretrained(tmp_path, variant="lowbit").state_dict(), packed.state_dict())


def test_parallel_loading_of_what_is_compressed(dense_path, packed, tmp_path, monkeypatch):
    """Weights come one after the other all the same."""
    Video.from_pretrained(dense_path).save_pretrained(tmp_path, max_shard_size="10KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    model = Video.from_pretrained(tmp_path, quantization_config=free())
    assert_same(model.state_dict(), packed.state_dict())


def test_inspect_and_verify_know_the_folder(packed, copied, tmp_path):
    packed.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for folder in (copied, tmp_path / "shards"):
        assert len(inspect(folder).modules) == 17
        assert verify(folder).problems == ()
    rewrite(copied, lambda t: t[f"{FIRST}.weight_row_scale"].fill_(float("nan")))
    assert any(f"{FIRST}: row_scale holds NaN" in problem for problem in verify(copied).problems)


def test_whole_model_compiles_into_one_graph(packed):
    torch._dynamo.reset()
    assert packed.hf_quantizer.is_compileable
    expected = outputs(packed)
    packed.compile(fullgraph=True, backend="eager")
    # the same ops in the same order, unless the compiler moves a product out of a sum
    torch.testing.assert_close(outputs(packed), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_copy_is_saved_under_its_own_config(packed, tmp_path):
    twin = copy.deepcopy(packed)
    twin.register_to_config(norm_eps=1e-5)
    for model in (twin, packed):
        model.save_pretrained(tmp_path)
        loaded = Video.from_pretrained(tmp_path)
        assert_same(loaded.state_dict(), packed.state_dict())
        assert loaded.config.norm_eps == model.config.norm_eps


def test_dequantized_model_is_dense_and_saved_so(packed, tmp_path):
    expected = outputs(packed)
    assert packed.dequantize() is packed
    assert not packed_modules(packed)
    # float32 sums in another order, over one block
    torch.testing.assert_close(outputs(packed), expected, rtol=1e-4, atol=1e-5)
    expected = outputs(packed)
    assert not getattr(packed, "hf_quantizer", None)
    assert "quantization_config" not in packed.config
    packed.to(torch.float64).to(torch.float32).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = Video.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), expected)
    assert all(type(module) is not PackedLinear for module in loaded.modules())
    hf_lowbit.quantize(packed, free())


# Pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["mapping", "backend"])
def test_pipeline(paths, way, tmp_path):
    if way == "mapping":
        config = PipelineQuantizationConfig(quant_mapping={"transformer": free(), "text_encoder": free()})
    else:
        options = {"method": "arb", **{name: getattr(free(), name) for name in type(free()).options()}}
        options = {**options, "calibration": None, "run": free().run}
        parts = ["transformer", "text_encoder"]
        config = PipelineQuantizationConfig("hf_lowbit", options, components_to_quantize=parts)
    pipeline = diffusers.LTXPipeline.from_pretrained(paths / "dense", quantization_config=config)
    assert len(packed_modules(pipeline.transformer)) == 17
    assert len(packed_modules(pipeline.text_encoder)) == 5  # "wo" is one that T5 keeps in float32
    expected = latents(pipeline)
    assert torch.isfinite(expected).all()
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(latents(diffusers.LTXPipeline.from_pretrained(tmp_path)), expected)
    assert torch.equal(latents(diffusers.DiffusionPipeline.from_pretrained(paths / "packed")), expected)


def test_pipeline_without_a_dtype_is_loaded_as_it_was_stored(tmp_path):
    """transformers loads the text encoder in the stored dtype; diffusers alone would take float32 for the rest."""
    tiny_pipeline(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = PipelineQuantizationConfig(quant_mapping={"transformer": free(skip=["proj_out"])})
    pipeline = diffusers.LTXPipeline.from_pretrained(tmp_path / "dense", quantization_config=config)
    for folder in ("first", "second"):
        assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
        assert pipeline.transformer.proj_out.weight.dtype == torch.bfloat16
        expected = latents(pipeline)
        pipeline.save_pretrained(tmp_path / folder)
        pipeline = diffusers.LTXPipeline.from_pretrained(tmp_path / folder)
        assert torch.equal(latents(pipeline), expected)


def test_modular_pipeline(paths):
    pipeline = diffusers.ModularPipeline.from_pretrained(str(paths / "dense"))
    pipeline.load_components(names=["transformer"], quantization_config={"transformer": free()})
    assert_same(
        pipeline.transformer.state_dict(), Video.from_pretrained(paths / "packed" / "transformer").state_dict()
    )
    pipeline = diffusers.ModularPipeline.from_pretrained(str(paths / "packed"))
    pipeline.load_components(names=["transformer", "text_encoder"])
    assert len(packed_modules(pipeline.transformer)) == 17
    assert len(packed_modules(pipeline.text_encoder)) == 5


def test_calibrated_text_encoder(paths, tmp_path):
    """A text encoder is a model of transformers, for which there is calibration; the other part needs none."""
    mapping = {"transformer": free(), "text_encoder": quick(calibration=tokens() % len(WORDS))}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipeline = diffusers.LTXPipeline.from_pretrained(paths / "dense", quantization_config=config)
    assert {row["calibration_tokens"] for row in pipeline.text_encoder.hf_quantizer.report.rows} == {tokens().numel()}
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(latents(diffusers.LTXPipeline.from_pretrained(tmp_path)), latents(pipeline))


def test_a_model_without_linear_layers_says_how_to_leave_it_out(paths):
    config = PipelineQuantizationConfig("hf_lowbit", {"method": "arb", "calibration": None})
    with pytest.raises(UnsupportedModelError, match=r"nothing to compress in Autoencoder.*components_to_quantize"):
        diffusers.AutoencoderKLLTXVideo.from_pretrained(
            paths / "dense" / "vae", quantization_config=config._resolve_quant_config(module_name="vae")
        )


@pytest.mark.parametrize("folder", ["packed", "dense"])
def test_dtype_that_nothing_is_computed_in(paths, folder):
    given = {} if folder == "packed" else {"quantization_config": free()}
    with pytest.raises(ValueError, match=r"dtype must be one to compute in, .* got torch\.float8_e4m3fn"):
        Video.from_pretrained(paths / folder / "transformer", dtype=torch.float8_e4m3fn, **given)


def test_backend_by_name_needs_the_name_of_a_method():
    assert LowBitConfig(method="arb", calibration=None) == hf_lowbit.ARBConfig(calibration=None)
    with pytest.raises(TypeError, match="name the method: method='arb'"):
        LowBitConfig(calibration=None)
    with pytest.raises(ValueError, match=r"unknown method 'nonsense'; known: .*arb"):
        LowBitConfig(method="nonsense")


# Places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["leaf_level", "block_level", "to disk"])
def test_group_offload(packed, how, tmp_path):
    expected = outputs(packed)
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    if how != "to disk":
        options = {"offload_type": how, "num_blocks_per_group": 1}
    packed.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
    for _ in range(2):
        assert torch.equal(outputs(packed), expected)
    if how == "to disk":  # what the tensors hold then is not the model; a dense one is saved all the same
        for refused in (packed.dequantize, lambda: packed.save_pretrained(tmp_path / "packed")):
            with pytest.raises(ValueError, match=r"offloaded to disk by groups; load the model anew"):
                refused()
        dense = tiny_video()
        dense.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
        with pytest.raises(ValueError, match=r"offloaded to disk by groups; load the model anew"):
            hf_lowbit.quantize(dense, free())
    else:
        packed.save_pretrained(tmp_path)
        assert torch.equal(outputs(Video.from_pretrained(tmp_path)), expected)


def test_layerwise_casting_leaves_packed_layers(dense_path):
    model = Video.from_pretrained(dense_path, quantization_config=free(skip=["time_embed"]))
    before = {name: tensor.clone() for name, tensor in stored_tensors(model).items()}
    expected = outputs(model)
    assert Video._skip_layerwise_casting_patterns == ["norm"]
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.time_embed.linear.weight.dtype == torch.float8_e4m3fn
    assert_same(stored_tensors(model), before)
    found = outputs(model)
    assert torch.isfinite(found).all()
    # only three dense layers in eight bits differ: 2^-4 of their values at most
    assert float((found - expected).square().sum() / expected.square().sum()) < 0.01


def test_packed_model_on_disk(packed, packed_path, tmp_path):
    expected = outputs(packed)
    loaded = Video.from_pretrained(packed_path, device_map=DISK, offload_folder=str(tmp_path))
    assert loaded.get_submodule(FIRST).weight_sign.device.type == "meta"
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(loaded), expected)
    with pytest.raises(ValueError, match="is offloaded; load the model without offloading"):
        loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="packed layers are offloaded, first transformer_blocks"):
        loaded.dequantize()


def test_disk_and_dtype_that_would_round_scales_is_refused(packed_path, tmp_path):
    options = {"device_map": DISK, "offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 would round scales stored as torch.float32"):
        Video.from_pretrained(packed_path, dtype=torch.bfloat16, **options)
    Video.from_pretrained(packed_path, dtype=torch.float32, **options)


def test_automatic_maps(tmp_path, monkeypatch):
    tiny_wan().save_pretrained(tmp_path / "dense")
    load = diffusers.WanTransformer3DModel.from_pretrained
    model = load(tmp_path / "dense", quantization_config=free())
    model.save_pretrained(tmp_path / "packed")
    offload = {"device_map": "auto", "offload_folder": str(tmp_path / "offload")}
    for room, places in (("1GB", {"cpu"}), ("60KB", {"disk"})):
        loaded = load(tmp_path / "packed", max_memory={"cpu": room}, **offload)
        assert set(map(str, loaded.hf_device_map.values())) == places
        assert torch.equal(wan_outputs(loaded), wan_outputs(model))
    compressed = load(tmp_path / "dense", quantization_config=free(), max_memory={"cpu": "1GB"}, **offload)
    assert_same(compressed.state_dict(), model.state_dict())
    monkeypatch.setattr("hf_lowbit.compress.Intake.take", None)
    with pytest.raises(ValueError, match="compressing while loading cannot be combined with disk offload"):
        load(tmp_path / "dense", quantization_config=free(), max_memory={"cpu": "60KB"}, **offload)


def test_compressing_with_disk_offload_is_refused_before_work(dense_path, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lowbit.hf.diffusers.Run", None)
    with pytest.raises(ValueError, match="compressing while loading cannot be combined with disk offload"):
        Video.from_pretrained(dense_path, quantization_config=free(), device_map=DISK, offload_folder=str(tmp_path))


def test_sizes_for_an_automatic_map(dense_path):
    """Half a byte for each weight that is to be compressed."""
    from accelerate.utils import CustomDtype, compute_module_sizes

    quantizer = Video.from_pretrained(dense_path, quantization_config=free()).hf_quantizer
    assert quantizer.get_special_dtypes_update(tiny_video(), torch.bfloat16) == {}
    model = tiny_video().to("meta")
    quantizer = type(quantizer)(free(), pre_quantized=False)
    quantizer.preprocess_model(model)
    special = quantizer.get_special_dtypes_update(model, torch.bfloat16)
    assert set(special.values()) == {CustomDtype.INT4}
    assert len(special) == 17
    full, small = (compute_module_sizes(model, torch.float32, special_dtypes=d)[""] for d in ({}, special))
    weights = sum(model.get_parameter(name).numel() for name in special)
    assert full - small == weights * 3.5


@pytest.mark.parametrize("folder", ["packed", "dense"])
def test_tensor_parallelism_is_refused_by_diffusers(paths, folder, monkeypatch):
    monkeypatch.setattr(Video, "_tp_plan", {"proj_in": "colwise"})
    given = {} if folder == "packed" else {"quantization_config": free()}
    parallel = diffusers.TensorParallelConfig(tp_degree=2)
    with pytest.raises(ValueError, match="cannot be combined with a tensor-parallel"):
        Video.from_pretrained(paths / folder / "transformer", parallel_config=parallel, **given)


# Single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dense_single_file(dense_path, packed, dtype, tmp_path):
    options = {"config": str(dense_path), "quantization_config": free(), "dtype": dtype}
    model = Video.from_single_file(str(dense_path / FILE), **options)
    assert model.dtype == (dtype or torch.float32)
    assert len(packed_modules(model)) == 17
    if dtype is None:
        assert_same(model.state_dict(), packed.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(Video.from_pretrained(tmp_path)), outputs(model))


def test_packed_single_file_is_refused(packed, packed_path):
    for config in (free(), packed.hf_quantizer.quantization_config):
        with pytest.raises(ValueError, match="from_single_file reads dense files, this one is packed"):
            Video.from_single_file(str(packed_path / FILE), config=str(packed_path), quantization_config=config)


# Adapters --------------------------------------------------------------------------------------------------------


def test_lora(packed, packed_path, tmp_path):
    expected = outputs(packed)
    packed.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = outputs(packed)
    assert not torch.equal(adapted, expected)
    trainable = {name for name, parameter in packed.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora" in name}
    assert not any(".weight_" in name or name.endswith("base_layer.weight") for name in trainable)
    adapted.square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in packed.named_parameters() if "lora" in name)
    assert all(parameter.grad is None for name, parameter in packed.named_parameters() if ".weight_" in name)
    with pytest.raises(ValueError, match=r"holds adapters .*save them with save_lora_weights"):
        packed.save_pretrained(tmp_path / "model")
    # save_lora_adapter() of the model refuses every quantized one: it calls .to(dtype=None)
    layers = peft.utils.get_peft_model_state_dict(packed)
    diffusers.LTXPipeline.save_lora_weights(tmp_path / "adapter", transformer_lora_layers=layers)
    with pytest.raises(ValueError, match="merging into packed weights is impossible"):
        packed.fuse_lora()
    fresh = Video.from_pretrained(packed_path)
    fresh.load_lora_adapter(str(tmp_path / "adapter"), weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(outputs(fresh), adapted.detach())
    fresh.unload_lora()
    assert torch.equal(outputs(fresh), expected)
    fresh.save_pretrained(tmp_path / "model")
    assert torch.equal(outputs(Video.from_pretrained(tmp_path / "model")), expected)
