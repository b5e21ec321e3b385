"""Headers of safetensors files: what a file says it holds, read without reading the tensors.

transformers stores some models under other names than those of their modules ("block_sparse_moe" for Mixtral's
"mlp"). Packed layers are known by module names, so a saved file says in its metadata how the names differ.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import FORMATS, Format, Spec

_LONGEST_KEY = 1000
NAMES_KEY = "hf_lowbit_names"
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


def packed_leaves() -> set[str]:
    """Return the names of tensors by which a packed layer is known: the last part of a key."""
    return {f"weight_{name}" for format_type in FORMATS.values() for name in format_type.tensor_names}


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """One tensor as a header describes it.

    Attributes:
        file: that holds it.
        dtype: safetensors' name of it.
        shape: of the tensor.
        key: under which the file holds it.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    key: str

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

    Returns:
        Its tensors by the names they have in the model.

    Raises:
        CheckpointError: not readable as safetensors, a dtype whose size is not known, or a broken table of names;
            names the file.
    """
    path, found = Path(file), []
    if not path.name.isprintable():
        raise CheckpointError(f"{reprlib.repr(path.name)} is not the name of a weight file")
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise CheckpointError(f"{path.name}: not a readable safetensors file: it is no plain file")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            for key in handle.keys():
                part = handle.get_slice(key)
                found.append(TensorHeader(path.name, part.get_dtype(), tuple(part.get_shape()), key))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error
    return by_module_name(found, metadata, path.name)


def read_all_headers(files: Iterable[str | Path]) -> tuple[dict[str, TensorHeader], list[str]]:
    """Read the headers of all files of a model.

    Returns:
        The tensors by the names they have in the model, and which of them lie in two files.

    Raises:
        CheckpointError: as :func:`read_headers`.
    """
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in files:
        found = read_headers(file)
        twice = sorted(headers.keys() & found.keys())
        problems += [f"{name}: is in {headers[name].file} and in {found[name].file}" for name in twice]
        headers |= found
    return headers, problems


def by_module_name(tensors: Iterable[TensorHeader], metadata: Mapping[str, str], file: str) -> dict[str, TensorHeader]:
    """Return the tensors of a file by the names they have in the model.

    Raises:
        CheckpointError: a name or dtype that no tensor has, or a broken table of names.
    """
    try:
        table = json.loads(metadata.get(NAMES_KEY, "{}"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{file}: its table of names is damaged")
    found: dict[str, TensorHeader] = {}
    for tensor in tensors:
        _refuse_odd_name(tensor.key, file)
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{file}: {tensor.key} has the dtype {tensor.dtype}, whose size is not known here")
        parts = tensor.key.split(".")
        ends = (end for end in range(len(parts) if table else 0, 0, -1) if ".".join(parts[:end]) in table)
        end = next(ends, 0)
        name = ".".join([table[".".join(parts[:end])], *parts[end:]]) if end else tensor.key
        _refuse_odd_name(name, file)
        if name in found:
            raise CheckpointError(f"{file}: its table of names gives {name} twice")
        found[name] = tensor
    return found


def _refuse_odd_name(name: str, file: str) -> None:
    """Names are shown on terminals as they are: no control characters, no page of text."""
    if len(name) > _LONGEST_KEY or not name.isprintable():
        raise CheckpointError(f"{file}: {reprlib.repr(name)} is not the name of a tensor")


def names_metadata(stored: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata entry that says how stored names differ from those in the model; none if they do not.

    Args:
        stored: name in the file by name in the model, of the tensors of packed layers.
    """
    table = {}
    for name, key in stored.items():
        if name != key:
            ours, theirs = name.split("."), key.split(".")
            while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
                del ours[-1], theirs[-1]
            table[".".join(theirs)] = ".".join(ours)
    return {NAMES_KEY: json.dumps(table, sort_keys=True, separators=(",", ":"))} if table else {}


def packed_layer_spec(name: str, row: Mapping[str, Any]) -> tuple[type[Format], Spec]:
    """Return format and spec of a row in a config's module table.

    Raises:
        ValueError: unknown format or bad spec; names the module.
    """
    if row["format"] not in FORMATS:
        raise ValueError(f"{name}: unknown format {reprlib.repr(row['format'])}; known: {', '.join(FORMATS)}")
    format_type = FORMATS[row["format"]]
    return format_type, format_type.spec_type.from_json(dict(row["spec"]), name)


def compare(
    name: str, format_type: type[Format], spec: Spec, tensors: Mapping[str, TensorHeader]
) -> tuple[set[str], list[str]]:
    """Compare the tensors that a packed layer's spec calls for with what the files hold, no more and no less.

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
    for key in sorted({f"{name}.{leaf}" for leaf in packed_leaves()} - set(expected)):
        if key in tensors:  # shifts that nobody adds, say: another weight than the one that was packed
            problems.append(f"{key} is in {tensors[key].file}, the spec in config.json has no such tensor")
    stub = tensors.get(f"{name}.weight")
    if stub is not None and (stub.shape != (1,) or not DTYPES[stub.dtype].is_floating_point):
        problems.append(f"{name}.weight in {stub.file} is {stub.dtype} {list(stub.shape)}, a packed layer has a stub")
    return set(expected), problems


def unlisted(modules: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """Return what is wrong with a module table that does not list every packed layer in the files.

    Args:
        modules: names in the table.
        tensors: keys in the files.
    """
    leaves = packed_leaves()
    packed = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in leaves}
    left_over = sorted(packed - set(modules))
    return [f"{name}: the files hold packed tensors of it, config.json does not list it" for name in left_over]
