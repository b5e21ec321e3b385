"""Where the time of one product with one token goes, by leaving parts out, on the CPU.

    python -m benchmarks.kernels.profile

Layers in the form that ARB-LLM_RC gives. Few rows, whose weights stay in the second-level cache, show what computing
takes; all rows, rotating through copies, show what waiting for memory adds. Without salient columns and with one byte
for an activation instead of two show what those cost. Writes ``benchmarks/results/kernels_profile.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from benchmarks.kernels.__main__ import copies, read_rate
from hf_lowbit.formats import BinarySpec
from hf_lowbit.kernels.cpu import binary
from hf_lowbit.report.bench import random_weight, timed_in_turn, typical_spec

SHAPES = ((4096, 4096), (4096, 11008))
FEW = 256  # rows: with 11,008 columns and all tables about one megabyte
REPEAT = 16  # times at one turn, lest the products between them empty the cache


def product(spec: BinarySpec, cold: bool, digits: int) -> Callable[[int], Any]:
    """Return the product that is timed; ``cold``: with another copy of the weight at each turn."""
    weights = copies(lambda: random_weight(spec), random_weight(spec).nbytes) if cold else [random_weight(spec)]
    x = torch.randn(1, spec.in_features).bfloat16()
    calls = []
    for weight in weights:
        parts, sizes = weight.call_arguments()
        calls.append(functools.partial(binary.linear, x, parts, None, sizes, digits))
    for call in calls:
        call()  # prepares
    if cold:
        return lambda turn: calls[turn % len(calls)]()
    return lambda turn: [calls[0]() for _ in range(REPEAT)]


def without_salient(spec: BinarySpec) -> BinarySpec:
    """Return the same layer with plain columns only."""
    return dataclasses.replace(spec, salient=0, salient_groups=0)


def measure(rows: int, columns: int, seconds: float) -> dict[str, Any]:
    """Return medians in microseconds for a shape; times of few rows are scaled to all."""
    full, few = typical_spec(rows, columns), typical_spec(FEW, columns)
    ways = {
        "all rows from memory": product(full, True, 2),
        "few rows in the cache": product(few, False, 2),
        "few, one byte": product(few, False, 1),
        "few, no salient columns": product(without_salient(few), False, 2),
        "few, no salient columns, one byte": product(without_salient(few), False, 1),
        "sixteen rows": product(typical_spec(16, columns), False, 2),
    }
    with torch.no_grad():
        rate = read_rate()
        times = timed_in_turn(ways, seconds)
    medians = {
        name: statistics.median(own) * 1e6 / (1 if name.startswith("all") else REPEAT) for name, own in times.items()
    }
    fixed = medians["sixteen rows"]  # nearly all of it is for the activations and the call
    scale = rows / FEW
    hot = fixed + (medians["few rows in the cache"] - fixed) * scale
    plain = fixed + (medians["few, no salient columns"] - fixed) * scale
    return {
        "rows": rows,
        "columns": columns,
        "microseconds": {name: round(value, 1) for name, value in medians.items()},
        "total": round(medians["all rows from memory"], 1),
        "activations": round(fixed, 1),
        "plain": round(plain - fixed, 1),
        "salient": round(hot - plain, 1),
        "memory": round(medians["all rows from memory"] - hot, 1),
        "second_byte": round((medians["few rows in the cache"] - medians["few, one byte"]) * scale, 1),
        "floor": round(random_weight(full).nbytes / rate * 1e6, 1),
    }


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = ("total", "activations", "plain", "salient", "memory", "second_byte", "floor")
    table = Table("shape", *(f"{part.replace('_', ' ')}, µs" for part in parts))
    rows = [measure(*shape, 12.0) for shape in SHAPES]
    for row in rows:
        table.add_row(f"{row['rows']} × {row['columns']}", *(f"{row[part]:,.0f}" for part in parts))
    Console().print(table)
    write_result("kernels_profile", {"cases": rows})


if __name__ == "__main__":
    main()
