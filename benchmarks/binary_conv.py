"""Binary convolutions: what they cost in time, what they learn, and what a network of them counts.

    python -m benchmarks.binary_conv speed     # beside conv2d in float32 and bfloat16, with the floor
    python -m benchmarks.binary_conv digits    # accuracy on scikit-learn's digits, six networks, three seeds
    python -m benchmarks.binary_conv counts    # parameters and operations of the body-mesh network

Times are those of one thread, by its own clock; every row takes turns with its peers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import conv2d

from benchmarks.common import RESULTS, write_result
from examples.binary_convs import VARIANTS, digits, train
from hf_lowbit.kernels import pack_plane
from hf_lowbit.kernels.conv import binary_conv2d, floor_seconds
from hf_lowbit.kernels.cpu import popcount
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.methods.bidrn.count import count
from hf_lowbit.methods.bidrn.network import BodyMeshNet, Sizes, Style
from hf_lowbit.methods.bidrn.options import PLAIN

# (channels in, out, kernel, stride, rows, columns): those of ResNet-18 and -50, and of the body network
SHAPES = (
    (64, 64, 3, 1, 56, 56), (128, 128, 3, 1, 28, 28), (256, 256, 3, 1, 14, 14), (512, 512, 3, 1, 7, 7),
    (64, 128, 3, 2, 56, 56), (256, 512, 3, 2, 14, 14), (64, 64, 1, 1, 56, 56), (64, 256, 1, 1, 56, 56),
    (256, 64, 1, 1, 56, 56), (512, 128, 1, 1, 28, 28), (1024, 256, 1, 1, 14, 14), (512, 2048, 1, 1, 7, 7),
    (2048, 512, 1, 1, 7, 7), (64, 64, 3, 1, 64, 48),
)  # fmt: skip


def in_turn(runs: dict[str, Callable[[], Any]], turns: int = 25) -> dict[str, float]:
    """Return the least microseconds of thread time of each, all taking turns."""
    times = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 2):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            if turn >= 2:
                times[name] = min(times[name], 1e6 * (time.thread_time() - began))
    return times


def bit_rate() -> float:
    """Return the pairs of bits that one thread compares and counts in a second, all in its nearest cache."""
    geometry = ConvGeometry(4096, 64, (1, 1))
    x, sign = torch.ones(1, 4096, 8, 8), torch.zeros(64, geometry.plane_bytes, dtype=torch.uint8)
    packed = popcount.pack_activations(x, None, geometry)
    whole = in_turn({"conv": lambda: popcount.binary_conv(x, sign, None, None, None, geometry)})["conv"]
    pack = in_turn({"pack": lambda: popcount.pack_activations(x, None, geometry)})["pack"]
    return float(packed.numel() * 64 * 64 / (1e-6 * (whole - pack)))


def bandwidth() -> float:
    """Return the bytes per second that one thread reads and writes in the caches beyond the nearest."""
    source = torch.zeros(1 << 18)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (1e-6 * in_turn({"copy": lambda: target.copy_(source)})["copy"])


def speed() -> dict[str, Any]:
    """Return times of all shapes; checks that the results are right first."""
    torch.set_num_threads(1)
    bits, memory = bit_rate(), bandwidth()
    rows = []
    for ins, outs, kernel, stride, height, width in SHAPES:
        geometry = ConvGeometry(ins, outs, (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
        torch.manual_seed(0)
        x, weight = torch.randn(1, ins, height, width), torch.randn(outs, ins, kernel, kernel)
        sign, affine, act = pack_plane(geometry.as_rows(weight) > 0), torch.randn(2, outs), torch.randn(3, outs)
        shift = torch.randn(ins)
        half_x, half_weight = x.bfloat16(), weight.bfloat16()
        options = (None, stride, kernel // 2)
        with torch.no_grad():
            times = in_turn(
                {
                    "float32": lambda: conv2d(x, weight, *options),  # noqa: B023
                    "bfloat16": lambda: conv2d(half_x, half_weight, *options),  # noqa: B023
                    "popcount": lambda: binary_conv2d(x, sign, shift, affine, act, geometry),  # noqa: B023
                    "popcount avx2": lambda: popcount.binary_conv(x, sign, shift, affine, act, geometry, 1),  # noqa: B023
                }
            )
        floor = 1e6 * floor_seconds(geometry, 1, (height, width), bits, memory)
        shape = {"in": ins, "out": outs, "kernel": kernel, "stride": stride, "rows": height, "columns": width}
        rows.append({**shape, "microseconds": times, "floor": floor})
        print(shape, {name: round(value) for name, value in times.items()}, round(floor), flush=True)
    return {"bits_per_second": bits, "bytes_per_second": memory, "isa": popcount.load()[1], "rows": rows}


def learn(seeds: int) -> dict[str, Any]:
    """Return test accuracies after 12 epochs; written after each training, and what is there is not done again.

    The two networks that are compared come first, then the others.
    """
    data, path = digits(), RESULTS / "binary_conv" / "digits.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, list[float]] = {name: before.get("accuracy", {}).get(name, []) for name in VARIANTS}
    result: dict[str, Any] = {"epochs": 12, "steps": 120, "accuracy": found}
    first = [(name, seed) for seed in range(seeds) for name in ("bnn", "bidrb")]
    for name, seed in first + [(name, seed) for seed in range(seeds) for name in VARIANTS]:
        if seed < len(found[name]):
            continue
        found[name].append(train(VARIANTS[name], data, seed, 12)[1])
        write_result("binary_conv/digits", result)
        print(name, seed, found[name][-1], flush=True)
    return result


def counts() -> dict[str, Any]:
    """Return the counts of the network in four forms."""
    styles = {
        "float": Style(binarize=False, binarize_box=False),
        "bnn": Style(True, False, "binary", False, PLAIN),
        "bidrn": Style(),
        "bidrn, named modules": Style(named=True),
    }
    found = {}
    for name, style in styles.items():
        with torch.device("meta"):
            one = count(BodyMeshNet(Sizes(), style), torch.empty(1, 3, 256, 192))
        found[name] = {"params": one.params, "macs": one.macs, "operations": one.operations, "outputs": one.outputs}
    return {"counts": found}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "digits", "counts"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    result = {"speed": speed, "digits": lambda: learn(given.seeds), "counts": counts}[given.what]()
    write_result(f"binary_conv/{given.what}", result)


if __name__ == "__main__":
    main()
