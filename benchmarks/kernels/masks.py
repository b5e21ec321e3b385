"""Products with N:M sparse binary weights beside the same form without a mask, in turn, on weights no cache holds.

    python -m benchmarks.kernels.masks

Layers as PBS²P makes them: two groups, salient columns, shifts. Writes ``benchmarks/results/kernels_masks.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from benchmarks.kernels.__main__ import copies
from hf_lowbit import PackedLinear
from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.report.bench import SALIENT_SHARE, timed_in_turn

PATTERNS = {"no mask": (0, 0), "6:8": (6, 8), "5:8": (5, 8), "4:8": (4, 8)}
SHAPES = ((4096, 4096), (576, 1536))


def sparse_weight(rows: int, columns: int, n: int, m: int) -> BinaryFormat:
    """Return a packed weight with random bits, scales and shifts; ``n`` of ``m`` columns kept."""
    salient = round(SALIENT_SHARE * columns)
    spec = BinarySpec(
        rows, columns, groups=2, salient=salient, salient_groups=2, shift=True, keep_n=n, keep_m=m
    )  # fmt: skip
    mask = None
    if m:
        order = torch.rand(rows, columns // m, m).argsort(-1)
        mask = (order < n).flatten(1)
    return BinaryFormat.pack(
        spec,
        sign=torch.rand(rows, columns) < 0.5,
        row_scale=torch.rand(6, spec.blocks, rows) * 0.01 + 0.01,
        code=(torch.rand(rows, columns) < 0.5).to(torch.uint8),
        row_shift=torch.randn(4, spec.blocks, rows) * 0.01,
        salient=torch.randperm(columns)[:salient].sort().values,
        sign2=torch.rand(rows, salient) < 0.5,
        mask=mask,
    )


def call_of(weight: BinaryFormat, x: torch.Tensor) -> Callable[[int], Any]:
    """Return the product that is timed, with another copy of the weight at each turn."""

    def twin() -> PackedLinear:
        state = {name: tensor.clone() for name, tensor in weight.state().items()}
        return PackedLinear(BinaryFormat.from_state(state, weight.spec), None, torch.bfloat16)

    layers = copies(twin, weight.nbytes)
    for layer in layers:
        layer(x[:1])  # the first call of a layer prepares it
    return lambda turn: layers[turn % len(layers)](x)


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("shape", "tokens", "kept", "bits per weight", "µs", "× no mask")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in SHAPES:
            weights = {name: sparse_weight(*shape, *pattern) for name, pattern in PATTERNS.items()}
            for tokens in (1, 128):
                x = torch.randn(tokens, shape[1]).bfloat16()
                times = timed_in_turn({name: call_of(weight, x) for name, weight in weights.items()}, 6.0)
                medians = {name: statistics.median(own) * 1e6 for name, own in times.items()}
                for name, weight in weights.items():
                    row = {"shape": shape, "tokens": tokens, "kept": name, "bits": round(weight.bits_per_weight, 2)}
                    row |= {"microseconds": round(medians[name], 1)}
                    row |= {"ratio": round(medians["no mask"] / medians[name], 3)}
                    rows.append(row)
                    cells = [f"{shape[0]} × {shape[1]}", str(tokens), name, f"{row['bits']}"]
                    table.add_row(*cells, f"{row['microseconds']:,.0f}", f"{row['ratio']:.2f}")
    Console().print(table)
    write_result("kernels_masks", {"cases": rows})


if __name__ == "__main__":
    main()
