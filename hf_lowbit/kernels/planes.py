"""The one layout of every stored bit plane: "P128".

A row of ``columns`` bits is padded with zeros to a multiple of 128 and stored as 16 bytes per group of 128 columns.
Inside group ``g``, **bit b (least significant first) of byte j holds column 128·g + 16·b + j**::

    byte        0        1      ...     15
    bit 0    col 0    col 1     ...  col 15
    bit 1    col 16   col 17    ...  col 31
    ...
    bit 7    col 112  col 113   ...  col 127

One shift therefore yields 16 neighbouring columns, which is what SIMD units and Triton want to read; the obvious order
(bit b of byte j is column 8·j + b) needs a shuffle on either. Padding bits are always 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
_LANES = 16  # columns that one bit position of a group covers


def padded_columns(columns: int) -> int:
    """Return ``columns`` rounded up to a multiple of 128."""
    return -(-columns // GROUP) * GROUP


def plane_bytes(columns: int) -> int:
    """Return the bytes that one row of ``columns`` bits occupies."""
    return padded_columns(columns) // 8


def pack_plane(bits: Tensor) -> Tensor:
    """Pack booleans into a P128 plane.

    Args:
        bits: (..., columns), bool; any device, ``meta`` included.

    Returns:
        (..., plane_bytes(columns)), uint8, contiguous; padding bits are 0.

    Raises:
        TypeError: ``bits`` is not boolean.
    """
    if bits.dtype != torch.bool:
        raise TypeError(f"bits must be a bool tensor, got {bits.dtype}")
    columns = bits.shape[-1]
    padded = torch.nn.functional.pad(bits, (0, padded_columns(columns) - columns))
    groups = padded.unflatten(-1, (-1, 8, _LANES)).to(torch.uint8)  # (..., G, bit, byte)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device).view(8, 1)
    return (groups << shifts).sum(dim=-2, dtype=torch.uint8).flatten(-2).contiguous()


def unpack_plane(plane: Tensor, columns: int) -> Tensor:
    """Unpack a P128 plane; the inverse of :func:`pack_plane`.

    Args:
        plane: (..., plane_bytes(columns)), uint8.
        columns: true number of columns.

    Returns:
        (..., columns), bool.

    Raises:
        ValueError: the last dimension does not fit ``columns``.
    """
    if plane.shape[-1] != plane_bytes(columns):
        raise ValueError(f"a plane of {columns} columns has {plane_bytes(columns)} bytes a row, got {plane.shape[-1]}")
    shifts = torch.arange(8, dtype=torch.uint8, device=plane.device).view(8, 1)
    bits = (plane.unflatten(-1, (-1, 1, _LANES)) >> shifts) & 1  # (..., G, bit, byte)
    return bits.flatten(-3)[..., :columns].to(torch.bool)
