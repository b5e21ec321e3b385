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

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_lowbit.compress.headers import TensorHeader, by_module_name, read_headers
from hf_lowbit.config import HfLowbitMethod, parse_json
from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.hub_errors import plain_errors

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
        return _is_compressed(self.config)


def read_checkpoint(path: str | Path, part: str = "", revision: str | None = None) -> Checkpoint:
    """Read config.json, the headers and the sizes of all files of a folder or a Hub repository.

    Args:
        path: a folder, or the name of a repository on the Hub; of the latter only these few bytes are fetched.
        part: folder of a model in a pipeline, see :func:`parts`; "" for a model that stands alone.
        revision: branch, tag or commit of a repository; None for its main branch.

    Raises:
        CheckpointError: a file is missing or damaged; it is named.
        HubError: the repository cannot be read.
        ValueError: neither a folder nor a repository name.
    """
    return _checkpoint(_place(path, revision), part)


def parts(path: str | Path, revision: str | None = None) -> list[str]:
    """Return the folders of the compressed models in a saved pipeline; [""] for a model that stands alone.

    Raises:
        CheckpointError: a pipeline holds no compressed model, or a config is damaged.
        HubError, ValueError: as :func:`read_checkpoint`.
    """
    place = _place(path, revision)
    if "model_index.json" not in place.files:
        return [""]
    configs = (file for file in sorted(place.files) if re.fullmatch(r"[\w.-]+/config\.json", file))
    owners = [file.removesuffix("/config.json") for file in configs]
    found = [part for part in owners if _is_compressed(_json_object(place, f"{part}/config.json"))]
    if not found:
        raise CheckpointError(f"{place.name}: none of the models of this pipeline is compressed by this package")
    return found


class _Folder:
    """A saved model on disk: what :func:`_checkpoint` reads of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = _printable(folder.resolve().name)
        self.files = {
            _printable(file.relative_to(folder).as_posix()): file.stat().st_size
            for file in folder.rglob("*")
            if file.is_file()
        }

    def text(self, file: str) -> str:
        return (self._folder / file).read_text(encoding="utf-8")

    def headers(self, file: str) -> dict[str, TensorHeader]:
        return read_headers(self._folder / file)


class _Repository:
    """A saved model on the Hub. All is read from one commit; of weight files the headers, by range requests."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self._api = name, HfApi()
        with plain_errors(name, "try again"):
            info = self._api.model_info(name, revision=revision, files_metadata=True)
        self._commit = info.sha
        self.files = {_printable(file.rfilename): file.size or 0 for file in info.siblings or []}

    def text(self, file: str) -> str:
        with plain_errors(self.name, "try again"):
            path = hf_hub_download(self.name, file, revision=self._commit)
        return Path(path).read_text(encoding="utf-8")

    def headers(self, file: str) -> dict[str, TensorHeader]:
        try:
            with plain_errors(self.name, "try again"):
                header = self._api.parse_safetensors_file_metadata(self.name, file, revision=self._commit)
                length = self._header_length(file)
        except (SafetensorsParsingError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} of {self.name}: not a readable safetensors file") from error
        leaf = file.rpartition("/")[2]
        try:
            found = [TensorHeader(leaf, one.dtype, tuple(one.shape), key) for key, one in header.tensors.items()]
            tensors = by_module_name(found, header.metadata or {}, leaf)
            spans = sorted(
                (int(one.data_offsets[0]), int(one.data_offsets[1]), k) for k, one in header.tensors.items()
            )
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{file} of {self.name}: its header is damaged") from error
        # what safetensors checks of a file that is here: tensors follow each other and end where the file does
        sizes, end = {tensor.key: tensor.nbytes for tensor in tensors.values()}, 0
        for first, last, key in spans:
            if first != end or last - first != sizes[key]:
                raise CheckpointError(f"{file} of {self.name}: {key} does not lie where its header says")
            end = last
        if self.files[file] != 8 + length + end:
            raise CheckpointError(f"{file} of {self.name}: its header does not fit the file")
        return tensors

    def _header_length(self, file: str) -> int:
        """Return how long a header says it is; the client keeps that to itself."""
        address = hf_hub_url(self.name, file, revision=self._commit)
        answer = get_session().get(address, headers={**build_hf_headers(), "Range": "bytes=0-7"})
        hf_raise_for_status(answer)
        return int.from_bytes(answer.content[:8], "little")


def _place(path: str | Path, revision: str | None) -> _Folder | _Repository:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{path}: is a folder, which has no revisions")
        return _Folder(folder)
    if folder.exists() or not _REPOSITORY.fullmatch(str(path)):
        raise ValueError(f"{path}: no such folder, and not the name of a repository on the Hub")
    return _Repository(str(path), revision)


def _checkpoint(place: _Folder | _Repository, part: str) -> Checkpoint:
    prefix = f"{part}/" if part else ""
    name = f"{place.name}/{part}" if part else place.name
    files = {file.removeprefix(prefix): size for file, size in place.files.items() if file.startswith(prefix)}
    if "config.json" not in files:
        if not part and "model_index.json" in files:
            raise CheckpointError(f"{name}: is a pipeline; name the folder of one of its models")
        what = "folder" if isinstance(place, _Folder) else "repository"
        raise CheckpointError(f"{name}: there is no config.json in this {what}, so it is not a saved model")
    config = _json_object(place, f"{prefix}config.json")
    of_diffusers = "_diffusers_version" in config
    single = f"{_OF_DIFFUSERS if of_diffusers else _OF_TRANSFORMERS}.safetensors"
    index = f"{single}.index.json"
    if index in files and (of_diffusers or single not in files):  # of both, diffusers loads the shards
        shards, listed = _shards(place, prefix, index)
    elif single in files:
        shards, listed = [single], {}
    else:
        raise CheckpointError(f"{name}: holds neither {single} nor {index}; other weight files are not read")
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        if shard not in files:
            raise CheckpointError(f"{name}: weight file {shard} is missing")
        found = place.headers(f"{prefix}{shard}")
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


def _is_compressed(config: Mapping[str, Any]) -> bool:
    stored = config.get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == HfLowbitMethod.HF_LOWBIT.value


def _json_object(place: _Folder | _Repository, file: str) -> dict[str, Any]:
    leaf = file.rpartition("/")[2]
    try:
        content = parse_json(place.text(file))
    except ValueError as error:
        raise CheckpointError(f"{leaf} of {place.name}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{leaf} of {place.name}: must be an object, got {type(content).__name__}")
    return content


def _shards(place: _Folder | _Repository, prefix: str, index: str) -> tuple[list[str], dict[str, str]]:
    """Return the weight files of an index, and which tensor it places where."""
    listed = _json_object(place, f"{prefix}{index}").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} of {place.name}: weight_map must be an object that gives file names")
    for key, shard in listed.items():
        if not _is_weight_file(shard):
            raise CheckpointError(
                f"{index} of {place.name}: weight_map must give plain file names in the same folder, such as "
                f"model-00001-of-00002.safetensors; for {reprlib.repr(key)} it gives {reprlib.repr(shard)}"
            )
    return sorted(set(listed.values())), listed
