"""What is done with a packed model in transformers beyond loading it: compile, place, cast, copy, undo, save again."""

import copy
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    CompileConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_lowbit
from hf_lowbit import ARBConfig, CheckpointError, LowBitRecipe, packed_modules
from hf_lowbit.compress.checksums import METADATA_KEY, damaged_tensors
from tests.hf.test_transformers import logits, quick
from tests.tiny import VOCABULARY, tiny_model, tokens

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
LAYER_1_ON_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    "model.layers.1": "disk",
}
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of a tiny dense model and of the same model packed; tests must not write to them."""
    folder = tmp_path_factory.mktemp("life")
    model = tiny_model()
    model.save_pretrained(folder / "dense")
    hf_lowbit.quantize(model, quick(calibration=None))
    model.save_pretrained(folder / "packed")
    return folder


@pytest.fixture
def packed(paths):
    return AutoModelForCausalLM.from_pretrained(paths / "packed")


def stored_tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".weight_" in name}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


# Generation and compilers ----------------------------------------------------------------------------------------


def counting_backend(name):
    """A backend of torch that needs no C++ compiler, and a list that grows by one with each graph it compiles."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):  # a function, since transformers copies what it is given to compile with
        graphs.append(graph)
        return torch._dynamo.lookup_backend(name)(graph, inputs)

    return backend, graphs


def small(architecture="llama", **changes):
    model = tiny_model(architecture, **changes)
    hf_lowbit.quantize(model, quick(calibration=None))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_static_cache_gives_the_same_tokens(architecture):
    model = small(architecture)
    expected = model.generate(tokens(2, 8), **GREEDY)
    assert expected.shape == (2, 8 + GREEDY["max_new_tokens"])
    assert torch.equal(model.generate(tokens(2, 8), cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_model_compiles_into_one_graph(backend):
    """One graph, and one more when the batch size first changes: from then on it is a variable."""
    model = small(num_hidden_layers=1)
    backend, graphs = counting_backend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counts = []
    with torch.no_grad():
        for batch in (4, 3, 2, 4):
            ids = tokens(batch)
            found = compiled(input_ids=ids, use_cache=False).logits
            expected = model(input_ids=ids, use_cache=False).logits
            # the same ops in the same order, unless the compiler moves a product out of a sum
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
            counts.append(len(graphs))
    assert counts == [1, 2, 2, 2]


def test_compiled_training_step_with_an_input_gradient():
    """The op's backward is traced too."""
    model = small(num_hidden_layers=1)
    states = model.get_input_embeddings()(tokens(2, 8)).detach()
    backend, graphs = counting_backend("aot_eager")
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        leaf = states.clone().requires_grad_()
        run(inputs_embeds=leaf, use_cache=False).logits.square().sum().backward()
        grads.append(leaf.grad)
    assert len(graphs) == 1
    # float32 sums in another order: roundings of 2^-24, over one block
    torch.testing.assert_close(*reversed(grads), rtol=0, atol=1e-5 * float(grads[0].abs().max()))


def test_generate_compiles(packed):
    """transformers compiles decoding steps where the quantizer allows it: on a GPU by itself, on a CPU when asked."""
    assert packed.hf_quantizer.is_compileable is True
    expected = packed.generate(tokens(2, 8), **GREEDY)
    backend, graphs = counting_backend("aot_eager")
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    found = packed.generate(tokens(2, 8), cache_implementation="static", compile_config=config, **GREEDY)
    assert torch.equal(found, expected)
    assert graphs


def test_whole_model_exports(packed):
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            packed,
            (),
            {"input_ids": tokens(), "use_cache": False},
            dynamic_shapes={"input_ids": {0: batch}, "use_cache": None},
        )
        called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert called.count("hf_lowbit.binary_linear.default") == len(packed_modules(packed))
        for size in (4, 3):
            found = exported.module()(input_ids=tokens(size), use_cache=False).logits
            assert torch.equal(found, logits(packed, tokens(size)))


# Pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2")


def written(pipe):
    return pipe("w5 w6 w7", do_sample=False, max_new_tokens=5, return_full_text=False)[0]["generated_text"]


def test_pipeline_of_a_packed_folder(paths, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(paths / "packed")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert len(packed_modules(pipe.model)) == 14
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert written(pipe) == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


def test_pipeline_that_compresses(paths, tokenizer):
    arguments = {"quantization_config": quick(calibration=None)}
    pipe = pipeline("text-generation", model=str(paths / "dense"), tokenizer=tokenizer, model_kwargs=arguments)
    ready = pipeline("text-generation", model=str(paths / "packed"), tokenizer=tokenizer)
    assert_same(stored_tensors(pipe.model), stored_tensors(ready.model))
    assert written(pipe) == written(ready)


# Placement -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_paths(tmp_path_factory):
    """As ``paths``, but with most bytes in the layers that are packed."""
    folder = tmp_path_factory.mktemp("wide")
    model = tiny_model(hidden_size=128, intermediate_size=256)
    model.save_pretrained(folder / "dense")
    hf_lowbit.quantize(model, quick(calibration=None))
    model.save_pretrained(folder / "packed")
    return folder


def places(model):
    """Where the parameters are: "meta" for those on disk."""
    return {parameter.device.type for parameter in model.parameters()}


def test_automatic_placement_counts_packed_bytes(wide_paths, tmp_path):
    """A budget between the two sizes holds the packed model; a smaller one does not."""
    dense = AutoModelForCausalLM.from_pretrained(wide_paths / "dense")
    packed = AutoModelForCausalLM.from_pretrained(wide_paths / "packed")
    budget = 500_000
    assert packed.get_memory_footprint() < 0.8 * budget < 0.8 * 0.5 * dense.get_memory_footprint()
    options = {"device_map": "auto", "offload_folder": tmp_path}
    placed = AutoModelForCausalLM.from_pretrained(wide_paths / "packed", max_memory={"cpu": budget}, **options)
    assert places(placed) == {"cpu"}
    placed = AutoModelForCausalLM.from_pretrained(wide_paths / "dense", max_memory={"cpu": budget}, **options)
    assert "meta" in places(placed)
    placed = AutoModelForCausalLM.from_pretrained(wide_paths / "packed", max_memory={"cpu": 300_000}, **options)
    assert places(placed) == {"cpu", "meta"}
    assert torch.equal(logits(placed), logits(packed))


def test_automatic_placement_while_compressing(wide_paths, tmp_path):
    """Weights yet to be compressed are never held dense, so a model that fits packed is not sent to disk."""
    options = {"quantization_config": quick(calibration=None), "device_map": "auto", "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(wide_paths / "dense", max_memory={"cpu": 500_000}, **options)
    assert places(model) == {"cpu"}
    assert len(packed_modules(model)) == 14
    with pytest.raises(ValueError, match="cannot be combined with disk offload"):
        AutoModelForCausalLM.from_pretrained(wide_paths / "dense", max_memory={"cpu": 100_000}, **options)


@pytest.mark.parametrize(
    "device_map", [{"": "disk"}, LAYER_1_ON_DISK, {**LAYER_1_ON_DISK, "lm_head": "disk"}], ids=str
)
def test_disk_is_refused_while_compressing(paths, device_map, tmp_path):
    with pytest.raises(ValueError, match="cannot be combined with disk offload"):
        AutoModelForCausalLM.from_pretrained(
            paths / "dense", quantization_config=quick(), device_map=device_map, offload_folder=tmp_path
        )


@pytest.mark.parametrize("device_map", [{"": "disk"}, LAYER_1_ON_DISK], ids=["everything", "one block"])
def test_offloaded_model_computes_and_saves_the_same(paths, packed, device_map, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        paths / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert "meta" in places(model)
    assert torch.equal(logits(model), logits(packed))
    assert torch.equal(model.generate(tokens(1, 8), **GREEDY), packed.generate(tokens(1, 8), **GREEDY))
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "again", paths / "packed")))
    # what lay on disk has its checksums all the same
    assert damaged_tensors([tmp_path / "again" / "model.safetensors"]) == ([], len(packed.state_dict()))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(packed))


TENSOR_PARALLEL = """
import sys, torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
import hf_lowbit
for folder, config in ((sys.argv[1], None), (sys.argv[2], hf_lowbit.ARBConfig(calibration=None))):
    options = {} if config is None else {"quantization_config": config}
    for way in ({"distributed_config": DistributedConfig(tp_size=2)}, {"tp_plan": "auto"}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **way, **options)
        except ValueError as error:
            print(error)
"""


def test_tensor_parallelism_is_refused(paths):
    """In a process that believes itself to be one of two; a process group cannot be undone within the test run."""
    command = [sys.executable, "-c", TENSOR_PARALLEL, str(paths / "packed"), str(paths / "dense")]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    refused = "hf_lowbit: tensor parallelism is not supported, packed rows cannot be cut apart; leave out tp_plan"
    assert done.stdout.splitlines() == 4 * [refused], done.stderr[-2000:]


def test_moving_away_and_to_the_cpu(packed):
    expected, before = logits(packed), stored_tensors(packed)
    assert torch.equal(logits(packed.cpu()), expected)
    assert torch.equal(logits(packed.to("cpu")), expected)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in packed.state_dict().items()}
    packed.to("meta")
    assert places(packed) == {"meta"}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in packed.state_dict().items()} == shapes
    assert packed(input_ids=tokens().to("meta")).logits.shape == expected.shape  # shapes can be asked without memory
    packed.to_empty(device="cpu")
    packed.load_state_dict(before, strict=False)
    assert_same(stored_tensors(packed), before)


# Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_scales_keep_their_dtype(paths, scale_dtype, tmp_path):
    stored = getattr(torch, scale_dtype)
    config = quick(calibration=None, scale_dtype=scale_dtype)
    for source in (torch.float32, torch.bfloat16):  # the dtype that the dense checkpoint is compressed in
        model = AutoModelForCausalLM.from_pretrained(paths / "dense", quantization_config=config, dtype=source)
        before = stored_tensors(model)
        assert {tensor.dtype for name, tensor in before.items() if "scale" in name} == {stored}
        model.save_pretrained(tmp_path / str(source))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, "auto"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(source), dtype=dtype)
            assert_same(stored_tensors(loaded), before)
            want = source if dtype == "auto" else dtype
            assert loaded.dtype == loaded.lm_head.weight.dtype == logits(loaded).dtype == want
            assert packed_modules(loaded)[FIRST].weight.dtype == want


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "base model": lambda model: model.model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.bfloat16).to(torch.float16).to(torch.float32).to(torch.bfloat16),
    "a layer": lambda model: [layer.half().bfloat16() for layer in packed_modules(model).values()],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_casting_the_model_leaves_the_scales(scale_dtype, cast, tmp_path):
    model = tiny_model()
    hf_lowbit.quantize(model, quick(calibration=None, scale_dtype=scale_dtype))
    before = {name: tensor.clone() for name, tensor in stored_tensors(model).items()}
    cast(model)
    assert {layer.weight.dtype for layer in packed_modules(model).values()} == {torch.bfloat16}
    assert_same(stored_tensors(model), before)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert_same(stored_tensors(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("name", ["half", "float"])
def test_half_and_float_are_refused_by_transformers(packed, name):
    """Should that change one day, ``test_casting_the_model_leaves_the_scales`` must take them in."""
    with pytest.raises(ValueError, match="is not supported for quantized model"):
        getattr(packed, name)()


# Configs ---------------------------------------------------------------------------------------------------------


def test_config_as_object_and_as_dict(paths, packed):
    config = quick(calibration=None)
    twin = copy.deepcopy(config)
    for given in (config, config, config.to_dict()):  # twice: the first run must not have changed it
        model = AutoModelForCausalLM.from_pretrained(paths / "dense", quantization_config=given)
        assert_same(stored_tensors(model), stored_tensors(packed))
        assert type(model.config.quantization_config) is ARBConfig
    assert config == twin
    assert config.modules is None


def test_config_with_calibration_data_survives_the_copy(paths):
    """transformers copies all that is given to ``from_pretrained``; token ids in a tensor must come through."""
    ids = tokens()
    config = quick(calibration=ids)
    again = copy.deepcopy(config)
    assert again == config
    loaded = AutoModelForCausalLM.from_pretrained(paths / "dense", quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(paths / "dense")
    hf_lowbit.quantize(model, again)
    assert_same(stored_tensors(loaded), stored_tensors(model))
    record = loaded.config.quantization_config.calibration
    assert (record.kind, record.tokens) == ("tokens", ids.numel())
    assert torch.equal(ids, tokens())


def test_dict_without_a_method_name_is_refused(paths):
    values = quick(calibration=None).to_dict()
    with pytest.raises(ValueError, match="unknown method None"):
        AutoModelForCausalLM.from_pretrained(
            paths / "dense", quantization_config={key: values[key] for key in values if key != "method"}
        )
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(
            paths / "dense", quantization_config={key: values[key] for key in values if key != "quant_method"}
        )


@pytest.mark.parametrize("other", [BitsAndBytesConfig(), LowBitRecipe({"*": ARBConfig()})], ids=["bnb", "recipe"])
def test_other_config_class_for_a_packed_checkpoint_names_both(paths, other):
    with pytest.raises(ValueError, match=f"ARBConfig.*{type(other).__name__}"):
        AutoModelForCausalLM.from_pretrained(paths / "packed", quantization_config=other)


def test_stored_values_win(paths, packed):
    other = quick(variant="rtn", block_size=64, calibration=None)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(paths / "packed", quantization_config=other)
    assert model.config.quantization_config == packed.config.quantization_config
    assert model.config.quantization_config.variant == "rc"
    assert_same(model.state_dict(), packed.state_dict())


# Back to dense ---------------------------------------------------------------------------------------------------


def test_dequantized_model_is_saved_as_a_dense_checkpoint(packed, tmp_path):
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "packed")  # which puts a name in the place of the dtype in the config
    assert packed.dequantize() is packed
    assert not packed_modules(packed)
    assert {type(m) for m in packed.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert torch.equal(logits(packed), expected)
    assert getattr(packed, "hf_quantizer", None) is None
    assert not packed.is_quantized
    dense = tmp_path / "dense"
    packed.save_pretrained(dense)
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    with safe_open(dense / "model.safetensors", framework="pt") as file:
        assert METADATA_KEY not in file.metadata()
        assert not any(".weight_" in key for key in file.keys())
    loaded = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(logits(loaded), expected)
    assert not getattr(loaded, "is_quantized", False)
    for dtype in (torch.bfloat16, torch.float16):
        cast = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
        assert torch.isfinite(logits(cast)).all()
    again = AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick(calibration=None))
    assert len(packed_modules(again)) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_in_another_dtype(paths, dtype):
    model = AutoModelForCausalLM.from_pretrained(paths / "packed", dtype=torch.float16)
    weights = {name: layer.packed.unpack() for name, layer in packed_modules(model).items()}
    model.dequantize(dtype)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to(dtype)), name


# Copies and saves ------------------------------------------------------------------------------------------------


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_model("llama-tied").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick(calibration=None))
    for folder in ("first", "second"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / folder)
        assert "lm_head.weight" not in load_file(tmp_path / folder / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(loaded), logits(model))
        model = loaded
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loading_and_saving_in_one_folder(packed, tmp_path):
    """Files that may still be mapped into memory are replaced; shards of the former save do not stay behind."""
    expected = logits(packed)
    packed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for size in ("10KB", "5GB", "5GB"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(logits(model), expected)
        assert damaged_tensors(tmp_path.glob("*.safetensors")) == ([], len(packed.state_dict()))
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    del model
    gc.collect()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_copy_is_equal_and_independent(packed):
    twin = copy.deepcopy(packed)
    expected = logits(packed)
    assert torch.equal(logits(twin), expected)
    assert_same(twin.state_dict(), packed.state_dict())
    twin.get_submodule(FIRST).weight_row_scale.data.mul_(2)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(packed), expected)


def test_state_dict_round_trip(packed):
    """Into itself, into a scrambled copy, and not into a model of another shape; without pickling anything."""
    expected, state = logits(packed), {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    assert packed.load_state_dict(packed.state_dict()) == ([], [])
    assert_same(packed.state_dict(), state)
    twin = copy.deepcopy(packed)
    for layer in packed_modules(twin).values():
        layer.weight_row_scale.data.zero_()
        layer.weight_sign.data.zero_()
    assert not torch.equal(logits(twin), expected)
    twin.load_state_dict(state)
    assert torch.equal(logits(twin), expected)
    assert_same(twin.state_dict(), state)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        tiny_model().load_state_dict(state, strict=False)


def test_no_parameter_of_a_packed_layer_is_trainable(packed):
    for model in (packed, small()):  # loaded, and compressed in memory
        for layer in packed_modules(model).values():
            assert not any(parameter.requires_grad for parameter in layer.parameters())
        trainable = model.num_parameters(only_trainable=True)
        assert trainable == 2 * VOCABULARY * 64 + 5 * 64  # embedding, head and norms


def test_sizes_are_those_of_what_is_stored(paths, packed):
    """transformers counts stored elements: a byte of signs is one of them, though it holds eight weights."""
    parameters = dict(packed.named_parameters())
    assert packed.num_parameters() == sum(parameter.numel() for parameter in parameters.values())
    stored = sum(layer.packed.nbytes for layer in packed_modules(packed).values())
    stubs = sum(layer.weight.nbytes for layer in packed_modules(packed).values())
    rest = sum(parameter.nbytes for name, parameter in parameters.items() if ".layers." not in name)
    norms = sum(parameter.nbytes for name, parameter in parameters.items() if "layernorm" in name)
    footprint = packed.get_memory_footprint(return_buffers=False)
    assert footprint == stored + stubs + rest + norms
    dense = AutoModelForCausalLM.from_pretrained(paths / "dense")
    assert footprint < 0.5 * dense.get_memory_footprint(return_buffers=False)
    on_disk = sum(tensor.nbytes for tensor in load_file(paths / "packed" / "model.safetensors").values())
    assert on_disk == footprint


def test_base_model_round_trip(paths, packed, tmp_path):
    base = AutoModel.from_pretrained(paths / "packed")
    for folder in ("first", "second"):
        base.save_pretrained(tmp_path / folder)
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert_same(base.state_dict(), packed.model.state_dict())
        assert len(packed_modules(base)) == 14
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "first")


def test_a_new_head_may_be_trained_on_a_packed_model(paths, packed, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(paths / "packed", num_labels=3)
    assert len(packed_modules(model)) == 14
    assert model(tokens()).logits.shape == (4, 3)
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert_same(again.state_dict(), model.state_dict())


def test_dequantizing_what_lies_on_disk_is_refused(paths, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(paths / "packed", device_map=LAYER_1_ON_DISK, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"7 packed layers are offloaded, first model\.layers\.1"):
        model.dequantize()
    assert torch.equal(logits(model), logits(packed))


def test_dequantized_model_bears_no_mark(packed):
    packed.dequantize()
    assert not hasattr(packed.config, "_is_quantized")
    assert all(parameter.requires_grad for parameter in packed.parameters())  # ready to be trained as a whole
