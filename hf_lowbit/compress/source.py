"""Dense weights read from a checkpoint when they are needed, so that only one block is in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_lowbit.compress.headers import read_headers
from hf_lowbit.errors import CheckpointError


class CheckpointSource:
    """Reads single tensors of a safetensors checkpoint by the name they have in the model.

    A file is opened for each read and closed again: an open file maps its pages into memory, and these would add up to
    the whole model over a run.
    """

    def __init__(self, files: Iterable[str | Path], base_prefix: str = "") -> None:
        """Read the headers.

        Args:
            files: safetensors files.
            base_prefix: name of the inner model ("model"), which checkpoint names may have or lack.

        Raises:
            CheckpointError: a file cannot be read as safetensors, or a tensor lies in two of them.
        """
        self.files: list[Path] = []
        self._place_of: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._alias: dict[str, _Place] = {}
        self._prefix = base_prefix
        for file in files:
            self.add(Path(file))

    def add(self, file: Path) -> None:
        """Read the headers of one more file.

        Raises:
            CheckpointError: it cannot be read as safetensors, or holds a tensor that another file holds, too.
        """
        for name, header in read_headers(file).items():
            if name in self._place_of:
                raise CheckpointError(f"{name}: is in {self._place_of[name][0].name} and in {file.name}")
            self._place_of[name] = file, header.key
            self._shapes[name] = tuple(header.shape)
        self.files.append(file)

    def alias(self, name: str, key: str, index: int | slice | None = None, transposed: bool = False) -> None:
        """Say where a parameter of the model is stored, if not under its own name.

        Args:
            name: of the parameter.
            key: of the tensor in the checkpoint.
            index: which part of a fused tensor it is, or which of its rows.
            transposed: whether it is stored the other way round.
        """
        self._alias[name] = _Place(key, index, transposed)

    def locate(self, name: str) -> str | None:
        """Return the checkpoint's key for a parameter of the model, None if there is none."""
        candidates = [self._alias[name].key if name in self._alias else name]
        if self._prefix:
            candidates += [f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return next((key for key in candidates if key in self._place_of), None)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it is stored, by the key that :meth:`locate` has given."""
        return self._shapes[key]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter of the model, on the CPU, as a copy that does not keep the file mapped.

        Raises:
            CheckpointError: not in the checkpoint, or the file has changed since its header was read.
        """
        known = self.locate(name)
        if known is None:
            raise CheckpointError(f"{name}: not in the checkpoint")
        file, key = self._place_of[known]
        place = self._alias.get(name, _Place(known))
        try:
            with safe_open(file, framework="pt") as handle:
                if place.index is None:
                    tensor = handle.get_tensor(key)
                else:
                    tensor = handle.get_slice(key)[place.index]
                return (tensor.T if place.transposed else tensor).to(dtype, copy=True).contiguous()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{key}: cannot be read from {file.name} any more: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter lies: key of the tensor, part of a fused one, whether the other way round."""

    key: str
    index: int | slice | None = None
    transposed: bool = False
