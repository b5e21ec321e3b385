"""Device code of format ``low_rank``: both factors in one launch, what is between them in registers.

A program takes some of the ranks. It multiplies its rows of ``down`` with the tokens, keeps the result (as many
numbers as ranks times tokens), and multiplies the same columns of ``up`` with it. So each weight is read once, no
program waits for another, and what passes through memory are partial sums of the output, one for each group of ranks,
which a second small kernel adds in a fixed order: no atomics, equal bits in every run. With few ranks the rows of
``up`` are shared out, too; each share then multiplies ``down`` again, out of the cache.

The weights are the left operand of both products, as in :mod:`hf_lowbit.kernels.triton.binary_kernels`.

Names: N rows of the weight (out_features), K columns (in_features), R rank, M tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "rows_per_share"])
def low_rank_kernel(
    x_ptr,  # (M, K) of any float type, row stride x_stride, columns next to each other
    up_ptr,  # (N, R)
    down_ptr,  # (R, K)
    bias_ptr,  # (N,), or None; only where one group holds all ranks
    out_ptr,  # (groups of ranks, M, N)
    M, N, R, K, x_stride, rows_per_share,
    DT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Partial sums of a group of ranks, a share of the rows and a tile of tokens; sums are float32.

    What is between the factors is rounded to DT, as in the reference.
    """
    group = tl.program_id(0)
    ranks = group * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    rank_ok, token_ok = ranks < R, tokens < M
    x_row = x_ptr + tokens.to(tl.int64) * x_stride  # 64 bits: M · K may exceed 2**31
    down_row = down_ptr + ranks[:, None] * K
    middle = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        column_ok = columns < K  # both operands: what lies past the last column may be NaN
        w = tl.load(down_row + columns[None, :], mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
        x = tl.load(x_row + columns[:, None], mask=column_ok[:, None] & token_ok, other=0.0)
        middle = tl.dot(w.to(DT), x.to(DT), middle, input_precision="ieee")
    between = middle.to(DT)
    first_row = tl.program_id(1) * rows_per_share
    for row in range(first_row, tl.minimum(first_row + rows_per_share, N), BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N))[:, None]
        row_ok = rows < N
        w = tl.load(up_ptr + rows * R + ranks[None, :], mask=row_ok & rank_ok[None, :], other=0.0)
        total = tl.dot(w.to(DT), between, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), input_precision="ieee")
        if bias_ptr is not None:
            total += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(DT).to(tl.float32)
        out = out_ptr + (group.to(tl.int64) * M + tokens) * N + rows
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_ok & token_ok)
