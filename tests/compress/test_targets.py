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
from hf_lowbit.compress.targets import FP32, NOT_TEXT, OUTPUT_HEAD, ROUTER, TIED, default_skips, plan_run, select
from tests.tiny import tiny_llava, tiny_model

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

    turned = LowBitRecipe({"*": rest, "*.down_proj": down, "layers.0": block}, optional=["*.down_proj", "layers.0"])
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
    named = rf"^{kind} '\*\.mpl' \(close: mlp\), {kind} 'layer\.0' \(close: layers\.0, layers\.1\): no module of Ll"
    with pytest.raises(ValueError, match=named):
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


def test_transposed_layers_are_compressed():
    targets = select(gpt2(), FREE, None)
    assert list(targets.methods) == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(targets.dense) == ["lm_head"]


def mixtral():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_experts_in_one_tensor_are_listed_one_by_one_and_their_router_stays_dense():
    targets = select(mixtral(), FREE, None)
    names = [name.partition("layers.0.")[2] for name in targets.methods]
    assert names[:4] == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert set(names[4:]) == {f"mlp.experts.each_{p}_proj.{i}" for p in ("gate_up", "down") for i in range(4)}
    assert targets.dense["model.layers.0.mlp.gate"] == ROUTER
    assert targets.unwanted == {}


def test_a_rule_for_the_router_does_not_help():
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        select(mixtral(), LowBitRecipe({"mlp.gate": FREE}), None)


def test_weights_of_three_dimensions_elsewhere_are_named():
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "special": nn.Module()})
    model["special"].bank = nn.Parameter(torch.zeros(2, 4, 4))
    targets = select(model, FREE, None)
    assert targets.unwanted == {"special": "fused weights of Module are not supported"}


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
    (blocks,), targets = plan_run(model, ARBConfig(), calibrated=True)
    assert list(blocks) == ["model.decoder.layers.0", "model.decoder.layers.1"]
    outside = {"model.decoder.project_in", "model.decoder.project_out"}
    assert {name for name, reason in targets.dense.items() if reason == "outside the decoder blocks"} == outside
    assert set(targets.unwanted) == outside
    assert len(targets.methods) == 2 * 6

    stacks, free = plan_run(model, FREE, calibrated=False)
    assert stacks == []
    assert set(free.methods) == set(targets.methods) | outside


def test_block_names_are_compared_whole():
    model = tiny_model("llama", num_hidden_layers=11)
    names = list(select(model, ARBConfig(), ["model.layers.1"]).methods)
    assert len(names) == len(BLOCK)
    assert all(name.startswith("model.layers.1.") for name in names)


def test_encoder_comes_before_decoder():
    stacks, targets = plan_run(t5(), ARBConfig(), calibrated=True)
    assert [next(iter(stack)) for stack in stacks] == ["encoder.block.0", "decoder.block.0"]
    assert targets.unwanted == {}
    assert set(targets.methods) == set(select(t5(), FREE, None).methods)


def test_only_the_text_model_of_a_model_with_a_vision_tower():
    for calibrated, config in ((True, ARBConfig()), (False, FREE)):
        stacks, targets = plan_run(tiny_llava(), config, calibrated)
        assert all(name.startswith("model.language_model.layers.") for name in targets.methods)
        assert {name.split(".")[1] for name, why in targets.dense.items() if why == NOT_TEXT} == {
            "vision_tower", "multi_modal_projector",
        }  # fmt: skip
        assert targets.unwanted == {}
        assert len(stacks) == calibrated


def test_lists_of_which_it_is_not_clear_what_text_does_are_named():
    model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4)]) for name in ("left", "right")})
    with pytest.raises(UnsupportedModelError, match=r"2 lists of blocks \(left, right\).*calibration=None"):
        plan_run(model, ARBConfig(), calibrated=True)
    assert len(plan_run(model, FREE, calibrated=False)[1].methods) == 2


def test_a_rule_that_only_covers_a_norm_is_refused():
    with pytest.raises(ValueError, match="input_layernorm"):
        select(tiny_model("llama"), LowBitRecipe({"input_layernorm": FREE, "*": FREE}), None)
