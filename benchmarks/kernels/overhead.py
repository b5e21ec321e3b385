"""What a product costs beside itself: one small layer, entered at every level, in turn; and memory beside the file's.

    python -m benchmarks.kernels.overhead

Prints the shortest of many rounds in microseconds, and bits per weight; writes nothing.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_lowbit import PackedLinear
from hf_lowbit.kernels.cpu import binary
from hf_lowbit.kernels.cpu.library import DTYPES, ISAS, Job, load
from hf_lowbit.report.bench import random_weight, typical_spec

ROUNDS, CALLS = 40, 30


def levels(rows: int, columns: int) -> dict[str, Callable[[], Any]]:
    """Return calls by name, from the layer down to the library."""
    layer = PackedLinear(random_weight(typical_spec(rows, columns)), None, torch.bfloat16)
    packed = layer.packed
    parts, sizes = packed.call_arguments()
    x, out = torch.randn(1, 1, columns).bfloat16(), torch.empty(1, 1, rows, dtype=torch.bfloat16)
    dense = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    found: dict[str, Callable[[], Any]] = {
        "nn.Linear, bfloat16": lambda: dense(x),
        "PackedLinear": lambda: layer(x),
        "format": lambda: packed.linear(x, None),
        "torch.ops": lambda: torch.ops.hf_lowbit.binary_linear(x, *parts, None, *sizes),
    }
    library, isa = load()
    if library is not None:
        made = binary.prepared(parts, *sizes)
        dtype, own = DTYPES[torch.bfloat16], ISAS.index(isa)
        found["kernel, in Python"] = lambda: binary.linear(x, parts, None, sizes)
        job = Job(ctypes.pointer(made.weight), None, out.data_ptr())
        found["library"] = lambda: (library.hflb_linear(ctypes.byref(job), 1, x.data_ptr(), dtype, 1, 2, own, 1), out)
    return found


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    table = Table("shape", "entered at", "µs")
    for shape in ((192, 576), (576, 1536)):
        calls = levels(*shape)
        best = dict.fromkeys(calls, float("inf"))
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    began = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    best[name] = min(best[name], (time.perf_counter() - began) / CALLS)
        for name, seconds in best.items():
            table.add_row(f"{shape[0]} × {shape[1]}", name, f"{seconds * 1e6:.1f}")
    Console().print(table)
    if load()[0] is not None:
        weight = random_weight(typical_spec(4096, 4096))
        parts, sizes = weight.call_arguments()
        beside = 8 * binary.Prepared(parts, *sizes).nbytes / 4096**2
        print(f"4096 × 4096: {weight.bits_per_weight:.2f} bits per weight, and {beside:.2f} kept beside them")


if __name__ == "__main__":
    main()
