"""Format ``binary``: sign planes with row and column scales, groups, salient columns and an optional N:M mask.

Serves ARB-LLM (all variants), its baselines, and PBS²P. What a value is, :mod:`hf_lowbit.kernels.reference` defines;
how bits lie in a plane, :mod:`hf_lowbit.kernels.planes`. On disk each tensor is called ``<module>.weight_<name>``.

======================  =====================================  ===================================================
tensor                  shape, dtype                           present
======================  =====================================  ===================================================
``sign``                (n, bytes(kept)), uint8                always; kept = all columns without a mask
``row_scale``           (2·S + G, blocks, n), scale dtype      always; S salient, G plain, S second-plane entries
``group``               (planes, n, bytes(kept)), uint8        G > 1; planes = ceil(log2 G)
``row_shift``           (S + G, blocks, n), scale dtype        ARB, ARB-X, BiLLM
``col_scale``           (max(S, G), m), scale dtype            ARB-RC
``salient``             (c,), int32, ascending                 c > 0
``sign2``               (n, bytes(c)), uint8                   c > 0
``col_scale2``          (S, c), scale dtype                    c > 0 and ``col_scale``
``mask``                (n, bytes(m)), uint8                   N:M sparsity
======================  =====================================  ===================================================

Pruned weights cost nothing but their mask bit: ``sign`` and ``group`` hold the kept ones alone, in column order.
Second signs are the exception: every row has one for each salient column (0 where pruned), so that each has a fixed
place. A short last group of length q keeps ceil(N · q / M).

The mask is a plain bitmap, 1 bit per weight before padding. The numbers of the groups' patterns among
all C(M, N) would be 0.875, 0.75 and 0.625 bits at 4:8, 5:8 and 6:8, which saves 5, 9 and 13 % of a layer of 4096
columns. But they took two to five times as long to unpack (``benchmarks/nm_mask.py``, results beside it), every reader
would need a table, of 12,870 patterns at 8:16, and kernels want the bits themselves, to count those before a column.

S is 0 in a layer without salient columns. The salient columns are an index list, not the bitmap that the memory
table of the paper counts (32·c against m bits, both below 0.01 bit per weight): their number is then known from a
shape, before any byte is read, and kernels gather with it directly.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.bits import padding_is_zero, pruned_evenly, scale_problems
from hf_lowbit.kernels import ops, pack_plane, plane_bytes, ready, unpack_plane
from hf_lowbit.kernels.reference import kept_columns, spread

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class BinarySpec(Spec):
    """Scalars of a ``binary`` weight.

    Attributes:
        block_size: columns that share a row scale.
        groups: G, groups of the plain columns, 1 to 4.
        salient: c, number of salient columns.
        salient_groups: S, groups of the salient columns, 1 or 2; 0 exactly when c is 0.
        shift: whether row shifts are stored.
        col_scales: whether column scales are stored.
        scale_dtype: dtype of scales and shifts.
        keep_n: N of the N:M mask, 0 without one.
        keep_m: M of the N:M mask, 0 without one.
    """

    block_size: int = 128
    groups: int = 1
    salient: int = 0
    salient_groups: int = 0
    shift: bool = False
    col_scales: bool = False
    scale_dtype: str = "float16"
    keep_n: int = 0
    keep_m: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        ranges = {
            "block_size": (1, 2**24),
            "groups": (1, 4),
            "salient": (0, 2**24 if found else self.in_features),
            "salient_groups": (0, 2),
            "keep_n": (0, 16),
            "keep_m": (0, 16),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                found.append(f"{name} must be an integer from {low} to {high}, got {reprlib.repr(value)}")
        found += [
            f"{name} must be true or false, got {reprlib.repr(getattr(self, name))}"
            for name in ("shift", "col_scales")
            if type(getattr(self, name)) is not bool
        ]
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            names = ", ".join(SCALE_DTYPES)
            found.append(f"scale_dtype must be one of {names}, got {reprlib.repr(self.scale_dtype)}")
        if found:
            return found
        if bool(self.salient) != bool(self.salient_groups):
            found.append("salient_groups must be 0 exactly when there is no salient column")
        if self.salient_groups > self.groups:
            found.append("salient_groups must not exceed groups")
        if bool(self.keep_m) != bool(self.keep_n) or self.keep_n > self.keep_m:
            found.append(f"keep_n:keep_m must be N:M with 1 <= N <= M, got {self.keep_n}:{self.keep_m}")
        return found

    @property
    def blocks(self) -> int:
        """Number of column blocks."""
        return -(-self.in_features // self.block_size)

    @property
    def kept(self) -> int:
        """Columns of a row that are not pruned."""
        return kept_columns(self.in_features, self.keep_n, self.keep_m)


def _ascending(index: Tensor, limit: int) -> bool:
    return bool((index[1:] > index[:-1]).all()) and int(index[0]) >= 0 and int(index[-1]) < limit


def _part_problems(spec: BinarySpec, **parts: Tensor | None) -> list[str]:
    """Return what is wrong with unpacked parts that packing would hide: shapes, code range, indices, mask counts."""
    full, compact = (spec.out_features, spec.in_features), (spec.out_features, spec.salient)
    want = {"sign": full, "code": full, "mask": full, "sign2": compact, "salient": (spec.salient,)}
    found = [
        f"{name} has shape {tuple(part.shape)}, expected {want[name]}"
        for name, part in parts.items()
        if part is not None and tuple(part.shape) != want[name]
    ]
    if found:
        return found
    code, salient, mask = parts["code"], parts["salient"], parts["mask"]
    if code is not None and (int(code.min()) < 0 or int(code.max()) >= spec.groups):
        found.append(f"code must be from 0 to {spec.groups - 1}, got {int(code.min())} to {int(code.max())}")
    if salient is not None and not _ascending(salient, spec.in_features):
        found.append(f"salient must hold ascending column indices below {spec.in_features}")
    if mask is not None and not (spec.keep_m and pruned_evenly(pack_plane(mask), full[1], spec.keep_n, spec.keep_m)):
        found.append(f"mask does not keep {spec.keep_n} of every {spec.keep_m} columns")
    return found


@register_format
@dataclasses.dataclass
class BinaryFormat(Format):
    """Tensors of a ``binary`` weight; shapes and meaning in the module docstring."""

    sign: Tensor
    row_scale: Tensor
    group: Tensor | None = None
    row_shift: Tensor | None = None
    col_scale: Tensor | None = None
    salient: Tensor | None = None
    sign2: Tensor | None = None
    col_scale2: Tensor | None = None
    mask: Tensor | None = None

    name: ClassVar[str] = "binary"
    spec_type: ClassVar[type[Spec]] = BinarySpec

    @classmethod
    def shapes(cls, spec: BinarySpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        n, m, dtype = spec.out_features, spec.in_features, SCALE_DTYPES[spec.scale_dtype]
        found: Shapes = {
            "sign": ((n, plane_bytes(spec.kept)), torch.uint8),
            "row_scale": ((2 * spec.salient_groups + spec.groups, spec.blocks, n), dtype),
        }
        if spec.groups > 1:
            found["group"] = (((spec.groups - 1).bit_length(), n, plane_bytes(spec.kept)), torch.uint8)
        if spec.shift:
            found["row_shift"] = ((spec.salient_groups + spec.groups, spec.blocks, n), dtype)
        if spec.col_scales:
            found["col_scale"] = ((max(spec.groups, spec.salient_groups), m), dtype)
        if spec.salient:
            found["salient"] = ((spec.salient,), torch.int32)
            found["sign2"] = ((n, plane_bytes(spec.salient)), torch.uint8)
            if spec.col_scales:
                found["col_scale2"] = ((spec.salient_groups, spec.salient), dtype)
        if spec.keep_m:
            found["mask"] = ((n, plane_bytes(m)), torch.uint8)
        return found

    @classmethod
    def pack(
        cls,
        spec: BinarySpec,
        *,
        sign: Tensor,
        row_scale: Tensor,
        code: Tensor | None = None,
        row_shift: Tensor | None = None,
        col_scale: Tensor | None = None,
        salient: Tensor | None = None,
        sign2: Tensor | None = None,
        col_scale2: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> BinaryFormat:
        """Pack unpacked parts.

        Args:
            spec: what the parts are.
            sign: (n, m), bool, True is +1; with a mask, pruned positions are ignored.
            row_scale: (2·S + G, blocks, n), >= 0.
            code: (n, m), integer group code below G, for G > 1.
            row_shift: (S + G, blocks, n).
            col_scale: (max(S, G), m), >= 0.
            salient: (c,), integer, ascending.
            sign2: (n, c), bool.
            col_scale2: (S, c), >= 0.
            mask: (n, m), bool, True is kept.

        Returns:
            A validated format on the device of ``sign``.

        Raises:
            ValueError: the parts do not fit the spec, or a scale leaves the range of its dtype.
        """
        problems = spec.problems() or _part_problems(
            spec, sign=sign, code=code, mask=mask, sign2=sign2, salient=salient
        )
        if problems:
            raise ValueError("; ".join(problems))
        dtype = SCALE_DTYPES[spec.scale_dtype]

        def kept(bits: Tensor) -> Tensor:
            return bits if mask is None else bits[mask].view(bits.shape[0], spec.kept)

        def scaled(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype).contiguous()

        group = None
        if spec.groups > 1:
            if code is None:
                raise ValueError("code is needed for more than one group")
            planes = (spec.groups - 1).bit_length()
            group = torch.stack([pack_plane(kept((code >> p & 1).bool())) for p in range(planes)])
        packed = cls(
            spec=spec,
            sign=pack_plane(kept(sign)),
            row_scale=row_scale.to(dtype).contiguous(),
            group=group,
            row_shift=scaled(row_shift),
            col_scale=scaled(col_scale),
            salient=None if salient is None else salient.to(torch.int32),
            sign2=None if sign2 is None else pack_plane(sign2),
            col_scale2=scaled(col_scale2),
            mask=None if mask is None else pack_plane(mask),
        )
        packed.validate("packed weight")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: indices, padding, mask counts, codes, scales."""
        spec, found = self.spec, []
        planes = {"sign": spec.kept, "group": spec.kept, "sign2": spec.salient, "mask": spec.in_features}
        for name, columns in planes.items():
            plane = getattr(self, name)
            if plane is not None and not padding_is_zero(plane, columns):
                found.append(f"{name} has padding bits set")
        if self.mask is not None and not pruned_evenly(self.mask, spec.in_features, spec.keep_n, spec.keep_m):
            found.append(f"mask does not keep {spec.keep_n} of every {spec.keep_m} columns")
        if self.group is not None and spec.groups == 3 and bool((self.group[0] & self.group[1]).any()):
            found.append("group holds code 3, which no scale belongs to")
        if self.salient is not None:
            if not _ascending(self.salient, spec.in_features):
                found.append(f"salient must hold ascending column indices below {spec.in_features}")
            elif not found and self._salient_codes_exceed_groups():
                found.append(f"group holds a code of {spec.salient_groups} or more in a salient column")
        for name, signed in (("row_scale", False), ("row_shift", True), ("col_scale", False), ("col_scale2", False)):
            tensor = getattr(self, name)
            if tensor is not None:
                found += scale_problems(name, tensor, signed)
        return found

    def _salient_codes_exceed_groups(self) -> bool:
        """Whether a salient column has a code without a scale; with one salient group the code is not read at all."""
        if self.spec.salient_groups < 2 or self.group is None or len(self.group) < 2 or self.salient is None:
            return False
        keep = None if self.mask is None else unpack_plane(self.mask, self.spec.in_features)
        high = spread(unpack_plane(self.group[1], self.spec.kept), keep)  # the plane of codes 2 and 3
        return bool(high[:, self.salient.long()].any())

    def call_arguments(self) -> tuple[tuple[Tensor | None, ...], tuple[int, int, int, int]]:
        """Return the tensors and the sizes as the ops take them."""
        spec = self.spec
        parts = (
            self.sign,
            self.row_scale,
            self.group,
            self.row_shift,
            self.col_scale,
            self.salient,
            self.sign2,
            self.col_scale2,
            self.mask,
        )
        return parts, (spec.in_features, spec.block_size, spec.keep_n, spec.keep_m)

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        parts, sizes = self.call_arguments()
        dense: Tensor = torch.ops.hf_lowbit.binary_dequantize(*parts, *sizes)
        return dense

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), result in the dtype of ``x``."""
        parts, sizes = self.call_arguments()
        return ops.binary_linear(x, parts, bias, sizes)

    def ready(self, bias: Tensor | None) -> Callable[[Tensor], Tensor | None] | None:
        """Return a shorter way to :meth:`linear` for few tokens on the CPU; see :class:`Format`."""
        parts, sizes = self.call_arguments()
        return ready.binary_ready(parts, bias, sizes)
