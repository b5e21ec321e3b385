"""Configs, recipes and the registry: validated, frozen, plain JSON, and silent about whose machine they come from."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_lowbit import (
    ARBConfig,
    CalibrationRecord,
    CondiQuantConfig,
    DVDQuantConfig,
    LowBitConfig,
    LowBitRecipe,
    ReCalKVConfig,
    RunOptions,
    registry,
)
from hf_lowbit.config import CalibratedConfig
from hf_lowbit.recipe import matches, rules_of

DEFAULTS = {
    "quant_method": "hf_lowbit",
    "method": "arb",
    "format_version": 1,
    "calibration": "c4",
    "samples": 128,
    "sequence_length": 2048,
    "seed": 0,
    "skip": [],
    "variant": "rc",
    "block_size": 128,
    "iterations": 15,
    "x_iterations": 15,
    "column_group_bitmap": True,
    "group_splits": 1,
    "salient_metric": "hessian",
    "max_salient_per_block": 50,
    "quantiles": 81,
    "damping": 0.01,
    "compensation": "exact",
    "scale_dtype": "float16",
}
TABLE = {"model.q": {"method": "arb", "format": "binary", "spec": {"out_features": 4, "in_features": 8}, "error": 0.1}}


def through_json(config: LowBitConfig) -> LowBitConfig:
    return LowBitConfig.from_dict(json.loads(json.dumps(config.to_dict())))


# ARBConfig -------------------------------------------------------------------------------------------------------


def test_defaults_are_written_out():
    """A file must not change its meaning when a default does, so each default is fixed here as well."""
    values = ARBConfig().to_dict()
    assert values.pop("hf_lowbit_version")
    assert values == DEFAULTS
    assert ARBConfig().to_diff_dict() == ARBConfig().to_dict()
    assert ARBConfig().quant_method == "hf_lowbit"
    assert ARBConfig().quant_method.value == "hf_lowbit"


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("samples", [1, 10**6], [0, -1, 1.0, True, "8", None]),
        ("sequence_length", [2, 131072], [1, 0, 2.5, False]),
        ("seed", [0, 2**31], [-1, 0.5, True]),
        ("variant", ["rc", "x", "arb", "billm", "rtn"], ["RC", "", None, 1, ["rc"]]),
        ("block_size", [32, 64, 4096], [0, 16, 33, 127, 4128, -32, 128.0, True]),
        ("iterations", [0, 1000], [-1, 1001, 1.0, None]),
        ("x_iterations", [0, 1000], [-1, 1001, "1"]),
        ("column_group_bitmap", [True, False], [0, 1, "true", None]),
        ("group_splits", [1, 2, 3], [0, 4, True]),
        ("salient_metric", ["hessian", "magnitude"], ["Hessian", None]),
        ("max_salient_per_block", [2, 4096], [1, 4097]),
        ("quantiles", [2, 1001], [1, 1002]),
        ("damping", [1e-8, 0.5, 1.0, 1], [0, 0.0, 1.1, -1.0, float("nan"), float("inf"), "0.1", True]),
        ("compensation", ["exact", "reference", "none"], ["None", None, False]),
        ("scale_dtype", ["float16", "bfloat16", "float32"], ["float64", torch.float16]),
        ("skip", [(), ("lm_head",), ["a", "b.*"]], ["lm_head", None, [""], [1], {"a": 1}]),
        ("calibration", ["c4", "wikitext2", None, "a/file.txt"], ["", True, 3, 0.5]),
        ("modules", [None, {}, TABLE], [[], "x", {"a": 1}, {"a": {}}, {"a": {**TABLE["model.q"], "b": 1}}]),
        ("run", [RunOptions(batch_size=1)], [None, RunOptions(batch_size=0), RunOptions(batch_size=True), {}]),
    ],
)
def test_ranges(key, good, bad):
    for value in good:
        assert getattr(ARBConfig(**{key: value}), key) == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^ARBConfig: (.*; )?{key}\b"):
            ARBConfig(**{key: value})


@pytest.mark.parametrize(
    ("config", "key", "good"),
    [(CondiQuantConfig, "weight_bits", 4), (DVDQuantConfig, "w_bits", 2), (ReCalKVConfig, "latent_bits", 16)],
)
def test_what_equals_a_choice_is_none(config, key, good):
    assert getattr(config(**{key: good}), key) == good
    for value in (4.0, True, "4"):
        with pytest.raises(ValueError, match=rf"{key} must be .*got {value!r}"):
            config(**{key: value})


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator().manual_seed(2**64)
    torch.Generator().manual_seed(ARBConfig(seed=2**63 - 1).seed)
    with pytest.raises(ValueError, match="seed"):
        ARBConfig(seed=2**64)


def test_all_problems_are_in_one_message():
    with pytest.raises(ValueError, match=r"^ARBConfig: ") as error:
        ARBConfig(samples=0, damping=2, variant="y", block_size=100, skip="lm_head", run=None, calibration="")
    for part in (
        "samples must be at least 1, got 0",
        "damping must be from 1e-08 to 1.0, got 2",
        "variant must be one of 'rc', 'x', 'arb', 'billm', 'rtn', got 'y'",
        "block_size must be a multiple of 32, got 100",
        "skip must be a list of non-empty strings, got 'lm_head'",
        "run must be RunOptions",
        "calibration must not be an empty string",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"error": True}, "error must be of type float, got True"),
        ({"error": "low"}, "error must be of type float"),
        ({"spec": [1]}, "spec must be of type Mapping"),
        ({"format": None}, "format must be of type str"),
        ({"method": 3, "colour": 1}, "unknown keys 'colour'"),
    ],
)
def test_bad_module_rows_name_module_and_key(row, message):
    with pytest.raises(ValueError, match=r"modules\['model.q'\]") as error:
        ARBConfig(modules={"model.q": {**TABLE["model.q"], **row}})
    assert message in str(error.value)


def test_error_may_be_missing_or_whole():
    row = TABLE["model.q"]
    for error in (None, 0, 0.5):
        assert ARBConfig(modules={"a": {**row, "error": error}}).modules["a"]["error"] == error
    assert ARBConfig(modules={"a": {key: value for key, value in row.items() if key != "error"}})


def test_fitting_to_inputs_needs_inputs():
    with pytest.raises(ValueError, match=r"variant 'x' .* needs calibration data"):
        ARBConfig(variant="x", calibration=None)
    assert ARBConfig(variant="arb", calibration=None).needs == "none"
    assert ARBConfig().needs == "tokens"


@pytest.mark.parametrize(("bitmap", "variant", "groups"), [(True, "rc", 2), (False, "rc", 1), (True, "billm", 1)])
def test_salient_groups(bitmap, variant, groups):
    assert ARBConfig(column_group_bitmap=bitmap, variant=variant).salient_groups == groups


def test_the_base_is_no_config():
    with pytest.raises(TypeError, match="use the config of a method"):
        LowBitConfig()


@pytest.mark.parametrize("key", ["samples", "skip", "calibration", "run", "quant_method", "unheard_of"])
def test_frozen(key):
    config = ARBConfig(samples=3)
    with pytest.raises(dataclasses.FrozenInstanceError, match=key):
        setattr(config, key, None)
    assert config == ARBConfig(samples=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.update(samples=9)


def test_frozen_against_deletion():
    config = ARBConfig(samples=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.samples


def test_replace_checks_again():
    config = dataclasses.replace(ARBConfig(samples=3), seed=7)
    assert (config.samples, config.seed) == (3, 7)
    with pytest.raises(ValueError, match="samples"):
        dataclasses.replace(config, samples=0)


def test_equality():
    assert ARBConfig(samples=3, skip=["a"]) == ARBConfig(samples=3, skip=("a",))
    assert ARBConfig(samples=3) != ARBConfig(samples=4)
    assert ARBConfig(calibration=["some text"]) != ARBConfig(calibration=["other text"])
    assert ARBConfig(run=RunOptions(batch_size=1)) == ARBConfig(run=RunOptions(batch_size=9))  # how, not what
    assert LowBitRecipe({"a": ARBConfig(), "b": ARBConfig(seed=1)}) != LowBitRecipe(
        {"b": ARBConfig(seed=1), "a": ARBConfig()}
    )


@pytest.mark.parametrize("data", ["c4", None, ["text"], [[1, 2, 3]], "folder/file.txt"], ids=repr)
def test_deepcopy(data):
    """transformers copies the keyword arguments of from_pretrained."""
    config = ARBConfig(samples=3, calibration=data, modules=TABLE, run=RunOptions(batch_size=7))
    twin = copy.deepcopy(config)
    assert twin == config
    assert twin is not config
    assert twin.run.batch_size == 7
    assert twin.modules["model.q"] is not config.modules["model.q"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        twin.samples = 4


def test_deepcopy_of_tensors_and_recipes():
    twin = copy.deepcopy(ARBConfig(calibration=torch.arange(6).view(2, 3)))
    assert twin.calibration == ((0, 1, 2), (3, 4, 5))
    recipe = LowBitRecipe({"*": ARBConfig(samples=3)}, skip=["a"])
    assert copy.deepcopy(recipe) == recipe


def test_skip_under_its_name_elsewhere():
    expected = ARBConfig(skip=["lm_head", "a.*"])
    assert ARBConfig(modules_to_not_convert=["lm_head", "a.*"]) == expected
    assert LowBitConfig(method="arb", modules_to_not_convert=["lm_head", "a.*"]) == expected
    stored = {key: value for key, value in expected.to_dict().items() if key != "skip"}
    assert LowBitConfig.from_dict({**stored, "modules_to_not_convert": ["lm_head", "a.*"]}) == expected
    assert expected.modules_to_not_convert == ["lm_head", "a.*"]
    assert ARBConfig(modules_to_not_convert="lm_head").skip == ("lm_head",)
    assert ARBConfig(modules_to_not_convert=None) == ARBConfig()
    assert LowBitRecipe({"*": ARBConfig()}, modules_to_not_convert=["a"]).skip == ("a",)
    assert "modules_to_not_convert" not in expected.to_dict()
    for build in (ARBConfig, lambda **both: LowBitConfig.from_dict({**stored, **both})):
        with pytest.raises(ValueError, match="skip and modules_to_not_convert mean the same, give one of them"):
            build(skip=["a"], modules_to_not_convert=["b"])
    with pytest.raises(ValueError, match="skip must be a list of non-empty strings"):
        ARBConfig(modules_to_not_convert=[None])


def test_equality_with_tensors():
    config = ARBConfig(calibration=torch.arange(6).view(2, 3))
    assert config == copy.deepcopy(config)
    assert config != ARBConfig(calibration=torch.ones(2, 3, dtype=torch.int64))


# JSON ------------------------------------------------------------------------------------------------------------


RECORD = CalibrationRecord(kind="texts", sha256="ab" * 32, tokens=5)
CONFIGS = {
    "default": ARBConfig(),
    "options": ARBConfig(variant="x", damping=1, samples=7, skip=["lm_head", "*.3.*"], calibration="wikitext2"),
    "no data": ARBConfig(calibration=None),
    "finished": ARBConfig(calibration=RECORD, modules=TABLE),
    "recipe": LowBitRecipe(
        {"*.down_proj": ARBConfig(variant="x"), "*": ARBConfig(group_splits=3)}, skip=["lm_head"], modules=TABLE
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_json_round_trip(config):
    again = through_json(config)
    assert type(again) is type(config)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == json.loads(json.dumps(config.to_dict()))


def test_json_file(tmp_path):
    CONFIGS["recipe"].to_json_file(tmp_path / "config.json")
    assert LowBitConfig.from_dict(json.loads((tmp_path / "config.json").read_text("utf-8"))) == CONFIGS["recipe"]


def test_input_of_from_dict_is_not_touched():
    data = CONFIGS["recipe"].to_dict()
    before = copy.deepcopy(data)
    LowBitConfig.from_dict(data)
    assert data == before


def test_order_of_rules_survives():
    patterns = ["z", "*.b.*", "a", "m.9", "m.10", "*"]
    recipe = LowBitRecipe({pattern: ARBConfig(seed=number) for number, pattern in enumerate(patterns)})
    again = through_json(recipe)
    assert [(pattern, config.seed) for pattern, config in again.rules] == list(zip(patterns, range(6), strict=True))


def test_hints_for_unknown_keys():
    with pytest.raises(ValueError, match="ARBConfig: ") as error:
        LowBitConfig.from_dict({**DEFAULTS, "smaples": 3, "bits": 1, "run": None})
    assert "unknown key 'smaples' (did you mean 'samples'?)" in str(error.value)
    assert "unknown key 'bits'" in str(error.value)
    assert "unknown key 'run'" in str(error.value)  # behaviour on a machine never comes out of a file


@pytest.mark.parametrize("version", [2, 0, -1, 10**30, "1", 1.0, True, None])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError, match=r"format_version .* reads 1 to 1.*newer hf-lowbit"):
        LowBitConfig.from_dict({**DEFAULTS, "format_version": version})


def test_version_of_the_package_is_only_information():
    assert LowBitConfig.from_dict({**DEFAULTS, "hf_lowbit_version": "99.0"}) == ARBConfig()
    assert LowBitConfig.from_dict({"method": "arb"}) == ARBConfig()
    assert ARBConfig.from_dict({"samples": 3}) == ARBConfig(samples=3)


def test_wrong_class_method_or_quant_method():
    with pytest.raises(ValueError, match="config of method 'recipe', not a ARBConfig"):
        ARBConfig.from_dict(CONFIGS["recipe"].to_dict())
    with pytest.raises(ValueError, match=r"unknown method 'gptq'; known: .*\barb, .*recipe"):
        LowBitConfig.from_dict({"method": "gptq"})
    with pytest.raises(ValueError, match="unknown method None"):
        LowBitConfig.from_dict({})
    with pytest.raises(ValueError, match="quant_method must be 'hf_lowbit', got 'gptq'"):
        LowBitConfig.from_dict({**DEFAULTS, "quant_method": "gptq"})


def test_unused_arguments_are_handed_back():
    assert LowBitConfig.from_dict(DEFAULTS, return_unused_kwargs=True, extra=1) == (ARBConfig(), {"extra": 1})


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["arb", "*"])
KEYS = st.text(max_size=3) | st.sampled_from(["kind", "name", "tokens", "method", "pattern", "config", "spec"])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
RECORD_FIELDS = st.fixed_dictionaries({}, optional={name: JSON for name in ("kind", "name", "sha256", "tokens")})
RULES = st.lists(st.fixed_dictionaries({"pattern": JSON, "config": JSON}), max_size=2)


def a_config_or_a_value_error(data):
    try:
        config = LowBitConfig.from_dict(data)
    except ValueError:
        return
    # NaN, which JSON as Python writes it may hold, differs from itself, so the text is compared.
    assert json.dumps(through_json(config).to_dict()) == json.dumps(config.to_dict())


@pytest.mark.parametrize("key", [key for key in (*DEFAULTS, "modules", "unheard_of") if key != "calibration"])
@settings(max_examples=40, deadline=None)
@given(value=JSON)
def test_any_json_gives_a_config_or_a_value_error(key, value):
    a_config_or_a_value_error({**DEFAULTS, key: value})


@settings(max_examples=100, deadline=None)
@given(value=JSON | RECORD_FIELDS)
@example(value={})
def test_any_stored_calibration_gives_a_config_or_a_value_error(value):
    a_config_or_a_value_error({**DEFAULTS, "calibration": value})


@settings(max_examples=100, deadline=None)
@given(value=JSON | RULES)
@example(value=[{"pattern": "*", "config": None}])
def test_any_stored_rules_give_a_config_or_a_value_error(value):
    a_config_or_a_value_error({"method": "recipe", "rules": value})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "texts", "colour": 1}, "a calibration record has .*, got .*colour"),
        ({"kind": 3}, "calibration.kind must be one of .*, got 3"),
        ({"kind": "texts", "tokens": "many", "sha256": 1}, "calibration.tokens must be a count, got 'many'"),
        ("somebody/else/text.txt", "a stored calibration is one of c4, wikitext2, got"),
        (["some text"], "a stored calibration is one of"),
    ],
)
def test_bad_stored_calibration(stored, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig.from_dict({**DEFAULTS, "calibration": stored})


@pytest.mark.parametrize("stored", [{"kind": "folder/of/mine"}, {"kind": "dataset", "name": "folder/of/mine"}])
def test_a_stored_record_cannot_carry_a_path(stored):
    with pytest.raises(ValueError, match="calibration"):
        LowBitConfig.from_dict({**DEFAULTS, "calibration": stored})


@pytest.fixture
def text_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("SECRET-folder").mkdir()
    Path("SECRET-file.txt").write_text("SECRET", "utf-8")


@pytest.mark.usefixtures("text_places")
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("SECRET-folder", "text folder"),
        (Path("SECRET-folder"), "text folder"),
        ("SECRET-file.txt", "text file"),
        (Path("SECRET-file.txt"), "text file"),
        ("SECRET-missing", "text file"),
        (["SECRET", "text"], "texts"),
        (("SECRET",), "texts"),
        (torch.full((2, 3), 987654), "tokens"),
        ([torch.full((3,), 987654)], "tokens"),
        ([[987654, 987654]], "tokens"),
    ],
)
def test_no_data_and_no_place_is_written(data, kind):
    run = RunOptions(report=Path("SECRET-report"), tokenizer="SECRET-tokenizer")
    config = ARBConfig(calibration=data, run=run)
    for saved in (config, LowBitRecipe({"*": config}, run=run)):
        text = json.dumps(saved.to_dict()) + saved.to_json_string()
        assert "SECRET" not in text
        assert "987654" not in text
        assert "run" not in saved.to_dict()
    assert config.to_dict()["calibration"] == {"kind": kind, "name": None, "sha256": None, "tokens": None}
    assert through_json(config).calibration == CalibrationRecord(kind=kind)


# Recipes ---------------------------------------------------------------------------------------------------------


def test_recipe_from_pairs_or_a_mapping():
    a, b = ARBConfig(seed=1), ARBConfig(seed=2)
    assert LowBitRecipe({"x": a, "*": b}) == LowBitRecipe([("x", a), ["*", b]]) == LowBitRecipe((("x", a), ("*", b)))
    assert rules_of(LowBitRecipe({"x": a, "*": b})) == (("x", a), ("*", b))
    assert rules_of(a) == (("*", a),)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "at least one rule"),
        ((), "at least one rule"),
        ({"": ARBConfig()}, "rule 0 must be a pair of a non-empty pattern"),
        ({3: ARBConfig()}, "rule 0 must be a pair"),
        ([("a", ARBConfig(), 1)], "rule 0 must be a pair"),
        ({"a": {"method": "arb"}}, "rule 'a' must hold the config of a method, got dict"),
        ({"a": None}, "rule 'a' must hold the config of a method, got NoneType"),
        ({"a": LowBitRecipe({"*": ARBConfig()})}, "rule 'a' must hold the config of a method, got LowBitRecipe"),
        ({"a": ARBConfig(skip=["b"])}, "rule 'a': put skip on the recipe"),
        ({"a": ARBConfig(modules={})}, "rule 'a': put skip on the recipe"),
        ([("a", ARBConfig()), ("a", ARBConfig())], "rule 'a' is given twice"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=f"LowBitRecipe: .*{message}"):
        LowBitRecipe(rules)


def test_all_bad_rules_are_named():
    with pytest.raises(ValueError, match=r"rule 'a' must hold.*rule 'b': put skip.*rule 2 must be a pair"):
        LowBitRecipe([("a", None), ("b", ARBConfig(skip=["c"])), ("", ARBConfig())])


@pytest.mark.parametrize(
    "rules", [None, {}, "x", [1], [{"pattern": "*"}], [{"pattern": "*", "config": DEFAULTS, "more": 1}]]
)
def test_bad_stored_rules(rules):
    with pytest.raises(ValueError, match=r"rules must be a list of|at least one rule"):
        LowBitConfig.from_dict({"method": "recipe", "rules": rules})


def test_bad_option_inside_a_stored_rule():
    rule = {"pattern": "*", "config": {**DEFAULTS, "samples": 0}}
    with pytest.raises(ValueError, match="samples must be at least 1"):
        LowBitConfig.from_dict({"method": "recipe", "rules": [rule]})
    rule = {"pattern": "*", "config": {**DEFAULTS, "format_version": 2}}
    with pytest.raises(ValueError, match="format_version 2 is not supported"):
        LowBitConfig.from_dict({"method": "recipe", "rules": [rule]})


def test_recipe_needs_what_a_rule_needs():
    free = ARBConfig(calibration=None)
    assert LowBitRecipe({"*": free}).needs == "none"
    assert LowBitRecipe({"a": free, "*": ARBConfig()}).needs == "tokens"


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("*", "model.layers.0.mlp", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head.inner", True),
        ("lm_head", "my_lm_head", False),
        ("lm_head", "lm_head_2", False),
        ("head", "lm_head", False),
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("down_proj", "down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("layers.0", "model.layers.0.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("layers.?.mlp", "model.layers.3.mlp.up_proj", True),
        ("layers.[12].mlp", "model.layers.3.mlp.up_proj", False),
        ("*.self_attn", "model.layers.0.self_attn.q_proj", True),
        ("model", "model.layers.0", True),
        ("model.layers", "model", False),
        ("LM_HEAD", "lm_head", False),
        ("*q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_*", "model.layers.0.self_attn.q_proj", True),
    ],
)
def test_patterns(pattern, name, covered):
    assert matches(pattern, name) is covered


# Registry --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class OtherConfig(CalibratedConfig):
    method = "other"


@pytest.fixture
def unchanged():
    before = registry.methods()
    yield
    assert registry.methods() == before


@pytest.mark.usefixtures("unchanged")
def test_clashes_and_unknown_fields_are_refused():
    arb = registry.get("arb")
    with pytest.raises(ValueError, match="'arb' is registered already"):
        registry.register(dataclasses.replace(arb, title="another"))
    with pytest.raises(ValueError, match="'arb2' has a config of method 'arb'"):
        registry.register(dataclasses.replace(arb, name="arb2"))
    other = dataclasses.replace(arb, name="other", config=OtherConfig)
    with pytest.raises(ValueError, match="'other': unknown unit 'layer'"):
        registry.register(dataclasses.replace(other, unit="layer"))
    with pytest.raises(ValueError, match=r"'other': unknown .*data 'text'"):
        registry.register(dataclasses.replace(other, needs="text"))


def test_a_new_method_can_be_read_back(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", registry.methods())
    registry.register(dataclasses.replace(registry.get("arb"), name="other", config=OtherConfig))
    assert list(registry.methods()) == sorted(registry.methods())
    config = LowBitRecipe({"a": OtherConfig(samples=3), "*": ARBConfig()})
    assert through_json(config) == config
    with pytest.raises(ValueError, match="unknown key 'variant'"):
        LowBitConfig.from_dict({**DEFAULTS, "method": "other"})


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'nope'; known: .*\barb"):
        registry.get("nope")
    for name in ("nope", None, 3, ["arb"]):
        with pytest.raises(ValueError, match=r"known: .*arb.*recipe"):
            registry.config_class(name)
    assert registry.config_class("arb") is ARBConfig
    assert registry.config_class("recipe") is LowBitRecipe


def test_methods_is_a_copy():
    registry.methods().clear()
    assert "arb" in registry.methods()
