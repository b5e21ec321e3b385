"""Tables of ``benchmarks.binary_conv`` for ``benchmarks.report``: times, digits, counts of the body-mesh network."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import number, table
from examples.binary_convs import TITLES

# arXiv 2311.14323, Table 1: parameters in millions, operations in billions
PUBLISHED = {
    "float": ("77.84", "16.85"),
    "bnn": ("21.61", "2.63"),
    "bidrn": ("17.22", "2.50"),
    "bidrn, named modules": ("17.22", "2.50"),
}


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / "binary_conv" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def speed() -> str:
    """Return times beside dense convolutions; above 1 the popcount convolution is the faster one."""
    result = _read("speed")
    if result is None:
        return "Not measured yet."
    rows = []
    for row in result["rows"]:
        times, floor = row["microseconds"], row["floor"]
        own = times["popcount"]
        cells = [number(times[name], 0) for name in ("float32", "bfloat16", "popcount", "popcount avx2")]
        ratios = [f"{times[name] / own:.2f}" for name in ("float32", "bfloat16")]
        shape = f"{row['in']} → {row['out']}, {row['kernel']} × {row['kernel']}"
        shape += f", stride {row['stride']}" if row["stride"] > 1 else ""
        rows.append(
            [f"{shape}, {row['rows']} × {row['columns']}", *cells, *ratios, f"{number(floor, 0)} ({own / floor:.1f})"]
        )
    header = [
        "convolution",
        "float32",
        "bfloat16",
        "popcount",
        "popcount, AVX2",
        "ratio to float32",
        "ratio to bfloat16",
    ]
    environment = result["environment"]
    note = (
        f"Microseconds of one thread, {environment['cpu']}, {result['isa']}, torch "
        f"{environment['packages']['torch']}. "
        f"Floor: the larger of {result['bits_per_second'] / 1e12:.1f}e12 pairs of bits and "
        f"{result['bytes_per_second'] / 1e9:.0f}e9 bytes per second, both measured in the same run; in brackets the "
        "time as a multiple of it."
    )
    return table([*header, "floor"], rows) + "\n\n" + note


def learned() -> str:
    """Return accuracies on the digits."""
    result = _read("digits")
    if result is None:
        return "Not measured yet."
    rows = []
    for name, scores in result["accuracy"].items():
        shown = " / ".join(f"{100 * score:.1f}" for score in scores)
        rows.append([TITLES[name], shown])
    return table(["network", "accuracy, %, one per seed"], rows)


def counts() -> str:
    """Return counts beside the published ones."""
    result = _read("counts")
    if result is None:
        return "Not measured yet."
    rows = []
    for name, found in result["counts"].items():
        params, operations = PUBLISHED[name]
        own = found["macs"] if name == "float" else found["operations"]
        rows.append([name, f"{found['params'] / 1e6:.4f}", params, f"{own / 1e9:.3f}", operations])
    return table(["network", "parameters, M", "published", "operations, G", "published"], rows)


TABLES = {"binary-conv-speed": speed, "binary-conv-digits": learned, "binary-conv-counts": counts}
