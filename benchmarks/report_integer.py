"""Table of products with packed integers for ``benchmarks.report``."""

from __future__ import annotations

import json

from benchmarks.common import RESULTS
from benchmarks.tables import table

OURS = ("W4", "W8", "W4A8", "W4A4")


def products() -> str:
    """Return how our products with integers compare with dense ones and those of other packages."""
    path = RESULTS / "kernels_integer.json"
    if not path.exists():
        return "Not measured yet."
    result = json.loads(path.read_text("utf-8"))
    others = list(dict.fromkeys(name for case in result["cases"] for name in case["microseconds"] if name not in OURS))
    others.remove("dense bfloat16")
    header = ["shape, tokens", "W4, µs: median (20 %, 80 %)", "of byte floor"]
    header += [f"{name}: × dense bf16" for name in OURS] + [f"W4: × {name}" for name in others]
    rows = []
    for case in result["cases"]:
        middle = {name: values[1] for name, values in case["microseconds"].items()}
        low, half, high = case["microseconds"]["W4"]
        row = [f"{case['rows']} × {case['columns']}, {case['batch']}", f"{half:,.0f} ({low:,.0f}, {high:,.0f})"]
        row.append(f"{case['floor_microseconds'] / half:.0%}")
        row += [f"{middle['dense bfloat16'] / middle[name]:.2f}" for name in OURS]
        row += [f"{middle[name] / half:.2f}" if name in middle else "–" for name in others]
        rows.append(row)
    environment, rates = result["environment"], [case["gigabytes_per_second"] for case in result["cases"]]
    tiles = " with AMX" if result["amx"] else ""
    bits = max(case["bits_per_weight"] for case in result["cases"])
    return (
        table(header, rows)
        + f"\n\n{environment['cpu']}, {result['isa']}{tiles}, {environment['threads']} thread(s); memory read at "
        + f"{min(rates):.0f} to {max(rates):.0f} GB/s. W4 has {bits:.2f} bits per weight, all counted."
    )


def rounding() -> str:
    """Return what rotating and rounding the input takes beside the product of codes."""
    path = RESULTS / "kernels_integer.json"
    cases = json.loads(path.read_text("utf-8")).get("rounding") if path.exists() else None
    if not cases:
        return "Not measured yet."
    header = ["shape, tokens", "rotate and round, µs", "round, µs", "multiply, µs"]
    header += ["three products of one input that is rounded once", "one product without the rotation"]
    rows = []
    for case in cases:
        turn, plain, product = (case["microseconds"][step] for step in ("rotate and round", "round", "multiply"))
        row = [f"{case['rows']} × {case['columns']}, {case['batch']}", *(f"{t:,.0f}" for t in (turn, plain, product))]
        row += [
            f"{(turn + 3 * product) / (3 * turn + 3 * product):.0%}",
            f"{(plain + product) / (turn + product):.0%}",
        ]
        rows.append(row)
    return table(header, rows)


TABLES = {"kernels-integer": products, "kernels-integer-rounding": rounding}
