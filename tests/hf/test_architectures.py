"""Models that are not one stack of ``nn.Linear``: fused experts, ``Conv1D``, encoder-decoders, vision towers."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    Conv1D,
    MixtralConfig,
    T5EncoderModel,
    UMT5EncoderModel,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import hf_lowbit
from hf_lowbit import AdaSVDConfig, CheckpointError, LowBitRecipe, PackedLinear, UnsupportedModelError, packed_modules
from hf_lowbit.experts import ExpertWeights
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.verify import verify
from tests.compress.test_planning import sparse
from tests.hf.test_transformers import QUIET, logits, quick
from tests.tiny import VOCABULARY, WITH_EXPERTS, closed_router, tiny_llava, tiny_model, tiny_t5, tiny_umt5, tokens

DATA = pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "data-free"])


def options(calibrated, **changes):
    return quick(**changes) if calibrated else quick(calibration=None, **changes)


# Experts ---------------------------------------------------------------------------------------------------------


@DATA
@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_experts_are_packed_one_by_one(architecture, calibrated, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options(calibrated))
    experts = [name for name in packed_modules(model) if ".each_" in name]
    assert len(experts) == 2 * 2 * 4  # layers, fused parameters, experts
    assert all(parameter.dim() < 3 for name, parameter in model.named_parameters() if ".weight_" not in name)
    dense = {name: reason for name, reason in model.hf_quantizer.report.dense.items() if "router" in reason}
    assert len(dense) == 2

    # the same model with what the packed experts stand for, run by transformers alone
    by_hand = tiny_model(architecture)
    for name, layer in packed_modules(model).items():
        weight = layer.packed.unpack()
        if ".each_" in name:
            fused, _, index = name.rpartition(".")
            module, _, leaf = fused.replace("each_", "").rpartition(".")
            matrix = weight.T if architecture == "gpt_oss" else weight
            getattr(by_hand.get_submodule(module), leaf).data[int(index)] = matrix
        else:
            by_hand.get_submodule(name).weight.data = weight
    assert torch.allclose(logits(model), logits(by_hand), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert logits(loaded).equal(logits(model))
    assert not verify(tmp_path / "packed").problems
    assert len(inspect(tmp_path / "packed").modules) == len(packed_modules(model))
    loaded.save_pretrained(tmp_path / "again")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")).equal(logits(model))

    loaded.dequantize()
    assert not packed_modules(loaded)
    assert torch.allclose(logits(loaded), logits(by_hand), rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "back")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(by_hand), atol=1e-5)


@DATA
def test_experts_in_memory_and_while_loading_give_the_same_bits(calibrated, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options(calibrated))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    hf_lowbit.quantize(model, options(calibrated))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_an_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(architecture):
    """Against the choice of the router itself, in the first block, where inputs are those of the model."""
    model = tiny_model(architecture)
    block = model.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    report = hf_lowbit.quantize(tiny_model(architecture), quick(skip=["self_attn"]))
    for batch in tokens().split(QUIET.batch_size):
        logits(model, batch)
    handle.remove()
    rows = {row["module"]: row for row in report.rows}
    total = 0
    for expert in range(4):
        row = rows[f"model.layers.0.mlp.experts.each_gate_up_proj.{expert}"]
        wanted = sum(int((choice == expert).sum()) for _, choice in seen)
        assert row["calibration_tokens"] == wanted
        total += wanted
    assert total == 2 * tokens().numel()


def test_experts_that_no_token_reaches_are_compressed_from_their_weights(caplog):
    config = quick(calibration=tokens(1, 2), samples=1)
    model = tiny_model("mixtral", num_local_experts=8)
    report = hf_lowbit.quantize(model, config)
    idle = [row for row in report.rows if row["calibration_tokens"] == 0]
    assert idle
    assert f"; {len(idle)} layers of experts that no calibration token reached" in report.summary()
    assert all(row["output_error"] is None for row in idle)
    assert (
        f"received no calibration token and are compressed from their weights alone ({idle[0]['module']}"
        in caplog.text
    )
    assert torch.isfinite(logits(model)).all()


IDLE = {
    "arb": (quick, ["mixtral", "qwen3_moe"]),
    "pbs2p": (sparse, ["mixtral"]),
    "adasvd": (lambda **data: AdaSVDConfig(ratio=0.5, importance="uniform", run=QUIET, **data), ["mixtral"]),
}


@pytest.mark.parametrize(
    ("method", "architecture"), [(method, kind) for method, (_, kinds) in IDLE.items() for kind in kinds]
)
def test_an_expert_without_tokens_is_packed_as_without_data(method, architecture):
    config = IDLE[method][0]
    report = hf_lowbit.quantize(model := closed_router(architecture), config(calibration=tokens(), samples=4))
    hf_lowbit.quantize(free := closed_router(architecture), config(calibration=None))
    idle = [row["module"] for row in report.rows if row["calibration_tokens"] == 0]
    experts = [f"model.layers.{i}.mlp.experts.each_{part}_proj.0" for i in range(2) for part in ("gate_up", "down")]
    assert idle == experts
    ours, theirs = packed_modules(model), packed_modules(free)
    for name in idle:
        if ours[name].spec == theirs[name].spec:  # ranks and N of a block may be planned with data
            state = theirs[name].packed.state()
            assert all(torch.equal(part, state[leaf]) for leaf, part in ours[name].packed.state().items())
    assert any(ours[name].spec == theirs[name].spec for name in idle)
    assert torch.isfinite(logits(model)).all()


@DATA
def test_some_experts_may_stay_dense(calibrated, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    config = options(calibrated, skip=["*.each_gate_up_proj.1", "layers.1.mlp"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    experts = model.model.layers[0].mlp.experts
    assert type(experts.each_gate_up_proj[1]) is nn.Linear
    assert isinstance(experts.each_gate_up_proj[0], PackedLinear)
    assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, nn.Parameter)  # none of them is packed
    original = tiny_model("mixtral").model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts.each_gate_up_proj[1].weight, original[1])
    model.save_pretrained(tmp_path / "packed")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")).equal(logits(model))


def test_other_ways_to_run_packed_experts_are_refused_clearly():
    model = tiny_model("mixtral")
    hf_lowbit.quantize(model, options(False))
    weights = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(weights, ExpertWeights)
    assert weights.shape == (4, 192, 64)
    assert weights.dtype == torch.float32
    assert model.config._experts_implementation == "eager"
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with pytest.raises((TypeError, AttributeError), match="use experts_implementation='eager'"):
            logits(model)
    model.set_experts_implementation("eager")
    logits(model)
    with pytest.raises(TypeError, match="multiplied one by one"):
        torch.matmul(torch.zeros(2, 64), weights[0])


def test_experts_of_another_build_are_left_dense_and_named(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "experts": nn.Module()})])
            self.layers[0]["experts"].gate = nn.Parameter(torch.zeros(2, 8, 8))

    _, report = hf_lowbit.compress.compress_model(Model(), options(False))
    assert report.dense == {"layers.0.experts": "fused weights of Module are not supported"}
    assert "layers.0.experts: fused weights of Module are not supported" in caplog.text
    assert not hf_lowbit.experts.is_supported(Llama4TextExperts(MixtralConfig(hidden_size=8, intermediate_size=8)))


def test_a_table_that_lists_an_expert_too_many_is_refused(tmp_path):
    model = tiny_model("mixtral", num_hidden_layers=1)
    hf_lowbit.quantize(model, options(False))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    table = config["quantization_config"]["modules"]
    name = "model.layers.0.mlp.experts.each_down_proj."
    table[f"{name}4"] = table[f"{name}3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"each_down_proj\.4: the model has no linear layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# Conv1D ----------------------------------------------------------------------------------------------------------


@DATA
def test_conv1d_is_packed_as_the_linear_layer_that_it_is(calibrated, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options(calibrated))
    layers = packed_modules(model)
    assert len(layers) == 2 * 4
    assert layers["transformer.h.0.attn.c_attn"].out_features == 3 * 64
    by_hand = tiny_model("gpt2")
    for name, layer in layers.items():
        dense = by_hand.get_submodule(name)
        weight = dense.weight.detach()
        assert float((layer.packed.unpack().T - weight).square().sum() / weight.square().sum()) < 0.4
        dense.weight.data = layer.packed.unpack().T.contiguous()
    assert torch.allclose(logits(model), logits(by_hand), rtol=1e-4, atol=1e-5)
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    hf_lowbit.quantize(in_memory, options(calibrated))
    assert logits(in_memory).equal(logits(model))
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert logits(loaded).equal(logits(model))
    loaded.dequantize()
    assert isinstance(loaded.transformer.h[0].attn.c_attn, Conv1D)
    assert torch.allclose(logits(loaded), logits(by_hand), rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "back")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(by_hand), atol=1e-5)


# Encoder-decoders ------------------------------------------------------------------------------------------------


def seq2seq_logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), decoder_input_ids=tokens(4, 7)).logits


@DATA
@pytest.mark.parametrize("kind", ["t5", "t5 gated", "umt5"])
def test_encoder_decoder(calibrated, kind, tmp_path):
    gated = kind != "t5"
    tiny = tiny_umt5 if kind == "umt5" else tiny_t5
    tiny(feed_forward_proj="gated-gelu" if gated else "relu").save_pretrained(tmp_path / "dense")
    config = options(calibrated, run=hf_lowbit.RunOptions(progress=False, batch_size=3))  # 3 and 1: uneven batches
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(packed_modules(model)) == 2 * (4 + 8) + 4 * (2 if gated else 1)  # "wo" is one that T5 keeps in float32
    assert sum("float32" in reason for reason in model.hf_quantizer.report.dense.values()) == 4
    assert all(name.startswith(("encoder.", "decoder.")) for name in packed_modules(model))
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed")
    assert seq2seq_logits(loaded).equal(seq2seq_logits(model))
    written = [m.generate(tokens(2, 8), max_new_tokens=5, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*written)
    loaded.save_pretrained(tmp_path / "again")  # after use
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    if calibrated:
        rows = model.hf_quantizer.report.rows
        assert {row["calibration_tokens"] for row in rows} == {tokens().numel()}
        by_data = sum(row["weight_error"] for row in rows)
        assert by_data < len(rows)


def test_encoder_decoder_block_by_block_equals_hooks_on_the_whole_model():
    """The decoder is calibrated on what the compressed encoder gives it."""
    from hf_lowbit.methods.arb.algorithm import quantize

    config = quick(skip=["encoder"])
    model, by_hand = tiny_t5(), tiny_t5()
    hf_lowbit.quantize(model, config)
    for block in (0, 1):
        own = [name for name in packed_modules(model) if name.startswith(f"decoder.block.{block}.")]
        moments = {}

        def add(module, args, name, moments=moments):
            rows = args[0].reshape(-1, args[0].shape[-1])
            moments[name] = moments.get(name, 0) + rows.T @ rows

        handles = [by_hand.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: add(m, a, n)) for n in own]
        for batch in tokens().split(QUIET.batch_size):
            with torch.no_grad():
                by_hand(input_ids=batch, decoder_input_ids=by_hand.prepare_decoder_input_ids_from_labels(labels=batch))
        for handle in handles:
            handle.remove()
        for name in own:
            linear = by_hand.get_submodule(name)
            linear.weight.data = quantize(linear.weight.detach(), moments[name] * (2 / 4), config, name).unpack()
    assert torch.allclose(seq2seq_logits(model), seq2seq_logits(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tiny", "encoder"), [(tiny_t5, T5EncoderModel), (tiny_umt5, UMT5EncoderModel)])
def test_encoder_alone(tiny, encoder, tmp_path):
    tiny(feed_forward_proj="relu").save_pretrained(tmp_path / "dense")
    model = encoder.from_pretrained(tmp_path / "dense", quantization_config=quick())
    assert len(packed_modules(model)) == 2 * 5
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    loaded = encoder.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(tokens()).last_hidden_state, loaded(tokens()).last_hidden_state)


# Vision towers ---------------------------------------------------------------------------------------------------


def image_logits(model):
    ids = tokens(1, 12)
    ids[:, :5] = VOCABULARY - 1  # five positions of the tower, class token included or not
    features = model.config.vision_config.image_size // model.config.vision_config.patch_size
    ids[:, features**2 : 5] = 5
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.rand(1, 3, 8, 8)).logits


@DATA
def test_vision_tower_stays_dense(calibrated, tmp_path, caplog):
    tiny_llava().save_pretrained(tmp_path / "dense")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", quantization_config=options(calibrated))
    assert len(packed_modules(model)) == 14
    assert all(name.startswith("model.language_model.layers.") for name in packed_modules(model))
    left = model.hf_quantizer.report.dense
    assert left["model.multi_modal_projector.linear_1"] == "not part of the text model"
    assert "stay dense" not in caplog.text  # nothing to warn of
    expected = image_logits(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    assert image_logits(loaded).equal(expected)
    assert not verify(tmp_path / "packed").problems
    ids = tokens(2, 8)
    assert torch.equal(*[m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, loaded)])
    dense = tiny_llava()
    hf_lowbit.quantize(dense, options(calibrated))
    assert image_logits(dense).equal(expected)


def test_several_lists_without_a_text_model_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.ModuleList([nn.Linear(4, 4)])
            self.right = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(UnsupportedModelError, match=r"2 lists of blocks \(left, right\)"):
        hf_lowbit.compress.compress_model(Model(), quick())


def test_a_recipe_reaches_single_experts():
    model = tiny_model("mixtral")
    recipe = LowBitRecipe(
        {"*.each_down_proj": quick(variant="x"), "*.experts": quick()}, skip=["self_attn"], run=QUIET
    )
    hf_lowbit.quantize(model, recipe)
    assert len(packed_modules(model)) == 16
    for name, layer in packed_modules(model).items():
        assert layer.spec.shift == ("down_proj" in name)
