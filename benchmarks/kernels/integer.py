"""Products with packed integers on this processor, beside dense ones and other packages' kernels.

    PYTHONPATH=... python -m benchmarks.kernels.integer          # with packages to compare with on the path

Random weights of 4 bits with a scale and a zero point for 64 columns, of 8 bits with a scale for a row, and the first
with activations that are rotated (blocks of 128) and rounded to 8 and 4 bits in groups of 64. So many copies of each
weight take turns that none stays in a cache. The floor is the time in which the bytes of the 4-bit weight are read, at
the rate measured beside the cases. ``--rounding`` measures the two steps of the default layer of DVD-Quant instead:
what it takes to rotate and round the input, and to multiply codes by codes.

Writes ``benchmarks/results/kernels_integer.json``; ``python -m benchmarks.report`` renders the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import RESULTS, write_result
from benchmarks.kernels.__main__ import copies, peers, read_rate
from hf_lowbit.formats import IntegerFormat, IntegerSpec
from hf_lowbit.kernels.activation import Sizes
from hf_lowbit.kernels.cpu import activation
from hf_lowbit.kernels.cpu import integer as library
from hf_lowbit.layers import PackedLinear
from hf_lowbit.report.bench import random_format, timed_in_turn

SHAPES = ((1536, 1536), (3072, 3072), (4096, 11008))
BATCHES = (1, 16, 128, 1024)
_PERCENTILES = (0.2, 0.5, 0.8)
_ROTATED: dict[str, Any] = {"rotation": 128, "activation": "token_group", "act_group_size": 64}


def forms(rows: int, columns: int) -> dict[str, IntegerSpec]:
    """Return the forms of our layers by name."""
    four: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": False}
    return {
        "W4": IntegerSpec(rows, columns, **four),
        "W8": IntegerSpec(rows, columns, bits=8),
        "W4A8": IntegerSpec(rows, columns, **four, **_ROTATED, act_bits=8),
        "W4A4": IntegerSpec(rows, columns, **four, **_ROTATED, act_bits=4),
    }


def _ours(spec: IntegerSpec, x: Tensor) -> tuple[Callable[[int], Tensor], int]:
    weight: Any = random_format(spec)
    twins = copies(
        lambda: IntegerFormat.from_state({n: t.clone() for n, t in weight.state().items()}, spec), weight.nbytes
    )
    layers = [PackedLinear(twin, None, x.dtype) for twin in twins]
    for layer in layers:
        layer(x[:1])  # the first call of a layer prepares it, which is no part of what is measured
    return lambda i: layers[i % len(layers)](x), weight.nbytes


def cases(rows: int, columns: int, batch: int) -> tuple[dict[str, Callable[[int], Any]], int]:
    """Return the products to be timed, each of the number of the round, and the bytes of the 4-bit weight."""
    x = torch.randn(batch, columns).bfloat16()
    found: dict[str, Callable[[int], Any]] = {}
    nbytes = {}
    for name, spec in forms(rows, columns).items():
        found[name], nbytes[name] = _ours(spec, x)
    dense = copies(lambda: torch.randn(rows, columns).bfloat16(), rows * columns * 2)
    found["dense bfloat16"] = lambda i: functional.linear(x, dense[i % len(dense)])
    full, wide = copies(lambda: torch.randn(rows, columns), rows * columns * 4), x.float()
    found["dense float32"] = lambda i: functional.linear(wide, full[i % len(full)])
    four = copies(
        lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.randint(16, (rows, columns), dtype=torch.int32), 1
        ),
        rows * columns // 2,
    )
    scales = torch.rand(columns // 64, rows, 2).bfloat16()
    found["torch int4"] = lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, four[i % len(four)], 64, scales)
    eight = copies(lambda: torch.randint(-127, 127, (rows, columns), dtype=torch.int8), rows * columns)
    row_scale = torch.rand(rows).bfloat16()
    found["torch int8"] = lambda i: torch.ops.aten._weight_int8pack_mm(x, eight[i % len(eight)], row_scale)
    others = peers(rows, columns)
    with contextlib.suppress(ImportError):
        others["quanto int4"] = _quanto(rows, columns)
    found |= {name: (lambda i, own=own: own[i % len(own)](x)) for name, own in others.items()}
    return found, nbytes["W4"]


def _quanto(rows: int, columns: int) -> list[nn.Module]:
    from optimum.quanto import freeze, qint4, quantize

    def make() -> nn.Module:
        layer = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
        quantize(layer, weights=qint4)
        freeze(layer)
        return layer

    return copies(make, rows * columns // 2)


def measure(rows: int, columns: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return percentiles in microseconds of every product and the floor, for one shape and batch."""
    with torch.no_grad():
        found, nbytes = cases(rows, columns, batch)
        rate = read_rate()
        times = timed_in_turn(found, seconds)
    return {
        "rows": rows,
        "columns": columns,
        "batch": batch,
        "microseconds": {
            name: [round(float(q) * 1e6, 1) for q in torch.tensor(values).quantile(torch.tensor(_PERCENTILES))]
            for name, values in times.items()
        },
        "bits_per_weight": round(8 * nbytes / (rows * columns), 3),
        "gigabytes_per_second": round(rate / 1e9, 1),
        "floor_microseconds": round(nbytes / rate * 1e6, 1),
        "rounds": len(times["W4"]),
    }


def rounding(rows: int, columns: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return median microseconds of the steps of a product with rounded activations, with and without rotation."""
    form: Any = random_format(IntegerSpec(rows, columns, 4, 32, False, **_ROTATED, act_bits=4))
    parts, x = (form.packed, form.scale, form.zero_point), torch.randn(batch, columns).bfloat16()
    sizes = Sizes(columns, 4, 32, 128, "token_group", 4, 64)
    made = activation.round_rows(x, None, None, sizes)
    if made is None:
        raise AssertionError("what is rounded is finite")
    steps: dict[str, Callable[[int], Any]] = {
        "rotate and round": lambda _: activation.round_rows(x, None, None, sizes),
        "round": lambda _: activation.round_rows(x, None, None, sizes._replace(rotation=0)),
        "multiply": lambda _: activation.product(*made, 64, parts, None, sizes[:3], x.dtype),
    }
    times = timed_in_turn(steps, seconds)
    middle = {name: round(statistics.median(values) * 1e6, 1) for name, values in times.items()}
    return {"rows": rows, "columns": columns, "batch": batch, "microseconds": middle}


def main() -> None:
    """Parse arguments, measure, write; cases of the file that are not measured again stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[rows for rows, _ in SHAPES], help="only these shapes")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="only so many tokens")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of ours")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each shape and batch")
    parser.add_argument("--rounding", action="store_true", help="only the steps of products with rounded activations")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    built, isa = library.load()
    console = Console()
    path = RESULTS / "kernels_integer.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    name, run = ("rounding", rounding) if arguments.rounding else ("cases", measure)
    kept = {(case["rows"], case["batch"]): case for case in before.get(name, [])}
    result = {part: before[part] for part in ("cases", "rounding") if part in before}
    for rows, columns in SHAPES:
        for batch in BATCHES:
            if rows not in arguments.rows or batch not in arguments.batches:
                continue
            case = kept[rows, batch] = run(rows, columns, batch, arguments.seconds)
            console.print(rows, columns, batch, case["microseconds"])
            result |= {"isa": isa if built else None, "amx": built is not None and library.has_amx()}
            write_result("kernels_integer", {**result, name: [kept[key] for key in sorted(kept)]})


if __name__ == "__main__":
    main()
