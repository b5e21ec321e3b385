"""A journal of a stranger, and recipe files: what ``--resume`` and ``--recipe`` read is checked before it is used."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lowbit import CheckpointError, RunOptions, packed_modules
from hf_lowbit.cli import app
from hf_lowbit.compress.journal import LINES
from tests.hf.test_transformers import quick
from tests.hostile.forge import LAYER, LONGEST_MESSAGE

Entries = list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run over the dense model, complete."""
    journal = tmp_path_factory.mktemp("finished") / "journal"
    compress(models, journal, resume=False)
    return journal


@pytest.fixture
def journal(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "journal"))


def compress(models: Path, journal: Path, resume: bool = True) -> Any:
    run = RunOptions(progress=False, journal=journal, resume=resume)
    config = quick(calibration=None, run=run)
    return AutoModelForCausalLM.from_pretrained(models / "one-dense", quantization_config=config)


def refused(models: Path, journal: Path, *parts: str) -> None:
    """Check that a journal is refused, in one short and printable message that holds ``parts``."""
    with pytest.raises(CheckpointError) as caught:
        compress(models, journal)
    message = str(caught.value)
    assert len(message) <= LONGEST_MESSAGE
    assert message.isprintable()
    for part in ("journal", *parts):
        assert part in message


def edit(journal: Path, change: Callable[[Entries], Any]) -> None:
    """Change the entries, the line with the hashes of the run being the first of them."""
    entries = [json.loads(line) for line in (journal / LINES).read_text().splitlines()]
    change(entries)
    (journal / LINES).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def holder(entries: Entries) -> dict[str, Any]:
    """Return the entry that records a certain layer."""
    return next(entry for entry in entries[1:] if LAYER in entry["modules"])


def edit_file(journal: Path, content: Callable[[dict[str, Tensor]], bytes]) -> None:
    """Write a file of the journal anew, and its hash."""

    def change(entries: Entries) -> None:
        entry = holder(entries)
        file = journal / entry["file"]
        new = content(load_file(file))
        file.write_bytes(new)
        entry["sha256"] = hashlib.sha256(new).hexdigest()

    edit(journal, change)


def test_the_untouched_journal_is_taken(models: Path, journal: Path) -> None:
    """Else everything below would pass for a wrong reason; forged hashes fit, too."""
    edit_file(journal, save)
    assert len(packed_modules(compress(models, journal))) == 7


@pytest.mark.parametrize(
    "name",
    [
        *[
            "../secret.safetensors",
            "/etc/passwd",
            "sub/../00001.safetensors",
            "",
            ".",
            "..",
            LINES,
            "00000.safetensors\n",
        ],
        *["C:\\x.safetensors", "..\\x.safetensors", "x\x00", "9" * 10**4, "00099.safetensors", None, 1, True, [], {}],
    ],
    ids=lambda name: repr(name)[:25],
)
def test_names_of_files(models: Path, journal: Path, name: Any) -> None:
    """Only the name that this package gives is taken; the other file is there, and its hash is right."""

    def change(entries: Entries) -> None:
        file = journal / entries[1]["file"]
        shutil.copy(file, journal.parent / "secret.safetensors")
        entries[1]["file"] = name

    edit(journal, change)
    refused(models, journal, "damaged")


@pytest.mark.parametrize("hash_", [None, 1, "", "0" * 64, [], True], ids=repr)
def test_hashes(models: Path, journal: Path, hash_: Any) -> None:
    edit(journal, lambda entries: entries[1].update(sha256=hash_))
    refused(models, journal, "damaged")


@pytest.mark.parametrize("key", ["file", "sha256", "rows", "modules"])
@pytest.mark.parametrize("value", [None, 1, True, "x", [1], {"a": 1}, [[]], [None]], ids=repr)
def test_entries_of_other_types(models: Path, journal: Path, key: str, value: Any) -> None:
    edit(journal, lambda entries: entries[1].update({key: value}))
    refused(models, journal, "damaged")


@pytest.mark.parametrize("key", ["file", "sha256", "rows", "modules"])
def test_entries_that_lack_something(models: Path, journal: Path, key: str) -> None:
    edit(journal, lambda entries: entries[1].pop(key))
    refused(models, journal, "damaged")


NUMBERS = ("weight_error", "output_error", "bits_per_weight", "bytes", "weights", "seconds", "resident_bytes")
ROW: dict[str, list[Any]] = {
    "module": [None, 1, ["x"], "", "elsewhere", "model.norm", "A" * 10**5],
    "method": [None, 1, "nope", "__class__", ["arb"], "A" * 10**5],
    "format": [None, 1, "nope", ["binary"]],
    **{key: ["0.1", True, float("nan"), float("inf"), [1], {}] for key in NUMBERS},
}


@pytest.mark.parametrize("key", ROW)
def test_rows_of_the_report(models: Path, journal: Path, key: str) -> None:
    """They go into the saved config and into sums; a wrong one must not end a run after hours."""
    before = (journal / LINES).read_bytes()
    for value in ROW[key]:
        (journal / LINES).write_bytes(before)
        edit(journal, lambda entries, value=value: entries[1]["rows"][0].update({key: value}))
        refused(models, journal, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.clear(),
        lambda row: row.update(method="nope"),
        lambda row: row.update(format="nope"),
        lambda row: row.update(spec=None),
        lambda row: row.update(spec=[]),
        lambda row: row["spec"].update(out_features=2**24 + 1),
        lambda row: row["spec"].update(groups=True),
        lambda row: row["spec"].update(surprise=1),
    ],
)
def test_rows_of_the_module_table(models: Path, journal: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(journal, lambda entries: change(holder(entries)["modules"][LAYER]))
    refused(models, journal, "damaged")


KEY = f"{LAYER}.weight_sign"


@pytest.mark.parametrize(
    "content",
    [
        lambda tensors: b"",
        lambda tensors: b"\x80\x04cos\nsystem\n.",
        lambda tensors: save(tensors)[:-1],
        lambda tensors: save({"x": torch.zeros(1)}),
        lambda tensors: save({**tensors, KEY: tensors[KEY][:-1].contiguous()}),
        lambda tensors: save({**tensors, KEY: tensors[KEY].view(torch.int8)}),
        lambda tensors: save({**tensors, KEY: tensors[KEY] | 128}),
        lambda tensors: save({key: tensor for key, tensor in tensors.items() if key != KEY}),
        lambda tensors: save({**tensors, f"{LAYER}.weight_surprise": torch.zeros(1)}),
        lambda tensors: save({**tensors, f"{LAYER}.weight_mask": tensors[KEY].clone()}),
        lambda tensors: save({**tensors, f"{LAYER}.weight_salient": tensors[f"{LAYER}.weight_salient"] + 60}),
        lambda tensors: save({**tensors, f"{LAYER}.weight_row_scale": -tensors[f"{LAYER}.weight_row_scale"]}),
    ],
    ids=["empty", "pickle", "cut", "other", "row", "dtype", "padding", "missing", "unknown", "mask", "index", "scale"],
)
def test_tensors_that_do_not_fit(models: Path, journal: Path, content: Callable[[dict[str, Tensor]], bytes]) -> None:
    edit_file(journal, content)
    refused(models, journal, ".safetensors")


@pytest.mark.parametrize(
    "text",
    ["", "\n", "[]\n", "null\n", "1\n", "{\n", "[" * 10**5 + "\n", '{"a": 1, "a": 2}\n', "\x00\n", "{}\n" * 3],
    ids=lambda text: repr(text)[:12],
)
def test_lines_that_are_no_journal(models: Path, journal: Path, text: str) -> None:
    (journal / LINES).write_text(text)
    with pytest.raises((CheckpointError, ValueError), match="journal"):
        compress(models, journal)


def test_a_journal_that_is_no_text(models: Path, journal: Path) -> None:
    (journal / LINES).write_bytes(b"\xff\xfe\n")
    refused(models, journal, "damaged")


# Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", [LINES, f"{LINES}.partial", "00000.partial", "00000.safetensors", "anything"])
def test_nothing_is_written_through_links(models: Path, tmp_path: Path, name: str, resume: bool) -> None:
    """A run writes these files; a link in their place would make it write to, say, a file in the user's home."""
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / name).symlink_to(precious)
    with pytest.raises(CheckpointError, match="is no plain file"):
        compress(models, tmp_path / "journal", resume)
    assert precious.read_text() == "keep me"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [LINES, "00000.safetensors"])
def test_named_pipes(models: Path, journal: Path, name: str) -> None:
    """They would be waited for."""
    (journal / name).unlink()
    os.mkfifo(journal / name)
    refused(models, journal, "is no plain file")


def test_a_folder_in_the_place_of_a_file(models: Path, journal: Path) -> None:
    (journal / "00000.safetensors").unlink()
    (journal / "00000.safetensors").mkdir()
    refused(models, journal, "missing or damaged")


# Recipe files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "Expecting value"),
        ("[]", 'must be an object with a "method"'),
        ("null", 'must be an object with a "method"'),
        ("{}", 'must be an object with a "method"'),
        ("[" * 10**5, "nested too deeply"),
        ('{"method": "arb", "samples": 1, "samples": 2}', "the key 'samples' is given twice"),
        ('{"method": "arb", "seed": 1' + "0" * 10**5 + "}", "limit"),
        ('{"method": "arb", "damping": NaN}', "damping must be from"),
        ('{"method": "arb", "damping": 1e999}', "damping must be from"),
        ('{"method": "arb", "samples": true}', "samples must be of type int"),
        ('{"method": "arb", "samples": 1000000, "sequence_length": 1000000}', "must be at most"),
        ('{"method": "arb", "calibration": "/etc/passwd"}', "a stored calibration is one of"),
        ('{"method": "arb", "calibration": ["/etc/passwd"]}', "a stored calibration is one of"),
        ('{"method": "arb", "run": {"report": "/tmp/x", "journal": "/tmp/y"}}', "unknown key 'run'"),
        ('{"method": "arb", "tokenizer": "x", "__class__": "os"}', "unknown key '__class__'"),
        ('{"method": "os.system"}', "unknown method 'os.system'"),
        ('{"method": ["arb"]}', "unknown method"),
        ('{"method": "\\u001b[2J"}', "unknown method '"),
        ('{"method": "' + "A" * 10**5 + '"}', "unknown method"),
        ('{"method": "recipe", "rules": [{"pattern": "*", "config": {"method": "recipe"}}]}', "got a recipe"),
        ('{"method": "recipe", "rules": {"*": {"method": "arb"}}}', "rules must be a list"),
        ('{"method": "recipe"}', "at least one rule"),
        ('{"method": "arb", "quant_method": "gptq"}', "quant_method must be 'hf_lowbit'"),
        ('{"method": "arb", "format_version": 99}', "format_version 99 is not supported"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_recipe_files(tmp_path: Path, content: str, part: str) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(content)
    command = ["quantize", "no/model", str(tmp_path / "out"), "--recipe", str(recipe)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert "recipe.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert len(result.stderr) <= LONGEST_MESSAGE
    assert "\x1b[2J" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04"], ids=repr)
def test_recipe_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    command = ["quantize", "no/model", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "recipe.json" in result.stderr
