"""Format ``binary_conv``: a convolution of signs, with what is folded into it.

==========  ==================================  =====================================================================
tensor      shape, dtype                        present
==========  ==================================  =====================================================================
``sign``    (out_channels, plane bytes), uint8  always; a P128 plane of ``in_features`` columns, the order of a row is
                                                (channel of the group, row, column) as in ``weight.reshape(n, -1)``
``affine``  (2, out_channels), ``side_dtype``   always; scale and offset of the integer sums: the weights' scale with
                                                batch normalization or the bias folded in
``shift``   (in_channels,), ``side_dtype``      ``shift="bias"``: added before the sign; (2, in_channels) with
                                                ``shift="affine"``: multiplied and added
``act``     (3, out_channels), ``side_dtype``   ``act="rprelu"``: slope below zero, shift before, shift after
==========  ==================================  =====================================================================

What is computed, :mod:`hf_lowbit.kernels.conv` defines; the full-precision residual that the spec may ask for needs no
tensors. On disk each is called ``<module>.weight_<name>``. In bytes:
``16 · out · ⌈in_features / 128⌉ + side · ((2 + 3 · [act]) · out + (1 or 2) · in_channels · [shift])``, where ``side``
is 4 or 2: the scale takes no place of its own, unlike in a form that keeps batch normalization.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.bits import padding_is_zero, scale_problems
from hf_lowbit.kernels import pack_plane, unpack_plane
from hf_lowbit.kernels.conv import binary_conv2d, rprelu
from hf_lowbit.kernels.geometry import ConvGeometry

SIDE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
SHIFTS = ("none", "bias", "affine")
ACTS = ("none", "rprelu")
RESIDUALS = ("none", "after_act", "before_act")


@dataclasses.dataclass(frozen=True)
class BinaryConvSpec(Spec):
    """Scalars of a ``binary_conv`` weight; ``in_features`` is channels of a group times taps of the kernel.

    Attributes:
        in_channels: of the images.
        kernel, stride, padding, dilation, output_padding: (rows, columns).
        groups: that channels are split into.
        transposed: whether it is a transposed convolution.
        shift: of the input before the sign, one of :data:`SHIFTS`.
        act: one of :data:`ACTS`.
        residual: where the full-precision residual of the input is added, one of :data:`RESIDUALS`.
        side_dtype: of all tensors but the signs.
    """

    in_channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1
    transposed: bool = False
    shift: str = "bias"
    act: str = "rprelu"
    residual: str = "after_act"
    side_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Turn lists into tuples."""
        for name in ("kernel", "stride", "padding", "dilation", "output_padding"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def of(cls, geometry: ConvGeometry, **options: Any) -> BinaryConvSpec:
        """Return the spec of a convolution."""
        values = {field.name: getattr(geometry, field.name) for field in dataclasses.fields(geometry)}
        outs = values.pop("out_channels")
        return cls(out_features=outs, in_features=geometry.columns, **values, **options)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON types, defaults left out."""
        values = super().to_json()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        found += [] if found else self.geometry.problems()
        for name, known in (
            ("shift", SHIFTS),
            ("act", ACTS),
            ("residual", RESIDUALS),
            ("side_dtype", tuple(SIDE_DTYPES)),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                found.append(f"{name} must be one of {', '.join(known)}, got {reprlib.repr(value)}")
        if not found and self.in_features != self.geometry.columns:
            found.append(
                f"in_features is {self.in_features}, {self.in_channels} channels in {self.groups} groups and a kernel "
                f"of {self.kernel} make {self.geometry.columns}"
            )
        return found

    @functools.cached_property
    def geometry(self) -> ConvGeometry:
        """The shape of the convolution."""
        names = (field.name for field in dataclasses.fields(ConvGeometry))
        fields: dict[str, Any] = {name: getattr(self, name, None) for name in names}
        return ConvGeometry(**{**fields, "out_channels": self.out_features})


@register_format
@dataclasses.dataclass
class BinaryConvFormat(Format):
    """Tensors of a ``binary_conv`` weight; shapes and meaning in the module docstring."""

    sign: Tensor
    affine: Tensor
    shift: Tensor | None = None
    act: Tensor | None = None

    name: ClassVar[str] = "binary_conv"
    spec_type: ClassVar[type[Spec]] = BinaryConvSpec

    @classmethod
    def shapes(cls, spec: BinaryConvSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        outs, dtype = spec.out_features, SIDE_DTYPES[spec.side_dtype]
        found: Shapes = {
            "sign": ((outs, spec.geometry.plane_bytes), torch.uint8),
            "affine": ((2, outs), dtype),
        }
        if spec.shift != "none":
            found["shift"] = ((spec.in_channels,) if spec.shift == "bias" else (2, spec.in_channels), dtype)
        if spec.act == "rprelu":
            found["act"] = ((3, outs), dtype)
        return found

    @classmethod
    def pack(
        cls,
        spec: BinaryConvSpec,
        weight: Tensor,
        affine: Tensor,
        shift: Tensor | None = None,
        act: Tensor | None = None,
    ) -> BinaryConvFormat:
        """Pack a convolution of signs.

        Args:
            spec: what it is.
            weight: in torch's layout, finite; its signs are kept, that of 0 is +1.
            affine: (2, out_channels), scale and offset.
            shift: (in_channels,) or (2, in_channels), if the spec has one.
            act: (3, out_channels), if the spec has one.

        Returns:
            A validated format on the device of the weight.

        Raises:
            ValueError: the parts do not fit the spec, the weight holds NaN or infinity, or a value leaves the range
                of ``side_dtype``.
        """
        if problems := spec.problems():
            raise ValueError("; ".join(problems))
        if tuple(weight.shape) != spec.geometry.weight_shape:
            raise ValueError(f"weight is {tuple(weight.shape)}, expected {spec.geometry.weight_shape}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("weight holds NaN or infinity")
        dtype = SIDE_DTYPES[spec.side_dtype]
        parts: dict[str, Any] = {"affine": affine, "shift": shift, "act": act}
        stored: dict[str, Any] = {
            name: None if part is None else part.detach().to(dtype).contiguous() for name, part in parts.items()
        }
        packed = cls(
            spec=spec,
            sign=pack_plane(spec.geometry.as_rows(weight) >= 0),
            **stored,
        )
        packed.validate("packed convolution")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: padding bits, numbers that are not finite."""
        found = [] if padding_is_zero(self.sign, self.spec.in_features) else ["sign has padding bits set"]
        for name in ("affine", "shift", "act"):
            part = getattr(self, name)
            found += [] if part is None else scale_problems(name, part, signed=True)
        return found

    def unpack(self) -> Tensor:
        """Return scale times sign, (out_features, in_features), float32."""
        plane = torch.where(unpack_plane(self.sign, self.spec.in_features), 1.0, -1.0)
        return self.affine[0].float().unsqueeze(1) * plane

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Refuse: the weight is one of a convolution."""
        raise TypeError("a weight of format binary_conv convolves; it is no linear layer")

    def convolve(self, x: Tensor, residual: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the convolution with shift, scale and activation; x (N, in_channels, H, W), result in its dtype.

        Args:
            x: images.
            residual: makes what is added where ``spec.residual`` says, from x.
        """
        spec = self.spec
        if residual is None or spec.residual == "none":
            return binary_conv2d(x, self.sign, self.shift, self.affine, self.act, spec.geometry)
        if spec.residual == "after_act" or self.act is None:
            return binary_conv2d(x, self.sign, self.shift, self.affine, self.act, spec.geometry) + residual(x)
        y = binary_conv2d(x, self.sign, self.shift, self.affine, None, spec.geometry) + residual(x)
        return rprelu(y, self.act)
