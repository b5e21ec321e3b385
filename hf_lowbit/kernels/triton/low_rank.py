"""Format ``low_rank`` on CUDA and ROCm devices: what is supported, how it is launched.

:mod:`hf_lowbit.kernels.low_rank` holds the definition, :mod:`hf_lowbit.kernels.triton.low_rank_kernels` the device
code. It is for decoding: up to :data:`MOST_TOKENS` tokens reading the factors takes the time, and one launch reads
both. With more the partial sums would outweigh the factors, and the two products are left to torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from hf_lowbit.kernels.triton.binary import (
    BLOCK,
    FUSED,
    LIMIT,
    TYPES,
    device_names,
    reduce_arguments,
    unsupported_device,
)
from hf_lowbit.kernels.triton.binary_kernels import reduce_kernel
from hf_lowbit.kernels.triton.low_rank_kernels import low_rank_kernel

# Partial sums of so many tokens take about half the bytes of the factors, at 4096 x 4096 and a ratio of 0.4.
MOST_TOKENS = 32
# Multiprocessors should have so many programs each, lest memory waits for requests.
PROGRAMS_PER_CORE = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a launch is cut up; blocks are powers of two and at least 16.

    Attributes:
        block_r: ranks of a group.
        block_n: rows of ``up`` at a time.
        block_k: columns of ``down`` at a time.
        block_m: tokens of a tile.
        shares: programs that share the rows of ``up``.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
    """

    block_r: int
    block_n: int
    block_k: int
    block_m: int
    shares: int
    num_warps: int = 4
    num_stages: int = 4

    def groups(self, rank: int) -> int:
        """Into how many groups the ranks are cut."""
        return -(-rank // self.block_r)


def shape_of(rows: int, rank: int, tokens: int, cores: int, dtype: torch.dtype) -> Shape:
    """Return how a problem is cut up.

    Small groups of ranks make many programs, large ones few partial sums, so groups grow with the tokens. Chosen by
    what the compiled kernels contain, not by a clock.
    """
    block_m = 16 if tokens <= 16 else 32
    wide = dtype == torch.float32
    block_r = 16 if tokens <= 4 else 32 if wide else 2 * block_m  # 64 in float32 do not fit into registers
    tiles = -(-rank // block_r) * -(-tokens // block_m)
    shares = max(1, min(-(-cores * PROGRAMS_PER_CORE // tiles), -(-rows // 256), 8))
    stages = 4 if tokens <= 4 else 3  # 64 KB of shared memory are all that an MI300 has
    return Shape(block_r, 64 if wide else 128, 64 if wide else 128, block_m, shares, num_stages=stages)


def unsupported(dtype: torch.dtype, up: Tensor, down: Tensor) -> str | None:
    """Return why factors cannot be multiplied with an input of ``dtype`` on their device, or None if they can."""
    reason = None if up.device.type == "meta" else unsupported_device(up.device)
    if reason is not None:
        return reason
    if dtype not in TYPES or up.dtype not in TYPES or down.dtype not in TYPES:
        return f"x is {dtype}, factors are {up.dtype} and {down.dtype}; float16, bfloat16 and float32 are computed"
    if not up.is_contiguous() or not down.is_contiguous():
        return "factors are not contiguous"
    if max(up.numel(), down.numel()) >= LIMIT:
        return f"factors of {max(up.numel(), down.numel())} numbers; at most {LIMIT - 1} are addressed"
    return None


def low_rank_linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by two factors on a GPU, as :func:`hf_lowbit.kernels.low_rank.low_rank_linear` defines it.

    Raises:
        NotImplementedError: :func:`unsupported` has something against it; the message says what.
    """
    reason = unsupported(x.dtype, up, down)
    if reason is not None:
        raise NotImplementedError(f"low_rank_linear in Triton: {reason}")
    return run(x, up, down, bias)


def run(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    shape: Shape | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Launch.

    Args:
        x: (..., in_features), any strides.
        up: (out_features, rank), contiguous.
        down: (rank, in_features), contiguous.
        bias: (out_features,) or None.
        shape: for tests and measurements; default by :func:`shape_of`.
        compute: type of the products' operands; default the dtype of ``x``.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    (rows, rank), columns = up.shape, down.shape[1]
    out = x.new_empty((*x.shape[:-1], rows))
    tokens = x.numel() // columns
    if not tokens:
        return out
    compute = compute or x.dtype
    shape = shape or shape_of(rows, rank, tokens, device_names(x.device)[1], compute)
    groups, bias = shape.groups(rank), None if bias is None else bias.contiguous()
    flat = x.reshape(tokens, columns)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    parts = out if groups == 1 else x.new_empty((groups, tokens, rows), dtype=torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        arguments = kernel_arguments(flat, up, down, bias if groups == 1 else None, parts, shape, compute)
        grid = (groups, shape.shares, -(-tokens // shape.block_m))
        low_rank_kernel[grid](**arguments, num_warps=shape.num_warps, num_stages=shape.num_stages, **FUSED)
        if groups > 1:
            reduce_kernel[(-(-out.numel() // BLOCK),)](**reduce_arguments(parts, bias, out, compute), **FUSED)
    return out


def kernel_arguments(
    x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, out: Tensor, shape: Shape, compute: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of the kernel by name; tensors may be on ``meta`` (to compile without a device)."""
    rows = up.shape[0]
    return {
        "x_ptr": x,
        "up_ptr": up,
        "down_ptr": down,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": x.shape[0],
        "N": rows,
        "R": up.shape[1],
        "K": x.shape[1],
        "x_stride": x.stride(0),
        "rows_per_share": -(-rows // (shape.shares * shape.block_n)) * shape.block_n,
        "DT": TYPES[compute],
        "BLOCK_R": shape.block_r,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "BLOCK_M": shape.block_m,
    }


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter."""
    return not isinstance(low_rank_kernel, triton.JITFunction)
