"""Products with packed weights on a GPU beside dense bfloat16, with the share of the roofline.

    python -m benchmarks.kernels.gpu        # needs a GPU; `python -m benchmarks.kernels` calls it where there is one

The roofline is the larger of two times: that of reading packed bytes, activations and result at the rate of a large
copy, and that of the product's operations at the rate of a large dense product, both measured in the same run. Writes
``benchmarks/results/kernels_gpu.json``. Nobody has run it on a GPU yet; its logic is tested on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from benchmarks.common import write_result
from hf_lowbit.report.bench import random_weight, typical_spec

SHAPES = ((4096, 4096), (4096, 11008), (14336, 4096))
BATCHES = (1, 4, 16, 128, 1024)


def seconds(statement: str, names: dict[str, Any], least: float) -> float:
    """Return the median time of a statement; the timer waits for the device."""
    return float(Timer(statement, globals=names).blocked_autorange(min_run_time=least).median)


def rates(device: str, size: int, least: float) -> tuple[float, float]:
    """Return bytes per second of a copy of ``size``² bfloat16 numbers and operations per second of a product."""
    x = torch.randn(size, size, device=device).bfloat16()
    names = {"x": x, "out": torch.empty_like(x)}
    copied = seconds("out.copy_(x)", names, least)
    multiplied = seconds("x @ x", names, least)
    return 2 * x.nbytes / copied, 2 * size**3 / multiplied


def measure(
    device: str, rows: int, columns: int, batch: int, rate: tuple[float, float], least: float
) -> dict[str, Any]:
    """Return times in microseconds, the ratio to dense and the share of the roofline for one case."""
    weight = random_weight(typical_spec(rows, columns)).to(torch.device(device))
    dense = torch.randn(rows, columns, device=device).bfloat16()
    x = torch.randn(batch, columns, device=device).bfloat16()
    names = {"weight": weight, "dense": dense, "x": x, "linear": torch.nn.functional.linear}
    with torch.no_grad():
        ours = seconds("weight.linear(x, None)", names, least)
        theirs = seconds("linear(x, dense)", names, least)
    moved = weight.nbytes + x.nbytes + 2 * batch * rows
    roofline = max(moved / rate[0], 2 * batch * rows * columns / rate[1])
    return {
        "rows": rows,
        "columns": columns,
        "batch": batch,
        "microseconds": {"ours": round(ours * 1e6, 1), "dense bfloat16": round(theirs * 1e6, 1)},
        "ratio": round(theirs / ours, 3),
        "share_of_roofline": round(roofline / ours, 3),
    }


def main() -> str | None:
    """Measure, print and write; return why not where there is no GPU."""
    if not torch.cuda.is_available():
        return "there is no GPU here; nothing was measured"
    torch.manual_seed(0)
    rate = rates("cuda", 8192, 1.0)
    cases = [measure("cuda", *shape, batch, rate, 0.5) for shape in SHAPES for batch in BATCHES]
    table = Table("shape", "batch", "ours, µs", "× dense bf16", "of roofline")
    for case in cases:
        table.add_row(
            f"{case['rows']} × {case['columns']}", str(case["batch"]), f"{case['microseconds']['ours']:,.0f}",
            f"{case['ratio']:.2f}", f"{case['share_of_roofline']:.0%}",
        )  # fmt: skip
    Console().print(table)
    name = torch.cuda.get_device_name()
    write_result("kernels_gpu", {"device": name, "bytes_per_second": rate[0], "operations": rate[1], "cases": cases})
    return None


if __name__ == "__main__":
    sys.exit(main())
