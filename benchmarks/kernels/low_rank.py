"""One product with low-rank factors beside two products in torch and the dense one, on weights that no cache holds.

    python -m benchmarks.kernels.low_rank              # all cases, about two minutes on one core
    python -m benchmarks.kernels.low_rank --threads 2

Every case rotates through copies of the weights, as the layers of a model do. "Ours" is a layer as a model calls it,
by the kernel that is chosen; the C++ form is also measured where it is not chosen, which shows up to how many tokens
it pays. The floor is the time in which the bytes of the factors can be read. Writes
``benchmarks/results/kernels_low_rank.json``; ``python -m benchmarks.report`` renders the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import linear

from benchmarks.common import write_result
from benchmarks.kernels.__main__ import copies, read_rate
from hf_lowbit.formats import LowRankFormat
from hf_lowbit.kernels import low_rank
from hf_lowbit.kernels.cpu import low_rank as cpu
from hf_lowbit.layers import PackedLinear
from hf_lowbit.methods.adasvd.options import rank_of
from hf_lowbit.report.bench import timed_in_turn

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (rows, columns, share kept, dtype of activations, of factors): layers of SmolLM2-135M, of a model of 7 billion
# parameters, and other dtypes
SHAPES = (
    (576, 576, 0.4, BF16, BF16),
    (1536, 576, 0.4, BF16, BF16),
    (576, 1536, 0.4, BF16, BF16),
    (4096, 4096, 0.4, BF16, BF16),
    (4096, 4096, 0.8, BF16, BF16),
    (4096, 4096, 0.4, F16, F16),
    (4096, 4096, 0.4, F32, F32),
    (4096, 4096, 0.4, F32, BF16),
)
BATCHES = (1, 4, 8, 16, 128)
_PERCENTILES = (0.2, 0.5, 0.8)


def measure(
    rows: int,
    columns: int,
    ratio: float,
    dtype: torch.dtype,
    held: torch.dtype,
    batches: tuple[int, ...],
    seconds: float,
) -> list[dict[str, Any]]:
    """Return percentiles in microseconds of each way for one shape, by number of tokens."""
    rank = rank_of((rows, columns), ratio)

    def one() -> PackedLinear:
        return PackedLinear(LowRankFormat.pack(torch.randn(rows, rank), torch.randn(rank, columns), held), None, dtype)

    layers = copies(one, rank * (rows + columns) * held.itemsize)
    factors = [(layer.packed.up, layer.packed.down) for layer in layers]
    dense = copies(lambda: torch.randn(rows, columns).to(dtype), rows * columns * dtype.itemsize)
    rate, found = read_rate(), []
    third = len(layers) // 3  # no two of the ways touch the same copy within a turn
    torch_way = low_rank.TABLE.kernels["reference"]

    def ways_for(x: torch.Tensor) -> dict[str, Callable[[int], Any]]:
        ways: dict[str, Callable[[int], Any]] = {
            "ours": lambda i: layers[i % len(layers)](x),
            "two torch products": lambda i: torch_way.linear(x, *factors[(i + third) % len(factors)], None),
            "dense": lambda i: linear(x, dense[i % len(dense)]),
        }
        if cpu.unsupported(dtype, *factors[0]) is None:
            ways["C++"] = lambda i: cpu.linear(x, *factors[(i + 2 * third) % len(factors)], None)
        return ways

    for batch in batches:
        x = torch.randn(batch, columns).to(dtype)
        times = timed_in_turn(ways_for(x), seconds)
        quantiles = {
            way: [round(float(q) * 1e6, 1) for q in torch.tensor(own).quantile(torch.tensor(_PERCENTILES))]
            for way, own in times.items()
        }
        found.append(
            {
                "rows": rows,
                "columns": columns,
                "ratio": ratio,
                "rank": rank,
                "activations": str(dtype).removeprefix("torch."),
                "factors": str(held).removeprefix("torch."),
                "batch": batch,
                "kernel": "C++" if "C++" in times and batch <= cpu.most_tokens(dtype, held) else "torch",
                "microseconds": quantiles,
                "floor_microseconds": round(rank * (rows + columns) * held.itemsize / rate * 1e6, 1),
                "rounds": len(times["ours"]),
            }
        )
    return found


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of ours")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and batch")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console, cases = Console(), []
    with torch.no_grad():
        for shape in SHAPES:
            for case in measure(*shape, tuple(arguments.batches), arguments.seconds):
                cases.append(case)
                console.print(case)
    if not arguments.no_file:
        write_result("kernels_low_rank", {"gigabytes_per_second": round(read_rate() / 1e9, 1), "cases": cases})


if __name__ == "__main__":
    main()
