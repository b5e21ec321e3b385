"""Bytes that a cache holds and the time of one decoding step: latents beside dense and quantized caches.

    python -m benchmarks.kv              # all shapes and contexts: about half an hour on one core
    python -m benchmarks.kv --quick      # one short context of each; writes nothing

A step is the call of one attention module with one new token per row: projections, the cache taking the token in,
attention, output projection; random weights, bfloat16. All caches take turns, and each goes round so many layers that
none of them stays in a cache of the processor. Transformers' quantized caches take part where what they need is
installed (``pip install optimum-quanto hqq``). The floor is the time in which the bytes that a layer holds can be read
once, at the rate measured beside the case; the roofline adds the arithmetic of latents, at the rate of torch's product
of a stretch of latents with the factor of a group of keys, measured there too.

Writes ``benchmarks/results/kv.json``, case by case, and the plot; ``python -m benchmarks.report`` renders tables. What
the file holds already is not measured again; remove it to measure anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.kernels.__main__ import read_rate
from benchmarks.kv.cases import (
    DECODED_AS_A_WHOLE,
    DENSE,
    DTYPE,
    LATENTS,
    SHAPES,
    Shape,
    caches,
    fill,
    held,
    kvpress_runs,
    layers_for,
    models,
    step,
)
from hf_lowbit.kernels.cpu import latent as cpu
from hf_lowbit.report.bench import timed_in_turn

CONTEXTS = (512, 2048, 4096, 16384)
BATCHES = (1, 8)
# Tokens times width of keys and values beyond which a case is left out, for its ten gigabytes; and beyond which caches
# that are decoded as a whole in every step, for seconds, take no part.
_LARGEST = 8 * 16384 * 2 * 4096
_LARGE = 16384 * 2 * 1024
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


def quick(values: list[float]) -> float:
    """Return the time that a fifth of the turns stays below: others' work on the machine lengthens the rest."""
    return sorted(values)[len(values) // 5]


def measure(shape: Shape, tokens: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return bytes and microseconds of one layer of every cache at one context."""
    layers = layers_for(shape, tokens, batch)
    kinds = caches(models(shape, layers))
    large = tokens * batch * 2 * shape.width > _LARGE
    kinds = {name: kind for name, kind in kinds.items() if not (large and name in DECODED_AS_A_WHOLE)}
    filled, calls = {}, {}
    with torch.inference_mode():
        for name, (model, make) in kinds.items():
            cache = make()
            fill(model, cache, shape, tokens, batch)
            filled[name] = held(cache) // layers
            x = torch.randn(batch, 1, shape.hidden).to(DTYPE)

            def call(turn: int, m: Any = model, c: Any = cache, x: Any = x) -> Any:
                return step(m.model.layers[turn % layers].self_attn, m, c, x, tokens + turn // layers)

            calls[name] = call
        rate = read_rate()
        times = timed_in_turn(calls, seconds, least=5 if large else 10)
    found = {
        name: {
            "bytes": filled[name],
            "microseconds": round(quick(values) * 1e6, 1),
            "floor_microseconds": round(filled[name] / rate * 1e6, 1),
        }
        for name, values in times.items()
    }
    turns = len(times[DENSE])
    return {
        "tokens": tokens,
        "batch": batch,
        "layers": layers,
        "bytes_per_second": rate,
        "turns": turns,
        "caches": found,
    }


def faster_from(cases: list[dict[str, Any]], batch: int) -> int | None:
    """Return the measured context from which on a step with latents is faster than a dense one, None for none."""
    found = None
    for case in sorted((case for case in cases if case["batch"] == batch), key=lambda case: -case["tokens"]):
        row = case["caches"]
        if row[LATENTS]["microseconds"] >= row[DENSE]["microseconds"]:
            break
        found = case["tokens"]
    return found


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
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="others keep figures")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens in a cache")
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES, help="rows of a batch")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="for each case, at least ten turns, or five of large caches"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = RESULTS / "kv.json"
    result: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"shapes": {}}
    result["kernel"], presses = cpu.ISAS[cpu.load()[1]], kvpress_runs()
    if not (presses.startswith("not installed") and "kvpress" in result):  # what was found when it was there stays
        result["kvpress"] = presses
    for name in arguments.shapes:
        shape = SHAPES[name]
        cases = [] if arguments.quick else result["shapes"].setdefault(name, {}).setdefault("cases", [])
        known = {(case["tokens"], case["batch"]) for case in cases}
        for tokens in CONTEXTS[:1] if arguments.quick else arguments.contexts:
            for batch in arguments.batches:
                if tokens * batch * 2 * shape.width > _LARGEST or (tokens, batch) in known:
                    continue
                case = measure(shape, tokens, batch, arguments.seconds)
                cases.append(case)
                cases.sort(key=lambda one: (one["tokens"], one["batch"]))
                steps = {kind: row["microseconds"] for kind, row in case["caches"].items()}
                print(name, tokens, batch, steps, flush=True)
                if not arguments.quick:
                    write_result("kv", result)
        bandwidth = statistics.median(case["bytes_per_second"] for case in cases)
        with torch.inference_mode():
            expected = roofline(shape, bandwidth, product_rate(shape))
        measured = {str(batch): faster_from(cases, batch) for batch in BATCHES}
        result["shapes"][name] = {"cases": cases, "roofline": expected, "faster_from": measured}
        print(name, expected, measured, flush=True)
        if not arguments.quick:
            write_result("kv", result)
            if "SmolLM2-135M" in result["shapes"]:
                plot(result, PLOT)


if __name__ == "__main__":
    main()
