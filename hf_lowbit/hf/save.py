"""Save a compressed model so that a folder is either complete or not there.

Everything is written into a hidden folder beside the target (``.NAME.MARK.partial``) and put in place at the end.
Whatever interrupts a save before that, the target is as it was. On Linux a new folder and an old one swap names in one
step. Where that cannot be had, the old folder is first renamed to ``.NAME.MARK.old``; a process killed right then
leaves it there, and the next :func:`check_target` or :func:`save_model` of the same target puts it back. Both also
remove what killed saves have left behind: a save that is still running holds a lock on its folder.

Beside what transformers writes there are ``compression_report.jsonl``, one line per layer with its errors, sizes and
times, as the compression run recorded them, ``compression_run.json`` about the run as a whole, and ``SHA256SUMS`` for
these and the tokenizer's files. The checksums of
tensors and configs are in the weight files, see :func:`file_metadata`.
"""

from __future__ import annotations

import copy
import ctypes
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lowbit.compress import checksums
from hf_lowbit.hf.record import RUN_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
REPORT_FILE = "compression_report.jsonl"
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
# Written by every save_pretrained, also by a later one into the same folder, so no list of ours may hold them fast.
_OF_TRANSFORMERS = (checksums.CONFIG, checksums.GENERATION_CONFIG, "*.safetensors", "*.safetensors.index.json")


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """Say now whether a model can be saved to ``path``, rather than after the long work.

    What an earlier save to ``path`` left when it was killed is put right first, see the top of this module.

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
    _tidy(target)
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


def _make_above(target: Path) -> None:
    """Make the folders above a target, unless a file is in the way, of which :func:`check_target` tells."""
    if not target.parent.exists() and next(folder for folder in target.parents if folder.exists()).is_dir():
        target.parent.mkdir(parents=True)


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
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model, and what belongs to it, as one folder that appears at once.

    Args:
        model: of transformers, or one of diffusers (not a pipeline), compressed or not.
        path: the folder, see :func:`check_target`; folders above it are made, since a model in memory, maybe of long
            work, should not be lost for one.
        tokenizer: saved beside the model, unless None.
        rows: of the compression run (``RunReport.rows``), written to :data:`REPORT_FILE`, unless None.
        overwrite: replace a saved model; the old one is removed when the new one is in place.
        max_shard_size: largest weight file, bytes or such as "5GB".
        record: of the run (:func:`hf_lowbit.hf.record.run_record`), written to ``compression_run.json``, unless None.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: as :func:`check_target` and :func:`check_shard_size`; nothing has changed then.
    """
    check_shard_size(max_shard_size)
    _make_above(Path(path).expanduser().resolve())
    target = check_target(path, overwrite)
    partial, lock = _partial_folder(target)
    try:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if rows is not None:
            lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
            (partial / REPORT_FILE).write_text(lines, encoding="utf-8")
        if record is not None:
            (partial / RUN_FILE).write_text(json.dumps(dict(record), indent=2) + "\n", encoding="utf-8")
        _count_weights(partial)
        for file in partial.glob("*.safetensors"):
            _order_header(file)
            # written readable for the owner only, unlike all the others
            shutil.copymode(partial / "config.json", file)
        own = (file for file in partial.rglob("*") if file.is_file() and not any(map(file.match, _OF_TRANSFORMERS)))
        checksums.write_sums(partial, [file.relative_to(partial).as_posix() for file in own])
        put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return target


def _count_weights(folder: Path) -> None:
    """Put the number of parameters of the dense model into an index of shards: transformers counts packed elements."""
    from hf_lowbit.report.headers import read_checkpoint  # here: it need not be there to load a model
    from hf_lowbit.report.inspect import inspect_checkpoint

    for index in folder.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        if "total_parameters" not in content.get("metadata", {}):  # of diffusers
            continue
        checkpoint = read_checkpoint(folder)
        if checkpoint.is_compressed:
            content["metadata"]["total_parameters"] = inspect_checkpoint(checkpoint).parameters
            index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def put_in_place(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an old folder there is replaced at once, or moved aside until that is done."""
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)  # this name is now that of the old folder
    else:
        aside = new.with_suffix(".old")
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders swap names in one step; False where the system or the file system has no such step."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):  # not Linux, or a C library older than the call
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(swap(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)


def _partial_folder(target: Path) -> tuple[Path, int | None]:
    """Make the hidden folder that a save works in.

    Returns:
        The folder, and a descriptor that holds a lock on it until it is closed or the process ends, None without one.
    """
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        lock = _locked(partial, wait=True)
        if partial.exists():
            return partial, lock
        if lock is not None:  # another process tidied the folder away before it was locked
            os.close(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder and return the descriptor that holds the lock; None if that cannot be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by a running save, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _tidy(target: Path) -> None:
    """Put right what killed saves left beside ``target``: the old folder if it was on its way out, and remains.

    Without locks (Windows) nothing is removed, because a save may still be at work in it.
    """
    pattern = re.compile(rf"(\.{re.escape(target.name)}\.[0-9a-f]{{8}})\.(partial|old)")
    try:
        beside = {match[1] for match in map(pattern.fullmatch, os.listdir(target.parent)) if match}
    except OSError:  # what is wrong with the folder above is said elsewhere
        return
    for stem in sorted(beside):
        partial, aside = target.with_name(f"{stem}.partial"), target.with_name(f"{stem}.old")
        lock = _locked(partial)
        running = lock is None and partial.exists()
        vacant = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        if aside.exists() and vacant and not (running and fcntl):
            aside.rename(target)
            logger.warning("%s: put back; a save that was to replace it was killed", target.name)
        if not running:
            for left in filter(Path.exists, (partial, aside)):
                shutil.rmtree(left, ignore_errors=True)
                logger.warning("%s: removed; a killed save left it behind", left.name)
        if lock is not None:
            os.close(lock)


# Checksums -----------------------------------------------------------------------------------------------------------


def file_metadata(model: Any) -> dict[str, str]:
    """Return the metadata of the weight files that ``save_pretrained`` is about to write, with all checksums."""
    if getattr(model, "_hf_peft_config_loaded", False):  # only an adapter is saved then
        return {}
    table: dict[str, str] = {}
    for tensors in _stored_tensors(model):
        table |= checksums.checksums(tensors)
    return checksums.metadata_from(table, _stored_configs(model))


def _stored_tensors(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield all tensors by their own name and by the one that transformers stores them under.

    transformers may rename, split and join tensors to write the names of the original checkpoint; its own function is
    asked what comes out. Both names are kept, because ``save_original_format=False`` writes the former. Everything is
    one part, as in ``save_pretrained``, unless tensors are offloaded to disk: these are read block by block.
    """
    # here: the package may be imported while transformers itself still is
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.integrations.accelerate import load_offloaded_parameter

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    parts: dict[str, list[str]] = {}
    offloaded = any(tensor.device.type == "meta" for tensor in state.values())
    for name in state:
        block = re.match(r".*?\.\d+\.", name) if offloaded else None
        parts.setdefault(block[0] if block else "", []).append(name)
    for names in parts.values():
        part = {
            name: load_offloaded_parameter(model, name) if state[name].device.type == "meta" else state[name]
            for name in names
        }
        yield {**part, **revert_weight_conversion(model, part)}


def _stored_configs(model: Any) -> dict[str, str]:
    """Return the texts of the config files that ``save_pretrained`` is about to write.

    It asks for the metadata first and completes the config later, so the same steps are made here with a copy.
    """
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    with tempfile.TemporaryDirectory() as folder:
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        files = [Path(folder, name) for name in (checksums.CONFIG, checksums.GENERATION_CONFIG)]
        return {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}
