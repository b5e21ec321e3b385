"""What every storage format promises, and the table of formats.

A format is a dataclass of named tensors plus a small *spec* of plain JSON scalars. The spec alone gives the name,
shape and dtype of every tensor, so a loader can build empty parameters on ``meta`` and compare them with a file's
header before a byte is read. A format does not know which method made it.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Format")
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

FORMATS: dict[str, type[Format]] = {}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Plain scalars that determine the tensors of one stored weight.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    out_features: int
    in_features: int

    @classmethod
    def from_json(cls, data: Any, where: str) -> Any:
        """Rebuild a spec from untrusted JSON.

        Args:
            data: what :meth:`to_json` returned.
            where: name of the module, for messages.

        Raises:
            ValueError: unknown, missing or out-of-range entries; all of them are named.
        """
        if not isinstance(data, dict):
            raise ValueError(f"{where}: the format spec must be an object, got {type(data).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        problems = [f"unknown key {reprlib.repr(key)}" for key in unknown[:10]]
        missing = [name for name, f in fields.items() if name not in data and f.default is dataclasses.MISSING]
        problems += [f"missing key {name!r}" for name in missing]
        if not missing:
            spec = cls(**{key: value for key, value in data.items() if key in fields})
            problems += spec.problems()
            if not problems:
                return spec
        raise ValueError(f"{where}: bad format spec: {'; '.join(problems)}")

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON types, defaults left out."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = []
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            # 2**24: more rows or columns than any layer has; a larger claim is a damaged or hostile file.
            if type(value) is not int or not 1 <= value <= 2**24:
                found.append(f"{name} must be an integer from 1 to {2**24}, got {reprlib.repr(value)}")
        return found


@dataclasses.dataclass
class Format:
    """Base of the storage formats: named tensors and a spec.

    Subclasses declare ``name``, ``spec_type``, the tensors as dataclass fields (absent ones None) and implement
    :meth:`shapes`, :meth:`check_values`, :meth:`unpack` and :meth:`linear`.
    """

    spec: Any

    name: ClassVar[str]
    spec_type: ClassVar[type[Spec]]
    tensor_names: ClassVar[tuple[str, ...]]  # all that a format of this kind may have; set by register_format

    @classmethod
    def shapes(cls, spec: Any) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        raise NotImplementedError

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents (shapes already agree), empty if nothing is."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias`` through the format's op."""
        raise NotImplementedError

    @classmethod
    def rounds_activations(cls, spec: Any) -> bool:
        """Return whether :meth:`linear` rounds its input, with bits that a call of :meth:`linear_at` may choose."""
        return False

    def linear_at(self, x: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
        """Return what :meth:`linear` does, with activations of other bits than those stored.

        Raises:
            ValueError: the format does not round activations, or not to so many bits.
        """
        raise ValueError(f"format {self.name!r} does not round activations; act_bits must be None, got {act_bits}")

    def ready(self, bias: Tensor | None) -> Callable[[Tensor], Tensor | None] | None:
        """Return a shorter way to :meth:`linear`, None if the format has none.

        It serves as long as no tensor is replaced, and returns None for what it leaves to :meth:`linear`.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name."""
        found = {name: getattr(self, name) for name in self.tensor_names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Tensor], spec: Any) -> Self:
        """Wrap existing tensors (no copy); shapes are checked by :meth:`validate`, not here. Works on ``meta``."""
        return cls(spec=spec, **state)

    @classmethod
    def empty(cls: type[Self], spec: Any, device: str | torch.device = "meta") -> Self:
        """Return a format with uninitialised tensors of the right shapes."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in cls.shapes(spec).items()
        }
        return cls.from_state(tensors, spec)

    def to(self: Self, device: torch.device) -> Self:
        """Return the format with its tensors on another device."""
        return self.from_state({name: tensor.to(device) for name, tensor in self.state().items()}, self.spec)

    def validate(self, where: str) -> None:
        """Check spec, names, shapes, dtypes and contents, so that nothing unchecked reaches a kernel.

        Args:
            where: name of the module, for the message.

        Raises:
            ValueError: names everything that is wrong.
        """
        problems = self.spec.problems()
        if not problems:
            expected, state = self.shapes(self.spec), self.state()
            problems += [f"{name} is missing" for name in expected if name not in state]
            problems += [f"{name} is not part of this spec" for name in state if name not in expected]
            for name, tensor in state.items():
                want = expected.get(name)
                if want and (tuple(tensor.shape), tensor.dtype) != want:
                    problems.append(
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {want[1]} {tuple(want[0])}"
                    )
        if not problems:
            problems += self.check_values()
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}")

    @classmethod
    def bytes_of(cls, spec: Any) -> int:
        """Return the bytes of the tensors that ``spec`` calls for: what :attr:`nbytes` of such a weight is."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in cls.shapes(spec).values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense matrix; bitmaps, scales, masks and padding all count."""
        weights: int = self.spec.out_features * self.spec.in_features
        return 8 * self.nbytes / weights


def register_format(cls: type[Self]) -> type[Self]:
    """Class decorator that adds a format to :data:`FORMATS`; a second format of the same name is refused."""
    if cls.name in FORMATS:
        raise ValueError(f"format {cls.name!r} is registered already, by {FORMATS[cls.name].__qualname__}")
    # Once, here: torch.compile cannot trace dataclasses.fields, which every forward would call.
    if "tensor_names" not in cls.__dict__:  # a format that holds others names theirs, too
        cls.tensor_names = tuple(field.name for field in dataclasses.fields(cls) if field.name != "spec")
    FORMATS[cls.name] = cls
    return cls
