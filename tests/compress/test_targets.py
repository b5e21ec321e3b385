"""Which layers are compressed, by what, and the reason for each that is not."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_lowbit import ARBConfig, LowBitRecipe, UnsupportedModelError
from hf_lowbit.compress.targets import FP32, OUTPUT_HEAD, TIED, default_skips, plan_run, select
from tests.tiny import tiny_model

FREE = ARBConfig(calibration=None)
BLOCK = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA = [f"model.layers.{number}.{name}" for number in range(2) for name in BLOCK]


def t5():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config)


# Defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_blocks_are_compressed_and_the_head_is_not(architecture):
    targets = select(tiny_model(architecture), FREE, None)
    assert list(targets.methods) == LLAMA  # in model order
    assert all(config is FREE for config in targets.methods.values())
    assert targets.dense == {"lm_head": OUTPUT_HEAD}


def test_tied_weights_are_known_by_both_names():
    assert default_skips(tiny_model("llama")) == {"lm_head": OUTPUT_HEAD}
    assert default_skips(tiny_model("llama-tied")) == {"model.embed_tokens": TIED, "lm_head": OUTPUT_HEAD}


def test_a_tied_linear_layer_that_is_no_head_stays_dense():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    model.all_tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    targets = select(model, FREE, None)
    tied = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert [targets.dense[name] for name in tied] == [TIED, TIED]
    assert list(targets.methods) == [name for name in LLAMA if name not in tied]


def test_a_base_model_has_no_head():
    targets = select(LlamaModel(tiny_model("llama").config), FREE, None)
    assert list(targets.methods) == [name.removeprefix("model.") for name in LLAMA]
    assert targets.dense == {}


def test_a_plain_module_will_do():
    targets = select(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), FREE, None)
    assert list(targets.methods) == ["0", "2"]


def test_weights_are_not_looked_at():
    config = tiny_model("llama").config
    with torch.device("meta"):
        model = LlamaModel(config)
    assert len(select(model, FREE, None).methods) == len(LLAMA)


# Skip and rules --------------------------------------------------------------------------------------------------


def test_skip_patterns():
    targets = select(tiny_model("llama"), ARBConfig(skip=["*.1.mlp", "q_proj", "lm_head"], calibration=None), None)
    skipped = {name for name in LLAMA if ".1.mlp." in name or name.endswith("q_proj")}
    assert set(targets.methods) == set(LLAMA) - skipped
    assert targets.dense["model.layers.1.mlp.up_proj"] == "skip pattern '*.1.mlp'"
    assert targets.dense["model.layers.0.self_attn.q_proj"] == "skip pattern 'q_proj'"
    assert targets.dense["lm_head"] == OUTPUT_HEAD
    assert set(targets.dense) == skipped | {"lm_head"}
    assert targets.unwanted == {}  # all of it was asked for, or is the default


def test_first_rule_wins():
    down, block, rest = (ARBConfig(calibration=None, seed=seed) for seed in range(3))
    recipe = LowBitRecipe({"*.down_proj": down, "layers.0": block, "*": rest}, skip=["k_proj"])
    methods = select(tiny_model("llama"), recipe, None).methods
    for name in LLAMA:
        if name.endswith("k_proj"):
            assert name not in methods
        elif name.endswith("down_proj"):
            assert methods[name] is down
        else:
            assert methods[name] is (block if ".0." in name else rest)

    turned = LowBitRecipe({"*": rest, "*.down_proj": down, "layers.0": block})
    assert set(map(id, select(tiny_model("llama"), turned, None).methods.values())) == {id(rest)}


def test_what_no_rule_covers_stays_dense():
    targets = select(tiny_model("llama"), LowBitRecipe({"mlp": FREE}), None)
    assert list(targets.methods) == [name for name in LLAMA if ".mlp." in name]
    assert targets.dense["model.layers.0.self_attn.q_proj"] == "no rule of the recipe matches"


def test_a_rule_does_not_overrule_the_head():
    targets = select(tiny_model("llama"), LowBitRecipe({"lm_head": FREE, "mlp": FREE}), None)
    assert targets.dense["lm_head"] == OUTPUT_HEAD
    with pytest.raises(UnsupportedModelError, match="nothing to compress in LlamaForCausalLM"):
        select(tiny_model("llama"), LowBitRecipe({"lm_head": FREE}), None)


@pytest.mark.parametrize(
    "config",
    [
        ARBConfig(skip=["*.mpl", "q_proj", "layer.0"], calibration=None),
        LowBitRecipe({"*.mpl": FREE, "layer.0": FREE, "*": FREE}),
    ],
    ids=["skip", "rule"],
)
def test_patterns_without_a_module_are_all_named(config):
    kind = "skip" if config.skip else "rule"
    with pytest.raises(ValueError, match=rf"^{kind} '\*\.mpl', {kind} 'layer\.0': no module of LlamaForCausalLM"):
        select(tiny_model("llama"), config, None)


def test_spelling_is_checked_before_anything_else():
    with pytest.raises(ValueError, match="skip 'lm_haed'"):
        select(tiny_model("llama"), ARBConfig(skip=["*", "lm_haed"], calibration=None), None)


# What cannot be compressed ---------------------------------------------------------------------------------------


def test_nothing_left():
    with pytest.raises(UnsupportedModelError, match=r"nothing to compress in LlamaForCausalLM .*skip pattern '\*'"):
        select(tiny_model("llama"), ARBConfig(skip=["*"], calibration=None), None)
    with pytest.raises(UnsupportedModelError, match=r"nothing to compress in Sequential \(no linear layers\)"):
        select(nn.Sequential(nn.LayerNorm(4)), FREE, None)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))


def test_transposed_layers_are_named():
    with pytest.raises(UnsupportedModelError, match="nothing to compress in GPT2LMHeadModel") as error:
        select(gpt2(), FREE, None)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.0.{name}: layers of type Conv1D are not supported" in str(error.value)


def test_transposed_layers_are_listed_beside_what_is_compressed():
    model = gpt2()
    model.extra = nn.Linear(32, 32)
    targets = select(model, FREE, None)
    assert list(targets.methods) == ["extra"]
    assert targets.dense.pop("lm_head") == OUTPUT_HEAD
    assert len(targets.dense) == 4
    assert targets.unwanted == targets.dense  # nobody asked for these
    assert set(targets.dense.values()) == {"layers of type Conv1D are not supported"}


def test_experts_in_one_tensor_and_their_router_are_listed():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    targets = select(MixtralForCausalLM(config), FREE, None)
    assert [name.rpartition(".")[2] for name in targets.methods] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    reasons = {name.partition("layers.0.")[2]: reason for name, reason in targets.dense.items() if "layers" in name}
    assert any("fused weights of" in reason and name.endswith("experts") for name, reason in reasons.items())
    assert any(name.endswith("gate") for name in reasons)


class Special(nn.Linear):
    """Computes something else than a linear layer."""


def test_subclasses_and_convolutions_are_listed():
    model = nn.ModuleDict(
        {"linear": nn.Linear(4, 4), "special": Special(4, 4), "conv": nn.Conv2d(2, 2, 3), "conv1d": nn.Conv1d(2, 2, 3)}
    )
    model["embedding"], model["norm"] = nn.Embedding(4, 4), nn.LayerNorm(4)
    targets = select(model, FREE, None)
    assert list(targets.methods) == ["linear"]
    assert targets.dense == {
        name: f"layers of type {kind} are not supported"
        for name, kind in [("special", "Special"), ("conv", "Conv2d"), ("conv1d", "Conv1d")]
    }


def test_layers_the_model_keeps_in_float32():
    targets = select(t5(), FREE, None)
    kept = [name for name, reason in targets.dense.items() if reason == FP32]
    assert kept
    assert all(name.endswith("DenseReluDense.wo") for name in kept)
    assert not any(name.endswith(".wo") for name in targets.methods)
    assert "encoder.block.0.layer.0.SelfAttention.q" in targets.methods


# Calibrated runs -------------------------------------------------------------------------------------------------


def test_a_calibrated_run_stays_inside_the_blocks():
    model = tiny_model("opt", word_embed_proj_dim=32)  # has projections before and after the blocks
    blocks, targets = plan_run(model, ARBConfig(), calibrated=True)
    assert list(blocks) == ["model.decoder.layers.0", "model.decoder.layers.1"]
    outside = {"model.decoder.project_in", "model.decoder.project_out"}
    assert {name for name, reason in targets.dense.items() if reason == "outside the decoder blocks"} == outside
    assert set(targets.unwanted) == outside
    assert len(targets.methods) == 2 * 6

    free_blocks, free = plan_run(model, FREE, calibrated=False)
    assert free_blocks is None
    assert set(free.methods) == set(targets.methods) | outside


def test_block_names_are_compared_whole():
    model = tiny_model("llama", num_hidden_layers=11)
    names = list(select(model, ARBConfig(), ["model.layers.1"]).methods)
    assert len(names) == len(BLOCK)
    assert all(name.startswith("model.layers.1.") for name in names)


def test_encoder_and_decoder_only_without_data():
    assert plan_run(t5(), FREE, calibrated=False)[0] is None
    with pytest.raises(UnsupportedModelError, match=r"encoder\.block, decoder\.block"):
        plan_run(t5(), ARBConfig(), calibrated=True)


def test_a_model_without_linear_layers_is_refused_with_its_reasons_in_a_calibrated_run_too():
    with pytest.raises(UnsupportedModelError, match="layers of type Conv1D are not supported"):
        plan_run(gpt2(), ARBConfig(), calibrated=True)


def test_a_rule_that_only_covers_a_norm_is_refused():
    with pytest.raises(ValueError, match="input_layernorm"):
        select(tiny_model("llama"), LowBitRecipe({"input_layernorm": FREE, "*": FREE}), None)
