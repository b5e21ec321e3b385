"""Check a packed model on disk: config against headers, every checksum, and every value an index or scale may take.

Beside the tensors these are the checksums of the config files and those that ``SHA256SUMS`` lists (see
``compress/checksums.py``). Here an edited file counts as damaged: who edited it knows, and who did not wants to.

Layers are read one at a time, so this needs little memory whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_lowbit.compress.checksums import SUMS_FILE, changed_configs, changed_files, damaged_tensors
from hf_lowbit.compress.headers import packed_layer_spec
from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.hf.hub_errors import plain_errors
from hf_lowbit.report.headers import read_checkpoint
from hf_lowbit.report.inspect import inspect_checkpoint


@dataclasses.dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`.

    Attributes:
        name: of the folder or repository.
        modules: packed layers whose values were checked.
        tensors: tensors in the weight files.
        checksums: tensors that were compared with a checksum.
        problems: what is wrong, tensor and file named; empty for a sound model.
    """

    name: str
    modules: int
    tensors: int
    checksums: int
    problems: tuple[str, ...]


def verify(path: str | Path, part: str = "") -> Verification:
    """Check a compressed model.

    Args:
        path: a folder, or the name of a repository on the Hub, whose weights are fetched.
        part: folder of the model in a pipeline, see :func:`hf_lowbit.report.headers.parts`.

    Raises:
        CheckpointError: not compressed by this package, or so damaged that headers or config cannot be read.
        HubError: the repository cannot be read.
        ValueError: neither a folder nor a repository name.
    """
    checkpoint = read_checkpoint(path, part)
    found = inspect_checkpoint(checkpoint)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _fetched(str(path), part)
    folder /= part
    files = [folder / name for name in sorted(checkpoint.weight_files)]
    problems = [*changed_configs(files).values()]
    changed, absent = changed_files(folder)
    problems += changed + [f"{name}: is missing" for name in absent]
    damaged, compared = damaged_tensors(files)
    problems += damaged
    source = CheckpointSource(files)
    for module in found.modules:
        format_type, spec = packed_layer_spec(module.name, {"format": module.format, "spec": module.spec})
        state = {
            name: source.read(f"{module.name}.weight_{name}", dtype)
            for name, (_, dtype) in format_type.shapes(spec).items()
        }
        try:
            format_type.from_state(state, spec).validate(module.name)
        except ValueError as error:
            problems.append(str(error))
    return Verification(found.name, len(found.modules), len(checkpoint.tensors), compared, tuple(problems))


def _fetched(repo: str, part: str) -> Path:
    """Fetch what is checked of a repository; return the folder that it lies in."""
    prefix = f"{part}/" if part else ""
    wanted = [f"{prefix}{pattern}" for pattern in ("*.json", "*.safetensors", SUMS_FILE)]
    with plain_errors(repo):
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
        if absent := changed_files(folder / part)[1]:
            snapshot_download(repo, allow_patterns=[f"{prefix}{name}" for name in absent])
    return folder
