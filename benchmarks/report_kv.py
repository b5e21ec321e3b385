"""Tables of caches of latents for ``benchmarks.report``: bytes, times, long texts, compiled programs."""

from __future__ import annotations

import itertools
import json
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import table

NOT_YET = "Not measured yet."
PLOT = "figures/kv_memory.svg"


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _measured(result: Any) -> dict[str, Any]:
    """Return the shapes that are measured to their end."""
    return {name: shape for name, shape in result["shapes"].items() if "roofline" in shape}


def _kinds(result: Any) -> list[str]:
    """Return the caches compared; those that are decoded as a whole are left out of large cases."""
    return list(next(iter(_measured(result).values()))["cases"][0]["caches"])


def memory() -> str:
    """Return bytes of one layer by context and cache; dense is larger by so much."""
    result = _read("kv")
    if result is None:
        return NOT_YET
    rows, kinds = [], _kinds(result)
    for name, shape in _measured(result).items():
        for case in shape["cases"]:
            if case["batch"] == 1:
                dense = case["caches"]["dense"]["bytes"]
                rows_of = [case["caches"].get(kind) for kind in kinds]
                held = [f"{row['bytes'] / 1e6:.2f} ({dense / row['bytes']:.2f})" if row else "–" for row in rows_of]
                rows.append([f"{name}, {case['tokens']}", *held])
    return table(["shape, tokens: MB of a layer (dense is larger by)", *kinds], rows)


def steps() -> str:
    """Return the time of one step by context, batch and cache."""
    result = _read("kv")
    if result is None:
        return NOT_YET
    rows, kinds = [], _kinds(result)
    for name, shape in _measured(result).items():
        for case in shape["cases"]:
            rows_of = [case["caches"].get(kind) for kind in kinds]
            times = [
                f"{row['microseconds']:,.0f} ({row['floor_microseconds']:,.0f})" if row else "–" for row in rows_of
            ]
            gain = case["caches"]["dense"]["microseconds"] / case["caches"]["latents"]["microseconds"]
            rows.append([f"{name}, {case['tokens']} × {case['batch']}", *times, f"{gain:.2f}"])
    environment = result["environment"]
    rates = [case["bytes_per_second"] / 1e9 for shape in _measured(result).values() for case in shape["cases"]]
    header = ["shape, tokens × rows: µs of a step (byte floor)", *kinds, "dense / latents"]
    return (
        table(header, rows)
        + f"\n\n{environment['cpu']}, {result['kernel']}, {environment['threads']} thread(s); memory read at "
        f"{min(rates):.0f} to {max(rates):.0f} GB/s; torch {environment['packages']['torch']}, commit "
        f"{environment['commit']}."
    )


def roofline() -> str:
    """Return what the roofline predicts, and from which context on a step was faster."""
    result = _read("kv")
    if result is None:
        return NOT_YET

    def context(tokens: int | None) -> str:
        return "never" if tokens is None else f"{tokens:,}"

    def predicted(expected: dict[str, Any]) -> str:
        """Where a cached token costs more, fewer weights to read still make up for some of them."""
        saved = expected["fixed_microseconds"]["dense"] - expected["fixed_microseconds"]["latents"]
        lost = expected["nanoseconds"]["latents"] - expected["nanoseconds"]["dense"]
        if expected["from_tokens"] is not None or saved <= 0:
            return context(expected["from_tokens"])
        return f"up to {1000 * saved / lost:,.0f}" if lost > 0 else "0"

    rows = []
    for name, shape in _measured(result).items():
        expected = shape["roofline"]
        times = expected["nanoseconds"]
        rows.append(
            [
                name,
                f"{expected['operations_per_byte']:.0f}",
                f"{times['dense']:.0f}, {times['latents']:.0f}",
                f"{expected['ceiling']:.2f}",
                predicted(expected),
                *(context(tokens) for tokens in shape["faster_from"].values()),
            ]
        )
    batches = next(iter(_measured(result).values()))["faster_from"]
    header = ["shape", "operations per byte", "ns of a cached token: dense, latents", "most to gain, ×"]
    header += ["predicted from tokens", *(f"measured from, {batch} row(s)" for batch in batches)]
    return table(header, rows)


def kvpress() -> str:
    """Return whether presses of kvpress run beside these figures."""
    result = _read("kv")
    return NOT_YET if result is None else f"kvpress 0.5.5, `KnormPress(compression_ratio=0.5)`: {result['kvpress']}."


def quality() -> str:
    """Return perplexity by position and found needles."""
    result = _read("kv_quality")
    if result is None:
        return NOT_YET
    count, length = result["texts"]
    edges = [0, 512]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    places = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    perplexities = [[name, *(f"{value:.2f}" for value in row["perplexity"])] for name, row in result["rows"].items()]
    lengths = [str(n) for n in result["lengths"] if any(str(n) in row["needles"] for row in result["rows"].values())]
    shares = [(name, [row["needles"].get(n) for n in lengths]) for name, row in result["rows"].items()]
    found = [[name, *("–" if share is None else f"{share:.0%}" for share in row)] for name, row in shares]
    environment, counts = result["environment"], result["needles"]
    return (
        table([f"perplexity by position, {count} texts of {length} tokens", *places], perplexities)
        + "\n\n"
        + table(["needles found in a text of so many tokens", *(f"{n}, of {counts[n]}" for n in lengths)], found)
        + f"\n\nbfloat16; {environment['cpu']}, torch {environment['packages']['torch']}, commit "
        f"{environment['commit']}."
    )


def compiled() -> str:
    """Return what the compiled Triton kernels contain."""
    result = _read("kv_compiled")
    if result is None:
        return "Not compiled yet."
    rows = []
    for name, case in result["kernels"].items():
        target, shape, held, kernel = name.split(" | ")
        matrix = ", ".join(f"{op} × {count}" for op, count in case["matrix"].items()) or "–"
        wrong = "; ".join(case["problems"]) or "–"
        numbers = [str(case["registers"]), str(case["spills"]), f"{case['shared'] / 1024:.1f}", matrix, wrong]
        rows.append([target, f"{shape}, {held}", kernel, *numbers])
    header = ["target", "shape, latents", "kernel", "registers", "spills", "shared KB", "matrix", "wrong"]
    return table(header, rows) + f"\n\nTriton {result['triton']}, {result['tokens']} tokens."


TABLES = {
    "kv-memory": memory,
    "kv-steps": steps,
    "kv-roofline": roofline,
    "kv-kvpress": kvpress,
    "kv-quality": quality,
    "kv-compiled": compiled,
}
