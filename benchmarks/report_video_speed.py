"""The table of denoising steps for ``benchmarks.report``."""

from __future__ import annotations

import json

from benchmarks.common import RESULTS
from benchmarks.tables import table


def steps() -> str:
    """Return the time of a step by version, beside dense bfloat16 and the floor."""
    path = RESULTS / "video_speed.json"
    if not path.exists():
        return "Not measured yet."
    result = json.loads(path.read_text("utf-8"))
    rows = []
    for name, case in result["cases"].items():
        dense = case["milliseconds"]["dense bfloat16"][1]
        floor = 1000 * case["operations"] / result["operations_per_second"]
        for way, (low, middle, high) in case["milliseconds"].items():
            times = f"{middle:,.1f} ({low:,.1f}, {high:,.1f})"
            rows.append([name, way, times, f"{dense / middle:.2f} ×", f"{floor / middle:.0%}"])
    header = ["transformer", "weights", "ms of a step: median (20 %, 80 %)", "as fast as dense bfloat16", "of floor"]
    environment = result["environment"]
    installed = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    return (
        table(header, rows)
        + f"\n\n{environment['cpu']}, {environment['threads']} thread(s), {result['repeats']} calls of each in turn; "
        f"{result['operations_per_second'] / 1e9:,.0f} billion operations per second at best; {installed}."
    )


TABLES = {"video_speed": steps}
