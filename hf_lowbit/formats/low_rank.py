"""Format ``low_rank``: a weight as the product of two factors, ``W ≈ up · down``.

=========  ========================  ==============================
tensor     shape                     dtype
=========  ========================  ==============================
``up``     (out_features, rank)      ``dtype`` of the spec
``down``   (rank, in_features)       ``dtype`` of the spec
=========  ========================  ==============================

On disk each is called ``<module>.weight_<name>``. ``rank · (n + m)`` numbers and nothing beside them: no scales, no
bitmaps, no padding. Both factors are held as plain floating point. A factor in another format (integers, signs) is
not stored yet; it would be a further entry of the spec, which a release that does not know it refuses.
"""

from __future__ import annotations

import dataclasses
import reprlib
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.kernels.low_rank import low_rank_linear

FACTOR_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class LowRankSpec(Spec):
    """Scalars of a ``low_rank`` weight.

    Attributes:
        rank: columns of ``up`` and rows of ``down``, from 1 to the smaller side of the weight.
        dtype: of both factors.
    """

    rank: int
    dtype: str = "float16"

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        most = 2**24 if found else min(self.out_features, self.in_features)
        if type(self.rank) is not int or not 1 <= self.rank <= most:
            found.append(f"rank must be an integer from 1 to {most}, got {reprlib.repr(self.rank)}")
        if not isinstance(self.dtype, str) or self.dtype not in FACTOR_DTYPES:
            found.append(f"dtype must be one of {', '.join(FACTOR_DTYPES)}, got {reprlib.repr(self.dtype)}")
        return found


@register_format
@dataclasses.dataclass
class LowRankFormat(Format):
    """Tensors of a ``low_rank`` weight; shapes and meaning in the module docstring."""

    up: Tensor
    down: Tensor

    name: ClassVar[str] = "low_rank"
    spec_type: ClassVar[type[Spec]] = LowRankSpec

    @classmethod
    def shapes(cls, spec: LowRankSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        dtype = FACTOR_DTYPES[spec.dtype]
        return {"up": ((spec.out_features, spec.rank), dtype), "down": ((spec.rank, spec.in_features), dtype)}

    @classmethod
    def pack(cls, up: Tensor, down: Tensor, dtype: torch.dtype) -> LowRankFormat:
        """Round two factors to their storage dtype.

        Args:
            up: (n, r), floating.
            down: (r, m), floating.
            dtype: one of :data:`FACTOR_DTYPES`.

        Returns:
            A validated format on the device of the factors.

        Raises:
            ValueError: shapes do not fit, the dtype is none of those, or a value leaves its range.
        """
        names = {value: name for name, value in FACTOR_DTYPES.items()}
        if dtype not in names or up.dim() != 2 or down.dim() != 2:
            raise ValueError(f"cannot store factors of shape {tuple(up.shape)} and {tuple(down.shape)} as {dtype}")
        spec = LowRankSpec(up.shape[0], down.shape[1], up.shape[1], names[dtype])
        packed = cls(spec=spec, up=up.to(dtype).contiguous(), down=down.to(dtype).contiguous())
        packed.validate("packed weight")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: values that are not finite."""
        # The largest magnitude hands on NaN and infinity, and costs a fraction of ``isfinite`` in half precision.
        return [
            f"{name} holds NaN or infinity"
            for name, factor in self.state().items()
            if not bool(torch.isfinite(factor.abs().amax()))
        ]

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        dense: Tensor = torch.ops.hf_lowbit.low_rank_dequantize(self.up, self.down)
        return dense

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), result and middle in the dtype of ``x``."""
        return low_rank_linear(x, self.up, self.down, bias)
