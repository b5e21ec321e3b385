"""Dense weights read from a checkpoint when they are needed, so that only one block is in memory at a time."""

from __future__ import annotations

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
        self.files = [Path(file) for file in files]
        self._file_of: dict[str, Path] = {}
        self._prefix = base_prefix
        for file in self.files:
            for key in read_headers(file):
                if key in self._file_of:
                    raise CheckpointError(f"{key}: is in {self._file_of[key].name} and in {file.name}")
                self._file_of[key] = file

    def locate(self, name: str) -> str | None:
        """Return the checkpoint's key for a parameter of the model, None if there is none."""
        candidates = [name]
        if self._prefix:
            candidates += [f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return next((key for key in candidates if key in self._file_of), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape of a parameter of the model; only the header is read."""
        key = self._key(name)
        with safe_open(self._file_of[key], framework="pt") as handle:
            return tuple(handle.get_slice(key).get_shape())

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter of the model, on the CPU, as a copy that does not keep the file mapped.

        Raises:
            CheckpointError: not in the checkpoint, or the file has changed since its header was read.
        """
        key = self._key(name)
        file = self._file_of[key]
        try:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(key).to(dtype, copy=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{key}: cannot be read from {file.name} any more: {error}") from error

    def _key(self, name: str) -> str:
        key = self.locate(name)
        if key is None:
            raise CheckpointError(f"{name}: not in the checkpoint")
        return key
