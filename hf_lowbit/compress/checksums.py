"""Checksums of everything that is saved: tensors with dtype and shape, both config files, and what lies beside them.

A bit that flips in a scale or in ``rope_theta`` gives fluent nonsense, not an error; only a checksum tells. Those of
tensors and configs are written into the metadata of the safetensors files with every save of a packed model, and
compared whenever one is loaded (unless that is put off). Files that only ``save_model`` writes, such as a tokenizer's,
are listed in ``SHA256SUMS``, which ``sha256sum --check`` reads as well. All this is against damage, not against an
adversary: whoever can write a file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_lowbit.compress.journal import file_hash
from hf_lowbit.errors import CheckpointError

logger = logging.getLogger(__name__)
METADATA_KEY = "hf_lowbit_sha256"
CONFIG_KEY = "hf_lowbit_config_sha256"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SUMS_FILE = "SHA256SUMS"
ORIGIN = "_name_or_path"
# 128 bits: damage is found with certainty for all purposes, at half the length of a full digest
_DIGITS = 32
_UNVERIFIED = "RunOptions(verify=False)"
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  ((?:[\w.+ -]+/)*[\w.+ -]+)")


def checksum(tensor: Tensor) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a tensor: its dtype, its shape, its bytes in row-major order."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    buffer: Any = flat.numpy()
    digest.update(buffer)
    return digest.hexdigest()[:_DIGITS]


def json_checksum(text: str) -> str:
    """Return 64 hexadecimal digits of the SHA-256 of what a JSON text says; order of keys and white space are no part.

    Nor is where the model was loaded from, which diffusers writes into configs: a push leaves that out.

    Raises:
        ValueError: not JSON.
    """
    content = json.loads(text)
    if isinstance(content, dict):
        content.pop(ORIGIN, None)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the checksum of each tensor; the same memory under two names is read once."""
    known: dict[tuple[Any, ...], str] = {}
    table = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if place not in known:
            known[place] = checksum(tensor)
        table[name] = known[place]
    return table


def metadata_of(state: Mapping[str, Tensor], configs: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metadata entries for tensors that are about to be saved.

    Args:
        state: the tensors by the name that they have in the file.
        configs: texts of the config files that are saved beside them, by file name.
    """
    return metadata_from(checksums(state), configs or {})


def metadata_from(table: Mapping[str, str], configs: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata entries for checksums of tensors and texts of config files."""
    entries = {METADATA_KEY: dict(table), CONFIG_KEY: {name: json_checksum(text) for name, text in configs.items()}}
    return {key: json.dumps(value, sort_keys=True, separators=(",", ":")) for key, value in entries.items() if value}


def problems_on_load(files: Iterable[str | Path], way: str = _UNVERIFIED) -> list[str]:
    """Compare all that is loaded with its checksums; what people edit, as they may, is a warning.

    Args:
        files: safetensors files of one model.
        way: how the user loads a model without this, for messages.

    Returns:
        What is wrong with ``config.json`` and with the tensors.

    Raises:
        CheckpointError: as :func:`damaged_tensors`.
    """
    paths = [Path(file) for file in files]
    configs = changed_configs(paths)
    accept = f"{way} loads an edited one, and saving the model records it"
    problems = [f"{configs.pop(CONFIG)}; {accept}"] if CONFIG in configs else []
    beside = [problem for folder in {path.parent for path in paths} for problem in changed_files(folder)[0]]
    for warning in [*configs.values(), *beside]:
        logger.warning("%s", warning)
    return problems + damaged_tensors(paths, way)[0]


def damaged_tensors(files: Iterable[str | Path], way: str = _UNVERIFIED) -> tuple[list[str], int]:
    """Compare every tensor of some files with its checksum.

    Hashing is spread over as many threads as torch uses: it runs at the speed of one core otherwise, below that of
    reading the files.

    Args:
        files: safetensors files of one model.
        way: how the user loads a model without this, for messages.

    Returns:
        What is wrong, tensor and file named, and how many tensors were compared.

    Raises:
        CheckpointError: a file cannot be read, or has no table of checksums.
    """
    problems, compared, first = [], 0, None
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for file in map(Path, files):
            try:
                with safe_open(file, framework="pt") as handle:
                    table = _table(file, handle.metadata() or {}, way)
                    first = first or (file.name, table)  # each file has the checksums of all
                    if table != first[1]:
                        problems.append(f"{file.name}: was not saved together with {first[0]}")
                    keys = list(handle.keys())
                    found = pool.map(lambda key, handle=handle: checksum(handle.get_tensor(key)), keys)
                    for key, digest in zip(keys, found, strict=True):
                        if key not in table:
                            problems.append(f"{key} in {file.name}: has no checksum")
                        elif digest != table[key]:
                            problems.append(f"{key} in {file.name}: does not match its checksum")
                    compared += len(table.keys() & keys)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}") from error
    return problems, compared


def absent_tensors(files: Iterable[str | Path]) -> list[str]:
    """Return which tensors have a checksum in some files of a model and are in none of them, as problems.

    Tied matrices are saved under one name, and the others have its checksum. transformers misses tensors by itself
    when it loads a model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    known: dict[str, str] = {}
    found: dict[str, int] = {}  # dimensions: vectors, such as those of norms, are often equal without being tied
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as handle:
                known |= _json_object((handle.metadata() or {}).get(METADATA_KEY, "{}")) or {}
                found |= {key: len(handle.get_slice(key).get_shape()) for key in handle.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}") from error
    present = {known[name] for name, dimensions in found.items() if name in known and dimensions > 1}
    absent = sorted(name for name, digest in known.items() if name not in found and digest not in present)
    return [f"{name}: has a checksum, but is in none of the files" for name in absent]


def changed_configs(files: Iterable[str | Path]) -> dict[str, str]:
    """Compare the config files beside some safetensors files with the checksums in these.

    Args:
        files: safetensors files of one model.

    Returns:
        What is wrong, by name of the config file. Absent files and files without a checksum are not judged: a config
        may be handed to transformers as an object, and the Hub client fetches ``generation_config.json`` last.

    Raises:
        CheckpointError: a file cannot be read.
    """
    changed = {}
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as handle:
                expected = _json_object((handle.metadata() or {}).get(CONFIG_KEY, "{}"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}") from error
        for name in (CONFIG, GENERATION_CONFIG):
            beside = file.parent / name
            if expected is None:
                changed[CONFIG] = f"{file.name}: its checksum of {CONFIG} is damaged"
            elif name in expected and beside.is_file() and _json_checksum_of(beside) != expected[name]:
                changed[name] = f"{name}: is not the one that was saved with {file.name}; it was damaged or edited"
    return changed


def changed_files(folder: Path) -> tuple[list[str], list[str]]:
    """Compare the files that ``SHA256SUMS`` in a folder lists.

    Returns:
        What is wrong, file named, and which listed files are absent; both empty if there is no such list.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return [], []
    except ValueError:
        return [f"{SUMS_FILE}: is damaged"], []
    problems, absent = [], []
    for line in filter(None, lines):
        match = _SUMS_LINE.fullmatch(line)
        if match is None or ".." in match[2].split("/"):
            problems.append(f"{SUMS_FILE}: is damaged")
        elif not (folder / match[2]).is_file():
            absent.append(match[2])
        elif file_hash(folder / match[2]) != match[1]:
            problems.append(f"{match[2]}: is not the one that was saved with the model; it was damaged or edited")
    return problems, absent


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write ``SHA256SUMS`` for some files of a folder, named with forward slashes; nothing if there are none."""
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in sorted(names)]
    if lines:
        (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _table(file: Path, metadata: Mapping[str, str], way: str) -> dict[str, str]:
    table = _json_object(metadata.get(METADATA_KEY, "null"))
    if not table:
        raise CheckpointError(
            f"{file.name}: has no checksums; it was damaged, or saved by something other than save_pretrained of a "
            f"packed model ({way} loads it all the same)"
        )
    return table


def _json_object(text: str) -> dict[str, str] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_checksum_of(file: Path) -> str | None:
    """Return the checksum of a JSON file, None if it is not one any more."""
    try:
        return json_checksum(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
