"""One token's attention over latents on the CPU, in bfloat16, without rebuilding the keys: in torch's operations.

For processors that :mod:`hf_lowbit.kernels.cpu.latent` is not for, and where it was not built.

A rotation by the angles of position ``t`` turns the pairs ``j`` of a key's coordinates. Written out, the score is::

    q · R(t) U z = Σ_j cos(t θ_j) · (a_j · z) + sin(t θ_j) · (b_j · z) + c · z
    a_j = q_j U_j + q_j' U_j'        b_j = q_j' U_j - q_j U_j'        c = Σ over what is not rotated of q_i U_i

with ``U_j`` the row of the pair's first coordinate and ``U_j'`` that of its second. The rows ``a, b, c`` are the same
for all tokens, so a stretch of the cache takes one product in bfloat16, which processors have matrix units for, and
one multiplication by cosines and sines that serves as rotation and dot product at once. The stretch is short enough
for what comes between to stay in the processor's cache. With GQA the product is larger than that of rebuilding the
keys, by the number of queries that share a key, but nothing of a key's width has to be moved, turned and stored.

Rounding: rows ``a, b, c``, the products with them and the weights of the values are rounded to bfloat16; sums,
cosines, sines and the soft-max are float32.

Source: rotation of cached latents as in Palu (arXiv 2407.21118); this order of the sums is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels.latent_case import Case
from hf_lowbit.kernels.latent_codec import decode_rows, group_places, shares

# Elements of the product between: 512 KB in bfloat16, a quarter of what a core's own cache holds on servers.
_PRODUCT = 2**18
_FEWEST, _MOST = 256, 4096  # tokens of a stretch; products of fewer rows are slower for each


def why_not(case: Case) -> str | None:
    """Return why the kernel cannot take this case, None if it can."""
    if case.q.device.type != "cpu":
        return f"tensors on {case.q.device.type}"
    if case.q.dtype != torch.bfloat16 or (not case.bits and case.keys.dtype != torch.bfloat16):
        return f"computes in bfloat16, q is {case.q.dtype}, keys are {case.keys.dtype}"
    if case.norm is not None:
        return "a norm of the keys needs the keys"
    return None


def decode(case: Case) -> tuple[Tensor, Tensor]:
    """Attend; the results are those of :func:`hf_lowbit.kernels.latent_attention.latent_decode`."""
    query = (case.q.float() * case.scaling).unflatten(1, (case.up_k.shape[0], -1))
    scores = _scores(case, query)
    if case.mask is not None:
        shown = case.mask
        scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown.float()
    lse = torch.logsumexp(scores, dim=-1)
    out = _mixed(case, shares(scores, lse[..., None]))
    if case.bias_v is not None:
        out = out + case.bias_v.float().view(case.up_v.shape[0], 1, -1)
    return out.flatten(1, 2).to(case.q.dtype), lse


def _scores(case: Case, query: Tensor) -> Tensor:
    """Scores (batch, heads, tokens) of ``query`` (batch, key heads, queries of each, head_dim), scaled already."""
    keys, up_k, bits = case.keys, case.up_k, case.bits
    batch, tokens = keys.shape[:2]
    half = case.rotated_pairs
    turns = None
    if case.positions is not None and case.inv_freq is not None:
        positions = case.positions
        if batch > 1 and torch.equal(positions, positions[:1].expand_as(positions)):
            positions = positions[:1]  # no padding: all rows turn alike
        turns = _turns(positions, case.inv_freq, case.rope_scale, up_k.shape[1] > 2 * half)
    groups = []
    for heads, place in group_places(case.groups_k, case.ranks_k):
        up = up_k[heads, :, : place.stop - place.start]
        groups.append((heads, place, _folded(query[:, heads], up, half).bfloat16()))
    scores = query.new_empty((*query.shape[:3], tokens))
    largest = max(rows.shape[1:4].numel() for _, _, rows in groups)
    step = min(max(_PRODUCT // largest, _FEWEST), _MOST, max(tokens, 1))
    # Fresh memory of this size is given back and faulted in again each time, which costs more than the arithmetic.
    products = query.new_empty(step * largest, dtype=torch.bfloat16)
    turned = query.new_empty(step * largest)
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        latents = keys[:, start:end]
        if bits:
            latents = decode_rows(latents, case.ranks_k, bits, torch.bfloat16)
        for heads, place, rows in groups:
            shape = end - start, *rows.shape[1:4]
            for at in range(batch):
                weight = rows[at].flatten(0, 2)
                product = products[: shape[0] * len(weight)].view(shape[0], -1)
                found = torch.mm(latents[at, :, place], weight.T, out=product).view(shape)
                if turns is None:
                    found = found[..., 0].float()
                else:
                    out = turned[: found.numel()].view(shape)
                    found = torch.mul(found, turns[at % len(turns), start:end, None, None], out=out).sum(-1)
                scores[at, heads, :, start:end] = found.permute(1, 2, 0)
    if case.bias_k is not None:
        rotated = None if turns is None else turns.expand(batch, -1, -1)
        for heads, _ in group_places(case.groups_k, case.ranks_k):
            column = case.bias_k.float().view(up_k.shape[:2])[heads, :, None]
            own = _folded(query[:, heads], column, half)[..., 0]
            scores[:, heads] += own if rotated is None else torch.einsum("bhrw,btw->bhrt", own, rotated)
    return scores.flatten(1, 2)


def _turns(positions: Tensor, inv_freq: Tensor, rope_scale: float, rest: bool) -> Tensor:
    """Cosines, sines and, where a part is not rotated, ones: (1 or batch, tokens, width), float32."""
    angle = positions[..., None].float() * inv_freq.float()
    parts = [angle.cos() * rope_scale, angle.sin() * rope_scale]
    return torch.cat([*parts, torch.ones_like(angle[..., :1])] if rest else parts, dim=-1)


def _folded(query: Tensor, up: Tensor, half: int) -> Tensor:
    """Rows ``a, b, c`` of the module's docstring: (batch, heads, queries of each, width, rank), float32.

    Args:
        query: (batch, heads, queries of each, head_dim).
        up: (heads, head_dim, rank).
        half: number of pairs that are rotated.
    """
    q, up = query[..., None], up[:, None]
    parts = []
    if half:
        first, second = slice(0, half), slice(half, 2 * half)
        a, b = q[..., first, :] * up[..., first, :], q[..., second, :] * up[..., first, :]
        parts += [a.addcmul_(q[..., second, :], up[..., second, :]), b.sub_(q[..., first, :] * up[..., second, :])]
    if up.shape[-2] > 2 * half:
        parts.append(query[..., 2 * half :].unsqueeze(-2) @ up[..., 2 * half :, :].float())
    return torch.cat(parts, dim=-2)


def _mixed(case: Case, weights: Tensor) -> Tensor:
    """Sum latents of values by ``weights`` (batch, heads, tokens), expand: (batch, key heads, queries, head_dim)."""
    values, up_v = case.values, case.up_v
    batch, heads, tokens = weights.shape
    kv_heads = up_v.shape[0]
    small = weights.bfloat16().unflatten(1, (kv_heads, -1))
    out = weights.new_empty((batch, kv_heads, heads // kv_heads, up_v.shape[1]))
    places = group_places(case.groups_v, case.ranks_v)
    sums = [weights.new_zeros((*small[:, own, :, 0].shape, at.stop - at.start)) for own, at in places]
    for start in range(0, tokens, _MOST):
        latents = values[:, start : start + _MOST]
        if case.bits:
            latents = decode_rows(latents, case.ranks_v, case.bits, torch.bfloat16)
        for (own, place), total in zip(places, sums, strict=True):
            part = small[:, own, :, start : start + _MOST].flatten(1, 2) @ latents[..., place].bfloat16()
            total += part.view_as(total)
    for (own, place), total in zip(places, sums, strict=True):
        up = up_v[own, :, : place.stop - place.start].bfloat16()
        out[:, own] = (total.bfloat16() @ up.transpose(1, 2)).float()
    return out
