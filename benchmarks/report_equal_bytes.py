"""Tables of quality at equal bytes for ``benchmarks.report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_results
from benchmarks.tables import number, table

FOLDER = "equal_bytes"
BUDGETS = (2.0, 2.5, 3.0, 4.0, 5.0)
PLOT = ROOT / "benchmarks" / "figures" / "equal_bytes.svg"
WORST_DRAWN = 1000  # perplexity; what is above stands in the table only
NAMES = {
    "integer-2-64": "integers, 2 bits, groups of 64 (`DVDQuantConfig`, calibrated)",
    "integer-2-32": "integers, 2 bits, groups of 32 (`DVDQuantConfig`, calibrated)",
    "integer-3-128": "integers, 3 bits, groups of 128 (`DVDQuantConfig`, calibrated)",
    "integer-4-128": "integers, 4 bits, groups of 128 (`DVDQuantConfig`, calibrated)",
    "integer-4-32-no-data": "integers, 4 bits, groups of 32 (`DVDQuantConfig`, without data)",
    "integer-4-32-no-data-balanced": "integers, 4 bits, groups of 32 (without data, columns balanced)",
    "integer-2-32-no-data": "integers, 2 bits, groups of 32 (`DVDQuantConfig`, without data)",
    "integer-2-64-no-data": "integers, 2 bits, groups of 64 (`DVDQuantConfig`, without data)",
    "integer-3-128-no-data": "integers, 3 bits, groups of 128 (`DVDQuantConfig`, without data)",
    "adasvd-int4": "AdaSVD, ratio 0.55, factors of 4 bits",
    "arb-rc": "ARB-RC without column-group bitmap, 3 iterations",
    "pbs2p-4of8-one-group": "PBS²P 4:8, one group",
    "hqq-2-64": "HQQ, 2 bits, groups of 64",
    "hqq-2-16": "HQQ, 2 bits, groups of 16",
    "hqq-3-64": "HQQ, 3 bits, groups of 64",
    "hqq-4-64": "HQQ, 4 bits, groups of 64",
    "quanto-2": "quanto, qint2",
    "quanto-4": "quanto, qint4",
    "bitsandbytes-nf4": "bitsandbytes, nf4, double quantization",
    "gptq-2-64": "GPTQ of LLM Compressor, 2 bits, groups of 64",
    "gptq-3-64": "GPTQ of LLM Compressor, 3 bits, groups of 64",
    "torchao-4-32": "torchao, 4 bits in bytes, groups of 32",
    "torchao-3-64": "torchao, 3 bits in bytes, groups of 64",
    "torchao-2-64": "torchao, 2 bits in bytes, groups of 64",
}
# rows of the other tables that fit, measured on the same held-out text: file -> name, calibration
ELSEWHERE = {
    "quality/rounding": "plain 1-bit rounding, without data",
    "quality/pbs2p-4of8-one-group-32x512": "PBS²P 4:8, one group",
    "quality/rc": "ARB-RC without column-group bitmap (128 × 512 tokens)",
    "quality/rc-cgb-32x512": "ARB-LLM_RC",
    "quality/pbs2p-4of8-32x512": "PBS²P 4:8",
    "quality/pbs2p-6of8-32x512": "PBS²P 6:8",
}


def found_rows() -> list[dict[str, Any]]:
    """Return all measured rows with the name they have in the table."""
    results = read_results(FOLDER)
    speeds = results.get("speed", {}).get("rows", {})
    rows = []
    for name, result in results.items():
        if name in ("dense", "errors", "speed"):
            continue
        shown = NAMES.get(name)
        if name.startswith("recipe-"):
            shown = f"**recipe for {name.removeprefix('recipe-')} bits** (chosen by a budget)"
        if shown is None:
            raise ValueError(f"{name}: has no name in the table")
        speed = speeds.get(name, {}).get("ratio")
        rows.append({**result, "name": shown, "speed": speed})
    for file, shown in ELSEWHERE.items():
        folder, _, stem = file.partition("/")
        result = read_results(folder).get(stem)
        if result is None or any(row["name"] == shown for row in rows):
            continue
        weights = 106_168_320  # of the linear layers in the blocks of SmolLM2-135M
        stored = round(result["bits_per_weight"] * weights / 8)
        rows.append(
            {
                "name": shown,
                "bits": result["bits_per_weight"],
                "bytes": stored,
                "perplexity": result["perplexity"],
                "speed": None,
                "family": "method",
            }
        )
    return rows


def equal_bytes() -> str:
    """Return the table: rows under the smallest budget that they keep, the best of each first."""
    results, rows = read_results(FOLDER), found_rows()
    header = [
        "at most, bits per weight",
        "what",
        "bits per weight",
        "MB of the layers",
        "perplexity",
        "decoding, × dense",
    ]
    lines = []
    for budget in BUDGETS:
        lower = max((other for other in BUDGETS if other < budget), default=0.0)
        own = sorted((row for row in rows if lower < row["bits"] <= budget), key=lambda row: row["perplexity"])
        lines += [[f"{budget:g}", *_cells(row)] for row in own]
    lines += [["more", *_cells(row)] for row in rows if row["bits"] > BUDGETS[-1]]
    if "dense" in results:
        lines.append(
            [
                "",
                "dense bfloat16",
                "16.00",
                number(106_168_320 * 2 / 1e6, 1),
                number(results["dense"]["perplexity"], 1),
                "1.00",
            ]
        )
    return table(header, lines, words=True) if lines else "Not measured yet."


def _cells(row: dict[str, Any]) -> list[str]:
    perplexity = row["perplexity"]
    speed = "–" if row["speed"] is None else number(row["speed"], 2)
    return [
        row["name"],
        number(row["bits"], 2),
        number(row["bytes"] / 1e6, 1),
        number(perplexity, 1 if perplexity < 1000 else 0),
        speed,
    ]


def winners() -> str:
    """Return for each budget what has the least perplexity, and what of the other kinds comes next."""
    rows, lines = found_rows(), []
    for budget in BUDGETS[:4]:
        own = sorted((row for row in rows if row["bits"] <= budget), key=lambda row: row["perplexity"])
        kinds = {
            kind: next((row for row in own if row["family"] == kind), None) for kind in ("recipe", "method", "peer")
        }
        cells = [f"{row['name']}: {row['perplexity']:,.1f}" if row else "none measured" for row in kinds.values()]
        best = {"recipe": "the recipe", "method": "one method", "peer": "another library"}
        lines.append([f"{budget:g}", best[own[0]["family"]] if own else "–", *cells])
    header = ["at most, bits per weight", "least perplexity", "recipe", "one method everywhere", "another library"]
    return table(header, lines, words=True)


def chosen() -> str:
    """Return what the recipes are made of, and what was predicted of them."""
    lines = []
    for name, result in read_results(FOLDER).items():
        if name.startswith("recipe-"):
            parts = ", ".join(f"{count} × {method} ({settings})" for method, settings, count in result["rules"])
            lines.append([name.removeprefix("recipe-"), parts])
    return (
        table(["budget, bits per weight", "layers × candidate"], lines, words=True) if lines else "Not measured yet."
    )


def setup() -> str:
    """Return one line on where the figures come from."""
    results = read_results(FOLDER)
    packages = sorted({result["package"] for result in results.values() if "package" in result})
    one = results.get("dense") or next(iter(results.values()), None)
    if one is None:
        return "Not measured yet."
    environment = one["environment"]
    return f"{environment['cpu']}, torch {environment['packages']['torch']}; {', '.join(packages)}."


def plot(path: Path = PLOT) -> None:
    """Draw perplexity over bits per weight: recipes, single methods, other libraries; the dense model is a line."""
    import matplotlib
    from matplotlib.figure import Figure

    results = read_results(FOLDER)
    drawn = [row for row in found_rows() if row["bits"] <= BUDGETS[-1] and row["perplexity"] <= WORST_DRAWN]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for family, label, marker in (
        ("recipe", "hf_lowbit, chosen by a budget", "o-"),
        ("method", "hf_lowbit, one method", "s"),
        ("peer", "other libraries", "^"),
    ):
        own = sorted((row["bits"], row["perplexity"]) for row in drawn if row["family"] == family)
        axes.semilogy(*zip(*own, strict=True), marker, label=label)
    for row in drawn:
        if row["family"] != "recipe":
            label = row["name"].split(",")[0].split(" of ")[0].split(" without ")[0]
            place = row["bits"], row["perplexity"]
            axes.annotate(label, place, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.axhline(results["dense"]["perplexity"], linestyle=":", color="gray", label="dense bfloat16")
    ticks = (20, 50, 100, 200, 500, 1000)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set(
        ylim=(15, 1500),
        xlabel="bits per weight of the linear layers, everything stored counted",
        ylabel="perplexity, held-out articles",
        title="SmolLM2-135M-Instruct at equal bytes",
    )
    axes.minorticks_off()
    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": FOLDER}):
        figure.savefig(path, metadata={"Date": None})


TABLES = {
    "equal-bytes": equal_bytes,
    "equal-bytes-winners": winners,
    "equal-bytes-chosen": chosen,
    "equal-bytes-setup": setup,
}
