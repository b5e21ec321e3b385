"""Tables of kernels for ``benchmarks.report``: products, where their time goes, masks, decoding, compiled programs."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import table

_PARTS = ("total", "activations", "plain", "salient", "memory", "second_byte", "floor")


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def decode() -> str:
    """Return the table of decoding speeds."""
    result = _read("decode")
    if result is None:
        return "Not measured yet."
    rows = []
    for name, case in result["models"].items():
        for way, speed in case["speeds"].items():
            split = case["milliseconds"].get(way)
            parts = ["–"] * 3 if split is None else [f"{split[part]:.1f}" for part in ("layers", "head", "rest")]
            rows.append([name, way, f"{speed['tokens_per_second']:.1f}", f"{speed['ratio']:.2f} ×", *parts])
    environment = result["environment"]
    where = f"{environment['cpu']}, {environment['threads']} thread(s), one sequence, median of calls in turn"
    header = ["model", "weights", "tokens per second", "of dense", "ms of a token: linear layers", "head", "all else"]
    return table(header, rows) + f"\n\n{where}."


def products() -> str:
    """Return the table of single products on the CPU."""
    result = _read("kernels_cpu")
    if result is None:
        return "Not measured yet."
    peers = list(dict.fromkeys(name for case in result["cases"] for name in case["ratio"]))
    header = ["shape, tokens", "µs: median (20 %, 80 %)", *(f"× {peer}" for peer in peers), "of byte floor"]
    rows = []
    for case in result["cases"]:
        low, middle, high = case["microseconds"]["ours"]
        ratios = [f"{case['ratio'][peer]:.2f}" if peer in case["ratio"] else "–" for peer in peers]
        rows.append(
            [
                f"{case['rows']} × {case['columns']}, {case['batch']}",
                f"{middle:,.0f} ({low:,.0f}, {high:,.0f})",
                *ratios,
                f"{case['share_of_floor']:.0%}",
            ]
        )
    environment = result["environment"]
    rates = [case["gigabytes_per_second"] for case in result["cases"]]
    bits = [case["bits_per_weight"] for case in result["cases"]]
    return (
        table(header, rows)
        + f"\n\n{environment['cpu']}, {result['isa']}, {environment['threads']} thread(s); memory read at "
        f"{min(rates):.0f} to {max(rates):.0f} GB/s; {min(bits):.2f} to {max(bits):.2f} bits per weight; torch "
        f"{environment['packages']['torch']}, commit {environment['commit']}."
    )


def profile() -> str:
    """Return where the time of a product with one token goes."""
    result = _read("kernels_profile")
    if result is None:
        return "Not measured yet."
    header = ["shape", *(f"{part.replace('_', ' ')}, µs" for part in _PARTS)]
    rows = [
        [f"{case['rows']} × {case['columns']}", *(f"{case[part]:,.0f}" for part in _PARTS)] for case in result["cases"]
    ]
    return table(header, rows)


def masks() -> str:
    """Return products with N:M sparse weights beside those without a mask."""
    result = _read("kernels_masks")
    if result is None:
        return "Not measured yet."
    rows = [
        [
            f"{case['shape'][0]} × {case['shape'][1]}, {case['tokens']}",
            case["kept"],
            f"{case['bits']:.2f}",
            f"{case['microseconds']:,.0f}",
            f"{case['ratio']:.2f}",
        ]
        for case in result["cases"]
    ]
    return table(["shape, tokens", "kept", "bits per weight", "µs", "speed beside no mask"], rows)


def compiled() -> str:
    """Return what the compiled GPU programs of each target contain."""
    result = _read("kernels_compiled")
    if result is None:
        return "Not compiled yet."
    rows = []
    for name, case in result["kernels"].items():
        target, variant, use = name.split(" ", 2)
        matrix = ", ".join(f"{op} × {count}" for op, count in case["matrix"].items())
        tile = f"{case['settings']['block_n']} × {case['settings']['block_m']}"
        wrong = "; ".join(case["problems"]) or "–"
        rows.append(
            [target, f"{variant}, {use}", tile, str(case["registers"]), str(case["spills"]),
             f"{case['shared'] / 1024:.0f}", matrix, f"{case['alu_per_weight']:.1f}", wrong]
        )  # fmt: skip
    header = ["target", "form, use", "tile", "registers", "spills", "shared KB", "matrix", "ALU per weight", "wrong"]
    return table(header, rows) + f"\n\nTriton {result['triton']}, layers of {' × '.join(map(str, result['shape']))}."


TABLES = {
    "decode": decode,
    "kernels": products,
    "kernels-profile": profile,
    "kernels-masks": masks,
    "kernels-compiled": compiled,
}
