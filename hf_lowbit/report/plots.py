"""One picture of a compressed model: bytes by part, bits per weight and error by layer. Needs ``matplotlib``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lowbit.errors import HfLowbitError
from hf_lowbit.report.inspect import Inspection
from hf_lowbit.report.tables import FILE, kinds_of, parts_of, size_text


def save_plot(inspection: Inspection, file: str | Path) -> Path:
    """Draw an inspection into a PNG file.

    Two panels and those of the others that have something to show: bytes by part of the folder; bits per weight of
    every packed layer; its output error (after a run with data); the share of its weights that an N:M mask keeps; the
    share of its numbers that factors of low rank hold, 1 for layers of the same kind that stayed dense. A line per
    kind of layer, from the first block to the last.

    Args:
        inspection: what to draw.
        file: ends in ".png"; an existing file is replaced.

    Returns:
        The file.

    Raises:
        HfLowbitError: matplotlib is not installed.
        ValueError: the name does not end in ".png".
    """
    target = Path(file)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{target.name}: the plot is a PNG file; end its name in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HfLowbitError("plots need matplotlib, which is not installed: pip install 'hf-lowbit[plots]'") from error
    lines = {"bits_per_weight": "bits per weight"}
    if any(module.error is not None for module in inspection.modules):
        lines["error"] = "relative output error"
    if any(module.mask for module in inspection.modules):
        lines["kept_share"] = "share of weights kept, N / M"
    if any(module.rank_share is not None for module in inspection.modules):
        lines["rank_share"] = "share of numbers kept"
    figure = Figure(figsize=(10, 4 + 3 * len(lines)), layout="constrained")
    panels = figure.subplots(1 + len(lines), 1)
    _bytes_by_part(panels[0], inspection)
    for panel, (value, label) in zip(panels[1:], lines.items(), strict=True):
        _by_layer(panel, inspection, value, label)
    figure.savefig(target, format="png", dpi=150)
    return target


def _bytes_by_part(axes: Any, inspection: Inspection) -> None:
    """Draw a bar per part, largest first; the other files are one part here."""
    sizes: dict[str, int] = {}
    for part, remark, _, size in parts_of(inspection):
        name = "other files" if remark == FILE else part
        sizes[name] = sizes.get(name, 0) + size
    ordered = sorted(sizes.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [size / 1e6 for _, size in ordered], color="#4c72b0")
    axes.bar_label(bars, [size_text(size) for _, size in ordered], padding=4)
    axes.margins(x=0.15)
    axes.set_xlabel("MB (1,000,000 bytes)")
    axes.set_title(f"{inspection.name}: {size_text(inspection.total_bytes)} on disk")


def _by_layer(axes: Any, inspection: Inspection, value: str, label: str) -> None:
    dense = list(inspection.config.left_dense or {}) if value == "rank_share" else []
    for kind, modules in kinds_of(inspection.modules).items():
        known = {module.name: getattr(module, value) for module in modules}
        found = [(_place(name), number) for name, number in known.items() if number is not None]
        if found:
            found += [(_place(name), 1.0) for name in dense if name.rpartition(".")[2] == kind]
        found.sort()
        axes.plot([place for place, _ in found], [number for _, number in found], marker=".", label=kind)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _place(name: str) -> float:
    """Return where a layer stands: the number of its block, plus a fraction for one of several in it (experts)."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return float(numbers[0]) + sum(n / 1000 ** (i + 1) for i, n in enumerate(numbers[1:])) if numbers else 0.0
