"""The journal of a compression run: what is done so far, so that a run that was killed can go on.

A folder beside the target holds one safetensors file for every finished group of layers (a block, or a few layers of
a run without data) and ``journal.jsonl``: a first line with hashes of everything that decides the result, then a line
per file. A file is renamed into place before its line is written and a torn last line is ignored, so that whatever
moment a run is killed at, the journal names complete files only. Going on gives the same packed bytes as a run that
was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from hf_lowbit.compress.headers import packed_layer_spec
from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import Format

LINES = "journal.jsonl"


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
        self._modules: dict[str, dict[str, Any]] = {}
        self._file_of: dict[str, Path] = {}
        self._entries = 0
        lines = folder / LINES
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
            first, *entries = [json.loads(line) for line in whole.splitlines()]
            differing = [part for part in identity if first.get(part) != identity[part]]
            if not differing:
                for entry in entries:
                    self._add(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder.name}/{LINES}: damaged: {error}") from error
        if differing:
            raise ValueError(f"{self.folder.name}: belongs to a run with another {' and another '.join(differing)}")
        if len(whole) < len(text):
            self._replace(whole.decode())

    def _add(self, entry: dict[str, Any]) -> None:
        path = self.folder / Path(entry["file"]).name
        if not path.exists() or file_hash(path) != entry["sha256"]:
            raise CheckpointError(
                f"{self.folder.name}/{path.name}: missing or damaged; remove the folder and start again"
            )
        for row in entry["rows"]:
            self.rows[row["module"]] = row
            self._file_of[row["module"]] = path
        self._modules.update(entry["modules"])
        self._entries += 1

    def __contains__(self, name: str) -> bool:
        """Whether a layer is finished."""
        return name in self.rows

    def packed(self, name: str) -> Format:
        """Read a finished layer.

        Raises:
            CheckpointError: its tensors do not fit its spec.
        """
        try:
            format_type, spec = packed_layer_spec(name, self._modules[name])
            tensors = load(self._file_of[name].read_bytes())
            prefix = f"{name}.weight_"
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            packed = format_type.from_state(state, spec)
            packed.validate(name)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.folder.name}: {error}") from error
        return packed

    def append(
        self, layers: dict[str, Format], rows: list[dict[str, Any]], modules: dict[str, dict[str, Any]]
    ) -> None:
        """Record finished layers.

        Args:
            layers: packed weights by name.
            rows: their report rows.
            modules: their rows of the module table.
        """
        path = self.folder / f"{self._entries:05d}.safetensors"
        partial = path.with_suffix(".partial")
        tensors: dict[str, Tensor] = {
            f"{name}.weight_{part}": tensor.detach().cpu().contiguous()
            for name, packed in layers.items()
            for part, tensor in packed.state().items()
        }
        save_file(tensors, partial)
        os.replace(partial, path)
        entry = {"file": path.name, "sha256": file_hash(path), "rows": rows, "modules": modules}
        _write(self.folder / LINES, json.dumps(entry) + "\n", "a")
        self._entries += 1

    def _replace(self, text: str) -> None:
        """Write the journal anew, at once."""
        partial = self.folder / f"{LINES}.partial"
        _write(partial, text, "w")
        os.replace(partial, self.folder / LINES)


def _write(path: Path, text: str, mode: str) -> None:
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
