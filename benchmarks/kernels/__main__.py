"""One product with a packed weight beside its peers, in turn, on weights that no cache holds.

    python -m benchmarks.kernels                 # all shapes and batches; about ten minutes on two cores
    python -m benchmarks.kernels --quick         # one shape, two batches

Every case rotates through so many copies of each weight that they do not fit into the caches, as the layers of a model
do. Peers that are installed take part: ``pip install bitsandbytes torchao``. The floor is the time in which the bytes
of the weight can be read, at the rate measured beside the cases. Writes ``benchmarks/results/kernels_cpu.json``;
``python -m benchmarks.report`` renders the table.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import write_result
from benchmarks.kernels import gpu
from hf_lowbit.formats import BinaryFormat
from hf_lowbit.kernels import dispatch
from hf_lowbit.kernels.cpu import library
from hf_lowbit.layers import PackedLinear
from hf_lowbit.report.bench import random_weight, timed_in_turn, typical_spec

SHAPES = ((4096, 4096), (4096, 11008), (576, 1536))
BATCHES = (1, 4, 16, 128, 1024)
_COLD_BYTES = 200_000_000  # more than the second-level caches of any machine we know, and most third-level ones
_PERCENTILES = (0.2, 0.5, 0.8)


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Return so many weights that they do not stay in a cache."""
    return [make() for _ in range(max(2, -(-_COLD_BYTES // nbytes)))]


def cases(rows: int, columns: int, batch: int) -> tuple[dict[str, Callable[[int], Any]], dict[str, int]]:
    """Return the products to be timed, each of the number of the round, and the bytes of their weights."""
    x = torch.randn(batch, columns).bfloat16()
    weight = random_weight(typical_spec(rows, columns))
    nbytes = {"packed": weight.nbytes}

    def twin() -> PackedLinear:
        state = {name: tensor.clone() for name, tensor in weight.state().items()}
        return PackedLinear(BinaryFormat.from_state(state, weight.spec), None, torch.bfloat16)

    layers = copies(twin, weight.nbytes)
    for own in layers:
        own(x[:1])  # the first call of a layer prepares it, which is no part of what is measured
    found: dict[str, Callable[[int], Any]] = {"ours": lambda i: layers[i % len(layers)](x)}

    def coarse(i: int) -> Tensor:
        with dispatch.forced("cpu-int8"):
            out: Tensor = layers[(i + len(layers) // 2) % len(layers)](x)  # not the one that was just read
        return out

    found["ours, int8 activations"] = coarse
    dense = copies(lambda: torch.randn(rows, columns).bfloat16(), rows * columns * 2)
    found["dense bfloat16"] = lambda i: functional.linear(x, dense[i % len(dense)])
    full = copies(lambda: torch.randn(rows, columns), rows * columns * 4)
    wide = x.float()
    found["dense float32"] = lambda i: functional.linear(wide, full[i % len(full)])
    if columns % 128 == 0:
        four = copies(
            lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                torch.randint(16, (rows, columns), dtype=torch.int32), 1
            ),
            rows * columns // 2,
        )
        scales = torch.rand(columns // 128, rows, 2).bfloat16()
        found["torch int4"] = lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, four[i % len(four)], 128, scales)
    eight = copies(lambda: torch.randint(-127, 127, (rows, columns), dtype=torch.int8), rows * columns)
    row_scale = torch.rand(rows).bfloat16()
    found["torch int8"] = lambda i: torch.ops.aten._weight_int8pack_mm(x, eight[i % len(eight)], row_scale)
    nbytes |= {"dense bfloat16": rows * columns * 2, "torch int4": rows * columns // 2}
    found |= {name: (lambda i, own=own: own[i % len(own)](x)) for name, own in peers(rows, columns).items()}
    return found, nbytes


def peers(rows: int, columns: int) -> dict[str, list[nn.Module]]:
    """Return layers of the packages that are installed; torchao has no product with int4 for x86 processors."""
    found = {}
    with contextlib.suppress(ImportError):
        found["bitsandbytes nf4"] = _bitsandbytes(rows, columns)
    with contextlib.suppress(ImportError):
        found["torchao int8"] = _torchao(rows, columns)
    return found


def _torchao(rows: int, columns: int) -> list[nn.Module]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def make() -> nn.Module:
        layer = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
        quantize_(layer, Int8WeightOnlyConfig())
        return layer

    return copies(make, rows * columns)


def _bitsandbytes(rows: int, columns: int) -> list[nn.Module]:
    import bitsandbytes

    def make() -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(torch.randn(rows, columns), requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return copies(make, rows * columns // 2)


def read_rate() -> float:
    """Return bytes per second that one pass over memory out of the caches reads, the best of several."""
    buffers = [torch.ones(_COLD_BYTES // 8) for _ in range(2)]
    best = 0.0
    for turn in range(12):
        began = time.perf_counter()
        buffers[turn % 2].sum()
        best = max(best, buffers[0].nbytes / (time.perf_counter() - began))
    return best


def measure(rows: int, columns: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return percentiles in microseconds, ratios and the share of the floor, for one shape and batch."""
    with torch.no_grad():
        found, nbytes = cases(rows, columns, batch)
        rate = read_rate()
        times = timed_in_turn(found, seconds)
    quantiles = {
        name: [round(float(q) * 1e6, 1) for q in torch.tensor(values).quantile(torch.tensor(_PERCENTILES))]
        for name, values in times.items()
    }
    ours = quantiles["ours"][1]
    floor = nbytes["packed"] / rate * 1e6
    return {
        "rows": rows,
        "columns": columns,
        "batch": batch,
        "microseconds": quantiles,
        "ratio": {name: round(values[1] / ours, 3) for name, values in quantiles.items() if name != "ours"},
        "bits_per_weight": round(8 * nbytes["packed"] / (rows * columns), 3),
        "gigabytes_per_second": round(rate / 1e9, 1),
        "floor_microseconds": round(floor, 1),
        "share_of_floor": round(floor / ours, 3),
        "rounds": len(times["ours"]),
    }


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and two batches; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of ours")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    built, isa = library.load()
    console = Console()
    if built is None:
        console.print(f"There is no compiled library ({isa}), so 'ours' is the reference.")
    rows = []
    table = Table("shape", "batch", "ours, µs", "× dense bf16", "× torch int4", "int8 mode, µs", "of byte floor")
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for batch in BATCHES[:4:3] if arguments.quick else BATCHES:
            row = measure(*shape, batch, arguments.seconds)
            rows.append(row)
            quantiles, ratio = row["microseconds"], row["ratio"]
            cells = [
                f"{quantiles['ours'][1]:,.0f}",
                f"{ratio['dense bfloat16']:.2f}",
                f"{ratio['torch int4']:.2f}" if "torch int4" in ratio else "–",
                f"{quantiles['ours, int8 activations'][1]:,.0f}",
                f"{row['share_of_floor']:.0%}",
            ]
            table.add_row(f"{shape[0]} × {shape[1]}", str(batch), *cells)
    console.print(table)
    if not arguments.quick:
        write_result("kernels_cpu", {"isa": isa if built else None, "cases": rows})
        if torch.cuda.is_available():
            gpu.main()


if __name__ == "__main__":
    main()
