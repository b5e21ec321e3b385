"""Weight files and an index of a stranger: headers that lie, names that lead elsewhere, links, pickles."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_lowbit import CheckpointError
from hf_lowbit.cli import app
from hf_lowbit.compress.checksums import METADATA_KEY
from hf_lowbit.report import headers
from hf_lowbit.report.inspect import inspect
from tests.hostile.forge import INDEX, LAYER, SINGLE, edit_header, edit_index, edit_tensors, load, refused, seal

KEY = f"{LAYER}.weight_sign"
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
NOT_SAFETENSORS = f"{SINGLE}: not a readable safetensors file"


# Headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        lambda old: (2**63).to_bytes(8, "little") + old[8:],
        lambda old: b"\xff" * 8 + old[8:],
        lambda old: bytes(8) + old[8:],
        lambda old: len(old).to_bytes(8, "little") + old[8:],
        lambda old: (8).to_bytes(8, "little") + old[8:],
        lambda old: b"",
        lambda old: old[:7],
        lambda old: old[: len(old) // 2],
        lambda old: old[:-1],
        lambda old: old + bytes(8),
        lambda old: b"PK\x03\x04" + old,
        lambda old: pickle.dumps({KEY: [1]}),
        lambda old: b"GGUF" + old,
        lambda old: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=[
        "2**63",
        "minus 1",
        "0",
        "whole file",
        "8",
        "empty",
        "7 bytes",
        "half",
        "cut",
        "more",
        "zip",
        "pickle",
        "gguf",
        "lfs",
    ],
)
def test_files_that_are_no_safetensors(model: Path, content: Callable[[bytes], bytes]) -> None:
    file = model / SINGLE
    file.write_bytes(content(file.read_bytes()))
    refused(model, NOT_SAFETENSORS)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]}, {"shape": [2**33, 2**33]}, {"shape": [-64, -16]}, {"shape": [64, 16, 2]}, {"shape": "64"},
        {"shape": [64.5]}, {"shape": None}, {"shape": [True, 1024]}, {"data_offsets": [0, 1]}, {"data_offsets": {}},
        {"data_offsets": [2**62, 2**62 + 1024]}, {"data_offsets": [1024, 0]}, {"data_offsets": [-1, 5]},
        {"dtype": "U128"}, {"dtype": "u8"}, {"dtype": 3}, {"dtype": None}, {"dtype": "F64"}, {"dtype": "object"},
    ],
    ids=str,
)  # fmt: skip
def test_entries_that_do_not_fit_the_file(model: Path, change: dict[str, Any]) -> None:
    edit_header(model, lambda header: header[KEY].update(change))
    refused(model, SINGLE)


def test_two_tensors_of_the_same_bytes(model: Path) -> None:
    """Overlaps would let one part of a file mean two things."""
    edit_header(model, lambda h: h[KEY].update(data_offsets=h["lm_head.weight"]["data_offsets"]))
    refused(model, NOT_SAFETENSORS)
    edit_header(model, lambda h: h.update({KEY: {**h["lm_head.weight"]}}))
    refused(model, NOT_SAFETENSORS)


@pytest.mark.parametrize("dtype", ["I8", "BOOL", "F8_E4M3", "F8_E8M0"])
def test_another_dtype_of_the_same_size(model: Path, dtype: str) -> None:
    edit_header(model, lambda h: h[KEY].update(dtype=dtype))
    refused(model, KEY, SINGLE)


@pytest.mark.parametrize(
    "name", ["\x1b[31m", "a\nb", "\x00", "a" * 10**5, "\u202egpj.exe"], ids=lambda name: repr(name)[:12]
)
def test_names_of_tensors_that_are_no_names(model: Path, name: str) -> None:
    edit_tensors(model, lambda t: t.update({name: torch.zeros(1)}))
    refused(model, SINGLE, "is not the name of a tensor")


@pytest.mark.parametrize("table", ["[]", "null", "1", '"x"', "{", "{}", "[" * 10**5, "NaN", ""])
def test_tables_of_checksums_that_are_no_tables(model: Path, table: str) -> None:
    edit_header(model, lambda h: h["__metadata__"].update({METADATA_KEY: table}))
    refused(model, f"{SINGLE}: has no checksums", ways=("load", "verify"))


@pytest.mark.parametrize("value", [1, None, [], {}, True, "", "0" * 32, "A" * 32])
def test_checksums_that_are_none(model: Path, value: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        table = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = json.dumps({**table, KEY: value})

    edit_header(model, change)
    refused(model, f"{KEY} in {SINGLE}: does not match its checksum", ways=("load", "verify"))


def test_a_table_of_other_tensors(model: Path) -> None:
    """A check that compares nothing must not pass."""
    edit_header(model, lambda h: h["__metadata__"].update({METADATA_KEY: '{"something.else": "00"}'}))
    refused(model, SINGLE, "checksum", ways=("load", "verify"))


# The index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *[
            "../out.safetensors",
            "sub/../../out.safetensors",
            "sub/out.safetensors",
            "./out.safetensors",
            "..",
            ".",
            "",
        ],
        *[
            "/etc/passwd",
            "/tmp/out.safetensors",
            "//host/share/out.safetensors",
            "~/out.safetensors",
            "file:out.safetensors",
        ],
        *[
            "..\\out.safetensors",
            "C:\\out.safetensors",
            "C:out.safetensors",
            "\\\\host\\out.safetensors",
            "%2e%2e/out",
        ],
        *["out\x00.safetensors", "\x1b[2J.safetensors", "out.bin", "config.json", "out.safetensors\n", ".safetensors"],
        *[
            "model.safetensors.index.json",
            "http://127.0.0.1/out.safetensors",
            "-",
            "a" * 10**4,
            3,
            None,
            True,
            ["x"],
            {},
        ],
    ],
    ids=lambda name: repr(name)[:30],
)
def test_names_of_shards(shards: Path, name: Any) -> None:
    """What is named lies where it is named, wherever that can be, and is a sound file with this tensor."""
    shutil.copy(shards / SHARDS[0], shards.parent / "out.safetensors")
    (shards / "sub").mkdir()
    shutil.copy(shards / SHARDS[0], shards / "sub" / "out.safetensors")
    edit_index(shards, lambda index: index["weight_map"].update({KEY: name}))
    refused(shards, INDEX, "weight_map", ways=("inspect", "verify"))


@pytest.mark.parametrize("weight_map", [[], {}, None, "x", 1, [["a", "b"]]], ids=str)
def test_an_index_without_a_map(shards: Path, weight_map: Any) -> None:
    edit_index(shards, lambda index: index.update(weight_map=weight_map))
    refused(shards, INDEX, "weight_map", ways=("inspect", "verify"))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, '{"weight_map": {"a": "b"}, "weight_map": {}}'])
def test_an_index_that_is_none(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content)
    refused(shards, INDEX, ways=("inspect", "verify"))


def test_a_shard_that_is_missing(shards: Path) -> None:
    (shards / SHARDS[1]).unlink()
    refused(shards, SHARDS[1])


def test_a_tensor_placed_in_another_shard_or_nowhere(shards: Path) -> None:
    home = next(name for name in SHARDS if KEY in load_file(shards / name))
    edit_index(shards, lambda index: index["weight_map"].update({KEY: next(name for name in SHARDS if name != home)}))
    refused(shards, f"places {KEY} in", ways=("inspect", "verify"))
    edit_index(shards, lambda index: index["weight_map"].update({KEY: home, "surprise": home}))
    refused(shards, "places surprise in", ways=("inspect", "verify"))


def test_shards_renamed_into_each_other(shards: Path) -> None:
    """transformers asks each shard what it holds, so the model is the same; verify says what is odd."""
    expected = load(shards).state_dict()
    (shards / SHARDS[0]).rename(shards / "aside")
    (shards / SHARDS[1]).rename(shards / SHARDS[0])
    (shards / "aside").rename(shards / SHARDS[1])
    refused(shards, INDEX, "which does not hold it", ways=("inspect", "verify"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(shards).state_dict().items())


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first, second = load_file(shards / SHARDS[0]), load_file(shards / SHARDS[1])
    key = next(iter(first))
    save_file({**second, key: first[key] + 1}, shards / SHARDS[1])
    seal(shards)
    refused(shards, f"{key} is in", SHARDS[0], SHARDS[1], ways=("inspect", "verify"))


def test_a_repository_whose_index_leads_elsewhere(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """Names of files come from an index on the Hub, too; verify would open them in the folder of the snapshot."""
    index = model.parent / "index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "../../secret.safetensors"}}))
    files = {"config.json": model / "config.json", INDEX: index}
    siblings = [SimpleNamespace(rfilename=name, size=3) for name in [*files, "../../secret.safetensors"]]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings, sha="0" * 40))
    monkeypatch.setattr(headers, "HfApi", lambda: api)
    monkeypatch.setattr(headers, "hf_hub_download", lambda _, name, **__: str(files[name]))
    with pytest.raises(CheckpointError, match=r"plain file names .* '\.\./\.\./secret\.safetensors'"):
        inspect("some/repository")


# Links and other things that are no files ------------------------------------------------------------------------


def test_links_as_the_cache_of_the_hub_has_them(shards: Path) -> None:
    """They must work: a snapshot in the cache is a folder of links to files elsewhere."""
    blobs = shards.parent / "blobs"
    shards.rename(blobs)
    shards.mkdir()
    for file in blobs.iterdir():
        (shards / file.name).symlink_to(file)
    assert CliRunner().invoke(app, ["verify", str(shards)]).exit_code == 0
    load(shards)


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_link_to_a_private_file_tells_nothing_of_it(model: Path, name: str) -> None:
    secret = model.parent / "secret.txt"
    secret.write_text("user=alice password=hunter2")
    (model / name).unlink()
    (model / name).symlink_to(secret)
    with pytest.raises((CheckpointError, ValueError, OSError)) as caught:
        load(model)
    assert "hunter2" not in str(caught.value)
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(app, [command, str(model)])
        assert result.exit_code == 2
        assert name in result.stderr
        assert "hunter2" not in result.output


@pytest.mark.parametrize("target", ["nowhere", SHARDS[0], "/dev/zero", "."])
def test_links_to_what_is_no_file(shards: Path, target: str) -> None:
    (shards / SHARDS[0]).unlink()
    (shards / SHARDS[0]).symlink_to(target)
    refused(shards, SHARDS[0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [SHARDS[0], "config.json", INDEX])
def test_named_pipes_are_not_waited_for(shards: Path, name: str) -> None:
    (shards / name).unlink()
    os.mkfifo(shards / name)
    refused(
        shards, name if name == SHARDS[0] else "", ways=("inspect", "verify", *(["load"] if name == SHARDS[0] else []))
    )


def test_a_folder_that_holds_itself(model: Path) -> None:
    (model / "loop").symlink_to(model)
    inspect(model)
    load(model)


# Pickles ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "training_args.bin", "optimizer.pt"])
def test_pickles_are_never_opened(model: Path, name: str) -> None:
    """Beside sound weights and in their place: never unpickled, not even to say that they are refused."""
    mark = model.parent / "mark"
    torch.save({"lm_head.weight": Bomb(mark), "x": torch.zeros(1)}, model / name)
    load(model)
    CliRunner().invoke(app, ["verify", str(model)])
    assert not mark.exists()
    (model / SINGLE).unlink()
    refused(model, f"neither {SINGLE} nor", ways=("inspect", "verify"))
    with pytest.raises(Exception):  # noqa: B017  whichever library speaks first; the mark is what counts
        load(model)
    assert not mark.exists()
