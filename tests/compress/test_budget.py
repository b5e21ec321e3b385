"""Runs with a budget: what they choose, that they keep it to the byte of the files, and what they refuse."""

import dataclasses
import itertools
import json
import math
from fnmatch import fnmatchcase

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import (
    AdaSVDConfig,
    ARBConfig,
    CheckpointError,
    DVDQuantConfig,
    LowBitConfig,
    LowBitRecipe,
    PBS2PConfig,
    ReCalKVConfig,
    RunOptions,
    UnsupportedModelError,
    packed_modules,
    quantize,
    registry,
)
from hf_lowbit.budget import default_candidates, settings_text
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress import engine
from hf_lowbit.compress.budget import without_choice
from hf_lowbit.compress.measures import StackMeasures
from hf_lowbit.formats import FORMATS
from hf_lowbit.recipe import matches, rules_of
from hf_lowbit.report.inspect import inspect
from tests.tiny import tiny_model, tiny_t5, tokens

DATA = {"calibration": tokens(), "samples": 8}
QUICK = {"iterations": 2, "quantiles": 9, "max_salient_per_block": 8}
QUIET = RunOptions(progress=False)


def integers(*pairs):
    return [DVDQuantConfig(w_bits=bits, group_size=group, delta=None, a_bits=16) for bits, group in pairs]


FOUR = ((2, 32), (3, 32), (4, 16), (8, 16))


def of_all_kinds():
    return [
        *integers(*FOUR),
        ARBConfig(**DATA, **QUICK),
        PBS2PConfig(**DATA, **QUICK),
        AdaSVDConfig(**DATA, ratio=0.5, factors="int8", factor_group=16),
    ]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama-tied").save_pretrained(folder)
    return folder


def compressed(dense, recipe, **run):
    config = dataclasses.replace(recipe, run=RunOptions(progress=False, **run))
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


@pytest.mark.parametrize("bits", [2.9, 3.3, 4.7, 9.5])
@pytest.mark.parametrize("candidates", [integers(*FOUR), of_all_kinds()], ids=["without-data", "with-data"])
def test_never_more_than_the_budget_in_the_files(dense, tmp_path, candidates, bits):
    model = compressed(dense, LowBitRecipe({"*": candidates}, target_bits_per_weight=bits))
    model.save_pretrained(tmp_path / "out")
    found = inspect(tmp_path / "out")
    plan = model.hf_quantizer.report.plan
    assert found.bits_per_weight <= bits
    assert found.packed_bytes <= sum(row["bytes"] for row in plan) <= bits * found.packed_weights / 8
    if all(row["method"] == "dvd_quant" for row in plan):
        assert found.packed_bytes == sum(row["bytes"] for row in plan)
    assert sum(row["weights"] for row in plan) == found.packed_weights
    assert sum(row["number"] for row in plan) == len(found.modules)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.config.quantization_config.plan == plan


@pytest.mark.parametrize("candidates", [integers(*FOUR), of_all_kinds()], ids=["without-data", "with-data"])
def test_never_more_than_the_bytes_of_the_files(dense, tmp_path, candidates):
    def size(recipe):
        folder = tmp_path / str(recipe.target_bytes)
        compressed(dense, recipe).save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    with pytest.raises(ValueError, match=r"target_bytes=1 cannot be met.* may take (\d+) bytes") as raised:
        compressed(dense, LowBitRecipe({"*": candidates}, target_bytes=1))
    least = int(str(raised.value).split("may take ")[1].split()[0])
    sizes = [size(LowBitRecipe({"*": candidates}, target_bytes=target)) for target in (least, least + 20_000)]
    assert sizes[0] <= least and sizes[0] < sizes[1] <= least + 20_000
    assert least - sizes[0] < 400 * 140  # headers are counted by a bound: so many tensors are in the file


def test_the_choice_is_the_best_by_the_errors_that_were_measured():
    model = tiny_model(num_hidden_layers=1)
    names = [f"model.layers.0.{part}" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    skip = ["k_proj", "v_proj", "o_proj", "gate_proj", "lm_head"]
    recipe = LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=3.9, skip=skip, run=QUIET)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    report = quantize(model, recipe)
    costs, errors = [], []
    for name in names:
        tried = [registry.get("dvd_quant").compress(registry.LinearUnit(name, weights[name]), None, one)
                 for one in integers(*FOUR)]  # fmt: skip
        costs.append([one.nbytes for one in tried])
        errors.append([float((weights[name] - one.unpack()).double().square().sum() /
                             weights[name].double().square().sum()) for one in tried])  # fmt: skip
    room = 3.9 * sum(weight.numel() for weight in weights.values()) / 8
    every = itertools.product(range(4), repeat=3)
    allowed = [picks for picks in every if sum(c[j] for c, j in zip(costs, picks, strict=True)) <= room]
    best = min(allowed, key=lambda picks: sum(e[j] for e, j in zip(errors, picks, strict=True)))
    assert [packed_modules(model)[name].packed.nbytes for name in names] == [
        own[j] for own, j in zip(costs, best, strict=True)
    ]
    least = sum(e[j] for e, j in zip(errors, best, strict=True))
    assert sum(row["error"] for row in report.plan) == pytest.approx(least, rel=1e-4)


def test_curvature_and_error_beside_the_whole_models_gradient():
    """γ is the mean over tokens of the squared gradient of a sequence's summed loss, by plain autograd."""
    model, data = tiny_model(), tokens()
    config = ARBConfig(calibration=data, samples=4, sequence_length=24, run=QUIET)
    run = engine.Run(model, config)
    measures = StackMeasures(run, run.stacks[0], run.batches)
    names = list(run.targets.methods)
    found = measures.sensitivity(names, 4, 24)
    outputs = {}
    for name in names:
        keep = lambda _m, _a, out, name=name: (out.retain_grad(), outputs.__setitem__(name, out))[0]  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    sums = {name: 0.0 for name in names}
    rows = [row for batch in run.batches for row in batch]
    for row in rows:
        logits = model(row[None]).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        for name in names:
            sums[name] = sums[name] + outputs[name].grad[0].double().square().sum(0)
    for name in names:
        torch.testing.assert_close(found[name], sums[name] / (len(rows) * 24), rtol=1e-4, atol=0)


def test_the_predicted_error_is_the_rise_of_the_loss_of_a_slightly_changed_model():
    """One layer, changed a little at random: the mean rise over many signs is about ½ Σ γ (R S Rᵀ)."""
    model, data = tiny_model(), tokens(8, 32)
    run = engine.Run(model, ARBConfig(calibration=data, samples=8, sequence_length=32, run=QUIET))
    name = "model.layers.0.mlp.down_proj"
    measures = StackMeasures(run, run.stacks[0], run.batches)
    curvature = measures.sensitivity([name], 8, 32)[name]
    ((_, weight, stats),) = measures.dense_inputs([name])
    from hf_lowbit.compress.budget import _error

    ids = torch.cat(run.batches)

    @torch.no_grad()
    def loss():
        logits = model(ids).logits.double()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    before, generator = loss(), torch.Generator().manual_seed(0)
    layer = model.get_submodule(name)
    rises, predicted = [], []
    for _ in range(24):
        residual = torch.randn(weight.shape, generator=generator) * 0.02
        predicted.append(_error(weight, weight - residual, (stats.total / stats.tokens).float(), curvature))
        for sign in (1, -1):  # what is linear in the residual cancels
            layer.weight.data = weight + sign * residual
            rises.append(float(loss() - before))
    layer.weight.data = weight
    mean, guess = sum(rises) / len(rises), sum(predicted) / len(predicted)
    # the empirical Fisher matrix of a random model is not its Hessian; the order of magnitude is what layers share
    assert 0.3 < mean / guess < 3


def test_budgets_that_cannot_be_met_say_the_nearest(dense, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be met.*so ([0-9.]+) is the nearest target") as raised:
        compressed(dense, LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=1.5))
    nearest = float(str(raised.value).split("so ")[1].split()[0])
    model = compressed(dense, LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=nearest))
    with pytest.raises(ValueError, match="cannot be met"):
        compressed(dense, LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=nearest - 0.001))
    model.save_pretrained(tmp_path / "out")
    assert inspect(tmp_path / "out").bits_per_weight <= nearest


def test_a_budget_larger_than_everything_forces_nothing(dense):
    model = compressed(dense, LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=64))
    assert {row["settings"] for row in model.hf_quantizer.report.plan} == {"w_bits=8, group_size=16"}


def test_first_match_wins_and_fixed_rules_count(dense, tmp_path):
    rules = {"*.down_proj": integers((8, 16))[0], "*.self_attn": integers(*FOUR), "*": integers(*FOUR[:2])}
    model = compressed(dense, LowBitRecipe(rules, target_bits_per_weight=5))
    model.save_pretrained(tmp_path / "out")
    config = model.config.quantization_config
    assert inspect(tmp_path / "out").bits_per_weight <= 5
    assert config.rules[0][0] == "*.down_proj"
    for name, layer in packed_modules(model).items():
        first = next(rule for pattern, rule in rules_of(config) if matches(pattern, name))
        assert (layer.spec.bits, layer.spec.group_size) == (first.w_bits, first.group_size)
        if name.endswith("down_proj"):
            assert layer.spec.bits == 8
    plain = LowBitConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert plain == config and not plain.is_open and plain.target_bits_per_weight == 5


def test_resuming_goes_on_with_the_recorded_choice(dense, tmp_path, monkeypatch):
    recipe = LowBitRecipe({"*": of_all_kinds()}, target_bits_per_weight=4)
    whole = compressed(dense, recipe, journal=tmp_path / "whole")
    original = engine.Run._place

    def killed(self, name, packed, row):
        if name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        original(self, name, packed, row)

    monkeypatch.setattr(engine.Run, "_place", killed)
    with pytest.raises(KeyboardInterrupt):
        compressed(dense, recipe, journal=tmp_path / "run")
    monkeypatch.setattr(engine.Run, "_place", original)
    monkeypatch.setattr("hf_lowbit.compress.budget.Budget._measured", None)  # nothing is measured again
    resumed = compressed(dense, recipe, journal=tmp_path / "run", resume=True)
    assert resumed.hf_quantizer.report.plan == whole.hf_quantizer.report.plan
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "change", [{"choice": {"model.layers.0.mlp.up_proj": 99}}, {"choice": {"x": 0}}, {"bytes": {}}]
)
def test_a_forged_choice_in_the_journal_is_refused(dense, tmp_path, change):
    recipe = LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=4)
    compressed(dense, recipe, journal=tmp_path / "run")
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    entry = json.loads(lines[1])
    assert entry["stack"] == "budget"
    for part, values in change.items():
        entry["plan"][part] = {**entry["plan"][part], **values} if values else values
    (tmp_path / "run" / "journal.jsonl").write_text("\n".join([lines[0], json.dumps(entry)]) + "\n")
    with pytest.raises(CheckpointError, match="does not fit this run"):
        compressed(dense, recipe, journal=tmp_path / "run", resume=True)


def test_the_plan_is_shown_before_anything_is_compressed(dense):
    class Stop(Exception):
        pass

    seen = []

    def look(plan):
        seen.extend(plan)
        raise Stop

    with pytest.raises(Stop):
        compressed(dense, LowBitRecipe({"*": integers(*FOUR)}, target_bits_per_weight=4), on_plan=look)
    assert seen and all(math.isfinite(row["error"]) for row in seen)


def test_experts_that_no_token_reaches_get_the_smallest():
    model = tiny_model("qwen3_moe")
    recipe = LowBitRecipe(
        {"*": [*integers(*FOUR[:3]), ARBConfig(**DATA, **QUICK)]}, target_bits_per_weight=4, run=QUIET
    )
    report = quantize(model, recipe)
    packed = packed_modules(model).values()
    bits = 8 * sum(layer.packed.nbytes for layer in packed) / sum(x.in_features * x.out_features for x in packed)
    assert bits <= 4 and len(report.plan) > 1


def test_layers_that_a_candidate_cannot_take_have_the_others():
    model = tiny_model(intermediate_size=72)  # down_proj has 72 columns, no multiple of 16
    candidates = [*integers(*FOUR[:2]), AdaSVDConfig(calibration=None, ratio=0.5)]
    report = quantize(model, LowBitRecipe({"*": candidates}, target_bits_per_weight=8, run=QUIET))
    assert {row["method"] for row in report.plan if row["layers"] == "down_proj"} == {"adasvd"}
    alone = quantize(tiny_model(intermediate_size=72), LowBitRecipe({"*": candidates[:2]}, target_bits_per_weight=8))
    assert sum("not a multiple of 16" in reason for reason in alone.dense.values()) == 2


@pytest.mark.parametrize("method", ["arb", "pbs2p", "adasvd", "dvd_quant"])
def test_no_layer_is_larger_than_its_method_says(method):
    from tests.contract.options_matrix import OPTIONS

    stats = LinearStats("x", 160)
    generator = torch.Generator().manual_seed(0)
    stats.update(torch.randn(4, 100, 160, generator=generator))
    weight = torch.randn(48, 160, generator=generator) * torch.rand(160, generator=generator).mul(3).exp()
    record = registry.get(method)
    for options in OPTIONS[method][:5]:
        config = record.config(**options)
        for own in (stats, None) if options.get("variant") != "x" else (stats,):
            packed = record.compress(registry.LinearUnit("blocks.0.x", weight), own, config)
            spec = record.largest("blocks.0.x", (48, 160), config, weight.dtype)
            assert packed.nbytes <= FORMATS[record.format].bytes_of(spec), options
            assert packed.bytes_of(packed.spec) == packed.nbytes


def refused(match, rules, **options):
    with pytest.raises(ValueError, match=match):
        LowBitRecipe(rules, **options)


def test_refusals():
    two = integers(*FOUR[:2])
    refused("needs target_bits_per_weight or target_bytes", {"*": two})
    refused("a target needs a rule with several configs", {"*": two[0]}, target_bits_per_weight=3)
    refused("either target_bits_per_weight or target_bytes", {"*": two}, target_bits_per_weight=3, target_bytes=10)
    refused("above 0 and at most 64", {"*": two}, target_bits_per_weight=0)
    refused("above 0 and at most 64", {"*": two}, target_bits_per_weight=math.nan)
    refused("whole number", {"*": two}, target_bytes=1.5)
    refused("two configs or more", {"*": two[:1]}, target_bits_per_weight=3)
    refused("given twice", {"*": [two[0], two[0]]}, target_bits_per_weight=3)
    refused("cannot choose recalkv", {"*": [two[0], ReCalKVConfig()]}, target_bits_per_weight=3)
    refused("must be configs of methods", {"*": [two[0], "arb"]}, target_bits_per_weight=3)
    refused("put skip on the recipe", {"*": [two[0], ARBConfig(skip=["a"])]}, target_bits_per_weight=3)
    refused("no layers of its own", {"*": [two[0], PBS2PConfig(layers={"a": 2})]}, target_bits_per_weight=3)
    refused(r"plan\[0\] must have layers", {"*": two[0]}, plan=("x",))
    refused("plan must be a list", {"*": two[0]}, plan="x")
    row = {"layers": "a", "number": 1, "method": "m", "settings": "\x1b[31m", "weights": 1, "bytes": 1, "error": 0.0}
    refused(r"plan\[0\].settings", {"*": two[0]}, plan=(row,))
    refused(r"plan\[0\].error", {"*": two[0]}, plan=({**row, "settings": "", "error": math.inf},))
    with pytest.raises(UnsupportedModelError, match="without data"):
        both = [ARBConfig(**DATA, **QUICK), PBS2PConfig(**DATA, **QUICK)]
        quantize(tiny_t5(), LowBitRecipe({"*": both}, target_bits_per_weight=5, run=QUIET))
    with pytest.raises(ValueError, match="give it importance='uniform'"):
        rules = {"*.down_proj": PBS2PConfig(**DATA, **QUICK), "*": two}
        quantize(tiny_model(), LowBitRecipe(rules, target_bits_per_weight=5, run=QUIET))


@pytest.mark.parametrize(
    "pattern", ["lm_head", "layers.1", "*.up_proj", "model", "q_proj", "layers.?.mlp", "1.mlp", "ayers.1"]
)
def test_plain_names_match_as_globs_do(pattern):
    names = ["lm_head", "model.lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "x.q_proj.y"]
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        expected = any(fnmatchcase(path, one) for path in heads for one in (pattern, f"*.{pattern}"))
        assert matches(pattern, name) == expected
        assert matches(f"none.such|{pattern}|*.nor_this", name) == expected


def test_a_rule_that_leaves_layers_dense_counts_them_as_dense(dense, tmp_path):
    """At ratio 1 factors save nothing: in bytes the layers are dense, in bits they are not packed at all."""
    nothing = AdaSVDConfig(calibration=None, ratio=1.0, importance="uniform")
    for number, target in enumerate(({"target_bytes": 190_000}, {"target_bits_per_weight": 4.0})):
        model = compressed(dense, LowBitRecipe({"*.up_proj": nothing, "*": integers(*FOUR)}, **target))
        model.save_pretrained(tmp_path / str(number))
        found = inspect(tmp_path / str(number))
        assert len(found.modules) == 12
        assert sum(file.stat().st_size for file in (tmp_path / str(number)).glob("*.safetensors")) <= 190_000
        assert found.bits_per_weight <= target.get("target_bits_per_weight", 16)


def test_stored_candidates_come_back():
    recipe = LowBitRecipe({"*": of_all_kinds()[:5]}, target_bytes=12345)
    again = LowBitConfig.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again.target_bytes == 12345 and [settings_text(one) for _, one in rules_of(again)] == [
        settings_text(one) for _, one in rules_of(recipe)
    ]
    assert without_choice(recipe).rules[0][1].method == "arb"  # takes any shape
    assert len(default_candidates()) == 8
