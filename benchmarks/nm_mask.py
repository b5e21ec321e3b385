"""Two ways to store an N:M mask: one bit per column, or the number of each group's pattern among all C(M, N).

    python -m benchmarks.nm_mask            # about a minute on one core

The bitmap is what the ``binary`` format stores: a P128 plane. The code needs ceil(log2 C(M, N)) bits per group, packed
without gaps, and a table of C(M, N) patterns to be read. For every N:M and shape the bytes and the time to unpack to
booleans are measured; both are plain torch, and the code is read in the best way there is, a table lookup of a group.

Writes ``benchmarks/results/nm_mask.json``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_result
from hf_lowbit.formats import BinarySpec
from hf_lowbit.kernels import pack_plane, unpack_plane

RATIOS = ((2, 4), (4, 8), (5, 8), (6, 8), (8, 16), (12, 16))
SHAPES = ((576, 576), (1536, 576), (4096, 4096))


def patterns(n: int, m: int) -> Tensor:
    """Return all masks of a group in the order of their numbers, (C(m, n), m), bool."""
    rows = [[column in chosen for column in range(m)] for chosen in itertools.combinations(range(m), n)]
    return torch.tensor(rows)


def random_mask(rows: int, columns: int, n: int, m: int) -> Tensor:
    """Return a mask in which every pattern is equally likely, (rows, columns), bool."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand((rows, columns // m, m), generator=generator)
    ranks = score.argsort(-1).argsort(-1)
    return (ranks < n).flatten(1)


def code_bits(n: int, m: int) -> int:
    """Return the bits of one group's number."""
    return (math.comb(m, n) - 1).bit_length()


def encode(mask: Tensor, n: int, m: int) -> Tensor:
    """Return the numbers of a mask's groups, ``code_bits`` each, one after the other; (rows, bytes), uint8."""
    weights = 2 ** torch.arange(m)
    number_of = torch.zeros(2**m, dtype=torch.int64)
    number_of[(patterns(n, m) * weights).sum(1)] = torch.arange(math.comb(m, n))
    numbers = number_of[(mask.unflatten(1, (-1, m)) * weights).sum(-1)]
    width = code_bits(n, m)
    bits = (numbers.unsqueeze(-1) >> torch.arange(width)) & 1
    flat = bits.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8)).sum(-1).to(torch.uint8)


def decode(codes: Tensor, columns: int, n: int, m: int, table: Tensor) -> Tensor:
    """Return the mask of :func:`encode`; reads the two or three bytes a number may span, shifts, looks up."""
    width = code_bits(n, m)
    start = torch.arange(columns // m) * width
    padded = torch.nn.functional.pad(codes, (0, 3)).to(torch.int32)
    byte = start // 8
    word = padded[:, byte] | padded[:, byte + 1] << 8
    if width > 9:
        word |= padded[:, byte + 2] << 16
    numbers = word >> (start % 8).to(torch.int32) & (1 << width) - 1
    return table[numbers].flatten(1)


def in_turn(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median milliseconds of each, all taking turns so that a busy machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(16):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def compare(rows: int, columns: int, n: int, m: int) -> dict[str, Any]:
    """Return bytes and times of both ways, and what the mask is of a whole packed layer."""
    mask = random_mask(rows, columns, n, m)
    plane, codes, table = pack_plane(mask), encode(mask, n, m), patterns(n, m)
    if not (
        torch.equal(unpack_plane(plane, columns), mask) and torch.equal(decode(codes, columns, n, m, table), mask)
    ):
        raise RuntimeError("a mask is not read back as it was")
    spec = BinarySpec(rows, columns, groups=2, shift=True, keep_n=n, keep_m=m)
    shapes = {"row_scale": 2 * spec.blocks * 2, "row_shift": 2 * spec.blocks * 2}
    layer = plane.numel() + 2 * pack_plane(mask[:, : spec.kept]).numel() + rows * sum(shapes.values())
    return {
        "rows": rows,
        "columns": columns,
        "n": n,
        "m": m,
        "bits_per_weight": {"bitmap": 8 * plane.numel() / mask.numel(), "code": 8 * codes.numel() / mask.numel()},
        "bound": math.log2(math.comb(m, n)) / m,
        "layer_saved": (plane.numel() - codes.numel()) / layer,
        "milliseconds": in_turn(
            {
                "bitmap": lambda: unpack_plane(plane, columns),
                "code": lambda: decode(codes, columns, n, m, table),
            }
        ),
    }


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    cases = [compare(*shape, *ratio) for shape in SHAPES for ratio in RATIOS]
    write_result("nm_mask", {"cases": cases})
    for case in cases:
        bits, times = case["bits_per_weight"], case["milliseconds"]
        print(f"{case['rows']} × {case['columns']} {case['n']}:{case['m']}", bits, times, case["layer_saved"])


if __name__ == "__main__":
    main()
