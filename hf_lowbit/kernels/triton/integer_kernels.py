"""Device code of format ``integer``: products with packed codes, of floats and of codes, and rounding of activations.

Codes are taken apart where they are loaded. A *unit* is the fewest bytes that hold whole codes: one byte with
``V = 8 / bits`` codes, or three bytes with 8 codes of 3 bits. Part k of some units are their k-th codes, so it takes
one shift by a constant and one mask, and its columns lie V apart: that is how ``x`` is read, too. Codes of
activations are written by :func:`round_kernel` in this order, tile by tile, and read as they lie. A product of bytes
takes 32 of them at least, so a part is 32 units long, and a tile of 4 bits 64 columns: of groups of 32 it would hold
two. For those a tile is 32 columns in their own order; parts of 32 / V units are woven into it.

The weights are the left operand, ``y.T = W @ x.T``, because that one may stay in registers. Scales of a tile's group
are multiplied after the product: whole numbers up to 255 are exact in every compute type. Where a tile has several
groups, values are made before it and rounded once to the compute type, as the reference does.

Names: N rows of the weight (out_features), K columns (in_features), M tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(ptr, start, unit, row_bytes, row_ok, part: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Codes ``part`` of units, (BLOCK_N, UNITS) int32; ``start`` are offsets of rows, ``row_bytes`` ends each row."""
    first: tl.constexpr = BITS * part // 8
    shift: tl.constexpr = BITS * part % 8
    at = unit * UNIT + first
    found = tl.load(ptr + start + at, mask=row_ok & (at < row_bytes), other=0).to(tl.int32) >> shift
    if shift + BITS > 8:
        found |= tl.load(ptr + start + at + 1, mask=row_ok & (at + 1 < row_bytes), other=0).to(tl.int32) << (8 - shift)
    return found & ((1 << BITS) - 1)


@triton.jit
def _woven(
    ptr, start, unit, row_bytes, row_ok,
    part: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Codes ``part``, ``part + step``, ... of units, those of a unit next to each other; (BLOCK_N, ...) int8."""
    if step == V:
        return _codes(ptr, start, unit, row_bytes, row_ok, part, BITS, UNIT).to(tl.int8)
    else:
        even = _woven(ptr, start, unit, row_bytes, row_ok, part, 2 * step, BITS, UNIT, V)
        odd = _woven(ptr, start, unit, row_bytes, row_ok, part + step, 2 * step, BITS, UNIT, V)
        return tl.interleave(even, odd)


@triton.jit
def _zeros(ptr, rows, group, zero_bytes, ok, BITS: tl.constexpr):
    """Zero points of groups, int32; without a table the middle of the range."""
    if ptr is None:
        return 1 << (BITS - 1)
    else:
        bit = rows * 0 + group * BITS
        at = bit // 8
        found = tl.load(ptr + rows * zero_bytes + at, mask=ok, other=0).to(tl.int32)
        if BITS == 3:
            found |= (
                tl.load(ptr + rows * zero_bytes + at + 1, mask=ok & (at + 1 < zero_bytes), other=0).to(tl.int32) << 8
            )
        return (found >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["M", "per_split"])
def integer_kernel(
    x_ptr,  # (M, K) of any float type, row stride x_stride
    packed_ptr,  # (N, row_bytes) uint8
    scale_ptr,  # (N, groups)
    zero_ptr,  # (N, zero_bytes) uint8, or None
    bias_ptr,  # (N,), or None; only where K is not split
    out_ptr,  # (splits, M, N)
    M, N, K, x_stride, row_bytes, zero_bytes, groups, group_size, per_split,
    BITS: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
    UNITS: tl.constexpr,  # of a tile
    WIDE: tl.constexpr,  # a tile has one group
    DT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_M) tile of ``W @ x.T`` over the columns of one split, accumulated in float32."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    tokens = (tl.program_id(0) // row_tiles * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    split = tl.program_id(1)
    row_ok = rows < N
    token_ok = tokens < M
    x_row = x_ptr + tokens.to(tl.int64) * x_stride  # 64 bits: M · K may exceed 2**31
    tiles = tl.cdiv(K, UNITS * V)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for t in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        unit = t * UNITS + tl.arange(0, UNITS)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        zero = 0
        scale = tl.zeros((BLOCK_N, 1), tl.float32)
        if WIDE:
            group = t * UNITS * V // group_size
            scale = tl.load(scale_ptr + rows * groups + group, mask=row_ok, other=0.0).to(tl.float32)
            zero = _zeros(zero_ptr, rows, group, zero_bytes, row_ok, BITS)
        for k in tl.static_range(V):
            code = _codes(packed_ptr, rows * row_bytes, unit[None, :], row_bytes, row_ok, k, BITS, UNIT)
            column = unit * V + k
            x = tl.load(x_row + column[:, None], mask=token_ok & (column[:, None] < K), other=0.0)
            if WIDE:
                part = tl.dot((code - zero).to(DT), x.to(DT), part, input_precision="ieee")
            else:
                group = column[None, :] // group_size
                ok = row_ok & (column[None, :] < K)
                own = tl.load(scale_ptr + rows * groups + group, mask=ok, other=0.0).to(tl.float32)
                value = (code - _zeros(zero_ptr, rows, group, zero_bytes, ok, BITS)).to(tl.float32) * own
                part = tl.dot(value.to(DT), x.to(DT), part, input_precision="ieee")
        acc += part * scale if WIDE else part
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(DT).to(tl.float32)
    out = out_ptr + (split.to(tl.int64) * M + tokens) * N + rows
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_ok & token_ok)


@triton.jit(do_not_specialize=["M", "per_split", "stretches"])
def codes_kernel(
    x_ptr,  # (M, width) int8: codes in the order of parts or columns, zeros behind the last column
    act_ptr,  # (M, act_groups) float32: scales
    packed_ptr,  # (N, row_bytes) uint8
    scale_ptr,  # (N, groups)
    zero_ptr,  # (N, zero_bytes) uint8, or None
    bias_ptr,  # (N,), or None; only where K is not split
    out_ptr,  # (splits, M, N)
    M, N, width, row_bytes, zero_bytes, groups, group_size, act_groups, act_group_size, per_split, stretches,
    BITS: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
    UNITS: tl.constexpr,  # of a tile
    ORDERED: tl.constexpr,  # codes of activations lie in the order of columns, and a tile has UNITS columns
    TILES: tl.constexpr,  # of a stretch: columns that have one scale on both sides
    DT: tl.constexpr,  # of the bias
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_M) tile of the product of codes, exact within a stretch, accumulated in float32."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    tokens = (tl.program_id(0) // row_tiles * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    split = tl.program_id(1)
    row_ok = rows < N
    token_ok = tokens < M
    x_row = x_ptr + tokens.to(tl.int64) * width
    lane = tl.arange(0, UNITS)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for s in range(split * per_split, tl.minimum((split + 1) * per_split, stretches)):
        first = s * TILES * UNITS * (1 if ORDERED else V)  # column
        group = first // group_size
        zero = _zeros(zero_ptr, rows, group, zero_bytes, row_ok, BITS)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for i in range(TILES):
            if ORDERED:
                start = first + i * UNITS
                unit = (start // V + tl.arange(0, UNITS // V))[None, :]
                code = _woven(packed_ptr, rows * row_bytes, unit, row_bytes, row_ok, 0, 1, BITS, UNIT, V)
                at = start + lane
                x = tl.load(x_row + at, mask=token_ok & (at < width), other=0)
                part = tl.dot((code - zero).to(tl.int8), x, part)
            else:
                start = first + i * UNITS * V
                unit = (start // V + tl.arange(0, UNITS))[None, :]
                for k in tl.static_range(V):
                    code = _codes(packed_ptr, rows * row_bytes, unit, row_bytes, row_ok, k, BITS, UNIT)
                    at = start + k * UNITS + lane
                    x = tl.load(x_row + at, mask=token_ok & (at < width), other=0)
                    part = tl.dot((code - zero).to(tl.int8), x, part)
        scale = tl.load(scale_ptr + rows * groups + group, mask=row_ok, other=0.0).to(tl.float32)
        own = tl.load(act_ptr + tokens.to(tl.int64) * act_groups + first // act_group_size, mask=token_ok, other=0.0)
        acc += part.to(tl.float32) * (scale * own)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(DT).to(tl.float32)
    out = out_ptr + (split.to(tl.int64) * M + tokens) * N + rows
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_ok & token_ok)


@triton.jit
def _nearest_even(value):
    """Round half to even; magnitudes below 2^22. No compiler may take the two sums for nothing."""
    return (value + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["M"])
def round_kernel(
    x_ptr,  # (M, K) of any float type, row stride x_stride
    divisor_ptr,  # (K,) float32, or None
    matrix_ptr,  # (ORDER, ORDER) float32 of ±1, or None
    codes_ptr,  # (M, width) int8, in the order of parts, which for V = 1 is that of columns
    act_ptr,  # (M, act_groups) float32
    M, K, x_stride, width, act_groups, norm, most,
    ORDER: tl.constexpr,  # of the Hadamard blocks
    GROUP: tl.constexpr,  # columns of a scale
    V: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,  # a multiple of ORDER, GROUP and V · UNITS
):  # fmt: skip
    """Divide, rotate and round (BLOCK_M, BLOCK_K) activations; a group with NaN or infinity has scale NaN, codes 0."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    ok = (tokens < M) & (columns < K)
    x = tl.load(x_ptr + tokens.to(tl.int64) * x_stride + columns, mask=ok, other=0.0).to(tl.float32)
    if divisor_ptr is not None:
        x = x / tl.load(divisor_ptr + columns, mask=columns < K, other=1.0)
    if matrix_ptr is not None:
        place = tl.arange(0, ORDER)
        matrix = tl.load(matrix_ptr + place[:, None] * ORDER + place[None, :])
        turned = tl.reshape(x, (BLOCK_M * (BLOCK_K // ORDER), ORDER))
        turned = tl.dot(turned, matrix, input_precision=PRECISION) * norm
        x = tl.reshape(turned, (BLOCK_M, BLOCK_K))
    parts = tl.reshape(x, (BLOCK_M * (BLOCK_K // GROUP), GROUP))
    largest = tl.max(tl.abs(parts), 1)
    broken = tl.max((~(tl.abs(parts) < float("inf"))).to(tl.int32), 1) != 0  # max may leave NaN out
    step = largest / most
    step = tl.where(step == 0.0, 1.0, step)
    code = _nearest_even(tl.clamp(tl.where(broken[:, None], 0.0, parts / step[:, None]), -128.0, 128.0))
    code = tl.reshape(tl.clamp(code, -most, most), (BLOCK_M, BLOCK_K))
    step = tl.reshape(tl.where(broken, float("nan"), step), (BLOCK_M, BLOCK_K // GROUP))
    group = tl.program_id(1) * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)[None, :]
    at = act_ptr + tokens.to(tl.int64) * act_groups + group
    tl.store(at, step, mask=(tokens < M) & (group < act_groups))
    inside = columns % (V * UNITS)
    place = columns - inside + inside % V * UNITS + inside // V
    tl.store(codes_ptr + tokens.to(tl.int64) * width + place, code.to(tl.int8), mask=(tokens < M) & (columns < width))
