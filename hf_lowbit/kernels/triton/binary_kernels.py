"""Device code of format ``binary``: one kernel for decoding and prefill, and two small ones before and after it.

The kernel walks K in groups of 128 columns and each group plane by plane: bit ``b`` of the 16 bytes of a group is 16
neighbouring columns (P128), so a tile of weights needs no shuffle and ``x`` is read as it lies. The weights are the
*left* operand of the product, ``y.T = W @ x.T``, because that one may stay in registers.

Two ways to turn bits into weights:

* *packed* (16-bit compute type): two neighbouring columns share a 32-bit integer; selecting among the few possible
  values and setting the sign are integer operations on both at once. Without column scales the values are those of
  the reference, rounded once. Row scale times column scale is multiplied in the compute type, both factors rounded
  to it first: exact for float16 scales and float16 ``x``, three roundings instead of one for bfloat16 ``x``.
* *plain* (float32, or column scales together with shifts): float32 arithmetic per weight, rounded once.

Salient columns: a small kernel copies ``x`` with zeros in these columns and appends their gathered inputs. The main
walk then needs plain scales only, and a second walk multiplies the gathered columns, both planes at once.

Splitting K writes partial sums that a small kernel adds in a fixed order: no atomics, equal bits in every run.

Names: N rows of the weight (out_features), K columns (in_features), M tokens, C salient columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# In device functions the compiler follows every `return`, so each `if` on a constant that returns has an `else`.

_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000 as int32: the sign bits of two 16-bit floats
_ONES = tl.constexpr(0x00010001)


@triton.jit
def _load_bits(ptr, row_start, lane, row_ok, PACKED: tl.constexpr):
    """16 bytes of a plane per row: (BLOCK_N, 16) int32, or packed (BLOCK_N, 8), bytes 2i and 2i+1 in the two halves.

    ``row_start`` is the byte offset of the group in each row, ``row_ok`` keeps rows past the last one from loading.
    """
    if PACKED:
        both = tl.load(ptr.to(tl.pointer_type(tl.int16)) + row_start // 2 + lane, mask=row_ok, other=0).to(tl.int32)
        return (both & 0xFF) | ((both & 0xFF00) << 8)
    else:
        return tl.load(ptr + row_start + lane, mask=row_ok, other=0).to(tl.int32)


@triton.jit
def _bit(bits, b: tl.constexpr, PACKED: tl.constexpr):
    """Bit ``b`` as a condition: bool, or packed 0xFFFF in each half where it is set."""
    if PACKED:
        return ((bits >> b) & _ONES) * 0xFFFF
    else:
        return (bits & (1 << b)) != 0


@triton.jit
def _choose(condition, yes, no, PACKED: tl.constexpr):
    if PACKED:
        return (condition & yes) | (~condition & no)
    else:
        return tl.where(condition, yes, no)


@triton.jit
def _by_code(low, high, v0, v1, v2, v3, GROUPS: tl.constexpr, PACKED: tl.constexpr):
    """``v[code]``; ``low`` and ``high`` are the two bits of the code, as conditions."""
    value = v0
    if GROUPS > 1:
        value = _choose(low, v1, v0, PACKED)
    if GROUPS == 3:  # code 3 does not occur
        value = _choose(high, v2, value, PACKED)
    if GROUPS == 4:
        value = _choose(high, _choose(low, v3, v2, PACKED), value, PACKED)
    return value


@triton.jit
def _signed(sign, b: tl.constexpr, value, PACKED: tl.constexpr):
    """``value`` where bit ``b`` of ``sign`` is set, ``-value`` elsewhere."""
    if PACKED:
        return value ^ ((~sign << (15 - b)) & _SIGNS)
    else:
        return tl.where((sign & (1 << b)) != 0, value, -value)


@triton.jit
def _unpair(value, DT: tl.constexpr, PACKED: tl.constexpr):
    """Packed pairs (BLOCK_N, 8) as (BLOCK_N, 16) of type DT; what is not packed is returned as it is."""
    if PACKED:
        return tl.interleave(value.to(tl.int16), (value >> 16).to(tl.int16)).to(DT, bitcast=True)
    else:
        return value


@triton.jit
def _pair(value, DT: tl.constexpr, PACKED: tl.constexpr):
    """float32 values, or packed their bit pattern in DT twice."""
    if PACKED:
        pattern = value.to(DT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return pattern | (pattern << 16)
    else:
        return value


@triton.jit
def _entry(ptr, entry, block, blocks, rows, row_ok, N):
    """Element (entry, block, row) of a table (entries, blocks, N), float32."""
    return tl.load(ptr + (entry * blocks + block) * N + rows, mask=row_ok, other=0.0).to(tl.float32)


@triton.jit
def _entries(ptr, first: tl.constexpr, block, blocks, rows, row_ok, N, GROUPS: tl.constexpr):
    """The entries of codes 0 to 3; copies of the first stand in for those that do not exist."""
    v0 = _entry(ptr, first, block, blocks, rows, row_ok, N)
    v1 = v0
    v2 = v0
    v3 = v0
    if GROUPS > 1:
        v1 = _entry(ptr, first + 1, block, blocks, rows, row_ok, N)
    if GROUPS > 2:
        v2 = _entry(ptr, first + 2, block, blocks, rows, row_ok, N)
    if GROUPS > 3:
        v3 = _entry(ptr, first + 3, block, blocks, rows, row_ok, N)
    return v0, v1, v2, v3


@triton.jit
def _column_scales(ptr, column, stride, lane, GROUPS: tl.constexpr, PACKED: tl.constexpr):
    """Column scales of the 16 columns from ``column`` on for codes 0 to 3, as :func:`_by_code` takes them.

    Rows of the table are padded to 128 columns, so nothing lies out of bounds.
    """
    at = ptr + column
    if PACKED:  # two columns in one load
        at = at.to(tl.pointer_type(tl.int32))
        stride = stride // 2
    v0 = tl.load(at + lane)
    v1 = v0
    v2 = v0
    v3 = v0
    if GROUPS > 1:
        v1 = tl.load(at + stride + lane)
    if GROUPS > 2:
        v2 = tl.load(at + 2 * stride + lane)
    if GROUPS > 3:
        v3 = tl.load(at + 3 * stride + lane)
    return v0, v1, v2, v3


@triton.jit
def _salient_tile(
    t, sign_ptr, group_ptr, keep_ptr, scale_ptr, shift_ptr, col_ptr, salient_ptr, sign2_ptr, col2_ptr,
    rows, row_ok, N, C, row_bytes, sign2_bytes, blocks, block_size, col_stride,
    GROUPS: tl.constexpr, SALIENT: tl.constexpr,
):  # fmt: skip
    """Weights (BLOCK_N, 16) of salient columns ``16·t`` and following, float32, 0 past the last one."""
    position = (t * 16 + tl.arange(0, 16))[None, :]
    exists = position < C
    ok = row_ok & exists  # past the last one, all tables read as 0
    column = tl.load(salient_ptr + position, mask=exists, other=0)
    at = rows * row_bytes + (column // 128) * 16 + column % 16
    bit = (column // 16) % 8
    block = column // block_size
    first = _entry(scale_ptr, 0, block, blocks, rows, ok, N)
    second = _entry(scale_ptr, SALIENT + GROUPS, block, blocks, rows, ok, N)
    if col_ptr is not None:
        first *= tl.load(col_ptr + column, mask=exists, other=0.0).to(tl.float32)
    if col2_ptr is not None:
        second *= tl.load(col2_ptr + position, mask=exists, other=0.0).to(tl.float32)
    shift = first
    if shift_ptr is not None:
        shift = _entry(shift_ptr, 0, block, blocks, rows, ok, N)
    if SALIENT == 2:
        code = ((tl.load(group_ptr + at, mask=ok, other=0).to(tl.int32) >> bit) & 1) != 0
        other = _entry(scale_ptr, 1, block, blocks, rows, ok, N)
        other2 = _entry(scale_ptr, SALIENT + GROUPS + 1, block, blocks, rows, ok, N)
        if col_ptr is not None:
            other *= tl.load(col_ptr + col_stride + column, mask=exists, other=0.0).to(tl.float32)
        if col2_ptr is not None:
            other2 *= tl.load(col2_ptr + C + position, mask=exists, other=0.0).to(tl.float32)
        first = tl.where(code, other, first)
        second = tl.where(code, other2, second)
        if shift_ptr is not None:
            shift = tl.where(code, _entry(shift_ptr, 1, block, blocks, rows, ok, N), shift)
    sign = (tl.load(sign_ptr + at, mask=ok, other=0).to(tl.int32) >> bit) & 1
    lane = tl.arange(0, 16)[None, :]
    sign2 = tl.load(sign2_ptr + rows * sign2_bytes + (t // 8) * 16 + lane, mask=row_ok, other=0).to(tl.int32)
    value = tl.where(sign != 0, first, -first)
    if shift_ptr is not None:
        value += shift
    value += tl.where(((sign2 >> (t % 8)) & 1) != 0, second, -second)
    if keep_ptr is not None:
        keep = (tl.load(keep_ptr + at, mask=ok, other=0).to(tl.int32) >> bit) & 1
        value = tl.where(keep != 0, value, 0.0)
    return value


@triton.jit(do_not_specialize=["M", "C", "per_split", "tiles_per_split"])
def binary_kernel(
    x_ptr,  # (M, >= K) of any float type, row stride x_stride; salient: zeros there, gathered inputs from padded K on
    sign_ptr,  # (N, row_bytes) uint8, P128
    group_ptr,  # (planes, N, row_bytes) uint8, or None
    keep_ptr,  # (N, row_bytes) uint8 mask plane, or None; then sign and group planes are spread to all columns
    scale_ptr,  # (2·SALIENT + GROUPS, blocks, N)
    shift_ptr,  # (SALIENT + GROUPS, blocks, N), or None
    col_ptr,  # (max(SALIENT, GROUPS), K padded to 128), DT if PACKED else float32, or None
    salient_ptr,  # (C,) int32, or None
    sign2_ptr,  # (N, sign2_bytes) uint8, P128 over the salient columns, or None
    col2_ptr,  # (SALIENT, C), or None
    bias_ptr,  # (N,), or None; only where K is not split
    out_ptr,  # (splits, M, N)
    M, N, K, C, x_stride, row_bytes, sign2_bytes, blocks, span, block_size, per_split, tiles_per_split,
    GROUPS: tl.constexpr, SALIENT: tl.constexpr,
    PER_PLANE: tl.constexpr,  # scale blocks are shorter than a group: `span` counts planes, else groups
    FULL: tl.constexpr,  # x has K padded to 128 columns, no column mask needed
    PACKED: tl.constexpr, DT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_M) tile of ``W @ x.T`` over the groups of one split, accumulated in float32."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    tokens = (tl.program_id(0) // row_tiles * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    split = tl.program_id(1)
    row_ok = rows < N
    token_ok = tokens < M
    x_row = x_ptr + tokens.to(tl.int64) * x_stride  # 64 bits: M · K may exceed 2**31
    lane = tl.arange(0, 16)[:, None]
    lanes = tl.arange(0, 8 if PACKED else 16)[None, :]
    groups = tl.cdiv(K, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for g in range(split * per_split, tl.minimum((split + 1) * per_split, groups)):
        at = rows * row_bytes + g * 16
        sign = _load_bits(sign_ptr, at, lanes, row_ok, PACKED)
        low_bits = sign
        high_bits = sign
        keep = sign
        if GROUPS > 1:
            low_bits = _load_bits(group_ptr, at, lanes, row_ok, PACKED)
        if GROUPS > 2:
            high_bits = _load_bits(group_ptr + N * row_bytes, at, lanes, row_ok, PACKED)
        if keep_ptr is not None:
            keep = _load_bits(keep_ptr, at, lanes, row_ok, PACKED)
        for b in tl.static_range(8):
            if b == 0 or PER_PLANE:
                block = (g * 8 + b) // span if PER_PLANE else g // span
                # Past the last column, where x is 0, a plane may lie in a block that does not exist.
                block = tl.minimum(block, blocks - 1)
                s0, s1, s2, s3 = _entries(scale_ptr, SALIENT, block, blocks, rows, row_ok, N, GROUPS)
                d0, d1, d2, d3 = s0, s1, s2, s3
                if shift_ptr is not None:
                    d0, d1, d2, d3 = _entries(shift_ptr, SALIENT, block, blocks, rows, row_ok, N, GROUPS)
                    if col_ptr is None:  # the values of +1 and of -1, instead of scale and shift
                        s0, s1, s2, s3, d0, d1, d2, d3 = (
                            d0 + s0, d1 + s1, d2 + s2, d3 + s3, d0 - s0, d1 - s1, d2 - s2, d3 - s3,
                        )  # fmt: skip
                s0, s1, s2, s3 = (
                    _pair(s0, DT, PACKED), _pair(s1, DT, PACKED), _pair(s2, DT, PACKED), _pair(s3, DT, PACKED),
                )  # fmt: skip
                d0, d1, d2, d3 = (
                    _pair(d0, DT, PACKED), _pair(d1, DT, PACKED), _pair(d2, DT, PACKED), _pair(d3, DT, PACKED),
                )  # fmt: skip
            column = g * 128 + b * 16
            if FULL:
                x = tl.load(x_row + column + lane, mask=token_ok, other=0.0)
            else:
                x = tl.load(x_row + column + lane, mask=token_ok & (column + lane < K), other=0.0)
            low = _bit(low_bits, b, PACKED)
            high = _bit(high_bits, b, PACKED)
            if shift_ptr is not None and col_ptr is None:
                plus = _by_code(low, high, s0, s1, s2, s3, GROUPS, PACKED)
                minus = _by_code(low, high, d0, d1, d2, d3, GROUPS, PACKED)
                w = _choose(_bit(sign, b, PACKED), plus, minus, PACKED)
            else:
                w = _signed(sign, b, _by_code(low, high, s0, s1, s2, s3, GROUPS, PACKED), PACKED)
            if keep_ptr is not None and PACKED:
                w &= _bit(keep, b, PACKED)
            w = _unpair(w, DT, PACKED)
            if col_ptr is not None:
                c0, c1, c2, c3 = _column_scales(col_ptr, column, groups * 128, lanes, GROUPS, PACKED)
                w *= _unpair(_by_code(low, high, c0, c1, c2, c3, GROUPS, PACKED), DT, PACKED)
                if shift_ptr is not None:
                    w += _by_code(low, high, d0, d1, d2, d3, GROUPS, PACKED)
            if keep_ptr is not None and not PACKED:
                w = tl.where(_bit(keep, b, PACKED), w, 0.0)
            acc = tl.dot(w.to(DT), x.to(DT), acc, input_precision="ieee")
    if SALIENT:
        tiles = tl.cdiv(C, 16)
        for t in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
            w = _salient_tile(
                t, sign_ptr, group_ptr, keep_ptr, scale_ptr, shift_ptr, col_ptr, salient_ptr, sign2_ptr, col2_ptr,
                rows, row_ok, N, C, row_bytes, sign2_bytes, blocks, block_size, groups * 128, GROUPS, SALIENT,
            )  # fmt: skip
            x = tl.load(x_row + groups * 128 + t * 16 + lane, mask=token_ok, other=0.0)
            acc = tl.dot(w.to(DT), x.to(DT), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(DT).to(tl.float32)
    out = out_ptr + (split.to(tl.int64) * M + tokens) * N + rows
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_ok & token_ok)


@triton.jit(do_not_specialize=["C", "steps"])
def columns_kernel(
    x_ptr,  # (M, K), strides x_stride and x_step; one row per program along the first axis of the grid
    salient_ptr,  # (C,) int32, ascending
    out_ptr,  # (M, width) of type DT
    K, C, x_stride, x_step, width, padded, steps,
    DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row of ``x`` with zeros in salient columns and up to ``padded``, then the salient columns, then zeros."""
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plain = out < padded
    gathered = tl.load(salient_ptr + out - padded, mask=(out >= padded) & (out < padded + C), other=K)
    column = tl.where(plain, out, gathered)
    low = tl.zeros((BLOCK,), tl.int32)  # how many salient columns lie below this one, by bisection
    high = low + C
    for _ in range(steps):
        middle = (low + high) // 2
        right = (low < high) & (tl.load(salient_ptr + middle, mask=low < high, other=0) < column)
        high = tl.where(right, high, middle)
        low = tl.where(right, middle + 1, low)
    salient = tl.load(salient_ptr + low, mask=low < C, other=-1) == column
    read = (column < K) & (plain != salient)
    x = tl.load(x_ptr + token * x_stride + column.to(tl.int64) * x_step, mask=read, other=0.0)
    tl.store(out_ptr + token * width + out, x.to(DT), mask=out < width)


@triton.jit(do_not_specialize=["total", "splits"])
def reduce_kernel(parts_ptr, bias_ptr, out_ptr, total, N, splits, DT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum (splits, M, N) float32 over the first dimension, in order, plus bias (N,) or None; ``total`` is M · N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < total
    value = tl.zeros((BLOCK,), tl.float32)
    part = parts_ptr + at
    for _ in range(splits):
        value += tl.load(part, mask=ok, other=0.0)
        part += total
    if bias_ptr is not None:
        value += tl.load(bias_ptr + at % N, mask=ok, other=0.0).to(DT).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=ok)
