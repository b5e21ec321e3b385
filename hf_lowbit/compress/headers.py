"""Headers of safetensors files: what a file says it holds, read without reading the tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import FORMATS, Format, Spec

# The names that safetensors uses, with the dtype that tells their size.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """One tensor as a header describes it: the file that holds it, safetensors' name of its dtype, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.count * DTYPES[self.dtype].itemsize


def read_headers(file: str | Path) -> dict[str, TensorHeader]:
    """Read one header; safetensors refuses overlaps, gaps and a file that is shorter or longer than it says.

    Raises:
        CheckpointError: not readable as safetensors, or a dtype whose size is not known; names the file.
    """
    path, found = Path(file), {}
    try:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():
                part = handle.get_slice(key)
                found[key] = TensorHeader(path.name, part.get_dtype(), tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error
    return known(found)


def packed_layer_spec(name: str, row: Mapping[str, Any]) -> tuple[type[Format], Spec]:
    """Return format and spec of a row in a config's module table.

    Raises:
        ValueError: unknown format or bad spec; names the module.
    """
    if row["format"] not in FORMATS:
        raise ValueError(f"{name}: unknown format {row['format']!r}; known: {', '.join(FORMATS)}")
    format_type = FORMATS[row["format"]]
    return format_type, format_type.spec_type.from_json(dict(row["spec"]), name)


def compare(
    name: str, format_type: type[Format], spec: Spec, tensors: Mapping[str, TensorHeader]
) -> tuple[set[str], list[str]]:
    """Compare the tensors that a packed layer's spec calls for with what the files hold.

    Args:
        name: of the module, as stored.
        format_type: of the layer.
        spec: of the layer.
        tensors: headers of all files.

    Returns:
        The keys of the layer's packed tensors, and what is wrong with them; files are named.
    """
    expected = {f"{name}.weight_{part}": want for part, want in format_type.shapes(spec).items()}
    problems = []
    for key, (shape, dtype) in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            problems.append(f"{key} is in none of the weight files")
        elif (tensor.shape, DTYPES[tensor.dtype]) != (tuple(shape), dtype):
            problems.append(
                f"{key} in {tensor.file} is {tensor.dtype} {list(tensor.shape)}, "
                f"config.json says {str(dtype).removeprefix('torch.')} {list(shape)}"
            )
    return set(expected), problems


def known(tensors: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the headers as they are; refuse dtypes whose size is not known."""
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{tensor.file}: {key} has the dtype {tensor.dtype}, whose size is not known here")
    return tensors
