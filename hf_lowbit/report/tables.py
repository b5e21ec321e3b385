"""Tables for the terminal and their JSON form, used by the command line and the demo alike.

Sizes are decimal (1 MB = 1,000,000 bytes), as disks and the Hub count them. JSON carries plain bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from hf_lowbit import registry
from hf_lowbit.methods import taxonomy
from hf_lowbit.registry import Method
from hf_lowbit.report.inspect import Inspection, PackedModule

# Remark on a part that is a file of its own.
FILE = "file"


def size_text(size: float) -> str:
    """Return bytes in a unit that suits them: "312 B", "56.6 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def error_text(error: float | None) -> str:
    """Return a relative error in percent, a dash where none was measured."""
    return "–" if error is None else f"{100 * error:.2f} %"


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured, None if nothing was."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _table(title: str, left: Iterable[str], right: Iterable[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def plan_table(plan: Iterable[Mapping[str, Any]]) -> Table:
    """Return what a run chose under a budget: rows of :mod:`hf_lowbit.budget`, and their sums."""
    rows = list(plan)
    caption = "the error is measured on the dense model, see hf_lowbit.compress.budget; sizes are the most it can be"
    table = _table("plan", ("layers", "method", "settings"), ("number", "bits per weight", "size", "error"), caption)
    sums: dict[str, Any] = {key: sum(row[key] for row in rows) for key in ("number", "weights", "bytes", "error")}
    for row in rows:
        table.add_row(row["layers"], row["method"], row["settings"], *_plan_figures(row))
    table.add_section()
    table.add_row("all of them", "", "", *_plan_figures(sums))
    return table


def _plan_figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    bits = 8 * row["bytes"] / max(1, row["weights"])
    return str(row["number"]), f"{bits:.3f}", size_text(row["bytes"]), f"{row['error']:.4g}"


def kinds_of(modules: Iterable[PackedModule]) -> dict[str, list[PackedModule]]:
    """Return packed layers by kind (q_proj, down_proj, ...), in the order in which they come."""
    found: dict[str, list[PackedModule]] = {}
    for module in modules:
        found.setdefault(module.kind, []).append(module)
    return found


@dataclasses.dataclass(frozen=True)
class Share:
    """What one method holds of a model, in one form.

    Attributes:
        method: its name.
        held_as: how its layers are stored.
        layers: how many.
        weights: of the dense model, and as a share of all its parameters.
        bytes: stored, and as a share of the weight files.
    """

    method: str
    held_as: str
    layers: int
    weights: int
    weights_share: float
    bytes: int
    bytes_share: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense model."""
        return 8 * self.bytes / self.weights


def shares_of(inspection: Inspection) -> list[Share]:
    """Return what each method of a model holds, in the order of its layers."""
    found: dict[tuple[str, str], list[PackedModule]] = {}
    for module in inspection.modules:
        found.setdefault((module.method, module.held_as), []).append(module)
    stored = inspection.packed_bytes + sum(group.bytes for group in inspection.groups) + inspection.header_bytes
    shares = []
    for (method, held_as), modules in found.items():
        weights, size = sum(module.weights for module in modules), sum(module.bytes for module in modules)
        shares.append(
            Share(method, held_as, len(modules), weights, weights / inspection.parameters, size, size / stored)
        )
    return shares


def shares_table(shares: Iterable[Share]) -> Table:
    """Return the table of what each method of a model holds."""
    table = _table(
        "packed layers by method",
        ["layers"],
        ["of parameters", "bytes", "of files", "bits"],
        "bits: stored for a weight",
    )
    for share in shares:
        numbers = (f"{100 * share.weights_share:.1f} %", f"{share.bytes:,}", f"{100 * share.bytes_share:.1f} %")
        table.add_row(f"{share.layers} × {share.method}, {share.held_as}", *numbers, f"{share.bits_per_weight:.3f}")
    return table


def parts_of(inspection: Inspection) -> list[tuple[str, str, int, int]]:
    """Return all parts of a folder: (part, remark, parameters, bytes); bytes add up to ``total_bytes``."""
    names = ", ".join(sorted({module.method for module in inspection.modules}))
    rows = [
        ("packed layers", f"{len(inspection.modules)} × {names}", inspection.packed_weights, inspection.packed_bytes)
    ]
    for group in inspection.groups:
        remark = f"{group.tensors} × {group.reason}" if group.reason else f"{group.tensors}"
        rows.append((group.kind, remark, group.parameters, group.bytes))
    rows.append(("file headers", "names and shapes", 0, inspection.header_bytes))
    return rows + [(file, FILE, 0, size) for file, size in inspection.other_files.items()]


def inspection_tables(inspection: Inspection, layers: bool = False) -> list[Table]:
    """Return the tables of ``hf-lowbit inspect``: parts, kinds of layers, and on request every layer."""
    parts = _table(
        f"{inspection.name}: where the bytes are",
        ["part", "remark"],
        ["parameters", "bytes", "share"],
        f"{inspection.bits_per_weight:.3f} bits per packed weight (scales, bitmaps and padding included); "
        f"{inspection.bits_per_parameter:.3f} bits per parameter of the whole model; "
        f"{100 * inspection.packed_share:.1f} % of the parameters are packed",
    )
    for part, remark, parameters, size in parts_of(inspection):
        share = f"{100 * size / inspection.total_bytes:.1f} %"
        parts.add_row(part, remark, f"{parameters:,}" if parameters else "", f"{size:,}", share)
    parts.add_section()
    parts.add_row("total on disk", "", f"{inspection.parameters:,}", f"{inspection.total_bytes:,}", "100.0 %")
    parts.columns[0].no_wrap = True

    kinds = _table(
        "packed layers by kind",
        ["layers named"],
        ["number", "bits per weight", "bytes", "mean output error"],
        "error: squared, relative to the output of the dense layer, on the calibration data",
    )
    for kind, modules in kinds_of(inspection.modules).items():
        size = sum(module.bytes for module in modules)
        bits = 8 * size / sum(module.weights for module in modules)
        error = mean(module.error for module in modules)
        kinds.add_row(kind, str(len(modules)), f"{bits:.3f}", f"{size:,}", error_text(error))
    shares = shares_of(inspection)
    mixed = [shares_table(shares)] if len(shares) > 1 else []
    if not layers:
        return [parts, *mixed, kinds]
    every = _table(
        "packed layers", ["layer", "method", "format", "stored as"], ["bits per weight", "bytes", "output error"]
    )
    for module in inspection.modules:
        numbers = (f"{module.bits_per_weight:.3f}", f"{module.bytes:,}", error_text(module.error))
        every.add_row(module.name, module.method, module.format, module.highlights, *numbers)
    return [parts, *mixed, kinds, every]


def inspection_json(inspection: Inspection, layers: bool = True) -> dict[str, Any]:
    """Return an inspection as JSON types; sizes in bytes, shares and errors from 0 to 1."""
    content: dict[str, Any] = {
        "name": inspection.name,
        "method": inspection.config.method,
        "total_bytes": inspection.total_bytes,
        "packed_bytes": inspection.packed_bytes,
        "header_bytes": inspection.header_bytes,
        "groups": [dataclasses.asdict(group) for group in inspection.groups],
        "other_files": dict(inspection.other_files),
        "parameters": inspection.parameters,
        "packed_weights": inspection.packed_weights,
        "packed_share": inspection.packed_share,
        "bits_per_weight": inspection.bits_per_weight,
        "bits_per_parameter": inspection.bits_per_parameter,
        "methods": [
            {**dataclasses.asdict(share), "bits_per_weight": share.bits_per_weight} for share in shares_of(inspection)
        ],
    }
    if layers:
        content["modules"] = [
            {**dataclasses.asdict(module), "bits_per_weight": module.bits_per_weight} for module in inspection.modules
        ]
    return content


def methods_table(methods: Mapping[str, Method]) -> Table:
    """Return the table of all methods."""
    table = _table(
        "methods",
        ["name", "what it does", "compresses", "bits", "data", "place in the field", "paper", "status"],
        [],
        "options of one: hf-lowbit methods NAME; the field: docs/methods.md, hf_lowbit.methods",
    )
    for name, method in methods.items():
        info = registry.method_info(name)
        what = f"{method.title}. {method.summary} (format {method.format}, unit {method.unit})"
        place = "outside the frame" if info.category is None else f"{info.category}, {info.subcategory}"
        compresses = ", ".join(sorted(info.compresses))
        bits = taxonomy.bits_text(info)
        table.add_row(name, what, compresses, bits, method.needs, place, method.paper, method.status)
    for column in (table.columns[0], table.columns[6]):
        column.no_wrap = True
    return table


def methods_json(methods: Mapping[str, Method]) -> list[dict[str, Any]]:
    """Return all methods as JSON types, each with its record in the field under "record"."""
    keys = ("name", "title", "summary", "format", "unit", "needs", "paper", "status")
    return [
        {**{key: getattr(method, key) for key in keys}, "record": registry.method_info(name).to_json()}
        for name, method in methods.items()
    ]


def options_json(method: Method) -> list[dict[str, Any]]:
    """Return the options of a method as JSON types: name, type, default, what is allowed, help."""
    return [
        {
            "name": name,
            "type": type(field.default).__name__,
            "default": field.default,
            "allowed": _allowed(field.metadata["option"], type(field.default)),
            "help": field.metadata["option"]["help"],
        }
        for name, field in method.config.options().items()
    ]


def _allowed(rules: Mapping[str, Any], kind: type) -> str:
    if rules["check"] is not None:
        return "see what it is"
    if rules["choices"] is not None:
        return ", ".join(map(str, rules["choices"]))
    if kind is bool:
        return "true, false"
    low, high, step = rules["low"], rules["high"], rules["multiple_of"]
    parts = [f"from {low}"] if low is not None else []
    parts += [f"to {high}"] if high is not None else []
    parts += [f"in steps of {step}"] if step is not None else []
    return " ".join(parts) or f"any {kind.__name__}"


def options_table(method: Method) -> Table:
    """Return the options of a method as a table."""
    table = _table(
        f"{method.name}: {method.title}, arXiv {method.paper}",
        ["option", "default", "allowed", "what it is"],
        [],
        f"{'' if method.unit == 'pipeline' else 'give them as --option name=value, or '}in Python as "
        f"{method.config.__name__}(name=value)",
    )
    for row in options_json(method):
        default = str(row["default"]).lower() if isinstance(row["default"], bool) else str(row["default"])
        table.add_row(row["name"], default, row["allowed"], row["help"])
    table.columns[0].no_wrap = True
    return table


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """Return the table of ``hf-lowbit eval`` from what :func:`hf_lowbit.report.evaluate.evaluate` returned."""
    data = f"{result['samples']} × {result['sequence_length']} tokens of {result['data']}"
    caption = f"perplexity on {data}, lower is better; bits per parameter of the whole model, headers included"
    columns = ["perplexity", "size on disk", "bits per parameter", "tokens per second"]
    table = _table("evaluation", ["model"], columns, caption)
    for name, row in result["models"].items():
        bits, speed = row["bits_per_parameter"], row["tokens_per_second"]
        numbers = (f"{row['perplexity']:.3f}", size_text(row["bytes"]), f"{bits:.3f}")
        table.add_row(name, *numbers, "–" if speed is None else f"{speed:.2f}")
    for name, ratio in result["ratios"].items():
        texts = [ratio[key] for key in ("perplexity", "bytes", "bits_per_parameter", "tokens_per_second")]
        table.add_section()
        table.add_row(f"{name}, ratio", *("–" if value is None else f"× {value:.3f}" for value in texts))
    return table


def image_table(result: Mapping[str, Any]) -> Table:
    """Return the table of ``hf-lowbit eval`` for a model that makes images larger."""
    caption = (
        f"{result['images']} images of {result['data']}, enlarged {result['scale']} times; luma without a border of "
        "as many pixels, higher is better; bits per parameter of the whole model, headers included"
    )
    table = _table("evaluation", ["model"], ["PSNR, dB", "SSIM", "size on disk", "bits per parameter"], caption)
    for name, row in result["models"].items():
        size = "–" if row["bytes"] is None else size_text(row["bytes"])
        bits = "–" if row["bytes"] is None else f"{row['bits_per_parameter']:.3f}"
        table.add_row(name, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", size, bits)
    for name, ratio in result["ratios"].items():
        table.add_section()
        table.add_row(f"{name}, ratio", "–", "–", f"× {ratio['bytes']:.3f}", f"× {ratio['bits_per_parameter']:.3f}")
    return table
