"""Custom op ``hf_lowbit::latent_decode``: attention of one new token over cached latents.

With the latents ``z`` of a key or value projection (format ``latent``), per head ``h`` of group ``g(h)``::

    k_h(t) = R(t) · norm(U_h z_g(t) + b_h)         norm and rotation R only where the model has them
    s_i(t) = scaling · q_i · k_h(t) + mask         query head i belongs to the key head h = i // (H / Hk)
    p_i    = softmax over t
    o_i    = U'_h (Σ_t p_i(t) z'_g'(t)) + b'_h     values are summed as latents and expanded once

A model with neither norm nor rotation needs no keys either: ``q·U_h`` meets the latents directly. The op also returns
the logarithm of the softmax' sum, so that results over two stretches of a cache can be merged (:func:`merge`).

The reference below is the definition, computed in float32 (float64 for such inputs); other kernels say where they
round (:mod:`hf_lowbit.kernels.latent_cpu`). There is no gradient: training goes another way, see
``cache/attention.py``.

Source: ReCalKV (arXiv 2505.24357); rotation of cached latents with their own positions as in Palu (arXiv 2407.21118).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import dispatch, latent_cpu
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


def _reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    norm: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    mask: Tensor | None,
    groups_k: Sequence[int],
    ranks_k: Sequence[int],
    groups_v: Sequence[int],
    ranks_v: Sequence[int],
    scaling: float,
    rope_scale: float,
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    zk, zv = (_latents(keys, ranks_k, bits, dtype), _latents(values, ranks_v, bits, dtype))
    batch, tokens = zk.shape[:2]
    query = q.to(dtype).unflatten(1, (up_k.shape[0], -1))  # batch, key heads, queries of each, head_dim
    turn = None
    if positions is not None and inv_freq is not None:
        turn = rotation(positions, inv_freq, rope_scale)
    scores = query.new_empty((*query.shape[:3], tokens))
    for heads, place in group_places(groups_k, ranks_k):
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
            key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + eps) * norm.to(dtype)
        if turn is not None:
            key = rotate(key, turn[0].to(dtype), turn[1].to(dtype))
        scores[:, heads] = query[:, heads] @ key.transpose(2, 3)
    scores = scores.flatten(1, 2) * scaling  # batch, heads, tokens
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    lse = torch.logsumexp(scores, dim=-1)
    # A query that sees nothing (padding) gives 0, like torch's own attention, and no NaN for later tokens to meet.
    weights = shares(scores, lse[..., None]).unflatten(1, (up_k.shape[0], -1))
    out = torch.empty_like(query)
    for heads, place in group_places(groups_v, ranks_v):
        up = up_v[heads, :, : place.stop - place.start].to(dtype)
        mixed = weights[:, heads] @ zv[..., place].unsqueeze(1)  # batch, heads of the group, queries of each, rank
        out[:, heads] = mixed @ up.transpose(1, 2)
    if bias_v is not None:
        out = out + bias_v.to(dtype).view(up_v.shape[:2])[:, None]
    return out.flatten(1, 2).to(q.dtype), lse.to(dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to attend to latents.

    Attributes:
        name: for :func:`dispatch.forced` and for tables.
        summary: what it does, in a few words.
        why_not: ``(arguments of the op) -> reason or None``.
        decode: ``(arguments of the op) -> (out, lse)``.
    """

    name: str
    summary: str
    why_not: Callable[..., str | None]
    decode: Callable[..., tuple[Tensor, Tensor]]


# In order of preference.
KERNELS: dict[str, Kernel] = {
    "cpu": Kernel("cpu", "bfloat16 products, keys are not rebuilt", latent_cpu.why_not, latent_cpu.decode),
    "reference": Kernel(
        "reference", "plain torch in float32, rebuilds the keys in every call", lambda *_: None, _reference
    ),
}


def choose(*arguments: Any) -> Kernel:
    """Return the kernel for a case.

    Raises:
        RuntimeError: a kernel is forced that cannot do it; with the reason.
    """
    forced = KERNELS.get(dispatch.forced_name() or "")
    if forced is not None:
        reason = forced.why_not(*arguments)
        if reason is not None:
            raise RuntimeError(f"kernel {forced.name!r} was asked for and cannot attend to these latents: {reason}")
        return forced
    return next(kernel for kernel in KERNELS.values() if kernel.why_not(*arguments) is None)


def _check(q: Tensor, keys: Tensor, values: Tensor, up_k: Tensor, up_v: Tensor, *rest: Any) -> None:
    """Refuse what no kernel may see."""
    (bias_k, bias_v, norm, positions, inv_freq, mask, groups_k, ranks_k, groups_v, ranks_v, _, _, _, bits) = rest
    if q.dim() != 3 or not q.is_floating_point():
        raise RuntimeError(f"latent_decode: q must be (batch, heads, head_dim), floating, got {tuple(q.shape)}")
    batch, heads, head_dim = q.shape
    if bits not in (0, 3, 4, 8):
        raise RuntimeError(f"latent_decode: bits must be 0, 3, 4 or 8, got {bits}")
    for name, stored, up, owners, ranks, bias in (
        ("keys", keys, up_k, groups_k, ranks_k, bias_k),
        ("values", values, up_v, groups_v, ranks_v, bias_v),
    ):
        width = row_bytes(ranks, bits) if bits else sum(ranks)
        if stored.dim() != 3 or stored.shape[0] != batch or stored.shape[2] != width:
            raise RuntimeError(
                f"latent_decode: {name} have shape {tuple(stored.shape)}, expected ({batch}, tokens, {width})"
            )
        if (stored.dtype == torch.uint8) != bool(bits):
            raise RuntimeError(f"latent_decode: {name} are {stored.dtype}, which does not go with bits={bits}")
        if up.dim() != 3 or up.shape[1:] != (head_dim, max(ranks)) or heads % up.shape[0]:
            raise RuntimeError(
                f"latent_decode: factor of the {name} has shape {tuple(up.shape)}, expected (a divisor of {heads}, "
                f"{head_dim}, {max(ranks)})"
            )
        if len(owners) != up.shape[0] or sorted(set(owners)) != list(range(len(ranks))):
            raise RuntimeError(f"latent_decode: groups of the {name} do not fit {up.shape[0]} heads")
        if bias is not None and bias.numel() != up.shape[0] * head_dim:
            raise RuntimeError(f"latent_decode: bias of the {name} has {bias.numel()} values")
        if stored.device != q.device or up.device != q.device:
            raise RuntimeError(f"latent_decode: q is on {q.device}, {name} on {stored.device} and {up.device}")
    tokens = keys.shape[1]
    if values.shape[1] != tokens or up_k.shape[0] != up_v.shape[0]:
        raise RuntimeError(
            f"latent_decode: {tokens} keys of {up_k.shape[0]} heads, {values.shape[1]} values of {up_v.shape[0]}"
        )
    if (positions is None) != (inv_freq is None):
        raise RuntimeError("latent_decode: positions and inv_freq go together")
    if positions is not None and (positions.shape != (batch, tokens) or 2 * inv_freq.numel() > head_dim):
        raise RuntimeError(
            f"latent_decode: positions {tuple(positions.shape)} and {inv_freq.numel()} frequencies do not fit "
            f"({batch}, {tokens}) and head_dim {head_dim}"
        )
    if norm is not None and norm.shape != (head_dim,):
        raise RuntimeError(f"latent_decode: norm has shape {tuple(norm.shape)}, expected ({head_dim},)")
    if mask is not None and (
        mask.dim() != 3
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] != tokens
    ):
        raise RuntimeError(f"latent_decode: mask {tuple(mask.shape)} does not spread to ({batch}, {heads}, {tokens})")


def _decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(*arguments)
    return choose(*arguments).decode(*arguments)


def _decode_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(q, *rest)
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def latent_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attend from one new token per row to cached latents.

    Args:
        arguments: in this order

            - q: (batch, heads, head_dim), normed and rotated.
            - keys, values: (batch, tokens, sum of ranks) floating, or (batch, tokens, row_bytes) uint8.
            - up_k, up_v: (key heads, head_dim, largest rank), zero beyond the rank of a head's group.
            - bias_k, bias_v: key heads · head_dim numbers, or None.
            - norm: (head_dim,), factors of an RMS norm of the keys, or None.
            - positions: (batch, tokens) int32, and inv_freq: (rotated / 2,), or None for both.
            - mask: (1 or batch, 1 or heads, tokens), boolean (true: seen) or added to the scores, or None.
            - groups_k, ranks_k, groups_v, ranks_v: group of every head, rank of every group.
            - scaling, rope_scale, eps: of the scores, of cosine and sine, of the norm.
            - bits: 8, 4 or 3 for rows of codes, 0 for latents.

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
