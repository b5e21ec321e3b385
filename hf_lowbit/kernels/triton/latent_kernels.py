"""Device code of one token's attention over latents: scores, weighted sums of the values' latents, results.

* *scores*: one program rebuilds the keys of all heads of a group for some tokens. The latents of these tokens are read
  once from memory and then, head after head, from the cache; keys go from the product through bias, norm and rotation
  to the queries in registers, and are never written.
* *values*: one program sums some columns of a group's latents over a stretch of the tokens, for all queries at once,
  with the soft-max kept up as it goes.
* *results*: merges the stretches in a fixed order (no atomics, equal bits in every run) and expands the sums.

Coordinates of a key come in pairs that a rotation turns, those that are not rotated in pairs of frequency 0; ``place``
says which row of the factor a coordinate is. Angles are formed in float32, since 16 bits do not hold positions.

Rounding: latents and factors meet in the compute type ``DT`` with sums in float32, weights of the values are rounded
to it; everything between is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half_at(ptr, mask):
    """Two bytes at any address as int16: rows of codes may start at odd ones."""
    low = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    high = tl.load(ptr + 1, mask=mask, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16)


@triton.jit
def _latents(
    rows, token_ok, column, rank, start, codes, group, GROUPS: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr
):
    """Some columns of a group's latents, (tokens, columns), in the compute type.

    ``rows`` points to each token's row (tokens, 1), ``column`` is (1, columns). Without codes the group's first number
    is ``start``; with codes its first byte is ``codes``.
    """
    ok = token_ok & (column < rank)
    if BITS == 0:
        return tl.load(rows + start + column, mask=ok, other=0.0).to(DT)
    else:
        each: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 8)
        words = (rank + each - 1) // each
        place, word = column // words, column % words
        packed = tl.load(rows + codes + word, mask=ok, other=0).to(tl.int32)
        if BITS == 3:
            packed |= tl.load(rows + codes + words + word, mask=ok, other=0).to(tl.int32) << 8
            packed |= tl.load(rows + codes + 2 * words + word, mask=ok, other=0).to(tl.int32) << 16
        code = (packed >> (BITS * place)) & ((1 << BITS) - 1)
        scale = _half_at(rows + 2 * group, token_ok).to(tl.float16, bitcast=True).to(tl.float32)
        zero = _half_at(rows + 2 * (GROUPS + group), token_ok).to(tl.float32)
        return tl.where(ok, (code.to(tl.float32) - zero) * scale, 0.0).to(DT)


@triton.jit
def scores_kernel(
    q_ptr, keys_ptr, up_ptr, bias_ptr, norm_ptr, positions_ptr, mask_ptr, out_ptr,
    place_ptr, frequency_ptr, scale_ptr, groups_ptr, members_ptr,
    T, H, keys_batch, keys_token, up_head, up_row, positions_batch, mask_batch, mask_head, scaling, eps,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, REP: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BITS: tl.constexpr, DT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Scores (batch, heads, tokens) in float32, mask added.

    q (batch, heads, head_dim); keys by strides, last 1; up (key heads, head_dim, ranks) by strides, last 1; bias (key
    heads, head_dim), norm (head_dim,), positions (batch, tokens), mask by strides or None; place (2, PAIRS) int32, -1
    for none; frequency and scale (PAIRS,); groups (3, GROUPS) int32: rank, start, first byte of the codes; members
    (GROUPS, MEMBERS) int32: key heads, -1 for none.
    """
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < T
    pair = tl.arange(0, PAIRS)
    first, second = tl.load(place_ptr + pair), tl.load(place_ptr + PAIRS + pair)
    rank = tl.load(groups_ptr + group)
    start, codes = tl.load(groups_ptr + GROUPS + group), tl.load(groups_ptr + 2 * GROUPS + group)
    rows = keys_ptr + b * keys_batch + token.to(tl.int64)[:, None] * keys_token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + b * positions_batch + token, mask=token_ok, other=0)
        angle = position.to(tl.float32)[:, None] * tl.load(frequency_ptr + pair)[None, :]
        cosine, sine = tl.cos(angle), tl.sin(angle)
    for member in range(MEMBERS):
        head = tl.load(members_ptr + group * MEMBERS + member)
        if head >= 0:
            x = tl.zeros((BLOCK_T, PAIRS), tl.float32)
            y = tl.zeros((BLOCK_T, PAIRS), tl.float32)
            for r in range(0, rank, BLOCK_R):
                column = r + tl.arange(0, BLOCK_R)
                z = _latents(
                    rows, token_ok[:, None], column[None, :], rank, start, codes, group, GROUPS, BITS, DT
                )  # fmt: skip
                up = up_ptr + head * up_head + column[:, None]
                column_ok = (column < rank)[:, None]
                u = tl.load(up + first[None, :] * up_row, mask=column_ok & (first >= 0)[None, :], other=0.0).to(DT)
                x = tl.dot(z, u, x, input_precision="ieee")
                u = tl.load(up + second[None, :] * up_row, mask=column_ok & (second >= 0)[None, :], other=0.0).to(DT)
                y = tl.dot(z, u, y, input_precision="ieee")
            if bias_ptr is not None:
                own = bias_ptr + head * HEAD_DIM
                x += tl.load(own + first, mask=first >= 0, other=0.0).to(tl.float32)[None, :]
                y += tl.load(own + second, mask=second >= 0, other=0.0).to(tl.float32)[None, :]
            if norm_ptr is not None:
                inverse = 1 / tl.sqrt(tl.sum(x * x + y * y, 1) / HEAD_DIM + eps)
                x *= inverse[:, None] * tl.load(norm_ptr + first, mask=first >= 0, other=0.0).to(tl.float32)[None, :]
                y *= inverse[:, None] * tl.load(norm_ptr + second, mask=second >= 0, other=0.0).to(tl.float32)[None, :]
            if positions_ptr is not None:
                turned = x * cosine - y * sine
                y = y * cosine + x * sine
                x = turned
            factor = tl.load(scale_ptr + pair) * scaling
            for n in tl.static_range(REP):
                h = head * REP + n
                query = q_ptr + (b * H + h) * HEAD_DIM
                q0 = tl.load(query + first, mask=first >= 0, other=0.0).to(tl.float32) * factor
                q1 = tl.load(query + second, mask=second >= 0, other=0.0).to(tl.float32) * factor
                score = tl.sum(x * q0[None, :] + y * q1[None, :], 1)
                if mask_ptr is not None:
                    shown = mask_ptr + b * mask_batch + h * mask_head + token
                    score += tl.load(shown, mask=token_ok, other=0.0)
                tl.store(out_ptr + (b * H + h) * T + token, score, mask=token_ok)


@triton.jit
def values_kernel(
    scores_ptr, values_ptr, sums_ptr, largest_ptr, total_ptr, groups_ptr, members_ptr,
    T, H, values_batch, values_token, per_split, width,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a stretch of tokens: (batch, splits, heads, width), with largest scores and totals.

    ``members`` (GROUPS, ROWS) int32: query heads of each group, -1 for none. A stretch has ``per_split`` tokens.
    """
    place, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(1)
    blocks = tl.cdiv(width, BLOCK_C)
    group, column = place // blocks, place % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.load(groups_ptr + group)
    start, codes = tl.load(groups_ptr + GROUPS + group), tl.load(groups_ptr + 2 * GROUPS + group)
    head = tl.load(members_ptr + group * ROWS + tl.arange(0, ROWS))
    head_ok = head >= 0
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    end = tl.minimum(T, (split + 1) * per_split)
    for t in range(split * per_split, end, BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token_ok = token < end
        scores = tl.load(
            scores_ptr + (b * H + head)[:, None] * T + token[None, :],
            mask=head_ok[:, None] & token_ok[None, :],
            other=float("-inf"),
        )
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # a query that sees nothing so far
        weights = tl.exp(scores - base[:, None])
        factor = tl.exp(largest - base)
        total = total * factor + tl.sum(weights, 1)
        rows = values_ptr + b * values_batch + token.to(tl.int64)[:, None] * values_token
        z = _latents(rows, token_ok[:, None], column[None, :], rank, start, codes, group, GROUPS, BITS, DT)
        sums = tl.dot(weights.to(DT), z, sums * factor[:, None], input_precision="ieee")
        largest = now
    row = (b * splits + split) * H + head
    column_ok = column < rank
    tl.store(sums_ptr + row[:, None] * width + column[None, :], sums, mask=head_ok[:, None] & column_ok[None, :])
    if place % blocks == 0:
        tl.store(largest_ptr + row, largest, mask=head_ok)
        tl.store(total_ptr + row, total, mask=head_ok)


@triton.jit
def results_kernel(
    sums_ptr, largest_ptr, total_ptr, up_ptr, bias_ptr, rank_ptr, out_ptr, lse_ptr,
    H, width, up_head, up_row, splits,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Outputs (batch, heads, head_dim) and logarithms of the soft-max' sums; ``rank`` (key heads,) of the values."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLITS)
    row = (b * splits + split) * H + h
    own = tl.load(largest_ptr + row, mask=split < splits, other=float("-inf"))
    largest = tl.max(own, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(own - base)
    total = tl.sum(share * tl.load(total_ptr + row, mask=split < splits, other=0.0), 0)
    head = h // REP
    rank = tl.load(rank_ptr + head)
    d = tl.arange(0, BLOCK_D)
    found = tl.zeros((BLOCK_D,), tl.float32)
    for r in range(0, rank, BLOCK_R):
        column = r + tl.arange(0, BLOCK_R)
        column_ok = column < rank
        parts = tl.load(
            sums_ptr + row[:, None] * width + column[None, :],
            mask=(split < splits)[:, None] & column_ok[None, :],
            other=0.0,
        )
        latent = tl.sum(parts * share[:, None], 0)
        up = tl.load(
            up_ptr + head * up_head + d[:, None] * up_row + column[None, :],
            mask=(d < HEAD_DIM)[:, None] & column_ok[None, :],
            other=0.0,
        )
        found += tl.sum(up.to(tl.float32) * latent[None, :], 1)
    found = found / tl.where(total == 0, 1.0, total)
    if bias_ptr is not None:
        found += tl.load(bias_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(out_ptr + (b * H + h) * HEAD_DIM + d, found.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + b * H + h, base + tl.log(total))
