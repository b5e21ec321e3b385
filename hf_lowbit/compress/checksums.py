"""A checksum for every stored tensor, in the metadata of the files that hold them.

A bit that flips in a scale or a sign plane gives fluent nonsense, not an error; only a checksum tells. The table is
written with every save of a packed model and compared whenever one is loaded (unless that is put off).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_lowbit.errors import CheckpointError

METADATA_KEY = "hf_lowbit_sha256"
# 128 bits: damage is found with certainty for all purposes, at half the length of a full digest
_DIGITS = 32


def checksum(tensor: Tensor) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a tensor's bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    buffer: Any = flat.numpy()
    return hashlib.sha256(buffer).hexdigest()[:_DIGITS]


def metadata_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata entry for tensors that are about to be saved; tensors on ``meta`` are left out."""
    table = {name: checksum(tensor) for name, tensor in state.items() if tensor.device.type != "meta"}
    return {METADATA_KEY: json.dumps(table, sort_keys=True, separators=(",", ":"))}


def damaged_tensors(files: Iterable[str | Path]) -> tuple[list[str], int]:
    """Compare every tensor of some files with its checksum.

    Args:
        files: safetensors files of one model.

    Returns:
        What is wrong, tensor and file named, and how many tensors were compared. A tensor that transformers stored
        under another name than the model's own has no checksum and is not counted.

    Raises:
        CheckpointError: a file cannot be read, or has no table of checksums.
    """
    problems, compared = [], 0
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as handle:
                table = _table(file, handle.metadata() or {})
                for key in handle.keys():
                    if key in table:
                        compared += 1
                        if checksum(handle.get_tensor(key)) != table[key]:
                            problems.append(f"{key} in {file.name}: does not match its checksum")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}") from error
    return problems, compared


def _table(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        table = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(
            f"{file.name}: has no checksums; it was damaged, or saved by something other than save_pretrained of a "
            "packed model (RunOptions(verify=False) loads it all the same)"
        )
    return table
