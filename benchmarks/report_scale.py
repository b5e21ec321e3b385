"""Tables of large models and of several processes for ``benchmarks.report``."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import table

NOT_YET = "Not measured yet."
LARGE = ("8b", "8b-8-blocks")


def _read(name: str) -> Any:
    path = RESULTS / "scale" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def processes() -> str:
    """Return time and memory of the same run by one process and by two, and how far the results differ."""
    result = _read("processes")
    if result is None:
        return NOT_YET
    rows = []
    for case, row in result["cases"].items():
        one, two = row["1"], row["2"]
        rows.append(
            [
                case,
                f"{one['seconds']:.1f}",
                f"{two['seconds']:.1f} ({two['seconds'] / one['seconds']:.2f})",
                f"{max(one['cpu_seconds']):.1f}",
                f"{max(two['cpu_seconds']):.1f} ({max(two['cpu_seconds']) / max(one['cpu_seconds']):.2f})",
                f"{max(one['peak_mb']):,}",
                f"{max(two['peak_mb']):,}",
                f"{row['differing']:,} of {row['bytes']:,}",
                f"{row['largest_error_gap']:.0e}" if row["largest_error_gap"] else "0",
            ]
        )
    header = [
        f"SmolLM2-135M, first {result['blocks']} blocks",
        "1 process, s",
        "2 processes, s (ratio)",
        "CPU s of the one",
        "CPU s of the busier of two (ratio)",
        "peak MB of the one",
        "peak MB of each of two",
        "bytes that differ",
        "largest relative gap of a layer's error",
    ]
    return f"{table(header, rows)}\n\n{_told(result)}"


def large() -> str:
    """Return time and memory of compressing checkpoints larger than the memory that is allowed."""
    found = [_large(result) for result in map(_read, LARGE) if result is not None]
    return "\n\n".join(found) or NOT_YET


def _large(result: Any) -> str:
    killed, resumed, sampled = result["killed"], result["resumed"], result["sampled"]
    runs = {"killed half way": killed, "resumed, to the end": resumed}
    if "whole" in result:
        runs["undisturbed"] = {"layers": resumed["layers"], **result["whole"]}
    rows = [
        [
            name,
            str(part["layers"]),
            f"{part['seconds'] / 60:.1f}",
            f"{part['cpu_seconds'] / 60:.1f}",
            f"{part['anonymous_gib']:.2f}",
            f"{part['resident_gib']:.2f}",
        ]
        for name, part in runs.items()
    ]
    size = f"{result['parameters'] / 1e9:.2f} billion parameters, {result['blocks']} blocks"
    header = [size, "layers recorded", "minutes", "CPU minutes", "anonymous GiB", "resident GiB, with pages of files"]
    same = f"{sampled['layers'] - len(sampled['differing'])} of {sampled['layers']} layers packed again alone are"
    same += " the same bytes"
    if "whole" in result:
        same += f"; all files of the undisturbed run are {'the same' if result['whole']['same'] else 'OTHERS'}"
    facts = (
        f"Dense: {result['dense_bytes'] / 2**30:.2f} GiB in bfloat16; saved: {resumed['bytes'] / 2**30:.2f} GiB "
        f"({resumed['bits_per_weight']:.3f} bits per weight of packed layers). Ceiling: {result['ceiling_gib']:g} GiB "
        f"of anonymous memory, kept by all. Packing alone took {resumed['layer_seconds'] / 60:.1f} minutes. {same}."
    )
    return f"{table(header, rows)}\n\n{facts}\n\n{_told(result)}"


def _told(result: Any) -> str:
    environment = result["environment"]
    return f"`{environment['command']}`, {environment['date']}, {environment['cpu']}."


TABLES = {"scale-processes": processes, "scale-large": large}
