"""Format ``integer``: a weight as integers of 2, 4 or 8 bits, with a scale for each row or each group of columns.

================  =====================================  ==============================================
tensor            shape, dtype                           present
================  =====================================  ==============================================
``packed``        (n, ⌈m · bits / 8⌉), uint8             always; codes, first column lowest
``scale``         (n, groups), ``scale_dtype``           always, >= 0
``zero_point``    (n, ⌈groups · bits / 8⌉), uint8        unless ``symmetric``; packed like codes
================  =====================================  ==============================================

What a value is, :mod:`hf_lowbit.kernels.integer` defines. On disk each is called ``<module>.weight_<name>``. A group
is ``group_size`` columns, the last one of a row may be shorter; 0 makes one group of the row. Bits per weight are
``bits + (16 + bits) / group_size`` with zero points and scales of 16 bits, padding of each row to bytes aside.
"""

from __future__ import annotations

import dataclasses
import reprlib
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.bits import scale_problems
from hf_lowbit.kernels.integer import BITS, code_bytes, integer_linear, pack_codes, unpack_codes

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class IntegerSpec(Spec):
    """Scalars of an ``integer`` weight.

    Attributes:
        bits: of a code: 2, 4 or 8.
        group_size: columns that share a scale, 0 for all of a row.
        symmetric: whether the zero is the middle of the range; otherwise zero points are stored.
        scale_dtype: of the scales.
    """

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    scale_dtype: str = "float16"

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if type(self.bits) is not int or self.bits not in BITS:
            found.append(f"bits must be one of {', '.join(map(str, BITS))}, got {reprlib.repr(self.bits)}")
        if type(self.group_size) is not int or not 0 <= self.group_size <= 2**24:
            found.append(f"group_size must be an integer from 0 to {2**24}, got {reprlib.repr(self.group_size)}")
        if type(self.symmetric) is not bool:
            found.append(f"symmetric must be true or false, got {reprlib.repr(self.symmetric)}")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            names = ", ".join(SCALE_DTYPES)
            found.append(f"scale_dtype must be one of {names}, got {reprlib.repr(self.scale_dtype)}")
        return found

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.in_features // self.group_size) if self.group_size else 1


@register_format
@dataclasses.dataclass
class IntegerFormat(Format):
    """Tensors of an ``integer`` weight; shapes and meaning in the module docstring."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    name: ClassVar[str] = "integer"
    spec_type: ClassVar[type[Spec]] = IntegerSpec

    @classmethod
    def shapes(cls, spec: IntegerSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        rows, groups = spec.out_features, spec.groups
        found: Shapes = {
            "packed": ((rows, code_bytes(spec.in_features, spec.bits)), torch.uint8),
            "scale": ((rows, groups), SCALE_DTYPES[spec.scale_dtype]),
        }
        if not spec.symmetric:
            found["zero_point"] = ((rows, code_bytes(groups, spec.bits)), torch.uint8)
        return found

    @classmethod
    def pack(cls, spec: IntegerSpec, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> IntegerFormat:
        """Pack codes, scales and zero points.

        Args:
            spec: what they are.
            codes: (n, m), integers from 0 to ``2^bits - 1``.
            scale: (n, groups), >= 0.
            zero_point: (n, groups), integers of the same range, unless the spec is symmetric.

        Returns:
            A validated format on the device of the codes.

        Raises:
            ValueError: the parts do not fit the spec, or a scale leaves the range of its dtype.
        """
        problems = spec.problems()
        if problems:
            raise ValueError("; ".join(problems))
        if spec.symmetric != (zero_point is None):
            problems.append("zero_point is needed unless the spec is symmetric, and only then")
        parts = {"codes": (codes, (spec.out_features, spec.in_features))}
        if zero_point is not None:
            parts["zero_point"] = (zero_point, (spec.out_features, spec.groups))
        for name, (part, shape) in parts.items():
            if tuple(part.shape) != shape:
                problems.append(f"{name} has shape {tuple(part.shape)}, expected {shape}")
            elif part.is_floating_point() or int(part.min()) < 0 or int(part.max()) >= 2**spec.bits:
                problems.append(f"{name} must be integers from 0 to {2**spec.bits - 1}")
        if problems:
            raise ValueError("; ".join(problems))
        packed = cls(
            spec=spec,
            packed=pack_codes(codes, spec.bits),
            scale=scale.to(SCALE_DTYPES[spec.scale_dtype]).contiguous(),
            zero_point=None if zero_point is None else pack_codes(zero_point, spec.bits),
        )
        packed.validate("packed weight")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: padding, scales. Every code and zero point is legal."""
        spec, found = self.spec, scale_problems("scale", self.scale, signed=False)
        for name, part, columns in (
            ("packed", self.packed, spec.in_features),
            ("zero_point", self.zero_point, spec.groups),
        ):
            used = columns * spec.bits % 8
            if part is not None and used and bool((part[:, -1] >> used).any()):
                found.append(f"{name} has padding bits set")
        return found

    def codes(self) -> Tensor:
        """Return the codes, (out_features, in_features), uint8."""
        return unpack_codes(self.packed, self.spec.in_features, self.spec.bits)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.spec.in_features, self.spec.bits, self.spec.group_size

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        dense: Tensor = torch.ops.hf_lowbit.integer_dequantize(self.packed, self.scale, self.zero_point, *self._sizes)
        return dense

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), result in the dtype of ``x``."""
        return integer_linear(x, self.packed, self.scale, self.zero_point, bias, self._sizes)
