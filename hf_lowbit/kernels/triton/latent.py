"""One token's attention over latents on CUDA and ROCm devices: what is supported, how it is launched.

:mod:`hf_lowbit.kernels.latent_attention` is the definition, :mod:`hf_lowbit.kernels.triton.latent_kernels` holds the
device code. Sizes of blocks are rules of the shapes, checked on what the compiled programs contain
(``python -m benchmarks.kv.compiled``) and not yet timed on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.latent_case import Case, pairs_of
from hf_lowbit.kernels.latent_codec import WORDS
from hf_lowbit.kernels.triton.latent_kernels import results_kernel, scores_kernel, values_kernel

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# TRITON_INTERPRET makes functions of another class: kernels then run on tensors of the CPU.
INTERPRETED = not isinstance(scores_kernel, triton.JITFunction)
_LEAST = 16  # rows and columns of a product
_STRETCH = 512  # tokens of a part of the values' sum, at least
_MOST_SPLITS = 64
_LARGEST_PAIRS, _MOST_ROWS = 128, 64
_FUSED = {"enable_fp_fusion": True}  # pinned: the default changes with Triton 3.10


def why_not(case: Case) -> str | None:
    """Return why the kernels cannot take this case, None if they can."""
    if case.q.device.type != ("cpu" if INTERPRETED else "cuda"):  # ROCm devices are called so, too
        return f"tensors on {case.q.device.type}"
    if not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(case.q.device) < (8, 0):
        return "needs compute capability 8.0"
    if case.q.dtype not in _TYPES or case.up_k.dtype not in _TYPES or case.up_v.dtype not in _TYPES:
        return f"q of {case.q.dtype}, factors of {case.up_k.dtype} and {case.up_v.dtype}"
    if not case.bits and (case.keys.dtype not in _TYPES or case.values.dtype not in _TYPES):
        return f"keys of {case.keys.dtype}, values of {case.values.dtype}"
    if case.up_k.shape[1] > 2 * _LARGEST_PAIRS:
        return f"heads of {case.up_k.shape[1]}, at most {2 * _LARGEST_PAIRS}"
    rep = case.q.shape[1] // case.up_k.shape[0]
    rows = max(case.groups_v.count(group) for group in range(len(case.ranks_v))) * rep
    if rows > _MOST_ROWS:
        return f"{rows} queries share a group of values, at most {_MOST_ROWS}"
    if not case.q.shape[0] or not case.keys.shape[1]:
        return "nothing to attend to"
    return None


def decode(case: Case) -> tuple[Tensor, Tensor]:
    """Attend; the results are those of :func:`hf_lowbit.kernels.latent_attention.latent_decode`."""
    cores = 1 if INTERPRETED else torch.cuda.get_device_properties(case.q.device).multi_processor_count
    return run(case, case.q.dtype, cores)


def run(case: Case, compute: torch.dtype, cores: int, block_t: int | None = None) -> tuple[Tensor, Tensor]:
    """Launch the three kernels.

    Args:
        case: one that :func:`why_not` has nothing against.
        compute: type of the products.
        cores: multiprocessors of the device, for the number of stretches.
        block_t: tokens of a block; default by a rule.
    """
    on_device = torch.cuda.device(case.q.device) if case.q.is_cuda else contextlib.nullcontext()
    with on_device:
        launches = launches_of(case, compute, cores, block_t)
        for kernel, grid, arguments, options in launches:
            kernel[grid](**arguments, **options, **_FUSED)
    last = launches[-1][2]
    return last["out_ptr"], last["lse_ptr"]


Launch = tuple[Any, tuple[int, ...], dict[str, Any], dict[str, int]]


def launches_of(case: Case, compute: torch.dtype, cores: int, block_t: int | None = None) -> list[Launch]:
    """Return kernel, grid, arguments and options of each launch; tensors may be on ``meta``, to compile only."""
    q = case.q.contiguous()
    batch, heads, head_dim = q.shape
    tokens, kv_heads = case.keys.shape[1], case.up_k.shape[0]
    rep, device = heads // kv_heads, q.device
    keys, values = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (case.keys, case.values))
    up_k, up_v = case.up_k.contiguous(), case.up_v.contiguous()
    tables = _tables(
        (tuple(case.groups_k), tuple(case.ranks_k), tuple(case.groups_v), tuple(case.ranks_v)),
        (head_dim, case.rotated_pairs, rep, case.bits),
        device,
    )
    pairs = tables["place"].numel() // 2
    frequency = torch.zeros(pairs, device=device)
    scale = torch.ones(pairs, device=device)
    if case.inv_freq is not None:
        frequency[: case.rotated_pairs] = case.inv_freq.float()
        scale[: case.rotated_pairs] = case.rope_scale
    mask = case.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill_(~mask, -torch.inf)
    mask = None if mask is None else mask.float().contiguous()
    positions = case.positions
    if positions is not None and positions.stride(1) != 1:
        positions = positions.contiguous()
    scores = torch.empty((batch, heads, tokens), device=device)
    members = tables["key_members"].shape[1]
    block_t = block_t or (32 if pairs <= 64 else 16)  # angles, keys and products of a block stay in registers
    scoring: dict[str, Any] = {
        "q_ptr": q, "keys_ptr": keys, "up_ptr": up_k, "bias_ptr": case.bias_k, "norm_ptr": case.norm,
        "positions_ptr": positions, "mask_ptr": mask, "out_ptr": scores, "place_ptr": tables["place"],
        "frequency_ptr": frequency, "scale_ptr": scale, "groups_ptr": tables["key_groups"],
        "members_ptr": tables["key_members"], "T": tokens, "H": heads, "keys_batch": keys.stride(0),
        "keys_token": keys.stride(1), "up_head": up_k.stride(0), "up_row": up_k.stride(1),
        "positions_batch": 0 if positions is None else positions.stride(0),
        "mask_batch": 0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        "mask_head": 0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        "scaling": float(case.scaling), "eps": float(case.eps), "GROUPS": len(case.ranks_k), "MEMBERS": members,
        "REP": rep, "HEAD_DIM": head_dim, "PAIRS": pairs, "BITS": case.bits, "DT": _TYPES[compute],
        "BLOCK_T": block_t, "BLOCK_R": 32,
    }  # fmt: skip
    width, groups = max(case.ranks_v), len(case.ranks_v)
    block_c = min(max(triton.next_power_of_2(width), _LEAST), 64)
    columns = groups * -(-width // block_c)
    splits = max(1, min(-(-2 * cores // (columns * batch)), -(-tokens // _STRETCH), _MOST_SPLITS))
    per_split = -(-tokens // splits // block_t) * block_t
    splits = -(-tokens // per_split)
    sums = torch.empty((batch, splits, heads, width), device=device)
    largest, total = (torch.empty((batch, splits, heads), device=device) for _ in range(2))
    summing: dict[str, Any] = {
        "scores_ptr": scores, "values_ptr": values, "sums_ptr": sums, "largest_ptr": largest, "total_ptr": total,
        "groups_ptr": tables["value_groups"], "members_ptr": tables["value_members"], "T": tokens, "H": heads,
        "values_batch": values.stride(0), "values_token": values.stride(1), "per_split": per_split, "width": width,
        "GROUPS": groups, "ROWS": tables["value_members"].shape[1], "BITS": case.bits, "DT": _TYPES[compute],
        "BLOCK_T": block_t, "BLOCK_C": block_c,
    }  # fmt: skip
    results: dict[str, Any] = {
        "sums_ptr": sums, "largest_ptr": largest, "total_ptr": total, "up_ptr": up_v, "bias_ptr": case.bias_v,
        "rank_ptr": tables["value_ranks"], "out_ptr": torch.empty_like(q),
        "lse_ptr": torch.empty((batch, heads), device=device), "H": heads, "width": width, "up_head": up_v.stride(0),
        "up_row": up_v.stride(1), "splits": splits, "REP": rep, "HEAD_DIM": head_dim,
        "SPLITS": triton.next_power_of_2(splits), "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_R": 32,
    }  # fmt: skip
    options = {"num_warps": 4, "num_stages": 2}
    return [
        (scores_kernel, (-(-tokens // block_t), len(case.ranks_k), batch), scoring, options),
        (values_kernel, (columns, splits, batch), summing, options),
        (results_kernel, (heads, batch), results, options),
    ]


@functools.lru_cache(64)
def _tables(grouping: tuple[Any, ...], sizes: tuple[int, int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Return what the kernels look up, int32 on the device: where groups lie, and whose they are."""
    groups_k, ranks_k, groups_v, ranks_v = grouping
    head_dim, half, rep, bits = sizes
    first, second = pairs_of(head_dim, half)
    pairs = triton.next_power_of_2(max(len(first), _LEAST))
    key_members = [[h for h, owner in enumerate(groups_k) if owner == g] for g in range(len(ranks_k))]
    value_members = [
        [h * rep + n for h, owner in enumerate(groups_v) if owner == g for n in range(rep)]
        for g in range(len(ranks_v))
    ]
    rows = triton.next_power_of_2(max(max(map(len, value_members)), _LEAST))
    found = {
        "place": _filled([first, second], pairs),
        "key_groups": _groups(ranks_k, bits),
        "key_members": _filled(key_members, max(map(len, key_members))),
        "value_groups": _groups(ranks_v, bits),
        "value_members": _filled(value_members, rows),
        "value_ranks": [ranks_v[owner] for owner in groups_v],
    }
    return {name: torch.tensor(table, dtype=torch.int32, device=device) for name, table in found.items()}


def _filled(rows: list[list[int]], width: int) -> list[list[int]]:
    return [row + [-1] * (width - len(row)) for row in rows]


def _groups(ranks: tuple[int, ...], bits: int) -> list[list[int]]:
    """Return rank, first number and, with codes, first byte of the codes of each group."""
    starts = [sum(ranks[:g]) for g in range(len(ranks))]
    each, size = WORDS[bits] if bits else (1, 1)
    lengths = [-(-rank // each) * size for rank in ranks]
    return [list(ranks), starts, [4 * len(ranks) + sum(lengths[:g]) for g in range(len(ranks))]]
