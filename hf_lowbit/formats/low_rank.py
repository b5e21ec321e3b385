"""Format ``low_rank``: a weight as the product of two factors, ``W ≈ up · down``.

=========  ========================  ====================================
factor     shape                     held as
=========  ========================  ====================================
``up``     (out_features, rank)      numbers of ``dtype``, or a format
``down``   (rank, in_features)       numbers of ``dtype``, or a format
=========  ========================  ====================================

A factor of plain numbers is one tensor, ``<module>.weight_up``. One that is itself held in another format (see
:data:`INNER`) has that format's tensors, ``<module>.weight_up_packed``, ``..._scale`` and so on, and the spec of that
format, less the shape, as an entry of this one: ``{"rank": 16, "down": {"format": "integer", "bits": 4}}``. Bytes are
those of the two factors and nothing beside them.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.binary import BinaryFormat, BinarySpec
from hf_lowbit.formats.integer import IntegerFormat, IntegerSpec
from hf_lowbit.kernels.low_rank import low_rank_linear, low_rank_ready

FACTOR_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Formats in which a factor may be held, by their spec. Not this one: factors of factors are a smaller rank.
INNER: dict[type[Spec], type[Format]] = {BinarySpec: BinaryFormat, IntegerSpec: IntegerFormat}
FACTORS = ("up", "down")
Factor = Tensor | Format


@dataclasses.dataclass(frozen=True)
class LowRankSpec(Spec):
    """Scalars of a ``low_rank`` weight.

    Attributes:
        rank: columns of ``up`` and rows of ``down``, from 1 to the smaller side of the weight.
        dtype: of factors that are plain numbers.
        up: spec of a factor that is held in another format, None for plain numbers.
        down: the same.
    """

    rank: int
    dtype: str = "float16"
    up: Spec | None = None
    down: Spec | None = None

    @classmethod
    def from_json(cls, data: Any, where: str) -> Any:
        """Rebuild a spec from untrusted JSON; see :meth:`Spec.from_json`."""
        inner = {name: data[name] for name in FACTORS if name in data} if isinstance(data, dict) else {}
        spec = super().from_json({k: v for k, v in data.items() if k not in inner} if inner else data, where)
        found = {name: _inner_spec(value, spec.shape_of(name), f"{where}: {name}") for name, value in inner.items()}
        return dataclasses.replace(spec, **found)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON types, defaults and the shapes of factors left out."""
        found = super().to_json()
        for name in FACTORS:
            inner = getattr(self, name)
            if inner is not None:
                rest = {k: v for k, v in inner.to_json().items() if k not in ("out_features", "in_features")}
                found[name] = {"format": INNER[type(inner)].name, **rest}
        return found

    def shape_of(self, factor: str) -> tuple[int, int]:
        """Return the shape of a factor, "up" or "down"."""
        return (self.out_features, self.rank) if factor == "up" else (self.rank, self.in_features)

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        most = 2**24 if found else min(self.out_features, self.in_features)
        if type(self.rank) is not int or not 1 <= self.rank <= most:
            found.append(f"rank must be an integer from 1 to {most}, got {reprlib.repr(self.rank)}")
        if not isinstance(self.dtype, str) or self.dtype not in FACTOR_DTYPES:
            found.append(f"dtype must be one of {', '.join(FACTOR_DTYPES)}, got {reprlib.repr(self.dtype)}")
        for name in () if found else FACTORS:
            inner = getattr(self, name)
            if inner is None:
                continue
            if type(inner) not in INNER:
                found.append(f"{name} must be the spec of a format, got {type(inner).__name__}")
            elif (inner.out_features, inner.in_features) != self.shape_of(name):
                found.append(f"{name} must be of shape {self.shape_of(name)}")
            else:
                found += [f"{name}: {problem}" for problem in inner.problems()]
        return found


def _inner_spec(data: Any, shape: tuple[int, int], where: str) -> Spec:
    """Rebuild the spec of a factor that is held in another format.

    Raises:
        ValueError: it is no such spec.
    """
    known = {format_type.name: kind for kind, format_type in INNER.items()}
    name = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(name, str) or name not in known:
        raise ValueError(f"{where}: must name a format of {', '.join(known)}, got {reprlib.repr(data)}")
    if given := sorted({"out_features", "in_features"} & set(data)):
        raise ValueError(f"{where}: {given[0]} follows from the weight and is not given")
    rest = {key: value for key, value in data.items() if key != "format"}
    inner: Spec = known[name].from_json({**rest, "out_features": shape[0], "in_features": shape[1]}, where)
    return inner


@register_format
@dataclasses.dataclass
class LowRankFormat(Format):
    """Factors of a ``low_rank`` weight, each a tensor or a format; shapes and meaning in the module docstring."""

    up: Factor
    down: Factor

    name: ClassVar[str] = "low_rank"
    spec_type: ClassVar[type[Spec]] = LowRankSpec
    tensor_names: ClassVar[tuple[str, ...]] = (
        *FACTORS,
        *(f"{factor}_{name}" for factor in FACTORS for held in INNER.values() for name in held.tensor_names),
    )

    @classmethod
    def shapes(cls, spec: LowRankSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        found: Shapes = {}
        for factor in FACTORS:
            inner = getattr(spec, factor)
            if inner is None:
                found[factor] = (spec.shape_of(factor), FACTOR_DTYPES[spec.dtype])
            else:
                found |= {f"{factor}_{name}": want for name, want in INNER[type(inner)].shapes(inner).items()}
        return found

    @classmethod
    def pack(cls, up: Factor, down: Factor, dtype: torch.dtype) -> LowRankFormat:
        """Put two factors together, plain numbers rounded to their storage dtype.

        Args:
            up: (n, r), floating; or in one of the formats of :data:`INNER`.
            down: (r, m), likewise.
            dtype: of plain numbers, one of :data:`FACTOR_DTYPES`.

        Returns:
            A validated format on the device of the factors.

        Raises:
            ValueError: shapes do not fit, the dtype is none of those, or a value leaves its range.
        """
        names = {value: name for name, value in FACTOR_DTYPES.items()}
        shapes = [_shape(factor) for factor in (up, down)]
        if dtype not in names or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"cannot store factors of shape {shapes[0]} and {shapes[1]} as {dtype}")
        kinds = {name: None if isinstance(f, Tensor) else f.spec for name, f in zip(FACTORS, (up, down), strict=True)}
        spec = LowRankSpec(shapes[0][0], shapes[1][1], shapes[0][1], names[dtype], **kinds)
        stored = [f.to(dtype).contiguous() if isinstance(f, Tensor) else f for f in (up, down)]
        packed = cls(spec=spec, up=stored[0], down=stored[1])
        packed.validate("packed weight")
        return packed

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name."""
        found: dict[str, Tensor] = {}
        for name, factor in (("up", self.up), ("down", self.down)):
            if isinstance(factor, Format):
                found |= {f"{name}_{part}": tensor for part, tensor in factor.state().items()}
            elif factor is not None:
                found[name] = factor
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], spec: LowRankSpec) -> LowRankFormat:
        """Wrap existing tensors (no copy); shapes are checked by :meth:`validate`, not here. Works on ``meta``.

        Raises:
            ValueError: a tensor belongs to no factor of this spec.
        """
        factors: dict[str, Any] = {}
        used = 0
        for name in FACTORS:
            inner = getattr(spec, name)
            if inner is None:
                factors[name] = state.get(name)
                used += name in state
            else:
                own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{name}_")}
                factors[name] = INNER[type(inner)].from_state(own, inner)
                used += len(own)
        if used != len(state):
            raise ValueError(f"tensors {', '.join(sorted(state))} are not those of this spec")
        return cls(spec=spec, up=factors["up"], down=factors["down"])

    def check_values(self) -> list[str]:
        """Return what is wrong with the factors' contents: values that are not finite, or what a format refuses."""
        found = []
        for name, factor in (("up", self.up), ("down", self.down)):
            if isinstance(factor, Format):
                found += [f"{name}: {problem}" for problem in factor.check_values()]
            # The largest magnitude hands on NaN and infinity, and costs a fraction of ``isfinite`` in half precision.
            elif not bool(torch.isfinite(factor.abs().amax())):
                found.append(f"{name} holds NaN or infinity")
        return found

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        dense: Tensor = torch.ops.hf_lowbit.low_rank_dequantize(dense_factor(self.up), dense_factor(self.down))
        return dense

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), result and middle in the dtype of ``x``."""
        if isinstance(self.up, Tensor) and isinstance(self.down, Tensor):
            return low_rank_linear(x, self.up, self.down, bias)
        return _product(_product(x, self.down, None), self.up, bias)

    def ready(self, bias: Tensor | None) -> Callable[[Tensor], Tensor | None] | None:
        """Return a shorter way to :meth:`linear` for few tokens on the CPU; see :class:`Format`."""
        if isinstance(self.up, Tensor) and isinstance(self.down, Tensor):
            return low_rank_ready(self.up, self.down, bias)
        return None


def dense_factor(factor: Factor) -> Tensor:
    """Return a factor as plain numbers: in its own dtype, or float32 for one that is held in a format."""
    return factor if isinstance(factor, Tensor) else factor.unpack()


def _product(x: Tensor, factor: Factor, bias: Tensor | None) -> Tensor:
    if isinstance(factor, Tensor):
        return linear(x, factor.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return factor.linear(x, bias)


def _shape(factor: Factor) -> tuple[int, ...]:
    return tuple(factor.shape) if isinstance(factor, Tensor) else (factor.spec.out_features, factor.spec.in_features)
