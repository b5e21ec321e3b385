"""Custom op ``hf_lowbit::latent_decode``: attention of one new token over cached latents.

With the latents ``z`` of a key or value projection (format ``latent``), per head ``h`` of group ``g(h)``::

    k_h(t) = R(t) · norm(U_h z_g(t) + b_h)         norm and rotation R only where the model has them
    s_i(t) = scaling · q_i · k_h(t) + mask         query head i belongs to the key head h = i // (H / Hk)
    p_i    = softmax over t
    o_i    = U'_h (Σ_t p_i(t) z'_g'(t)) + b'_h     values are summed as latents and expanded once

A model with neither norm nor rotation needs no keys either: ``q·U_h`` meets the latents directly. The op also returns
the logarithm of the softmax' sum, so that results over two stretches of a cache can be merged (:func:`merge`).

The reference below is the definition, computed in float32 (float64 for such inputs); other kernels say where they
round (:mod:`hf_lowbit.kernels.cpu.latent`, :mod:`hf_lowbit.kernels.latent_torch`). There is no gradient: training goes
another way, see ``cache/attention.py``.

Source: ReCalKV (arXiv 2505.24357); rotation of cached latents with their own positions as in Palu (arXiv 2407.21118).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import latent_torch
from hf_lowbit.kernels.choice import Kernel, Table
from hf_lowbit.kernels.cpu import latent as cpu
from hf_lowbit.kernels.latent_case import Case
from hf_lowbit.kernels.latent_codec import decode_rows, group_places, row_bytes, shares
from hf_lowbit.kernels.ops import LIBRARY, unobserved

LIBRARY.define(
    "latent_decode(Tensor q, Tensor keys, Tensor values, Tensor up_k, Tensor up_v, Tensor? bias_k, Tensor? bias_v, "
    "Tensor? norm, Tensor? positions, Tensor? inv_freq, Tensor? mask, int[] groups_k, int[] ranks_k, int[] groups_v, "
    "int[] ranks_v, float scaling, float rope_scale, float eps, int bits) -> (Tensor, Tensor)"
)


# What is part of the definition and needed elsewhere, too ---------------------------------------------------------


def rotation(positions: Tensor, inv_freq: Tensor, rope_scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary embeddings, formed in float32 like transformers does.

    Args:
        positions: (batch, tokens), integers.
        inv_freq: (rotated / 2,), float32.
        rope_scale: factor of both, 1 for most models.

    Returns:
        Two tensors (batch, tokens, rotated), float32; the second half of the last dimension repeats the first.
    """
    angle = positions[..., None].float() * inv_freq.float()
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * rope_scale, angle.sin() * rope_scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads.

    Args:
        x: (batch, heads, tokens, head_dim).
        cos: (batch, tokens, rotated); what of ``head_dim`` lies beyond ``rotated`` is left as it is.
        sin: likewise.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge results of the op over parts of a cache, (batch, heads, head_dim) each with (batch, heads)."""
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    weights = [shares(lse, total) for _, lse in parts]
    merged = sum(out.float() * share[..., None] for (out, _), share in zip(parts, weights, strict=True))
    result: Tensor = torch.as_tensor(merged).to(parts[0][0].dtype)
    return result


# The op ------------------------------------------------------------------------------------------------------------


def _latents(stored: Tensor, ranks: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    return decode_rows(stored, ranks, bits, dtype) if bits else stored.to(dtype)


def _reference(case: Case) -> tuple[Tensor, Tensor]:
    q, up_k, up_v, norm, mask = case.q, case.up_k, case.up_v, case.norm, case.mask
    bias_k, bias_v = case.bias_k, case.bias_v
    dtype = torch.promote_types(q.dtype, torch.float32)
    zk = _latents(case.keys, case.ranks_k, case.bits, dtype)
    zv = _latents(case.values, case.ranks_v, case.bits, dtype)
    batch, tokens = zk.shape[:2]
    query = q.to(dtype).unflatten(1, (up_k.shape[0], -1))  # batch, key heads, queries of each, head_dim
    turn = None
    if case.positions is not None and case.inv_freq is not None:
        turn = rotation(case.positions, case.inv_freq, case.rope_scale)
    scores = query.new_empty((*query.shape[:3], tokens))
    for heads, place in group_places(case.groups_k, case.ranks_k):
        z, up = zk[..., place], up_k[heads, :, : place.stop - place.start].to(dtype)
        bias = None if bias_k is None else bias_k.to(dtype).view(up_k.shape[:2])[heads]
        if norm is None and turn is None:
            scores[:, heads] = (query[:, heads] @ up) @ z.transpose(1, 2).unsqueeze(1)
            if bias is not None:
                scores[:, heads] += (query[:, heads] * bias[:, None]).sum(-1, keepdim=True)
            continue
        key = (z @ up.flatten(0, 1).T).view(batch, tokens, *up.shape[:2]).transpose(1, 2)
        if bias is not None:
            key = key + bias[:, None]
        if norm is not None:
            key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + case.eps) * norm.to(dtype)
        if turn is not None:
            key = rotate(key, turn[0].to(dtype), turn[1].to(dtype))
        scores[:, heads] = query[:, heads] @ key.transpose(2, 3)
    scores = scores.flatten(1, 2) * case.scaling  # batch, heads, tokens
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    lse = torch.logsumexp(scores, dim=-1)
    # A query that sees nothing (padding) gives 0, like torch's own attention, and no NaN for later tokens to meet.
    weights = shares(scores, lse[..., None]).unflatten(1, (up_k.shape[0], -1))
    out = torch.empty_like(query)
    for heads, place in group_places(case.groups_v, case.ranks_v):
        up = up_v[heads, :, : place.stop - place.start].to(dtype)
        mixed = weights[:, heads] @ zv[..., place].unsqueeze(1)  # batch, heads of the group, queries of each, rank
        out[:, heads] = mixed @ up.transpose(1, 2)
    if bias_v is not None:
        out = out + bias_v.to(dtype).view(up_v.shape[:2])[:, None]
    return out.flatten(1, 2).to(q.dtype), lse.to(dtype)


def _triton_why_not(case: Case) -> str | None:
    if case.q.device.type != "cuda":  # ROCm devices are called so, too
        return f"tensors on {case.q.device.type}"
    try:  # not before a GPU needs it: Triton exists for Linux only
        from hf_lowbit.kernels.triton import latent as on_gpu
    except ImportError as error:
        return f"Triton cannot be imported ({type(error).__name__})"
    return on_gpu.why_not(case)


def _triton_decode(case: Case) -> tuple[Tensor, Tensor]:
    from hf_lowbit.kernels.triton import latent as on_gpu

    return on_gpu.decode(case)


# A case is a Case; the product of a kernel is ``(outputs, logarithms of the soft-max' sums)``.
TABLE = Table(
    Kernel("cpu", "C++ in bfloat16, keys rebuilt and rotated in the first cache", cpu.why_not, cpu.decode),
    Kernel("torch", "torch in bfloat16, keys are not rebuilt", latent_torch.why_not, latent_torch.decode),
    Kernel("triton", "Triton, keys never leave registers, not yet timed on a GPU", _triton_why_not, _triton_decode),
    Kernel("reference", "plain torch in float32, rebuilds the keys in every call", lambda _: None, _reference),
)
choose, reasons = TABLE.choose, TABLE.reasons


@functools.lru_cache(1024)
def _all_used(owners: tuple[int, ...], groups: int) -> bool:
    return sorted(set(owners)) == list(range(groups))


def _check(case: Case) -> None:
    """Refuse what no kernel may see."""
    q, keys, norm, positions, mask = case.q, case.keys, case.norm, case.positions, case.mask
    if q.dim() != 3 or not q.is_floating_point() or not q.shape[1] or not q.shape[2]:
        raise RuntimeError(
            f"latent_decode: q must be (batch, heads, head_dim), floating, got {tuple(q.shape)} of {q.dtype}"
        )
    batch, heads, head_dim = q.shape
    if case.bits not in (0, 3, 4, 8):
        raise RuntimeError(f"latent_decode: bits must be 0, 3, 4 or 8, got {case.bits}")
    for name, stored, up, owners, ranks, bias in (
        ("keys", keys, case.up_k, case.groups_k, case.ranks_k, case.bias_k),
        ("values", case.values, case.up_v, case.groups_v, case.ranks_v, case.bias_v),
    ):
        if not ranks or min(ranks) < 1:
            raise RuntimeError(f"latent_decode: ranks of the {name} must be numbers from 1, got {list(ranks)}")
        width = row_bytes(ranks, case.bits) if case.bits else sum(ranks)
        if stored.dim() != 3 or stored.shape[0] != batch or stored.shape[2] != width:
            raise RuntimeError(
                f"latent_decode: {name} have shape {tuple(stored.shape)}, expected ({batch}, tokens, {width})"
            )
        if not (stored.dtype == torch.uint8 if case.bits else stored.is_floating_point()):
            raise RuntimeError(f"latent_decode: {name} are {stored.dtype}, which does not go with bits={case.bits}")
        if up.dim() != 3 or up.shape[1:] != (head_dim, max(ranks)) or not up.shape[0] or heads % up.shape[0]:
            raise RuntimeError(
                f"latent_decode: factor of the {name} has shape {tuple(up.shape)}, expected (a divisor of {heads}, "
                f"{head_dim}, {max(ranks)})"
            )
        if len(owners) != up.shape[0] or not _all_used(tuple(owners), len(ranks)):
            raise RuntimeError(f"latent_decode: groups of the {name} do not fit {up.shape[0]} heads")
        if bias is not None and bias.numel() != up.shape[0] * head_dim:
            raise RuntimeError(f"latent_decode: bias of the {name} has {bias.numel()} values")
        if not up.is_floating_point():
            raise RuntimeError(f"latent_decode: factor of the {name} is {up.dtype}, which is not floating")
        if stored.device != q.device or up.device != q.device:
            raise RuntimeError(f"latent_decode: q is on {q.device}, {name} on {stored.device} and {up.device}")
    for name in ("bias_k", "bias_v", "norm", "positions", "inv_freq", "mask"):
        tensor = getattr(case, name)
        if tensor is not None and tensor.device != q.device:
            raise RuntimeError(f"latent_decode: q is on {q.device}, {name} on {tensor.device}")
    tokens = keys.shape[1]
    if case.values.shape[1] != tokens or case.up_k.shape[0] != case.up_v.shape[0]:
        raise RuntimeError(
            f"latent_decode: {tokens} keys of {case.up_k.shape[0]} heads, {case.values.shape[1]} values of "
            f"{case.up_v.shape[0]}"
        )
    if (positions is None) != (case.inv_freq is None):
        raise RuntimeError("latent_decode: positions and inv_freq go together")
    if positions is not None and (positions.shape != (batch, tokens) or 2 * case.rotated_pairs > head_dim):
        raise RuntimeError(
            f"latent_decode: positions {tuple(positions.shape)} and {case.rotated_pairs} frequencies do not fit "
            f"({batch}, {tokens}) and head_dim {head_dim}"
        )
    if positions is not None and positions.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"latent_decode: positions are {positions.dtype}, expected integers of 32 or 64 bits")
    if case.inv_freq is not None and case.inv_freq.dim() != 1:
        raise RuntimeError(f"latent_decode: inv_freq has shape {tuple(case.inv_freq.shape)}, expected (rotated / 2,)")
    if norm is not None and norm.shape != (head_dim,):
        raise RuntimeError(f"latent_decode: norm has shape {tuple(norm.shape)}, expected ({head_dim},)")
    if mask is not None and (
        mask.dim() != 3
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] != tokens
    ):
        raise RuntimeError(f"latent_decode: mask {tuple(mask.shape)} does not spread to ({batch}, {heads}, {tokens})")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"latent_decode: mask is {mask.dtype}, expected boolean or floating")


def _decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    case = Case(*arguments)
    _check(case)
    found: tuple[Tensor, Tensor] = choose(case).linear(case)
    return found


def _decode_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    case = Case(*arguments)
    _check(case)
    q = case.q
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def latent_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attend from one new token per row to cached latents.

    Args:
        arguments: those of :class:`hf_lowbit.kernels.latent_case.Case`, in its order.

    Returns:
        Outputs (batch, heads, head_dim) in the dtype of q, and the logarithm of the softmax' sum (batch, heads) in
        float32 (float64 for such a q).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if unobserved(arguments[0]):
        return _decode(*arguments)
    found: tuple[Tensor, Tensor] = torch.ops.hf_lowbit.latent_decode(*arguments)
    return found


LIBRARY.impl("latent_decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lowbit::latent_decode", _decode_fake, lib=LIBRARY)
