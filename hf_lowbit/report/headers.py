"""The headers of a saved model, compressed or dense: which tensors lie in which file, and how big every file is.

Only config.json, the index and the headers are read. What they say is not trusted: names of files are plain names in
the folder, and a header that does not fit its file is an error that names the file. Links are followed, since the
cache of the Hub is made of them.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from hf_lowbit.compress.headers import TensorHeader, by_module_name, read_headers
from hf_lowbit.config import HfLowbitMethod, parse_json
from hf_lowbit.errors import CheckpointError

# What transformers and diffusers call the weights of a model; each reads its own files alone.
_OF_TRANSFORMERS, _OF_DIFFUSERS = "model", "diffusion_pytorch_model"
# No separator, no colon, no leading dot: neither another folder, nor another drive, nor a hidden file.
_WEIGHT_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Headers of any model folder, compressed or dense.

    Attributes:
        name: of the folder or repository, for messages.
        config: content of config.json.
        tensors: by their key.
        files: bytes of every file by its path in the folder.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, int]

    @property
    def weight_files(self) -> set[str]:
        """Files that hold the tensors."""
        return {tensor.file for tensor in self.tensors.values()}

    @property
    def header_bytes(self) -> int:
        """Bytes of the weight files that are not tensor data."""
        data = sum(tensor.nbytes for tensor in self.tensors.values())
        return self.stored_bytes - data

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(self.files[name] for name in self.weight_files)

    @property
    def is_compressed(self) -> bool:
        """Whether config.json names this package."""
        stored = self.config.get("quantization_config")
        return isinstance(stored, dict) and stored.get("quant_method") == HfLowbitMethod.HF_LOWBIT.value


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read config.json, the headers and the sizes of all files of a folder or a Hub repository.

    Raises:
        CheckpointError: a file is missing or damaged; it is named.
        ValueError: neither a folder nor a repository name.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or not _REPOSITORY.fullmatch(str(path)):
            raise ValueError(f"{path}: no such folder, and not the name of a repository on the Hub")
        return _read_repository(str(path))
    name = _printable(folder.resolve().name)
    files = {
        _printable(file.relative_to(folder).as_posix()): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    if "config.json" not in files:
        raise CheckpointError(f"{name}: there is no config.json in this folder, so it is not a saved model")
    config = _json_object(folder / "config.json", name)
    of_diffusers = "_diffusers_version" in config
    single = f"{_OF_DIFFUSERS if of_diffusers else _OF_TRANSFORMERS}.safetensors"
    index = f"{single}.index.json"
    if index in files and (of_diffusers or single not in files):  # of both, diffusers loads the shards
        shards, listed = _shards(folder / index, name)
    elif single in files:
        shards, listed = [single], {}
    else:
        raise CheckpointError(f"{name}: holds neither {single} nor {index}; other weight files are not read")
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        if shard not in files:
            raise CheckpointError(f"{name}: weight file {shard} is missing")
        found = read_headers(folder / shard)
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{name}: {min(twice)} is in {shard} and in {tensors[min(twice)].file}")
        tensors |= found
    places = {tensor.key: tensor.file for tensor in tensors.values()}
    lost = [key for key, shard in listed.items() if places.get(key) != shard]
    if lost:
        key = lost[0]
        raise CheckpointError(f"{name}: {index} places {_printable(key)} in {listed[key]}, which does not hold it")
    return Checkpoint(name, config, tensors, files)


def _printable(name: str) -> str:
    """Return the name of a file as it may be shown on a terminal; no weight file is called by the other form."""
    return name if name.isprintable() else ascii(name)


def _is_weight_file(name: Any) -> bool:
    """Return whether a name from an index can only mean a safetensors file in the same folder."""
    return isinstance(name, str) and bool(_WEIGHT_FILE.fullmatch(name))


def _json_object(file: Path, name: str) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file.name} of {name}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name} of {name}: must be an object, got {type(content).__name__}")
    return content


def _shards(index: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """Return the weight files of an index, and which tensor it places where."""
    listed = _json_object(index, name).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index.name} of {name}: weight_map must be an object that gives file names")
    for key, shard in listed.items():
        if not _is_weight_file(shard):
            raise CheckpointError(
                f"{index.name} of {name}: weight_map must give plain file names in the same folder, such as "
                f"model-00001-of-00002.safetensors; for {reprlib.repr(key)} it gives {reprlib.repr(shard)}"
            )
    return sorted(set(listed.values())), listed


def _read_repository(name: str) -> Checkpoint:
    """Read config.json and the headers of a repository; only these few bytes are fetched."""
    api = HfApi()
    try:
        siblings = api.model_info(name, files_metadata=True).siblings or []
        config_file = Path(hf_hub_download(name, "config.json"))
        metadata = api.get_safetensors_metadata(name)
    except Exception as error:  # network, hub and header errors have no common base
        raise CheckpointError(
            f"{name}: no such folder, and not to be had from the Hub ({type(error).__name__}: {error})"
        ) from error
    tensors: dict[str, TensorHeader] = {}
    for file, header in metadata.files_metadata.items():
        found = [TensorHeader(file, tensor.dtype, tuple(tensor.shape), key) for key, tensor in header.tensors.items()]
        tensors |= by_module_name(found, header.metadata or {}, file)
    config = _json_object(config_file, name)
    files = {_printable(file.rfilename): file.size or 0 for file in siblings}
    for shard in sorted(metadata.files_metadata):
        if not _is_weight_file(shard) or shard not in files:
            raise CheckpointError(f"{name}: the index names {reprlib.repr(shard)}, no weight file of this repository")
    return Checkpoint(name, config, tensors, files)
