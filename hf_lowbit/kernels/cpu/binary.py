"""The product with a ``binary`` weight on a processor, straight from the packed planes.

Few tokens: the compiled library multiplies bytes that the bits of the planes select. Activations become integers of
``digits`` bytes with one scale for 128 columns: three bytes hold float32 (relative error about 1e-7), two hold
bfloat16 and float16 (2e-5), one is the opt-in fast mode (6e-3). Many tokens: some rows at a time are unpacked to the
dtype of the activations in a scratch buffer, and multiplied there by tiles (bfloat16, AMX) or by torch.

Salient columns are gathered once per weight into planes of their own ("runs", see ``csrc/binary.h``), and scales are
put into the order in which they are read. Both are kept beside the weight and never saved: 1.24 bits per weight
in an ARB-LLM_RC layer of 2.88, 4096 x 4096 with 9 % salient columns (``python -m benchmarks.kernels.overhead``).
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.calls import DIGITS, Call
from hf_lowbit.kernels.cpu.library import DTYPES, ISAS, Job, Weight, has_amx, load
from hf_lowbit.kernels.cpu.scratch import multiply_unpacked
from hf_lowbit.kernels.planes import GROUP, pack_plane, padded_columns, unpack_plane
from hf_lowbit.kernels.reference import kept_columns, salient_groups, spread

_RUN, _STRIP = 16, 64
# Above so many tokens unpacking pays, with tiles (bfloat16 where the processor has AMX) and without; measured with
# `python -m benchmarks.kernels`.
MOST_TOKENS_TILES, MOST_TOKENS = 8, 16
Parts = tuple[Any, ...]
Sizes = tuple[int, int, int, int]


def unsupported(dtype: torch.dtype, parts: Parts, sizes: Sizes) -> str | None:
    """Return why this kernel cannot multiply, None if it can.

    Args:
        dtype: of the activations.
        parts: the tensors of the weight in the order of the op's schema, ``sign`` to ``mask``.
        sizes: in_features, block_size, keep_n, keep_m.
    """
    _, row_scale, group, row_shift, col_scale, salient = parts[:6]
    in_features, block_size, _, _ = sizes
    library, reason = load()
    if library is None:
        return f"no compiled library: {reason}"
    if dtype not in DTYPES or row_scale.dtype not in DTYPES:
        return f"activations of {dtype} and scales of {row_scale.dtype}"
    if block_size % GROUP and block_size < in_features:
        return f"blocks of {block_size} columns, not a multiple of {GROUP}"
    if (group is not None and group.shape[0] > 1) or (salient is None and row_scale.shape[0] > 2):
        return "more than two groups"
    if row_shift is not None and col_scale is not None:
        return "row shifts together with column scales"
    return None


class Prepared:
    """A weight as the library wants it.

    Attributes:
        weight: pointers and sizes; the tensors they point into are kept alive here or belong to the caller.
    """

    def __init__(self, parts: Parts, in_features: int, block_size: int, keep_n: int, keep_m: int) -> None:
        """Gather what the library wants elsewhere than it is stored; ``parts`` must outlive the object."""
        sign, row_scale, group, row_shift, col_scale, salient, sign2, col_scale2, mask = parts
        rows, padded = row_scale.shape[-1], padded_columns(in_features)
        keep = None if mask is None else unpack_plane(mask, in_features)
        codes = 1 if group is None else 2
        own: dict[str, Tensor] = {}
        if keep is not None:  # stored planes hold the kept columns only
            kept = kept_columns(in_features, keep_n, keep_m)
            own["sign"] = pack_plane(spread(unpack_plane(sign, kept), keep))
            if group is not None:
                own["group"] = pack_plane(spread(unpack_plane(group[0], kept), keep))
            # with two codes a plane for each of them, which costs the kernel nothing beside the one it is told of
            own["keep"] = mask if group is None else pack_plane(keep & ~unpack_plane(own["group"], in_features))
        columns = torch.ones(codes, in_features) if col_scale is None else col_scale.float()
        plain = torch.zeros(codes, padded)
        plain[:, :in_features] = columns[:codes]
        S = 0 if salient is None else salient_groups(row_scale.shape[0], codes)
        if salient is not None:
            plain[:, salient.long()] = 0
            planes = [own.get("sign", sign), own.get("group", None if group is None else group[0]), sign2]
            own |= _runs(planes, keep, columns[:S], col_scale2, salient, in_features, block_size)
        own["plain_scale"] = plain
        own["row_scale"] = _in_strips(row_scale)
        if row_shift is not None:
            own["row_shift"] = _in_strips(row_shift)
        # columns of the slots behind the others in an unpacked row, and which of the slots are empty
        self.slots: Tensor | None = None
        self.salient = self.unused = torch.empty(0, dtype=torch.int64)
        if salient is not None:
            self.salient = salient.long()
            self.slots = own["run_column"].long().clamp(min=0)
            self.unused = (own["run_column"] < 0).nonzero().flatten()
        self._kept = own
        self.weight = Weight(
            rows=rows,
            columns=in_features,
            blocks=row_scale.shape[1],
            block_size=min(block_size, padded) if block_size < in_features else padded,
            runs=own["run_block"].shape[0] if S else 0,
            used_runs=int((own["run_column"].unflatten(0, (-1, _RUN))[:, 0] >= 0).sum()) if S else 0,
            groups=codes,
            salient_groups=S,
            scale_dtype=DTYPES[own["row_scale"].dtype],
            **{"sign": sign.data_ptr(), "group": None if group is None else group.data_ptr()}
            | {name: tensor.data_ptr() for name, tensor in own.items()},
        )
        self.nbytes = sum(tensor.nbytes for tensor in own.values() if tensor is not mask)


def _in_strips(table: Tensor) -> Tensor:
    """Put the scales of 64 rows together: (entries, blocks, rows) -> (rows / 64, blocks, entries, 64), filled with 0.

    In the file those of one block lie far from those of the next, in other pages and the same places of a cache.
    """
    if table.dtype is torch.bfloat16:  # for which the library has no form of its own
        table = table.float()
    filled = torch.nn.functional.pad(table, (0, -table.shape[-1] % _STRIP))
    return filled.unflatten(-1, (-1, _STRIP)).permute(2, 1, 0, 3).contiguous()


def _runs(
    planes: list[Any], keep: Tensor | None, columns: Tensor, columns2: Tensor | None, salient: Tensor,
    in_features: int, block_size: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Gather salient columns into runs of 16 columns of one block, eight runs to a group of a plane."""
    sign, group, sign2 = planes
    count, codes = salient.shape[0], columns.shape[0]
    index = salient.long()
    slots, of_block = [], []
    for block in (index // block_size).unique().tolist():
        for part in (index // block_size == block).nonzero().flatten().split(_RUN):
            slots.append(torch.nn.functional.pad(part, (0, _RUN - len(part)), value=-1))
            of_block.append(block)
    while len(of_block) % 8:
        slots.append(torch.full((_RUN,), -1))
        of_block.append(of_block[-1])
    place = torch.cat(slots)
    used, safe = place >= 0, place.clamp(min=0)
    column = index[safe]
    second = torch.ones(codes, count) if columns2 is None else columns2.float()

    def gathered(plane: Tensor, width: int, at: Tensor) -> Tensor:
        return unpack_plane(plane, width)[:, at] & used

    signs = gathered(sign, in_features, column)
    none = torch.zeros_like(signs)
    bits = [signs, none if group is None else gathered(group, in_features, column), gathered(sign2, count, safe)]
    if keep is not None:
        kept = keep[:, column] & used
        bits.append(kept & ~bits[1] if codes > 1 else kept)
    return {
        "run_planes": torch.stack([pack_plane(each) for each in bits]),
        "run_column": torch.where(used, column, -1).to(torch.int32).contiguous(),
        "run_block": torch.tensor(of_block, dtype=torch.int32),
        "first_scale": torch.where(used, columns[:, column], 0.0).contiguous(),
        "second_scale": torch.where(used, second[:, safe], 0.0).contiguous(),
    }


# Prepared weights by the tensor of their signs, as long as that lives: its id, checked against a weak reference.
_PREPARED: dict[int, tuple[Any, list[int], Prepared]] = {}
_MAKING = threading.Lock()  # threads that first use a weight at the same time shall not each hold a copy of it


def prepared(parts: Parts, in_features: int, block_size: int, keep_n: int, keep_m: int) -> Prepared:
    """Return the prepared form of a weight, made at the first call and again whenever its tensors change."""
    stamp = _stamp([part for part in parts if part is not None])
    key = id(parts[0])

    def known() -> Prepared | None:
        found = _PREPARED.get(key)
        return found[2] if found is not None and found[0]() is parts[0] and found[1] == stamp else None

    made = known()
    if made is None:
        with _MAKING:
            made = known()
            if made is None:
                made = Prepared(parts, in_features, block_size, keep_n, keep_m)
                _PREPARED[key] = (weakref.ref(parts[0], lambda _: _PREPARED.pop(key, None)), stamp, made)
    return made


def _stamp(tensors: list[Tensor]) -> list[int]:
    """Where the tensors are, and how often each was written to, which tensors of the inference mode do not count."""
    return [tensor.data_ptr() for tensor in tensors] + [
        0 if tensor.is_inference() else tensor._version for tensor in tensors
    ]


def call(parts: Parts, bias: Tensor | None, sizes: Sizes) -> Call:
    """Return a shorter way to :func:`linear` for a few tokens; :func:`unsupported` has nothing against the weight."""
    made, (library, isa) = prepared(parts, *sizes), load()
    tensors = [part for part in (*parts, bias) if part is not None]
    copied = [part for part in parts if part is not None and not part.is_inference()]
    return Call(
        library.hflb_linear,
        ISAS.index(isa),
        Job,
        made.weight,
        sizes[0],
        MOST_TOKENS_TILES,
        bias,
        tensors,
        copied,
        made,
    )


def linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes, digits: int = 0) -> Tensor:
    """Multiply: ``x @ W.T + bias``, as the op defines it.

    Args:
        x: (..., in_features), on the CPU.
        parts: tensors of the weight, ``sign`` to ``mask``.
        bias: (out_features,) or None.
        sizes: in_features, block_size, keep_n, keep_m.
        digits: bytes of an activation; 0 for as many as its dtype needs.

    Returns:
        (..., out_features), in the dtype of ``x``.
    """
    made = prepared(parts, *sizes)
    rows = x.contiguous()
    count = rows.numel() // sizes[0]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    tiles = count > MOST_TOKENS_TILES and x.dtype is torch.bfloat16 and has_amx()
    if count > MOST_TOKENS and not tiles:
        return _unpacking(rows, made, bias)
    out = torch.empty((*x.shape[:-1], made.weight.rows), dtype=x.dtype)
    library, isa = load()
    if tiles:
        where = None if bias is None else bias.data_ptr()
        if library.hflb_wide_amx(
            ctypes.byref(made.weight), rows.data_ptr(), count, where, out.data_ptr(), torch.get_num_threads()
        ):
            raise MemoryError("binary_linear: no memory for a scratch buffer")
        return out
    job = Job(ctypes.pointer(made.weight), None if bias is None else bias.data_ptr(), out.data_ptr())
    failed = library.hflb_linear(
        ctypes.byref(job), 1, rows.data_ptr(), DTYPES[x.dtype], count, digits or DIGITS[x.dtype], ISAS.index(isa),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed == 1:  # NaN or infinity, which integers cannot hold
        return _unpacking(rows, made, bias)
    if failed:
        raise MemoryError("binary_linear: no memory for a scratch buffer")
    return out


def _unpacking(x: Tensor, made: Prepared, bias: Tensor | None) -> Tensor:
    """Multiply with some rows at a time unpacked to the dtype of ``x``.

    Salient columns stay in their runs, behind the others, and the activations are put there too: a column's place in
    the product does not matter, and scattering them took longer than the longer product does.
    """
    rows, columns = made.weight.rows, x.shape[-1]
    flat = x.view(-1, columns)
    if made.slots is not None:
        flat = torch.cat([flat.index_fill(1, made.salient, 0), flat[:, made.slots].index_fill_(1, made.unused, 0)], 1)
    out = multiply_unpacked(flat, rows, functools.partial(unpack_rows, made, apart=True)).view(*x.shape[:-1], rows)
    return out if bias is None else out.add_(bias)


def unpack_rows(made: Prepared, start: int, end: int, out: Tensor, apart: bool = False) -> None:
    """Write rows of the dense weight into ``out``, (at least end - start, in_features), contiguous.

    With ``apart`` it has as many more columns as there are slots, and salient columns are there.
    """
    library, isa = load()
    failed = library.hflb_dequantize(
        ctypes.byref(made.weight), start, end, out.data_ptr(), DTYPES[out.dtype], int(apart), ISAS.index(isa),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("binary_dequantize: no memory for a scratch buffer")


def dequantize(parts: Parts, sizes: Sizes) -> Tensor:
    """Return the dense weight, (out_features, in_features), float32."""
    made = prepared(parts, *sizes)
    out = torch.empty(made.weight.rows, sizes[0])
    unpack_rows(made, 0, made.weight.rows, out)
    return out
