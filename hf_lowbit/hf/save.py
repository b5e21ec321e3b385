"""Save a compressed model so that a folder is either complete or not there.

Everything is written into a hidden folder beside the target and renamed at the end. Whatever interrupts a save before
that, the target is as it was. Beside what transformers writes there is ``compression_report.jsonl``: one line per
layer with its errors, sizes and times, as the compression run recorded them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REPORT_FILE = "compression_report.jsonl"
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """Say now whether a model can be saved to ``path``, rather than after the long work.

    Args:
        path: folder to be made; an empty one may exist.
        overwrite: allow a folder that holds a saved model; it is replaced as a whole.

    Returns:
        The target, absolute and with links followed.

    Raises:
        ValueError: the target exists and is not an empty folder (or, with ``overwrite``, no saved model).
        FileNotFoundError, NotADirectoryError, PermissionError: the folder above it cannot be written to.
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path}: is a file; name a folder to be made")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{path}: exists and is not empty; choose another folder, or overwrite it")
        if not (target / "config.json").is_file():  # a slip of the keyboard must not delete somebody's documents
            raise ValueError(f"{path}: holds no config.json, so it is no saved model and is not overwritten")
    parent = target.parent
    if not parent.exists():
        raise FileNotFoundError(f"{path}: the folder above it does not exist; make it first")
    if not parent.is_dir():
        raise NotADirectoryError(f"{path}: what lies above it is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder above it cannot be written to")
    return target


def check_shard_size(size: int | str) -> None:
    """Refuse a shard size that transformers would refuse after the long work.

    Raises:
        ValueError: neither a positive number of bytes nor a number with KB, MB, GB or TB.
    """
    number = size > 0 if isinstance(size, int) else bool(_SHARD_SIZE.fullmatch(size.strip()))
    if not number:
        raise ValueError(
            f"max_shard_size must be bytes or a number with KB, MB, GB or TB, such as '5GB', got {size!r}"
        )


def save_model(
    model: Any,
    path: str | Path,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a model, and what belongs to it, as one folder that appears at once.

    Args:
        model: a transformers model, compressed or not.
        path: the folder, see :func:`check_target`.
        tokenizer: saved beside the model, unless None.
        rows: of the compression run (``RunReport.rows``), written to :data:`REPORT_FILE`, unless None.
        overwrite: replace a saved model; the old one is removed when the new one is in place.
        max_shard_size: largest weight file, bytes or such as "5GB".

    Returns:
        The folder.

    Raises:
        ValueError, OSError: as :func:`check_target` and :func:`check_shard_size`; nothing has changed then.
    """
    target = check_target(path, overwrite)
    check_shard_size(max_shard_size)
    mark = secrets.token_hex(4)
    partial = target.with_name(f".{target.name}.{mark}.partial")
    try:
        partial.mkdir()
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if rows is not None:
            lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
            (partial / REPORT_FILE).write_text(lines, encoding="utf-8")
        for file in partial.glob("*.safetensors"):
            _order_header(file)
            # written readable for the owner only, unlike all the others
            shutil.copymode(partial / "config.json", file)
        _put_in_place(partial, target, target.with_name(f".{target.name}.{mark}.old"))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _order_header(file: Path) -> None:
    """Sort the metadata in a header: safetensors writes it in random order, and equal models should be equal files."""
    with open(file, "r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # always so: the same content, without the padding
            handle.seek(8)
            handle.write(text.ljust(length))


def _put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Rename ``new`` to ``target``; what was there is moved aside first, and back again if that fails."""
    if not target.exists():
        new.rename(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
