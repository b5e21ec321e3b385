"""Bytes that a cache holds and the time of one decoding step: latents beside dense and quantized caches.

    python -m benchmarks.kv              # writes benchmarks/results/kv.json and a plot
    python -m benchmarks.kv --quick      # one short context; writes nothing

A step is the call of one attention module with one new token per row: projections, the cache taking the token in,
attention, output projection; random weights, bfloat16. All caches take turns. The floor is the time in which the bytes
held can be read once, at the rate measured beside the case; the roofline adds the arithmetic of latents at the rate
of the product of a stretch of latents with the folded queries, measured there too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, write_result
from benchmarks.kernels.__main__ import read_rate
from benchmarks.kv.cases import DTYPE, SHAPES, Shape, caches, fill, held, models, step
from hf_lowbit.kernels.latent_attention import KERNELS
from hf_lowbit.report.bench import timed_in_turn

CONTEXTS = (512, 2048, 4096, 16384)
BATCHES = (1, 8)
# Tokens times width of keys and values beyond which a case is left out: memory and patience.
_LARGEST = 16384 * 2 * 4096
PLOT = ROOT / "benchmarks" / "figures" / "kv_memory.svg"


def product_rate(shape: Shape) -> float:
    """Return operations per second of the product that a group of keys takes, the best of several."""
    z = torch.randn(512, shape.key_rank).to(DTYPE)
    up = torch.randn(shape.together * shape.head_dim, shape.key_rank).to(DTYPE)
    best = 0.0
    for _ in range(30):
        began = time.perf_counter()
        z @ up.T
        best = max(best, 2 * 512 * up.numel() / (time.perf_counter() - began))
    return best


def roofline(shape: Shape, bandwidth: float, operations: float) -> dict[str, Any]:
    """Return nanoseconds of a cached token and microseconds of a step's fixed part, and from where latents win.

    A cached token costs the longer of reading it and computing with it. The fixed part is the reading of what differs
    between the two modules: the rows of both projections against both factors.
    """
    n, bytes_each = shape.width, DTYPE.itemsize
    ranks = shape.kv_heads // shape.together * shape.key_rank + shape.value_rank
    flops = {
        "dense": 4 * shape.heads * shape.head_dim,
        "latents": 2 * n * shape.key_rank + 3 * n + 2 * shape.heads * (shape.head_dim + shape.value_rank),
    }
    per_token = {
        "dense": max(2 * n * bytes_each / bandwidth, flops["dense"] / operations),
        "latents": max(ranks * bytes_each / bandwidth, flops["latents"] / operations),
    }
    fixed = {
        "dense": 2 * n * shape.hidden * bytes_each / bandwidth,
        "latents": (ranks * shape.hidden + n * (shape.key_rank + shape.value_rank)) * bytes_each / bandwidth,
    }
    gain, debt = per_token["dense"] - per_token["latents"], fixed["latents"] - fixed["dense"]
    return {
        "ceiling": per_token["dense"] / per_token["latents"],
        "from_tokens": None if gain <= 0 else max(0, round(debt / gain)),
        "nanoseconds": {name: value * 1e9 for name, value in per_token.items()},
        "fixed_microseconds": {name: value * 1e6 for name, value in fixed.items()},
        "operations_per_byte": operations / bandwidth,
    }


def measure(shape: Shape, tokens: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return bytes and microseconds (median) of every cache at one context."""
    kinds = caches(models(shape))
    filled, calls = {}, {}
    with torch.inference_mode():
        for name, (model, make) in kinds.items():
            cache = make()
            fill(model, cache, shape, tokens, batch)
            filled[name] = held(cache)
            x = torch.randn(batch, 1, shape.hidden).to(DTYPE)
            attention = model.model.layers[0].self_attn

            def call(turn: int, a: Any = attention, m: Any = model, c: Any = cache, x: Any = x) -> Any:
                return step(a, m, c, x, tokens + turn)

            calls[name] = call
        rate = read_rate()
        times = timed_in_turn(calls, seconds)
    found = {
        name: {
            "bytes": filled[name],
            "microseconds": round(float(torch.tensor(values).median()) * 1e6, 1),
            "floor_microseconds": round(filled[name] / rate * 1e6, 1),
        }
        for name, values in times.items()
    }
    turns = len(times["dense"])
    return {"tokens": tokens, "batch": batch, "bytes_per_second": rate, "turns": turns, "caches": found}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bytes over context for one row of SmolLM2-135M, 30 layers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kv"
    from matplotlib import pyplot

    cases = [case for case in result["shapes"]["SmolLM2-135M"]["cases"] if case["batch"] == 1]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name in cases[0]["caches"]:
        axes.plot(
            [case["tokens"] for case in cases],
            [30 * case["caches"][name]["bytes"] / 1e6 for case in cases],
            marker="o",
            label=name,
        )
    axes.set(xlabel="tokens", ylabel="MB held", title="Cache of SmolLM2-135M, bfloat16, half of the width kept")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short context; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case, at least ten turns")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"kernel": KERNELS["cpu"].summary, "shapes": {}}
    for name, shape in SHAPES.items():
        cases = []
        for tokens in CONTEXTS[:1] if arguments.quick else CONTEXTS:
            for batch in BATCHES:
                if tokens * batch * 2 * shape.width <= _LARGEST:
                    cases.append(measure(shape, tokens, batch, arguments.seconds))
                    steps = {kind: row["microseconds"] for kind, row in cases[-1]["caches"].items()}
                    print(name, tokens, batch, steps, flush=True)
        bandwidth = sorted(case["bytes_per_second"] for case in cases)[len(cases) // 2]
        with torch.inference_mode():
            expected = roofline(shape, bandwidth, product_rate(shape))
        result["shapes"][name] = {"cases": cases, "roofline": expected}
        print(name, expected, flush=True)
    if not arguments.quick:
        write_result("kv", result)
        plot(result, PLOT)


if __name__ == "__main__":
    main()
