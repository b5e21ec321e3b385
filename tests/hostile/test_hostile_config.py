"""A config.json of a stranger: every field of every type, recipes within recipes, and JSON that is hard to read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_lowbit import ARBConfig
from hf_lowbit.cli import app
from tests.hostile.forge import SINGLE, edit_config, edit_tensors, load, refused, seal, write_into_config

# What JSON can hold in the place of a number, a word or a switch; none is right for any option.
WRONG: list[Any] = [
    float("nan"),
    float("-inf"),
    10**400,
    -1,
    "",
    "\x1b[2J",
    "A" * 10**5,
    [[1]],
    {"a": {}},
    [None],
    None,
]


def test_the_untouched_copy_is_sound(model: Path, shards: Path) -> None:
    """Else everything below would pass for a wrong reason; forged checksums fit, too."""
    expected = load(model).state_dict()
    for folder in (model, shards):
        seal(folder)
        assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())


@pytest.mark.parametrize("field", ARBConfig.options())
def test_every_option_refuses_other_types(model: Path, field: str) -> None:
    default = ARBConfig.options()[field].default
    for value in [*WRONG, *([1, 0] if isinstance(default, bool) else [True, False])]:
        edit_config(model, lambda q, value=value: q.update({field: value}))
        refused(model, field, "must be", ways=("load", "inspect"))


@pytest.mark.parametrize("tokens", [{"samples": 2**40}, {"sequence_length": 10**400}])
def test_a_product_of_options_that_fills_the_memory(model: Path, tokens: dict[str, int]) -> None:
    edit_config(model, lambda q: q.update(tokens))
    refused(model, "samples × sequence_length must be at most", ways=("load", "inspect"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("skip", ["lm_head", [""], [1], [["lm_head"]], {"lm_head": 1}, None, True, [None], 1]),
        ("left_dense", [[], "lm_head", {"lm_head": 1}, {"lm_head": None}, {"lm_head": ["x"]}, 0, False]),
        ("left_dense", [{"lm_head": text} for text in ("\x1b[31mred", "two\nlines", "long" * 1000)]),
        ("left_dense", [{"\x07bell": "reason"}, {"lm_head": "\ud800"}]),
        ("modules", ["x", 1, True, [], [{"a": 1}]]),
        (
            "calibration",
            ["/etc/passwd", "../text", ["c4"], 1, True, {}, [[1, 2]], "", {"kind": 1}, {"kind": ["texts"]}],
        ),
        ("calibration", [{"kind": "texts", "sha256": value} for value in (10**63, "x" * 64, "ab" * 32 + "\n", [])]),
        ("calibration", [{"kind": "texts", "tokens": v} for v in (True, -1, "1", 1.5, 10**400, float("nan"))]),
        ("calibration", [{"kind": "dataset", "name": value} for value in ("my/folder", ["c4"], True, 3)]),
        ("calibration", [{"kind": "texts", "path": "/home"}, {"name": "c4"}]),
        ("format_version", [True, "1", None, 1.0, [1], 10**400, 2]),
        ("method", [None, "", "ARB", ["arb"], {"a": 1}, "__class__", "os.system", "\x1b[2J", True, "A" * 10**5]),
        ("rules", [[]]),
        ("run", [{"verify": False}, None]),
        ("verify", [False]),
        ("quantize", ["x" * 10**5]),
        ("__class__", ["ARBConfig"]),
    ],
)
def test_every_other_field_refuses_other_types(model: Path, field: str, values: list[Any]) -> None:
    for value in values:
        edit_config(model, lambda q, value=value: q.update({field: value}))
        refused(model, field, ways=("load", "inspect"))


def test_very_many_unknown_keys_are_refused_in_one_short_message(model: Path) -> None:
    edit_config(model, lambda q: q.update({f"iterationz{number:05d}": 0 for number in range(20_000)}))
    refused(
        model, "unknown key 'iterationz00000' (did you mean 'iterations'?)", "19980 more", ways=("load", "inspect")
    )
    edit_config(model, lambda q: (q.clear(), q.update({"quant_method": "hf_lowbit", "method": "arb", "A" * 10**6: 1})))
    refused(model, "unknown key 'AAA", ways=("load", "inspect"))


@pytest.mark.parametrize("value", ["HF_LOWBIT", "hf-lowbit", "hf_lowbit ", "", None, 1], ids=repr)
def test_another_quant_method_is_not_loaded_as_ours(model: Path, value: Any) -> None:
    """transformers takes it for a dense model; the stubs then do not fit."""
    edit_config(model, lambda q: q.update(quant_method=value))
    refused(model, "not of this package", ways=("inspect", "verify"))
    with pytest.raises((RuntimeError, ValueError)):
        load(model)


@pytest.mark.parametrize("value", [[1], "hf_lowbit", True, 3], ids=repr)
def test_a_quantization_config_that_is_no_object(model: Path, value: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    refused(model, "quantization_config must be an object", ways=("inspect", "verify"))


# Recipes ---------------------------------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    config: dict[str, Any] = {"method": "arb"}
    for _ in range(levels):
        config = {"method": "recipe", "rules": [{"pattern": "*", "config": config}]}
    return config


RULE: dict[str, Any] = {"pattern": "*", "config": {"method": "arb", "calibration": None}}


def set_rules(folder: Path, rules: Any) -> None:
    """Turn a stored config into that of a recipe."""

    def change(q: dict[str, Any]) -> None:
        table = {key: q[key] for key in ("quant_method", "modules", "left_dense")}
        q.clear()
        q.update(table, method="recipe", rules=rules)

    edit_config(folder, change)


def test_a_sound_recipe_is_loaded(model: Path) -> None:
    set_rules(model, [RULE])
    load(model)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        *[
            (rules, "rules must be a list of")
            for rules in (None, {}, "x", 1, [1], [[]], [None], [{}], [{"pattern": "*"}])
        ],
        ([["*", {"method": "arb"}]], "rules must be a list of"),
        ([{**RULE, "more": 1}], "rules must be a list of"),
        ([], "at least one rule"),
        *[([{**RULE, "pattern": value}], "rule 0 must be a pair") for value in ("", None, 1, True, ["*"], {})],
        *[([{**RULE, "config": value}], "must be an object") for value in (None, [], "arb")],
        *[
            ([{**RULE, "config": {"method": value}}], "unknown method")
            for value in (None, "nope", ["arb"], "__class__")
        ],
        ([{**RULE, "config": {**RULE["config"], "samples": True}}], "samples must be"),
        ([{**RULE, "config": {**RULE["config"], "iterationz": 1}}], "unknown key 'iterationz'"),
        *[
            ([{**RULE, "config": {**RULE["config"], key: v}}], "put skip on")
            for key, v in (("skip", ["x"]), ("modules", {}))
        ],
        ([RULE, RULE], "rule '*' is given twice"),
        ([{**RULE, "pattern": "A" * 10**5}] * 2, "is given twice"),
        *[([{**RULE, "config": nested(levels)}], "got a recipe") for levels in (1, 80)],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_stored_rules(model: Path, rules: Any, message: str) -> None:
    set_rules(model, rules)
    refused(model, message, ways=("load", "inspect"))


# JSON itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['"skip": []', '"modules": {}', '"x": {"y": 1, "y": 2}'])
def test_a_key_given_twice(model: Path, text: str) -> None:
    """transformers takes the last one; another reader takes the first, and sees another model."""
    write_into_config(model, text)
    refused(model, "is given twice", ways=("inspect", "verify"))


@pytest.mark.parametrize(
    "text",
    ['"x": ' + "[" * 10**5, '"x": {' * 10**5, '"iterations": 1' + "0" * 10**5, '"x": \x01', "}", '"x'],
    ids=["lists", "objects", "digits", "control", "brace", "quote"],
)
def test_what_no_reader_understands(model: Path, text: str) -> None:
    write_into_config(model, text)
    refused(model, "is not valid JSON", ways=("inspect", "verify"))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe{}", b"\x80\x04cos\nsystem\n."], ids=repr)
def test_a_config_that_is_no_object(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, "config.json", ways=("inspect", "verify"))


@pytest.mark.parametrize("field", ["skip", "left_dense", "variant", "calibration", "modules", "samples", "method"])
@pytest.mark.parametrize("depth", [50, 400, 800])
def test_deep_values(model: Path, field: str, depth: int) -> None:
    """A message must not try to show all of it. transformers itself gives up above a depth of about 490."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    edit_config(model, lambda q: q.update({field: value}))
    refused(model, field, ways=("load", "inspect") if depth < 450 else ("inspect",))


def test_nothing_of_a_checkpoint_reaches_the_terminal_as_it_is(model: Path) -> None:
    """Escape sequences could rewrite what the user sees; files may have such names, tensors and modules may not."""
    (model / "\x1b[2Jnotes.txt").write_text("x")
    result = CliRunner().invoke(app, ["inspect", str(model)])
    assert result.exit_code == 0
    assert "notes.txt" in result.output
    assert "\x1b[2J" not in result.output
    edit_tensors(model, lambda t: t.update({"\x1b[2J": torch.zeros(1)}))
    refused(model, "is not the name of a tensor")
    assert "\x1b[2J" in load_file(model / SINGLE)
