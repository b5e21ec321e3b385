"""Plain-torch definition of every op. Slow on purpose: fast kernels are tested against it.

Format ``binary``. Column ``j`` of row ``i`` in block ``b = j // block_size`` has a *kind* (salient or not, equal for
the whole column) and a *code* ``h`` (its group, from the group planes). Its value is ::

    plain column      ±row_scale[S + h, b, i] · col_scale[h, j] + row_shift[S + h, b, i]
    salient column    ±row_scale[h', b, i] · col_scale[h', j] + row_shift[h', b, i]
                      ± row_scale[S + G + h', b, i] · col_scale2[h', position of j among the salient columns]

with ``S`` salient groups, ``G`` plain groups and ``h' = h`` if ``S > 1`` else 0. Absent column scales count as 1,
absent shifts as 0. A pruned position (N:M mask) is exactly 0; sign and group planes then hold the kept positions
only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels.planes import unpack_plane


def kept_columns(in_features: int, keep_n: int, keep_m: int) -> int:
    """Return the number of kept positions in one row of an N:M mask (all columns when ``keep_m`` is 0).

    A short last group of length q keeps ceil(N·q/M).
    """
    if not keep_m:
        return in_features
    full, tail = divmod(in_features, keep_m)
    return full * keep_n + -(-keep_n * tail // keep_m)


def binary_dequantize(
    sign: Tensor,
    row_scale: Tensor,
    group: Tensor | None,
    row_shift: Tensor | None,
    col_scale: Tensor | None,
    salient: Tensor | None,
    sign2: Tensor | None,
    col_scale2: Tensor | None,
    mask: Tensor | None,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> Tensor:
    """Rebuild the dense weight of a ``binary`` layer.

    Args:
        sign: (out_features, bytes), uint8 P128 plane of the kept columns; 1 is +1.
        row_scale: (2·S + G, blocks, out_features), floating; order salient, plain, salient second plane.
        group: (planes, out_features, bytes), uint8; bit p of the code is in plane p. None: one group.
        row_shift: (S + G, blocks, out_features) or None.
        col_scale: (max(S, G), in_features) or None.
        salient: (c,), int32, ascending column indices, or None.
        sign2: (out_features, plane_bytes(c)), uint8, second plane of the salient columns.
        col_scale2: (S, c) or None.
        mask: (out_features, plane_bytes(in_features)), uint8, or None.
        in_features: number of columns.
        block_size: columns that share a row scale.
        keep_n: N of the N:M mask, 0 without one.
        keep_m: M of the N:M mask, 0 without one.

    Returns:
        (out_features, in_features), float32.
    """
    kept = kept_columns(in_features, keep_n, keep_m)
    keep = None if mask is None else unpack_plane(mask, in_features)
    signs = _signs(spread(unpack_plane(sign, kept), keep))
    code = torch.zeros_like(signs, dtype=torch.uint8)
    if group is not None:
        for p, plane in enumerate(group):
            code |= spread(unpack_plane(plane, kept), keep).to(torch.uint8) << p
    scale = row_scale.float()
    shift = None if row_shift is None else row_shift.float()
    cols = None if col_scale is None else col_scale.float()

    count = 0 if salient is None else salient.shape[0]
    codes = 0
    if count:
        plain_groups = 2 ** (0 if group is None else group.shape[0])
        codes = salient_groups(scale.shape[0], plain_groups)
    plain = slice(codes, scale.shape[0] - codes)
    values = signs * _by_code(code, scale[plain], block_size)
    if cols is not None:
        values *= _select(code, cols[: plain.stop - plain.start].unsqueeze(1))
    if shift is not None:
        values += _by_code(code, shift[plain.start : plain.stop], block_size)
    if count and salient is not None and sign2 is not None:
        index = salient.long()
        blocks = index // block_size
        chosen = code[:, index] if codes > 1 else torch.zeros_like(code[:, index])
        first = signs[:, index] * _select(chosen, scale[:codes, blocks].transpose(1, 2))
        second = _signs(unpack_plane(sign2, count))
        second = second * _select(chosen, scale[plain.stop :, blocks].transpose(1, 2))
        if cols is not None:
            first *= _select(chosen, cols[:codes, index].unsqueeze(1))
        if col_scale2 is not None:
            second *= _select(chosen, col_scale2.float().unsqueeze(1))
        if shift is not None:
            first += _select(chosen, shift[:codes, blocks].transpose(1, 2))
        values[:, index] = first + second
    return values if keep is None else values * keep


def salient_groups(entries: int, plain_capacity: int) -> int:
    """Number of salient groups S from ``entries = 2·S + G``; with two group planes G is 3 or 4.

    S is 1 (no bitmap on salient columns) or 2, and G more than half its capacity, which makes the answer unique.
    """
    for groups in (1, 2):
        plain = entries - 2 * groups
        if plain_capacity // 2 < plain <= plain_capacity:
            return groups
    raise ValueError(f"row_scale has {entries} entries, which fits no number of groups")


def binary_linear(
    x: Tensor,
    sign: Tensor,
    row_scale: Tensor,
    group: Tensor | None,
    row_shift: Tensor | None,
    col_scale: Tensor | None,
    salient: Tensor | None,
    sign2: Tensor | None,
    col_scale2: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> Tensor:
    """Multiply by a ``binary`` weight: ``x @ W.T + bias``.

    The weight is rounded once to the dtype of ``x``, as tensor-core kernels do too, and the product is accumulated in
    float32 by the matrix multiplication. The dense weight lives only inside this call.

    ``x`` is (..., in_features), float32, float16 or bfloat16; ``bias`` is (out_features,) or None; the other arguments
    are those of :func:`binary_dequantize`.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    parts = (group, row_shift, col_scale, salient, sign2, col_scale2, mask, in_features, block_size, keep_n, keep_m)
    weight = binary_dequantize(sign, row_scale, *parts)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _signs(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2).sub_(1)


def spread(bits: Tensor, keep: Tensor | None) -> Tensor:
    """Put the kept bits (n, kept) of each row at their columns (n, k); they are stored in column order."""
    if keep is None:
        return bits
    return torch.zeros_like(keep).masked_scatter_(keep, bits)


def _select(code: Tensor, table: Tensor) -> Tensor:
    """``table[code]`` over the first dimension: code (n, k), table (entries, n or 1, k or 1) -> (n, k)."""
    out = table[0].expand(code.shape)
    for entry in range(1, table.shape[0]):
        out = torch.where(code == entry, table[entry], out)
    return out


def _by_code(code: Tensor, table: Tensor, block_size: int) -> Tensor:
    """``table[code, block, row]``: code (n, k), table (entries, blocks, n) -> (n, k)."""
    rows, columns = code.shape
    blocks = table.shape[1]
    block_size = min(block_size, columns)  # one wide block must not be padded to its nominal width
    padded = torch.nn.functional.pad(code, (0, blocks * block_size - columns)).view(rows, blocks, block_size)
    entries = table.transpose(1, 2).unsqueeze(-1)  # (entries, n, blocks, 1)
    out = entries[0].expand(padded.shape)
    for entry in range(1, entries.shape[0]):
        out = torch.where(padded == entry, entries[entry], out)
    return out.reshape(rows, -1)[:, :columns]
