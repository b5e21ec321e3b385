"""Where the bytes of a compressed model are, read from config.json and the headers of the weight files alone.

No weight is loaded, so this takes well under a second whatever the size of the model. Every byte of the folder is
counted once: packed layers, other tensors, the headers of the weight files, and all other files. The parts add up to
what the disk holds, and a test keeps it so.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_lowbit.compress.headers import TensorHeader, compare, packed_layer_spec, unlisted
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.report.headers import Checkpoint, read_checkpoint

_EMBEDDINGS = ("wte", "wpe")
EMBEDDINGS, NORMS, DENSE = "embeddings", "norms", "dense linear layers"
SMALL, OTHER = "stubs and biases", "other tensors"


@dataclasses.dataclass(frozen=True)
class PackedModule:
    """One packed layer; ``bytes`` are those of its packed tensors, scales and bitmaps included.

    ``error`` is the squared relative error of its output on the calibration data, None in a run without data.
    """

    name: str
    method: str
    format: str
    spec: Mapping[str, Any]
    weights: int
    bytes: int
    error: float | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense matrix."""
        return 8 * self.bytes / self.weights

    @property
    def kind(self) -> str:
        """Last part of the name, which is the same in every block."""
        return self.name.rpartition(".")[2]

    @property
    def mask(self) -> str:
        """N:M of the mask, such as "4:8"; "" where nothing is pruned."""
        return f"{self.spec['keep_n']}:{self.spec['keep_m']}" if self.spec.get("keep_m") else ""

    @property
    def held_as(self) -> str:
        """Format in words, with the mask or what holds the factors: "binary, 4:8", "low_rank of integer"."""
        inner = [value["format"] for value in self.spec.values() if isinstance(value, Mapping) and "format" in value]
        of = f" of {' and '.join(dict.fromkeys(inner))}" if inner else ""
        return f"{self.format}{of}" + (f", {self.mask}" if self.mask else "")

    @property
    def kept_share(self) -> float:
        """Share of the weights that the mask keeps, N / M; 1 without a mask."""
        return float(self.spec["keep_n"] / self.spec["keep_m"]) if self.mask else 1.0

    @property
    def rank_share(self) -> float | None:
        """Numbers that the factors of a low-rank layer hold, as a share of the weights; None of any other layer."""
        if self.format != "low_rank":
            return None
        return float(self.spec["rank"] * (self.spec["out_features"] + self.spec["in_features"]) / self.weights)

    @property
    def highlights(self) -> str:
        """What the spec holds beside the shape: switches by their name, numbers with theirs."""
        return ", ".join([*([self.mask] if self.mask else []), *_spec_words(self.spec)])


def _spec_words(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield the entries of a spec in words; one that is a spec of its own by its format, with that in brackets."""
    for key, value in spec.items():
        if key in ("out_features", "in_features", "keep_n", "keep_m"):
            continue
        word = key.replace("_", " ")
        if isinstance(value, Mapping):
            rest = ", ".join(_spec_words({k: v for k, v in value.items() if k != "format"}))
            yield f"{word} {value.get('format', '')} ({rest})" if rest else f"{word} {value.get('format', '')}"
        else:
            yield word if value is True else f"{word} {value}"


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """Tensors that are not packed, of one kind and one reason."""

    kind: str
    reason: str
    tensors: int
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A compressed model, byte by byte.

    Attributes:
        name: of the folder or repository.
        config: the stored quantization config.
        modules: packed layers, block after block.
        groups: all other tensors.
        header_bytes: of the weight files.
        other_files: bytes by name: config, tokenizer, report and whatever else lies in the folder.
        total_bytes: sum of all of the above, equal to the bytes on disk.
    """

    name: str
    config: LowBitConfig
    modules: tuple[PackedModule, ...]
    groups: tuple[TensorGroup, ...]
    header_bytes: int
    other_files: Mapping[str, int]
    total_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed layers."""
        return sum(module.bytes for module in self.modules)

    @property
    def packed_weights(self) -> int:
        """Weights of the packed layers, counted as in the dense model."""
        return sum(module.weights for module in self.modules)

    @property
    def parameters(self) -> int:
        """Parameters of the dense model; stubs are none."""
        return self.packed_weights + sum(group.parameters for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the packed layers."""
        return 8 * self.packed_bytes / self.packed_weights

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of the whole model: everything in the weight files, headers included."""
        stored = self.packed_bytes + sum(group.bytes for group in self.groups) + self.header_bytes
        return 8 * stored / self.parameters

    @property
    def packed_share(self) -> float:
        """Share of the parameters that is packed, 0 to 1."""
        return self.packed_weights / self.parameters


def inspect(path: str | Path, part: str = "", revision: str | None = None) -> Inspection:
    """Read what a compressed model is made of.

    Args:
        path: a folder, or the name of a repository on the Hub, of which only headers are fetched.
        part: folder of the model in a pipeline, see :func:`hf_lowbit.report.headers.parts`.
        revision: of a repository; None for its main branch.

    Raises:
        CheckpointError: not compressed by this package, damaged or incomplete; names the file and the tensor.
        HubError: the repository cannot be read.
        ValueError: neither a folder nor a repository name.
    """
    return inspect_checkpoint(read_checkpoint(path, part, revision))


def bits_per_parameter(checkpoint: Checkpoint) -> float:
    """Return the bits per parameter of a whole model, compressed or dense, headers of its weight files included."""
    if checkpoint.is_compressed:
        return inspect_checkpoint(checkpoint).bits_per_parameter
    return 8 * checkpoint.stored_bytes / max(1, sum(tensor.count for tensor in checkpoint.tensors.values()))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Do the work of :func:`inspect` on headers that were read already; raises what it raises."""
    if not checkpoint.is_compressed:
        raise CheckpointError(_why_not_compressed(checkpoint))
    try:
        config = LowBitConfig.from_dict(checkpoint.config["quantization_config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of {checkpoint.name}: {error}") from error
    if not config.modules:
        raise CheckpointError(f"config.json of {checkpoint.name}: quantization_config lists no packed modules")
    modules, used, problems = [], set(), []
    for name, row in sorted(config.modules.items(), key=_in_model_order):
        try:
            module, keys = _packed_module(name, row, checkpoint.tensors)
        except ValueError as error:
            problems.append(str(error))
        else:
            modules.append(module)
            used |= keys
    problems += unlisted(config.modules, checkpoint.tensors)
    if problems:
        more = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{checkpoint.name}: {'; '.join(problems[:5])}{more}")
    rest = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in used}
    others = {name: size for name, size in checkpoint.files.items() if name not in checkpoint.weight_files}
    return Inspection(
        name=checkpoint.name,
        config=config,
        modules=tuple(modules),
        groups=_grouped(rest, checkpoint.config, config),
        header_bytes=checkpoint.header_bytes,
        other_files=dict(sorted(others.items())),
        total_bytes=checkpoint.total_bytes,
    )


def _in_model_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Sort key: config.json has its keys in the order of text, in which block 10 comes before block 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def _why_not_compressed(checkpoint: Checkpoint) -> str:
    stored = checkpoint.config.get("quantization_config")
    if isinstance(stored, dict):
        method = reprlib.repr(stored.get("quant_method"))
        return f"{checkpoint.name}: quantized with {method}, which is not of this package"
    if stored is not None:
        return f"config.json of {checkpoint.name}: quantization_config must be an object, got {type(stored).__name__}"
    parameters = sum(tensor.count for tensor in checkpoint.tensors.values())
    bits = bits_per_parameter(checkpoint)
    return (
        f"{checkpoint.name}: not compressed (config.json has no quantization_config); it is a dense model of "
        f"{parameters:,} parameters at {bits:.2f} bits, {checkpoint.total_bytes:,} bytes on disk"
    )


def _packed_module(
    name: str, row: Mapping[str, Any], tensors: Mapping[str, TensorHeader]
) -> tuple[PackedModule, set[str]]:
    """Compare the tensors that a module's spec calls for with the headers.

    Returns:
        The module, and the keys of its packed tensors.

    Raises:
        ValueError: unknown format, bad spec, or tensors that are missing or of another shape or dtype.
    """
    format_type, spec = packed_layer_spec(name, row)
    keys, problems = compare(name, format_type, spec, tensors)
    if problems:
        raise ValueError("; ".join(problems))
    module = PackedModule(
        name=name,
        method=row["method"],
        format=row["format"],
        spec=dict(row["spec"]),
        weights=spec.out_features * spec.in_features,
        bytes=sum(tensors[key].nbytes for key in keys),
        error=row.get("error"),
    )
    return module, keys


def _grouped(
    tensors: Mapping[str, TensorHeader], model_config: Mapping[str, Any], config: LowBitConfig
) -> tuple[TensorGroup, ...]:
    """Sort the tensors that are not packed by kind and by the reason why."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        is_stub = leaf == "weight" and module in (config.modules or {})
        kind, reason = (SMALL, "") if is_stub else _kind_and_reason(module, leaf, tensor, model_config, config)
        found.setdefault((kind, reason), []).append((0 if is_stub else tensor.count, tensor.nbytes))
    order = (EMBEDDINGS, DENSE, NORMS, SMALL, OTHER)
    return tuple(
        TensorGroup(kind, reason, len(rows), sum(row[0] for row in rows), sum(row[1] for row in rows))
        for (kind, reason), rows in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    )


def _kind_and_reason(
    module: str, leaf: str, tensor: TensorHeader, model_config: Mapping[str, Any], config: LowBitConfig
) -> tuple[str, str]:
    """Tell from name and shape what a tensor is; the model itself is not built."""
    last = module.rpartition(".")[2].lower()
    if leaf == "bias":
        return SMALL, ""
    if module in (config.left_dense or {}):
        return DENSE, (config.left_dense or {})[module]
    if "embed" in last or last in _EMBEDDINGS:
        return EMBEDDINGS, "also the output head (tied)" if model_config.get("tie_word_embeddings") else ""
    if "norm" in last or len(tensor.shape) == 1:
        return NORMS, ""
    if len(tensor.shape) == 2:
        return DENSE, "not seen by the run"
    return OTHER, ""
