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
    "dobi": "bound search as published (DOBI)",
    "output": "bound search by outputs",
    "condiquant-dobi": "CondiQuant, bound search as published",
    "condiquant": "**CondiQuant** (default)",
    "condiquant-least": "CondiQuant, the strength of least error (`cond_slack=0`)",
    "condiquant-dobi-0.003": "CondiQuant, as published, t = 0.003",
    "condiquant-dobi-0.01": "CondiQuant, as published, t = 0.01",
    "condiquant-dobi-0.03": "CondiQuant, as published, t = 0.03",
    "condiquant-dobi-0.06": "CondiQuant, as published, t = 0.06",
    "condiquant-percentile": "CondiQuant, percentile",
    "dobi-dqc": "bound search as published, 100 steps of DQC",
    "condiquant-dqc": "CondiQuant (default), 100 steps of DQC",
}
BITS = (4, 3, 2)
# PSNR known before: of a prototype of the method, on a model of the same build trained on twenty photographs, measured
# on the same crops. No command here makes them.
KNOWN: dict[str, tuple[str, str, str]] = {
    "dense": ("30.25", "30.25", "30.25"),
    "min-max": ("30.13", "29.82", "27.61"),
    "percentile (0.999)": ("30.24", "30.19", "29.92"),
    "bound search (DOBI)": ("30.22", "30.17", "28.90"),
    "CondiQuant, the best t": ("30.22", "30.18", "29.74"),
    "DOBI, 100 steps of DQC": ("–", "–", "30.12"),
    "CondiQuant, 100 steps of DQC": ("–", "–", "30.17"),
}
# The same of the prototype on DAT-light, calibrated on 6 patches of other photographs.
KNOWN_DAT: dict[str, tuple[str, str, str]] = {
    "dense": ("32.55", "32.55", "32.55"),
    "min-max": ("30.76", "26.29", "23.78"),
    "percentile (0.999)": ("31.84", "–", "24.26"),
    "bound search (DOBI)": ("31.45", "30.61", "28.80"),
    "CondiQuant, t chosen for each layer": ("31.47", "30.56", "29.56"),
    "CondiQuant, the best t": ("31.49", "30.66", "29.65"),
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


def _psnr(run: dict[str, Any] | None) -> str:
    return "–" if run is None else f"{run['psnr']:.2f} / {run['ssim']:.4f}"


def _measured(runs: dict[str, Any]) -> list[list[str]]:
    """Return the rows of what was measured, without those of which nothing was."""
    dense, rows = runs["dense"], []
    fixed = {
        "bicubic": "bicubic",
        "dense": "dense float32",
        "without_body": "dense, without what its transformer blocks add",
    }
    rows += [[f"ours: {title}", *[_psnr(dense[name])] * 3] for name, title in fixed.items() if name in dense]
    for variant, title in VARIANTS.items():
        found = [runs.get(f"w{bits}-{variant}") for bits in BITS]
        if any(found):
            rows.append([f"ours: {title}", *map(_psnr, found)])
    return rows


HEADER = ["PSNR, dB / SSIM of the luma", "W4A4", "W3A3", "W2A2"]


def quality() -> str:
    """PSNR and SSIM by width, ours above the paper's."""
    runs = read_results("quality_condiquant")
    if "dense" not in runs:
        return NOT_YET
    rows = _measured(runs)
    rows += [[f"known before (a prototype): {name}", *figures] for name, figures in KNOWN.items()]
    for name, methods in PUBLISHED.items():
        rows += [[f"paper, {name}: {method}", *figures] for method, figures in methods.items()]
    return table(HEADER, rows)


def pretrained() -> str:
    """PSNR and SSIM by width of a pretrained model of which linear layers are quantized."""
    runs = read_results("quality_condiquant_dat")
    if "dense" not in runs:
        return NOT_YET
    rows = [[f"known before (a prototype): {name}", *figures] for name, figures in KNOWN_DAT.items()]
    return table(HEADER, _measured(runs) + rows)


def conditioning() -> str:
    """What conditioning does to the weights, and what a run costs and stores."""
    runs, rows = read_results("quality_condiquant"), []
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


TABLES = {"condiquant": quality, "condiquant-conditioning": conditioning, "condiquant-dat": pretrained}
