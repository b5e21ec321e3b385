"""Tables of CondiQuant for ``benchmarks.report``: what was measured, and what the paper states."""

from __future__ import annotations

from typing import Any

from benchmarks.common import read_results
from benchmarks.tables import number, table

NOT_YET = "Not measured yet."
# result file after "w<bits>-" -> name in the table
VARIANTS = {
    "minmax": "min-max",
    "percentile": "percentile (0.999)",
    "dobi": "bound search (DOBI)",
    "condiquant": "**CondiQuant** (default)",
    "condiquant-0.003": "CondiQuant, t = 0.003",
    "condiquant-0.01": "CondiQuant, t = 0.01",
    "condiquant-0.03": "CondiQuant, t = 0.03",
    "condiquant-percentile": "CondiQuant, percentile",
    "dobi-dqc": "bound search, 100 steps of DQC",
    "condiquant-dqc": "CondiQuant, 100 steps of DQC",
}
BITS = (4, 3, 2)
# PSNR known before, of a model of the same build trained on twenty photographs, measured on the same crops
KNOWN: dict[str, tuple[str, str, str]] = {
    "dense": ("30.25", "30.25", "30.25"),
    "min-max": ("30.13", "29.82", "27.61"),
    "percentile (0.999)": ("30.24", "30.19", "29.92"),
    "bound search (DOBI)": ("30.22", "30.17", "28.90"),
    "CondiQuant, the best t": ("30.22", "30.18", "29.74"),
}
# PSNR / SSIM of SwinIR-light, Set5 and Urban100, arXiv 2502.15478, Table 3: scale -> method -> bits -> figures
PUBLISHED: dict[str, dict[str, tuple[str, str, str]]] = {
    "×2, Set5 (dense 38.15, bicubic 32.25)": {
        "2DQuant": ("37.87", "37.32", "36.00"),
        "**CondiQuant**": ("38.03", "37.77", "37.15"),
    },
    "×2, Urban100 (dense 32.76)": {
        "2DQuant": ("31.84", "30.45", "28.62"),
        "**CondiQuant**": ("32.03", "31.18", "29.96"),
    },
    "×4, Set5 (dense 32.45)": {
        "2DQuant": ("31.77", "30.90", "29.53"),
        "**CondiQuant**": ("32.09", "31.62", "30.64"),
    },
}


def _runs() -> dict[str, Any]:
    return read_results("quality_condiquant")


def _psnr(run: dict[str, Any] | None) -> str:
    return "–" if run is None else f"{run['psnr']:.2f} / {run['ssim']:.4f}"


def quality() -> str:
    """PSNR and SSIM by width, ours above the paper's."""
    runs = _runs()
    if "dense" not in runs:
        return NOT_YET
    dense = runs["dense"]
    rows = [
        ["ours: bicubic", *[_psnr(dense["bicubic"])] * 3],
        ["ours: dense float32", *[_psnr(dense["dense"])] * 3],
        ["ours: dense, without what its transformer blocks add", *[_psnr(dense.get("without_body"))] * 3],
    ]
    for variant, title in VARIANTS.items():
        found = [runs.get(f"w{bits}-{variant}") for bits in BITS]
        if any(found):
            rows.append([f"ours: {title}", *map(_psnr, found)])
    rows += [[f"known before: {name}", *figures] for name, figures in KNOWN.items()]
    for name, methods in PUBLISHED.items():
        rows += [[f"paper, {name}: {method}", *figures] for method, figures in methods.items()]
    return table(["PSNR, dB / SSIM of the luma", "W4A4", "W3A3", "W2A2"], rows)


def conditioning() -> str:
    """What conditioning does to the weights, and what a run costs and stores."""
    runs, rows = _runs(), []
    for bits in BITS:
        for variant, title in VARIANTS.items():
            run = runs.get(f"w{bits}-{variant}")
            if run is None or "condition_after" not in run:
                continue
            rows.append(
                [
                    f"W{bits}A{bits}, {title}",
                    number(run["condition_before"], 0),
                    number(run["condition_after"], 1),
                    f"{100 * run['output_change']:.1f} %",
                    f"{100 * run['total_error']:.1f} %",
                    number(run["bits_per_weight"], 2),
                    number(run["bytes"] / 1000, 1),
                    number(run["seconds"], 0),
                ]
            )
    header = ["", "mean κ before", "after", "outputs change by", "total error", "bits per weight", "kB", "seconds"]
    return table(header, rows) if rows else NOT_YET


TABLES = {"condiquant": quality, "condiquant-conditioning": conditioning}
