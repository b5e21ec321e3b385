"""Dense weights on their way into a model that is being loaded and compressed.

transformers hands over every weight as soon as it has read it, or made it from several tensors of the checkpoint. A
run without data compresses it at once. A calibrated run needs it later, when its block's turn comes: the model gets
a stub, and the weight is read again from the checkpoint; if it cannot be found there as it is (experts that
transformers fuses while loading), it is written to a scratch file first. Either way no more than a few dense layers
are in memory.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_lowbit.compress.dense import weight_problems
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.memory import give_back_memory
from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.experts import expert_names, fused_name, fused_parameters, take_apart
from hf_lowbit.layers import stored_shape


class Intake:
    """Takes the weights that a run compresses, and lets all others pass."""

    def __init__(self, run: Run) -> None:
        """Prepare for a run whose model is on ``meta``."""
        self.run = run
        self.failure: Exception | None = None
        self._layers: dict[str, list[str]] = {}
        for name in run.targets.methods:
            self._layers.setdefault(fused_name(name) or f"{name}.weight", []).append(name)
        self._arrived: set[str] = set()
        self._waiting: list[str] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def wants(self, parameter: str) -> bool:
        """Return whether a parameter of the model holds a weight that is compressed."""
        return parameter in self._layers

    def take(self, parameter: str, tensor: Tensor, key: str | None = None) -> None:
        """Take a weight, on its final device and in its final dtype.

        What goes wrong is kept for :meth:`close`, because transformers would go on and collect errors.

        Args:
            parameter: its name in the model.
            tensor: the weight, as the model stores it.
            key: its name in the checkpoint, if it is stored there as it is.
        """
        if self.failure is not None:
            return
        try:
            with torch.no_grad():
                names = self._installed(parameter, self._unmapped(parameter, tensor, key))
                if self.run.deferred:
                    self._put_off(parameter, names, key)
                else:
                    self._compress(names)
                    give_back_memory()  # or what is free between the packed layers grows with them
        except Exception as error:
            self.failure = error

    def close(self) -> None:
        """End the intake when the model is loaded; scratch files stay until the object goes.

        Raises:
            Exception: what went wrong while weights were taken.
            ValueError: weights did not arrive; they are named.
        """
        if self.failure is not None:
            raise self.failure
        missing = [parameter for parameter in self._layers if parameter not in self._arrived]
        if missing:
            more = f", {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError(f"not in the dense checkpoint: {', '.join(missing[:10])}{more}")

    def _installed(self, parameter: str, tensor: Tensor) -> list[str]:
        """Put a weight into the model and check it; return the names of its layers."""
        owner, _, leaf = parameter.rpartition(".")
        module: Any = self.run.model.get_submodule(owner)
        targets = self._layers[parameter]
        if fused_name(targets[0]) == parameter:
            expected = tuple(getattr(module, leaf).shape)
            problems = weight_problems(parameter, tensor, expected)
            names = expert_names(owner, leaf, len(fused_parameters(module)[leaf]))
            if not problems:
                take_apart(module, leaf, set(targets), owner, tensor)
        else:
            problems = [] if self._was_checked(parameter) else weight_problems(owner, tensor, stored_shape(module))
            names = [owner]
            module.weight = nn.Parameter(tensor.detach(), requires_grad=False)
            module.weight._is_hf_initialized = True  # or transformers would initialise it
        if problems:
            raise ValueError("; ".join(problems))
        self._arrived.add(parameter)
        return [name for name in names if name in set(targets)]

    def _unmapped(self, parameter: str, tensor: Tensor, key: str | None) -> Tensor:
        """Return a weight that is no view of a mapped file, if the checkpoint holds it as it is.

        transformers keeps the files mapped until all is loaded, and every page that is read stays resident so long.
        """
        source = self.run.weights.source
        own = [name for name in (parameter, key) if name and source is not None and source.locate(name) is not None]
        if source is None or not own or tensor.device.type != "cpu":
            return tensor
        if self.run.deferred and self._was_checked(parameter):
            return tensor  # nobody looks at it now
        return source.read(own[0], tensor.dtype)

    def _was_checked(self, parameter: str) -> bool:
        """Return whether the run has looked at a weight when it was made: it lies in the checkpoint under its name."""
        source = self.run.weights.source
        fused = fused_name(self._layers[parameter][0]) == parameter
        return not fused and source is not None and source.locate(parameter) is not None

    def _put_off(self, parameter: str, names: list[str], key: str | None) -> None:
        """Leave stubs in the model, and see to it that the weights can be read later."""
        if not self._was_checked(parameter):  # else it lies under its own name: a whole tensor, or rows of one
            self._make_readable(parameter, names, key)
        self.run.weights.put_off(names)
        for name in names:
            module: Any = self.run.model.get_submodule(name)
            module.weight._is_hf_initialized = True

    def _make_readable(self, parameter: str, names: list[str], key: str | None) -> None:
        """Say where in the checkpoint the weights of layers lie, or write them to a file."""
        source = self.run.weights.source
        if source is None:
            source = self.run.weights.source = CheckpointSource([])
        journal = self.run.journal
        finished = journal is not None and all(name in journal for name in names)
        stored = source.locate(parameter) or (source.locate(key) if key else None)
        if stored is not None:
            owner = parameter.rpartition(".")[0]
            transposed = bool(getattr(self.run.model.get_submodule(owner), "is_transposed", False))
            for name in names:
                fused = fused_name(name) is not None
                index = int(name.rpartition(".")[2]) if fused else None
                source.alias(f"{name}.weight", stored, index, fused and transposed)
        elif not finished:
            weights = {f"{name}.weight": self._weight(name) for name in names}
            source.add(self._write({name: weight.cpu().contiguous() for name, weight in weights.items()}))

    def _weight(self, name: str) -> Tensor:
        weight: Any = self.run.model.get_submodule(name).weight
        return weight.detach()

    def _write(self, weights: dict[str, Tensor]) -> Path:
        """Write weights to a scratch file; beside the journal, where there is room for the model, if there is one."""
        if self._scratch is None:
            folder = None if self.run.journal is None else self.run.journal.folder
            prefix = f"dense-{self.run.team.rank}-"
            for stale in [] if folder is None else folder.glob(f"{prefix}*"):  # of a run that was killed
                shutil.rmtree(stale, ignore_errors=True)
            self._scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=folder)
        path = Path(self._scratch.name) / f"{len(list(Path(self._scratch.name).iterdir())):05d}.safetensors"
        save_file(weights, path)
        return path

    def _compress(self, names: list[str]) -> None:
        """Compress what has come so far, as soon as there is work for every thread or nothing more will come."""
        self._waiting += [name for name in self.run.leave_dense(names) if not self.run.restored([name])]
        step = self.run.at_once
        while len(self._waiting) >= step or (self._waiting and len(self._arrived) == len(self._layers)):
            now, self._waiting = self._waiting[:step], self._waiting[step:]
            self.run.compress_layers(now, {})
