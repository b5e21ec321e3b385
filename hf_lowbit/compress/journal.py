"""The journal of a compression run: what is done so far, so that a run that was killed can go on.

A folder beside the target holds a safetensors file for every finished group of layers (a block, or a few layers of a
run without data; of several processes each writes a file of the layers that it packed) and ``journal.jsonl``: a first
line with hashes of everything that decides the result, then a line per file. A file is renamed into place before its
line is written and a torn last line is ignored, so that whatever moment a run is killed at, the journal names complete
files only. Going on gives the same packed bytes as a run that was never interrupted.

What is read back is checked like any file of a stranger. The hashes lie in the same folder, so they find damage; they
do not make the journal of somebody else trustworthy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowbit import registry
from hf_lowbit.compress.headers import packed_layer_spec
from hf_lowbit.compress.parcel import layer_of, tensors_of
from hf_lowbit.config import parse_json
from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import Format

LINES = "journal.jsonl"
# Numbers in a row of the report that the run goes on to use; the optional ones may be None or absent.
_NUMBERS = ("weight_error", "bits_per_weight", "bytes", "weights", "seconds")
_OPTIONAL_NUMBERS = ("output_error", "resident_bytes")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_hash(file)


def _slow_hash(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def run_identity(config: dict[str, Any], tokens_hash: str | None, files: Iterable[Path]) -> dict[str, Any]:
    """Return hashes of all that decides the result of a run.

    Args:
        config: as saved; it holds no path.
        tokens_hash: of the calibration tokens, None in a run without data.
        files: of the dense checkpoint.
    """
    text = json.dumps(config, sort_keys=True)
    shards = sorted(file_hash(file) for file in files)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "calibration data": tokens_hash,
        "dense checkpoint": hashlib.sha256("".join(shards).encode()).hexdigest(),
    }


class Journal:
    """Finished layers of a run, on disk.

    Attributes:
        rows: report row of every finished layer, by name.
        plans: what was decided for a stack of blocks before its first was compressed: by name of that block, for each
            rule of the recipe a number per block.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool) -> None:
        """Open a journal, or start one.

        Raises:
            ValueError: there is one already and ``resume`` is False; or it belongs to another run, and the message
                says what differs.
            CheckpointError: a finished file is missing or damaged.
        """
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}
        self.plans: dict[str, dict[str, dict[str, int | float]]] = {}
        self._modules: dict[str, dict[str, Any]] = {}
        self._file_of: dict[str, Path] = {}
        self._entries = 0
        lines = folder / LINES
        _refuse_links(folder)
        if lines.exists():
            if not resume:
                raise ValueError(f"{folder.name}: an unfinished run is recorded here; resume it or remove the folder")
            self._read(lines, identity)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._replace(json.dumps(identity) + "\n")

    def _read(self, lines: Path, identity: dict[str, Any]) -> None:
        text = lines.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # what follows the last line break was cut off by a kill
        try:
            first, *entries = [parse_json(line) for line in whole.splitlines()]
            differing = [part for part in identity if first.get(part) != identity[part]]
            if not differing:
                for entry in entries:
                    self._add(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder.name}/{LINES}: damaged: {str(error)[:500]}") from error
        if differing:
            raise ValueError(f"{self.folder.name}: belongs to a run with another {' and another '.join(differing)}")
        if len(whole) < len(text):
            self._replace(whole.decode())

    def _add(self, entry: dict[str, Any]) -> None:
        if "plan" in entry:
            self.plans[_text(entry["stack"])] = _checked_plan(entry["plan"])
            return
        path = self._file(self._entries)
        if entry["file"] != path.name or not path.is_file() or file_hash(path) != entry["sha256"]:
            raise CheckpointError(
                f"{self.folder.name}/{path.name}: missing or damaged; remove the folder and start again"
            )
        for row in entry["rows"]:
            name = _checked(row, entry["modules"])
            self.rows[name], self._modules[name], self._file_of[name] = row, entry["modules"][name], path
        self._entries += 1

    def __contains__(self, name: str) -> bool:
        """Whether a layer is finished."""
        return name in self.rows

    def packed(self, name: str) -> Format:
        """Return a finished layer, whose tensors are pages of its file: the system can drop them and read them again.

        Raises:
            CheckpointError: its tensors do not fit its spec.
        """
        try:
            packed = layer_of(name, self._modules[name], _mapped(self._file_of[name], f"{name}."))
        except (ValueError, TypeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder.name}/{self._file_of[name].name}: {error}") from error
        return packed

    def store(self, layers: dict[str, Format], number: int) -> str:
        """Write the file of some finished layers; it counts when :meth:`append` has recorded it.

        Args:
            layers: packed weights by name.
            number: of the file among those that are recorded next, from 0.

        Returns:
            Hash of the file.
        """
        path = self._file(self._entries + number)
        partial = path.with_suffix(".partial")
        save_file(tensors_of(layers), partial)
        os.replace(partial, path)
        return file_hash(path)

    def append(self, files: Sequence[Mapping[str, Any]], write: bool = True) -> None:
        """Record files of finished layers, all at once.

        Args:
            files: for each, in order, "sha256" as :meth:`store` returned it, the report rows of its layers ("rows")
                and their rows of the module table by name ("modules").
            write: whether the lines are written, by one process of several; the others only count.
        """
        entries = [{"file": self._file(self._entries + i).name, **file} for i, file in enumerate(files)]
        for entry in entries:
            self._modules |= entry["modules"]
            self._file_of |= dict.fromkeys(entry["modules"], self.folder / entry["file"])
        if write:
            _write(self.folder / LINES, "".join(json.dumps(entry) + "\n" for entry in entries), "a")
        self._entries += len(entries)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def append_plan(self, stack: str, plan: dict[str, dict[str, int | float]]) -> None:
        """Record what was decided for a stack of blocks.

        Args:
            stack: name of its first block.
            plan: for each rule, by its pattern, a number per block.
        """
        _write(self.folder / LINES, json.dumps({"stack": stack, "plan": plan}) + "\n", "a")
        self.plans[stack] = plan

    def _replace(self, text: str) -> None:
        """Write the journal anew, at once."""
        partial = self.folder / f"{LINES}.partial"
        _write(partial, text, "w")
        os.replace(partial, self.folder / LINES)


def _mapped(file: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a file whose names start so; on Windows, where a mapped file cannot be removed, copied."""
    with safe_open(file, framework="pt") as handle:
        found = {key: handle.get_tensor(key) for key in handle.keys() if key.startswith(prefix)}
    return {key: tensor.clone() for key, tensor in found.items()} if os.name == "nt" else found


def _refuse_links(folder: Path) -> None:
    """Refuse what a journal never makes: through a link, a run would write elsewhere; for a pipe it would wait."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(
                f"{folder.name}/{reprlib.repr(path.name)}: is no plain file; remove the folder and start again"
            )


def _checked(row: Mapping[str, Any], modules: Mapping[str, Any]) -> str:
    """Return the name of a finished layer.

    Raises:
        ValueError, KeyError, TypeError: its row of the report, or of the module table, is not as a run writes it.
    """
    name = row["module"]
    entry = modules.get(name) if isinstance(name, str) else None
    if not isinstance(entry, Mapping) or not isinstance(entry["spec"], Mapping):
        raise ValueError(f"{reprlib.repr(name)} is in the report, but not in the module table")
    packed_layer_spec(name, entry)
    registry.get(entry["method"])
    if (row["method"], row["format"]) != (entry["method"], entry["format"]):
        raise ValueError(f"{name}: the report and the module table name different methods or formats")
    numbers = {key: row[key] for key in _NUMBERS} | {key: row.get(key) for key in _OPTIONAL_NUMBERS}
    for key, value in numbers.items():
        if value is None and key in _OPTIONAL_NUMBERS:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}: {key} must be a finite number, got {reprlib.repr(value)}")
    return name


def _checked_plan(plan: Any) -> dict[str, dict[str, int | float]]:
    """Return a plan as :meth:`Journal.append_plan` writes it; what the numbers may be, the method's config knows.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(plan, dict) or not all(isinstance(numbers, dict) for numbers in plan.values()):
        raise ValueError(f"a plan must hold numbers by rule and block, got {reprlib.repr(plan)}")
    for numbers in plan.values():
        for block, number in numbers.items():
            if type(number) not in (int, float) or not math.isfinite(number):
                raise ValueError(f"{reprlib.repr(block)}: planned {reprlib.repr(number)}, which is no number")
    return plan


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{reprlib.repr(name)} is not the name of a block")
    return name


def _write(path: Path, text: str, mode: str) -> None:
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
