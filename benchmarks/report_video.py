"""Tables of DVD-Quant for ``benchmarks.report``: what was measured, figures known before, and the paper's."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common import read_results
from benchmarks.tables import number, table

NOT_YET = "Not measured yet."
TITLES = {
    "rtn": "plain rounding (rows, symmetric), activations per token",
    "minmax": "minimum and maximum of rows, per token",
    "bgr": "BGR only: searched rows, per token",
    "rotation": "rotation only: all columns, minimum and maximum of rows, per token",
    "both": "both: rotation and BGR, rows, per token",
    "both, channel": "both, activations in the printed form (Eq. 10, `channel`)",
    "both, channel_token": "both, `channel_token`",
    "paper": '`preset="paper"`: both, rows, per token and 64 columns',
    "groups, no rotation": "BGR in groups of 32, no rotation",
    "groups, full rotation, minmax": "groups of 32, rotation of all columns, minimum and maximum",
    "groups, full rotation": "groups of 32, rotation of all columns, BGR",
    "groups, blocks": "groups of 32, rotation in blocks, BGR",
    "groups, blocks, balance": "the same with the balance of all columns, β = 0.5",
    "groups, blocks, balance 1": "the same, β = 1",
    "groups, blocks, outliers": "the same, balance of columns that stand out",
    "groups of 64": "groups of 64, blocks of 128, BGR, balance of columns that stand out",
    "default": "**default**: the same in groups of 32, of 64 for activations",
}
# PSNR of W4A4 known before, on another model trained by the same recipe: clean, with outlier channels.
KNOWN: dict[str, tuple[float | None, float | None]] = {
    "rtn": (24.4, 17.5),
    "minmax": (None, 17.5),
    "bgr": (25.7, 17.4),
    "rotation": (None, 23.6),
    "both": (29.7, 23.2),
    "both, channel": (31.0, 21.2),
    "both, channel_token": (None, 22.2),
    "groups, no rotation": (32.2, 18.9),
    "groups, full rotation, minmax": (31.7, 24.3),
    "groups, full rotation": (34.2, 25.0),
    "groups, blocks": (32.3, 24.7),
    "groups, blocks, balance": (33.8, 30.4),
    "groups, blocks, balance 1": (32.9, 33.3),
}
# HunyuanVideo, VBench (arXiv 2505.18663, Table 1): aesthetic quality, imaging quality, overall and scene consistency.
PAPER = {
    "16 / 16": {"full precision": (62.53, 64.78, 25.86, 42.81)},
    "4 / 8": {
        "MinMax": (59.44, 60.62, 25.78, 36.41),
        "SmoothQuant": (60.50, 64.47, 25.56, 28.85),
        "QuaRot": (58.80, 56.86, 25.33, 34.30),
        "ViDiT-Q": (57.01, 59.74, 24.77, 27.11),
    },
    "4 / 6": {"DVD-Quant": (62.27, 64.22, 25.83, 33.07)},
    "4 / 4": {
        "MinMax": (24.20, 24.78, 4.27, 0.00),
        "SmoothQuant": (48.41, 59.46, 21.09, 7.84),
        "QuaRot": (44.85, 54.30, 17.33, 0.94),
        "ViDiT-Q": (45.36, 40.10, 19.66, 7.85),
        "DVD-Quant": (61.96, 61.82, 25.68, 29.94),
    },
}
# Imaging quality at a mean of 6 bits (Table 2).
PAPER_SCHEDULES = {"δ-GBS": 61.93, "8 to 4": 61.40, "4 to 8": 61.33, "random": 61.26, "alternate": 61.03}
WIDTHS = ("16", "8", "6", "4")


def _result(part: str) -> dict[str, Any]:
    return dict(read_results("quality_video").get(part, {}))


def schemes() -> str:
    """Return decibels of all schemes on both models, the known ones of W4A4 beside."""
    figures = _result("schemes").get("figures")
    if not figures:
        return NOT_YET
    header = ["PSNR in dB of videos", "bits per weight"]
    header += [f"{kind} A{bits}" for kind in ("clean", "outliers") for bits in WIDTHS] + ["known, A4"]
    rows = []
    for name, title in TITLES.items():
        found = [figures[kind].get(name) for kind in ("clean", "outliers")]
        if None in found:
            continue
        known = ", ".join(number(value, 1) for value in KNOWN.get(name, (None, None)))
        line = [title, number(found[0]["bits_per_weight"], 2)]
        rows.append([*line, *(number(row[bits], 1) for row in found for bits in WIDTHS), known])
    other = ", ".join(f"{kind} {figures[kind]['other noise']:.1f}" for kind in figures)
    note = (
        f"Videos of the float model from other noise: {other} dB (known: 14.4). The injection of outlier channels "
        f"itself: {figures['outliers']['injection']:.0f} dB."
    )
    return f"{table(header, rows)}\n\n{note}"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return number(values[0], 1)
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def schedules() -> str:
    """Return decibels of schedules of one mean width beside the paper's scores."""
    result = _result("schedules")
    figures = result.get("figures")
    if not figures:
        return NOT_YET
    kinds = list(figures)
    rows = []
    for name, published in PAPER_SCHEDULES.items():
        cells = []
        for kind in kinds:
            found = figures[kind]["mean 6"]
            cells.append(number(found["psnr"], 1) if name == "δ-GBS" else _spread(figures[kind][name]))
        rows.append([name, *cells, number(published, 2)])
    for bits in ("8", "4"):
        rows.append([f"{bits} bits in all steps", *(number(figures[kind]["all"][bits], 1) for kind in kinds), "–"])
    header = ["schedule", *(f"{kind}, PSNR in dB" for kind in kinds), "paper, imaging quality"]
    reached = ", ".join(
        f"{kind}: δ = {figures[kind]['mean 6']['delta']:.3f} gives {figures[kind]['mean 6']['mean']:.2f} bits"
        for kind in kinds
    )
    return f"{table(header, rows)}\n\nMean widths: {reached}."


def _by_clip(runs: list[list[float]]) -> list[float]:
    """Return decibels by clip, the mean of several runs."""
    return [statistics.mean(values) for values in zip(*runs, strict=True)]


def _ahead(ours: list[float], others: list[float]) -> str:
    """Return the mean of differences clip by clip with its standard error."""
    apart = [one - other for one, other in zip(ours, others, strict=True)]
    return f"{statistics.mean(apart):+.2f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.2f}"


def long_schedules() -> str:
    """Return decibels of schedules over the steps that the paper's videos have, and how far δ-GBS is ahead of each."""
    figures = _result("long_schedules").get("figures")
    if not figures:
        return NOT_YET
    rows = []
    for name in (*PAPER_SCHEDULES, "all 8", "all 4"):
        cells = []
        for own in figures.values():
            found = _by_clip(own["clips"][name])
            cells.append(number(statistics.mean(found), 2))
            cells.append("–" if name == "δ-GBS" else _ahead(_by_clip(own["clips"]["δ-GBS"]), found))
        rows.append([name, *cells, number(PAPER_SCHEDULES.get(name), 2)])
    header = ["schedule", *(text for kind in figures for text in (f"{kind}, dB", "δ-GBS ahead by"))]
    notes = [
        f"{kind}: δ = {own['delta']:g} gives {own['mean']:.2f} bits, {len(own['clips']['δ-GBS'][0])} clips;\n\n```\n"
        + "".join("8" if bits == 8 else "·" for bits in own["bits"])
        + "\n```"
        for kind, own in figures.items()
    ]
    return "\n\n".join([table([*header, "paper, imaging quality"], rows), *notes])


def deltas() -> str:
    """Return mean bits and decibels by δ."""
    figures = _result("schedules").get("figures")
    if not figures:
        return NOT_YET
    kinds = list(figures)
    rows = [
        [
            delta,
            *(f"{figures[k]['delta'][delta]['mean']:.1f}, {figures[k]['delta'][delta]['psnr']:.1f}" for k in kinds),
        ]
        for delta in figures[kinds[0]]["delta"]
    ]
    strips = []
    for kind in kinds:
        row = figures[kind]["mean 6"]
        strip = "".join("8" if bits == 8 else "·" for bits in row["bits"])
        strips.append(f"{kind:>9}  {strip}")
    body = "\n".join(strips)
    header = ["δ", *(f"{kind}: mean bits, dB" for kind in kinds)]
    return f"{table(header, rows)}\n\nSteps with 8 bits at a mean of 6, and those with 4 (·):\n\n```\n{body}\n```"


def paper() -> str:
    """Return scores of the paper."""
    rows = [
        [method, width, *(number(value, 2) for value in scores)]
        for width, methods in PAPER.items()
        for method, scores in methods.items()
    ]
    header = ["HunyuanVideo, VBench (paper)", "W / A", "aesthetic", "imaging", "overall", "scene"]
    return table(header, rows)


GRIDS = {
    "absmax": "largest magnitude, symmetric",
    "minmax": "minimum and maximum",
    "bounds": "narrower ranges, no refinement",
    "best_start": "the best of these refined (default)",
    "full": "all of these refined",
}


def weights() -> str:
    """Return relative squared errors of the trained weights."""
    figures = _result("weights").get("figures")
    if not figures:
        return NOT_YET
    parts = []
    for kind, found in figures.items():
        rows = []
        for name, title in GRIDS.items():
            cells = [
                found.get(f"{size}, {turn}, {name}") for size in (-1, 64, 32) for turn in ("none", "full", "block")
            ]
            rows.append([title, *(number(cell, 4) for cell in cells)])
        header = ["error of all weights, 4 bits"]
        header += [f"{unit}{turn}" for unit in ("rows", "64", "32") for turn in (", plain", ", rotated", ", blocks")]
        parts.append(f"Model {kind}:\n\n" + table(header, rows))
    return "\n\n".join(parts)


def size() -> str:
    """Return bytes of a transformer of Wan2.1-1.3B's shape."""
    result = _result("size")
    if not result:
        return NOT_YET
    rows = [["dense, bfloat16", "–", "16", number(result["dense_bytes"] / 1e6, 0), "1"]]
    for title, row in result["figures"].items():
        cells = [number(row["bits_per_weight"], 3), number(row["bytes"] / 1e6, 0), number(row["times_smaller"], 2)]
        rows.append([f"`{title}`", str(row["layers"]), *cells])
    header = ["shape of Wan2.1-1.3B", "packed layers", "bits of a packed weight", "MB", "times smaller"]
    found = result.get("written")
    note = ""
    if found:
        note = (
            f"\n\nA file of that shape, filled with random numbers and compressed from disk layer by layer: "
            f"{found['dense_bytes_on_disk'] / 1e6:,.0f} MB became {found['bytes_on_disk'] / 1e6:,.0f} MB, "
            f"{found['times_smaller']:.2f} times smaller; `hf-lowbit inspect` counts "
            f"{found['bits_per_parameter']:.3f} bits per parameter of the whole transformer."
        )
    return table(header, rows) + note


TABLES = {
    "video-schemes": schemes,
    "video-schedules": schedules,
    "video-deltas": deltas,
    "video-long-schedules": long_schedules,
    "video-weights": weights,
    "video-size": size,
    "video-paper": paper,
}
