"""Rules of a recipe that cannot mean what was written: refused with names, before any work."""

import json
import re

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit import (
    AdaSVDConfig,
    ARBConfig,
    LowBitConfig,
    LowBitRecipe,
    PBS2PConfig,
    ReCalKVConfig,
    RunOptions,
    packed_modules,
)
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.targets import plan_run, select
from tests.tiny import tiny_model

FREE = ARBConfig(variant="rtn", calibration=None)
KV = {"calibration": None, "rank_multiple": 4}


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Whatever is refused here is refused before a layer is touched."""
    monkeypatch.setattr(Run, "compress_layers", lambda *_, **__: pytest.fail("began"))


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("*.mpl.down_proj", "mlp.down_proj"),
        ("*.donw_proj", "down_proj"),
        ("model.layer.0", "model.layers.0"),
        ("*.self_atn", "self_attn"),
        ("q_porj", "q_proj"),
    ],
)
@pytest.mark.parametrize("kind", ["rule", "skip"])
def test_a_pattern_without_a_module_is_named_with_what_is_close(pattern, close, kind):
    recipe = LowBitRecipe({pattern: FREE, "*": FREE}) if kind == "rule" else LowBitRecipe({"*": FREE}, skip=[pattern])
    with pytest.raises(ValueError, match=rf"^{kind} {re.escape(repr(pattern))} \(close: .*{re.escape(close)}"):
        hf_lowbit.quantize(tiny_model(), recipe)


def test_nothing_close_is_not_made_up():
    with pytest.raises(ValueError, match=r"^rule '\*\.wq_b': no module of LlamaForCausalLM matches$"):
        select(tiny_model(), LowBitRecipe({"*.wq_b": FREE, "*": FREE}), None)


def test_optional_patterns_may_match_nothing():
    recipe = LowBitRecipe(
        {"*.experts": PBS2PConfig(calibration=None), "*": FREE}, skip=["router"], optional=["router"]
    )
    with pytest.raises(ValueError, match=r"^rule '\*\.experts'"):
        select(tiny_model(), recipe, None)
    both = LowBitRecipe(recipe.rules, skip=["router"], optional=["*.experts", "router"])
    assert {config.method for config in select(tiny_model(), both, None).methods.values()} == {"arb"}
    assert LowBitConfig.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    kv = LowBitRecipe({"*.cross_attn": ReCalKVConfig(**KV), "*": FREE}, optional="*.cross_attn")
    assert {config.method for config in plan_run(tiny_model(), kv, False)[1].methods.values()} == {"arb"}


def test_files_without_optional_patterns_are_as_before():
    assert "optional" not in LowBitRecipe({"*": FREE}).to_dict()
    assert LowBitRecipe({"*": FREE}).optional == ()


@pytest.mark.parametrize(
    ("optional", "message"),
    [
        (["*.mpl"], r"optional: '\*\.mpl' is the pattern of no rule and of no skip"),
        ([3], "optional: 3 is the pattern of no rule"),
        (7, "optional must be a list of patterns, got 7"),
    ],
)
def test_bad_optional_patterns(optional, message):
    with pytest.raises(ValueError, match=message):
        LowBitRecipe({"*": FREE}, optional=optional)
    with pytest.raises(ValueError, match=message):
        LowBitConfig.from_dict({**LowBitRecipe({"*": FREE}).to_dict(), "optional": optional})


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*", "*.down_proj"], r"rule '\*\.down_proj' comes after '\*': the first rule that matches"),
        (["mlp", "self_attn", "layers.0"], r"rule 'layers\.0' comes after 'self_attn', 'mlp'"),
    ],
)
def test_a_rule_that_comes_too_late_is_refused(patterns, message):
    recipe = LowBitRecipe({pattern: FREE for pattern in patterns})
    with pytest.raises(ValueError, match=message):
        hf_lowbit.quantize(tiny_model(), recipe)
    select(tiny_model(), LowBitRecipe(recipe.rules, optional=patterns[-1]), None)
    select(tiny_model(), LowBitRecipe(recipe.rules[::-1]), None)  # the special before the general


def test_a_rule_whose_layers_are_skipped_or_the_head_is_not_too_late():
    recipe = LowBitRecipe({"q_proj": FREE, "lm_head": FREE, "mlp": FREE}, skip=["q_proj"])
    targets = select(tiny_model(), recipe, None)
    assert all(".mlp." in name for name in targets.methods)


# The cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"k_proj": ReCalKVConfig(**KV, ratio=0.5), "v_proj": ReCalKVConfig(**KV, ratio=0.75)},
            r"0\.self_attn and 1 more: k_proj belongs to rule 'k_proj' and v_proj to rule 'v_proj' \(recalkv\)",
        ),
        (
            {"v_proj": FREE, "self_attn": ReCalKVConfig(**KV)},
            r"0\.self_attn and 1 more: k_proj belongs to rule 'self_attn' and v_proj to rule 'v_proj' \(arb\)",
        ),
        (
            {"k_proj": ReCalKVConfig(**KV), "*": FREE},
            r"k_proj belongs to rule 'k_proj' and v_proj to rule '\*' \(arb\)",
        ),
        ({"k_proj": ReCalKVConfig(**KV), "mlp": FREE}, r"v_proj: stays dense while k_proj is compressed; skip "),
        (
            {"self_attn": ReCalKVConfig(**KV), "*": ReCalKVConfig(**KV, ratio=0.75)},
            r"rule '\*' \(recalkv\): LlamaForCausalLM has no attention there|rule '\*' comes after 'self_attn'",
        ),
        (
            {"layers.0": ReCalKVConfig(**KV, latent_bits=4), "*": ReCalKVConfig(**KV)},
            r"rules 'layers\.0', '\*': a model has one cache: latent_bits, .* must be alike",
        ),
    ],
    ids=["two halves", "values of another method", "keys only", "values dense", "the same twice", "other codes"],
)
def test_rules_for_the_cache_that_clash_are_refused_once(rules, message):
    with pytest.raises(ValueError, match=message) as raised:
        hf_lowbit.quantize(tiny_model(), LowBitRecipe(rules))
    assert len(str(raised.value)) < 400


def test_rules_for_the_cache_of_different_layers_are_fine(monkeypatch):
    monkeypatch.undo()
    recipe = LowBitRecipe(
        {"layers.0": ReCalKVConfig(**KV, ratio=0.75), "*": ReCalKVConfig(**KV, ratio=0.5)},
        run=RunOptions(progress=False),
    )
    model = tiny_model()
    hf_lowbit.quantize(model, recipe)
    widths = {name.split(".")[2]: layer.spec.width for name, layer in packed_modules(model).items()}
    assert widths == {"0": 24, "1": 16}


# One config object in two rules --------------------------------------------------------------------------------------


def test_a_config_given_to_two_rules_is_planned_for_each(monkeypatch):
    """Rules are told apart by their config objects: a shared one would get the plan of one rule for both."""
    monkeypatch.undo()
    shared = AdaSVDConfig(calibration=[[3 + i for i in range(24)]] * 4, samples=4, sequence_length=24, ratio=0.5)
    model = tiny_model(num_hidden_layers=3)
    hf_lowbit.quantize(model, LowBitRecipe({"self_attn": shared, "mlp": shared}, run=RunOptions(progress=False)))
    for _, rule in model.config.quantization_config.rules:
        assert set(rule.layers) == {f"model.layers.{i}" for i in range(3)}
    assert shared.layers is None


def test_a_plain_model_takes_a_recipe(monkeypatch):
    monkeypatch.undo()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    targets = select(model, LowBitRecipe({"0": FREE, "2": PBS2PConfig(calibration=None)}), None)
    assert {name: config.method for name, config in targets.methods.items()} == {"0": "arb", "2": "pbs2p"}
    assert torch.isfinite(model(torch.zeros(1, 16))).all()
