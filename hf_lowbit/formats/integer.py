"""Format ``integer``: a weight as integers of 2, 3, 4 or 8 bits, with a scale for each row or each group of columns.

====================  =====================================  ==============================================
tensor                shape, dtype                           present
====================  =====================================  ==============================================
``packed``            (n, ⌈m · bits / 8⌉), uint8             always; codes, first column lowest
``scale``             (n, groups), ``scale_dtype``           unless ``parts``; >= 0
``bounds``            (parts, 2), float32                    if ``parts``; both ends of the grid of so many rows
``zero_point``        (n, ⌈groups · bits / 8⌉), uint8        unless ``symmetric``; packed like codes
``smooth``            (m,), ``scale_dtype``                  if ``smooth``; > 0
``rotation_signs``    (m,), int8                             if ``rotation_signs``; +1 and -1
``act_bounds``        (2,), float32                          if ``activation`` is static; ends of the inputs' grid
====================  =====================================  ==============================================

What a value is, :mod:`hf_lowbit.kernels.integer` defines. On disk each is called ``<module>.weight_<name>``. A group
is ``group_size`` columns, the last one of a row may be shorter; 0 makes one group of the row. Bits per weight are
``bits + (16 + bits) / group_size`` with zero points and scales of 16 bits, padding of each row to bytes aside, and
24 bits per column, over all rows, for what changes the basis.

With ``parts`` the weight has one grid for all of it, or for each of so many equal parts of its rows (queries, keys and
values in one): ``w = l + code · (u - l) / (2^bits - 1)`` for ends l <= u of any sign, and with u = l all are l.

The codes may stand for the weight in another basis: inputs are divided by ``smooth``, multiplied by the signs and
rotated by Hadamard blocks before the product, and may be rounded to integers then, which
:mod:`hf_lowbit.kernels.activation` defines. Such inputs meet the weight times ``smooth``, likewise signed and rotated.
:meth:`IntegerFormat.unpack` returns the weight for plain inputs, so ``dequantize()`` of a layer needs no rotation.

How many bits activations get is stored, and may be chosen anew for each call: see :meth:`IntegerFormat.linear_at` and
:func:`hf_lowbit.layers.set_act_bits`.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.bits import scale_problems
from hf_lowbit.kernels.activation import TABLE as ACTIVATION_KERNELS
from hf_lowbit.kernels.activation import Sizes, integer_act_linear
from hf_lowbit.kernels.hadamard import core_of
from hf_lowbit.kernels.integer import BITS, code_bytes, integer_linear, pack_codes, unpack_codes
from hf_lowbit.kernels.integer import TABLE as KERNELS
from hf_lowbit.kernels.ready import integer_ready
from hf_lowbit.kernels.rounding import MODES, check_act_bits, range_step, untransform

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class IntegerSpec(Spec):
    """Scalars of an ``integer`` weight.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group_size: columns that share a scale, 0 for all of a row.
        symmetric: whether the zero is the middle of the range; otherwise zero points are stored.
        scale_dtype: of the scales.
        rotation: order of the Hadamard blocks along the columns, which it divides; 0 for none.
        rotation_signs: whether columns are multiplied by stored signs before they are rotated.
        smooth: whether inputs are divided by a stored vector first.
        activation: how inputs are rounded, one of :data:`hf_lowbit.kernels.rounding.MODES`.
        act_bits: of an activation's code, 2 to 8, unless a call chooses others.
        act_group_size: columns that share an activation scale, for ``token_group``.
        parts: equal parts of the rows that have one grid each, whose ends are stored; 0 for scales.
    """

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    scale_dtype: str = "float16"
    rotation: int = 0
    rotation_signs: bool = False
    smooth: bool = False
    activation: str = "none"
    act_bits: int = 8
    act_group_size: int = 0
    parts: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if type(self.bits) is not int or self.bits not in BITS:
            found.append(f"bits must be one of {', '.join(map(str, BITS))}, got {reprlib.repr(self.bits)}")
        if type(self.group_size) is not int or not 0 <= self.group_size <= 2**24:
            found.append(f"group_size must be an integer from 0 to {2**24}, got {reprlib.repr(self.group_size)}")
        for name in ("symmetric", "rotation_signs", "smooth"):
            if type(getattr(self, name)) is not bool:
                found.append(f"{name} must be true or false, got {reprlib.repr(getattr(self, name))}")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            names = ", ".join(SCALE_DTYPES)
            found.append(f"scale_dtype must be one of {names}, got {reprlib.repr(self.scale_dtype)}")
        if type(self.parts) is not int or not 0 <= self.parts <= 2**24:
            found.append(f"parts must be an integer from 0 to {2**24}, got {reprlib.repr(self.parts)}")
        elif not found and self.parts and (self.out_features % self.parts or self.group_size or not self.symmetric):
            found.append(
                f"parts {self.parts} must divide out_features {self.out_features}, with neither groups nor zero points"
            )
        return found or self._basis_problems() + self._activation_problems()

    def _basis_problems(self) -> list[str]:
        if type(self.rotation) is not int or not 0 <= self.rotation <= self.in_features:
            return [f"rotation must be an integer from 0 to {self.in_features}, got {reprlib.repr(self.rotation)}"]
        if self.rotation and self.in_features % self.rotation:
            return [f"rotation {self.rotation} does not divide in_features {self.in_features}"]
        if self.rotation and (self.rotation == 1 or core_of(self.rotation) is None):
            return [f"rotation: no Hadamard matrix of order {self.rotation} is known here"]
        if self.rotation_signs and not self.rotation:
            return ["rotation_signs need a rotation"]
        return []

    def _activation_problems(self) -> list[str]:
        if not isinstance(self.activation, str) or self.activation not in MODES:
            return [f"activation must be one of {', '.join(MODES)}, got {reprlib.repr(self.activation)}"]
        found = []
        if type(self.act_bits) is not int or not 2 <= self.act_bits <= 8:
            found.append(f"act_bits must be an integer from 2 to 8, got {reprlib.repr(self.act_bits)}")
        elif self.activation == "none" and self.act_bits != 8:
            found.append(f"act_bits {self.act_bits} without an activation mode")
        least, most = (1, 2**24) if self.activation == "token_group" else (0, 0)
        if type(self.act_group_size) is not int or not least <= self.act_group_size <= most:
            found.append(
                f"act_group_size must be an integer from {least} to {most} for activation {self.activation!r}, "
                f"got {reprlib.repr(self.act_group_size)}"
            )
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
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    smooth: Tensor | None = None
    rotation_signs: Tensor | None = None
    bounds: Tensor | None = None
    act_bounds: Tensor | None = None

    name: ClassVar[str] = "integer"
    spec_type: ClassVar[type[Spec]] = IntegerSpec

    @classmethod
    def shapes(cls, spec: IntegerSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        rows, groups = spec.out_features, spec.groups
        found: Shapes = {"packed": ((rows, code_bytes(spec.in_features, spec.bits)), torch.uint8)}
        if spec.parts:
            found["bounds"] = ((spec.parts, 2), torch.float32)
        else:
            found["scale"] = ((rows, groups), SCALE_DTYPES[spec.scale_dtype])
        if not spec.symmetric:
            found["zero_point"] = ((rows, code_bytes(groups, spec.bits)), torch.uint8)
        if spec.smooth:
            found["smooth"] = ((spec.in_features,), SCALE_DTYPES[spec.scale_dtype])
        if spec.rotation_signs:
            found["rotation_signs"] = ((spec.in_features,), torch.int8)
        if spec.activation == "static":
            found["act_bounds"] = ((2,), torch.float32)
        return found

    @classmethod
    def pack(
        cls,
        spec: IntegerSpec,
        codes: Tensor,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        smooth: Tensor | None = None,
        rotation_signs: Tensor | None = None,
        bounds: Tensor | None = None,
        act_bounds: Tensor | None = None,
    ) -> IntegerFormat:
        """Pack codes, scales and zero points.

        Args:
            spec: what they are.
            codes: (n, m), integers from 0 to ``2^bits - 1``, of the weight in the basis of the spec.
            scale: (n, groups), >= 0, unless the spec has parts.
            zero_point: (n, groups), integers of the same range, unless the spec is symmetric.
            smooth: (m,), > 0, if the spec has it.
            rotation_signs: (m,), +1 and -1, if the spec has them.
            bounds: (parts, 2), both ends of each grid, if the spec has parts.
            act_bounds: (2,), both ends of the grid of inputs, for activation static.

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
        for name, vector, wanted in (
            ("smooth", smooth, spec.smooth),
            ("rotation_signs", rotation_signs, spec.rotation_signs),
            ("scale", scale, not spec.parts),
            ("bounds", bounds, bool(spec.parts)),
            ("act_bounds", act_bounds, spec.activation == "static"),
        ):
            if wanted != (vector is not None):
                problems.append(f"{name} is needed if the spec has it, and only then")
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
        dtype = SCALE_DTYPES[spec.scale_dtype]
        packed = cls(
            spec=spec,
            packed=pack_codes(codes, spec.bits),
            scale=None if scale is None else scale.to(dtype).contiguous(),
            zero_point=None if zero_point is None else pack_codes(zero_point, spec.bits),
            smooth=None if smooth is None else smooth.to(dtype).contiguous(),
            rotation_signs=None if rotation_signs is None else rotation_signs.to(torch.int8).contiguous(),
            bounds=None if bounds is None else bounds.float().contiguous(),
            act_bounds=None if act_bounds is None else act_bounds.float().contiguous(),
        )
        packed.validate("packed weight")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: padding, scales. Every code and zero point is legal."""
        spec, found = self.spec, []
        if self.scale is not None:
            found += scale_problems("scale", self.scale, signed=False)
        for name, ends in (("bounds", self.bounds), ("act_bounds", self.act_bounds)):
            if ends is not None:
                wrong = scale_problems(name, ends, signed=True)
                found += wrong or ([f"{name}: an upper end lies below the lower"] if _reversed(ends) else [])
        for name, part, columns in (
            ("packed", self.packed, spec.in_features),
            ("zero_point", self.zero_point, spec.groups),
        ):
            used = columns * spec.bits % 8
            if part is not None and used and bool((part[:, -1] >> used).any()):
                found.append(f"{name} has padding bits set")
        if self.smooth is not None:
            wrong = scale_problems("smooth", self.smooth, signed=False)
            found += wrong or ([] if bool((self.smooth > 0).all()) else ["smooth holds a zero"])
        if self.rotation_signs is not None and not bool((self.rotation_signs.abs() == 1).all()):
            found.append("rotation_signs holds other values than +1 and -1")
        return found

    def codes(self) -> Tensor:
        """Return the codes, (out_features, in_features), uint8."""
        return unpack_codes(self.packed, self.spec.in_features, self.spec.bits)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.spec.in_features, self.spec.bits, self.spec.group_size

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points; those of ``bounds`` are floating, one for each row."""
        if self.bounds is None:
            if self.scale is None:
                raise ValueError("an integer weight has scales or bounds")
            return self.scale, self.zero_point
        low, high = self.bounds.float().repeat_interleave(self.spec.out_features // self.spec.parts, 0).split(1, 1)
        step = range_step(low, high, self.spec.bits)
        return step, -low / step

    def unpack(self) -> Tensor:
        """Return the dense weight for plain inputs, (out_features, in_features), float32."""
        scale, zero_point = self._grid()
        dense: Tensor = torch.ops.hf_lowbit.integer_dequantize(self.packed, scale, zero_point, *self._sizes)
        return untransform(dense, self.smooth, self.rotation_signs, self.spec.rotation)

    @classmethod
    def rounds_activations(cls, spec: IntegerSpec) -> bool:
        """Return whether inputs are rounded to integers, too."""
        return spec.activation != "none"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), rounded as the spec says, result in the dtype of ``x``."""
        spec = self.spec
        if spec.activation == "none" and not spec.rotation and not spec.smooth:
            return integer_linear(x, self.packed, *self._grid(), bias, self._sizes)
        return self._product(x, bias, spec.act_bits)

    def ready(self, bias: Tensor | None) -> Callable[[Tensor], Tensor | None] | None:
        """Return a shorter way to :meth:`linear` for few tokens on the CPU; see :class:`Format`."""
        spec = self.spec
        if spec.activation != "none" or spec.rotation or spec.smooth:
            return None
        return integer_ready((self.packed, *self._grid()), bias, self._sizes)

    def kernel_reasons(self, dtype: torch.dtype, device: str) -> dict[str, str]:
        """Return for every kernel why it multiplies inputs of a dtype on a kind of device, or does not."""
        spec, parts = self.spec, (self.packed, *self._grid())
        if spec.activation == "none" and not spec.rotation and not spec.smooth:
            return KERNELS.reasons(dtype, device, parts, self._sizes)
        sizes = Sizes(*self._sizes, spec.rotation, spec.activation, spec.act_bits, spec.act_group_size)
        return ACTIVATION_KERNELS.reasons(dtype, device, parts, sizes)

    def linear_at(self, x: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
        """Return what :meth:`linear` does, with activations of ``act_bits``: 2 to 8, or 16 for not rounded.

        Raises:
            ValueError: the spec does not round activations, or the bits are none of these.
        """
        if not self.rounds_activations(self.spec):
            return super().linear_at(x, bias, act_bits)
        check_act_bits(act_bits)
        return self._product(x, bias, act_bits)

    def _product(self, x: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
        spec = self.spec
        sizes = Sizes(*self._sizes, spec.rotation, spec.activation, act_bits, spec.act_group_size)
        tensors = (self.packed, *self._grid(), bias, self.smooth, self.rotation_signs, self.act_bounds)
        return integer_act_linear(x, tensors, sizes)


def _reversed(ends: Tensor) -> bool:
    return bool((ends[..., 0] > ends[..., 1]).any())
