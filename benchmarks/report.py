"""Renders the tables of README.md and benchmarks/README.md, and the cards in model_cards/, from the result files.

    python -m benchmarks.report            # rewrite the tables
    python -m benchmarks.report --check    # fail if a table differs from its result files (a test does this)

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    cards,
    report_adasvd,
    report_binary_conv,
    report_cache,
    report_compatibility,
    report_condiquant,
    report_equal_bytes,
    report_integer,
    report_kernels,
    report_kv,
    report_pbs2p,
    report_recalkv,
    report_scale,
    report_serving,
    report_texts,
    report_video,
    report_video_speed,
)
from benchmarks.common import RESULTS, ROOT, read_results
from benchmarks.tables import number as _number
from benchmarks.tables import table as _table

# result file -> (name in the table, published perplexity of LLaMA-7B on WikiText2: arXiv 2410.03129, Tables 1 and 4)
QUALITY = {
    "dense": ("dense bfloat16", "5.68"),
    "rounding": ("plain 1-bit rounding", "–"),
    "billm": ("BiLLM-style baseline", "49.79"),
    "billm-exact": ("BiLLM-style, exact compensation", "–"),
    "arb": ("ARB", "22.67"),
    "x": ("ARB-X without CGB", "26.29"),
    "x-cgb": ('ARB-LLM_X (`variant="x"`)', "21.81"),
    "rc": ("ARB-RC without CGB", "15.85"),
    "rc-cgb-reference": ("ARB-LLM_RC, published compensation", "14.03"),
    "rc-cgb-3-iterations": ("ARB-LLM_RC, 3 iterations", "14.34"),
    "rc-cgb": ("**ARB-LLM_RC** (default)", "14.03"),
    "rc-cgb-32x512": ("ARB-LLM_RC, 32 × 512 tokens", "–"),
}
SHORT = ("dense", "rounding", "billm", "x-cgb", "rc-cgb")


def _quality_rows(names: tuple[str, ...], full: bool) -> list[list[str]]:
    results = read_results("quality")
    rows = []
    for name in names:
        if name not in results:
            continue
        result, (title, published) = results[name], QUALITY[name]
        errors = result.get("errors") or {}
        error = sum(errors.values()) / len(errors) if errors else None
        row = [
            title,
            _number(result["perplexity"], 1),
            _number(result.get("bits_per_weight", 16.0), 2),
            _number(result["bytes"] / 1e6, 1),
        ]
        if full:
            # plain rounding runs without data: what is recorded is the error of the weights, not of the output
            row += [_number(error, 4) + (" (weights)" if name == "rounding" else "")]
            row += [_number(result.get("salient_share"), 3)]
        rows.append([*row, published])
    return rows


def quality_short() -> str:
    """Return the table of README."""
    header = ["SmolLM2-135M-Instruct", "perplexity", "bits per weight", "MB on disk", "paper, LLaMA-7B"]
    return _table(header, _quality_rows(SHORT, full=False))


def quality_full() -> str:
    """Return the table of all variants."""
    header = ["SmolLM2-135M-Instruct", "perplexity", "bits per weight", "MB on disk", "output error", "salient share"]
    header += ["paper, LLaMA-7B"]
    return _table(header, _quality_rows(tuple(QUALITY), full=True))


def _errors(row: dict[str, Any]) -> str:
    return f"{row['weight_error']:.3f} / {row['output_error']:.4f}"


def layers() -> str:
    """Return one table per measured block: output error of every variant for every linear."""
    parts = []
    for result in sorted(read_results("quality_layers").values(), key=lambda result: result["block"]):
        kinds = result["linears"]
        variants = list(next(iter(kinds.values())))
        rows = [[variant, *(_errors(kind[variant]) for kind in kinds.values())] for variant in variants]
        parts.append(f"Block {result['block']}:\n\n" + _table(["variant", *kinds], rows))
    return "\n\n".join(parts)


def order() -> str:
    """Return in how many layers each part of the paper's order holds."""
    rows = [row for result in read_results("quality_layers").values() for row in result["linears"].values()]
    if not rows:
        return "Not measured yet."

    def compare(first: str, second: str) -> str:
        ratios = [row[first]["output_error"] / row[second]["output_error"] for row in rows]
        return f"{sum(ratio < 1 for ratio in ratios)} (ratio {min(ratios):.2f} to {max(ratios):.2f})"

    claims = {
        "BiLLM-style below rounding": ("billm", "rounding"),
        "ARB below BiLLM-style, same compensation": ("arb", "billm, exact"),
        "ARB-LLM_X below ARB": ("x + cgb", "arb"),
        "ARB-LLM_RC below ARB": ("rc + cgb", "arb"),
        "column-group bitmap helps ARB-X": ("x + cgb", "x"),
        "column-group bitmap helps ARB-RC": ("rc + cgb", "rc"),
        "exact compensation below the published form": ("rc + cgb", "rc + cgb, reference"),
    }
    lines = [[claim, compare(*pair)] for claim, pair in claims.items()]
    return _table(["output error", f"holds in how many of {len(rows)} layers"], lines)


def setup() -> str:
    """Return one line on how the quality figures were taken."""
    result = read_results("quality").get("rc-cgb")
    if result is None:
        return "Not measured yet."
    environment = result["environment"]
    text = (
        f"{result['calibration'][0]} × {result['calibration'][1]} tokens of Wikipedia articles for calibration, "
        f"{result['heldout'][0]} × {result['heldout'][1]} of other articles for measuring; "
        f"{environment['cpu']}, torch {environment['packages']['torch']}, commit {environment['commit']}."
    )
    quick = read_results("quality").get("rc-cgb-32x512")
    if quick is not None:
        text += (
            f" With 32 × 512 tokens, the whole model is compressed in {quick['seconds'] / 60:.1f} minutes "
            f"on {quick['environment']['threads']} threads of that machine."
        )
    return text


def drills() -> str:
    """Return what the drills require and found, and where they ran."""
    path = RESULTS / "drills.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not results:
        return "Not run yet."
    met = {True: "yes", False: "**no**", None: "–"}
    rows = [
        [name.replace("_", " "), check["requirement"], check["found"], met[check["met"]]]
        for name, result in results.items()
        for check in result["checks"]
    ]
    lines = []
    for name, result in results.items():
        environment = result["environment"]
        packages = ", ".join(f"{package} {number}" for package, number in environment["packages"].items())
        lines.append(
            f"* {name.replace('_', ' ')}: {result['seconds'] / 60:.0f} min, {environment['cpu']}, "
            f"torch on {environment['threads']} of its threads, Python {environment['python']}, {packages}, "
            f"commit {environment['commit']}"
        )
    return _table(["drill", "required", "found", "met"], rows, words=True) + "\n\n" + "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "quality-short": quality_short,
    "quality-full": quality_full,
    "quality-setup": setup,
    "quality-layers": layers,
    "quality-order": order,
    "drills": drills,
    **report_binary_conv.TABLES,
    **report_kernels.TABLES,
    **report_pbs2p.TABLES,
    **report_adasvd.TABLES,
    **report_cache.TABLES,
    **report_compatibility.TABLES,
    **report_condiquant.TABLES,
    **report_equal_bytes.TABLES,
    **report_integer.TABLES,
    **report_texts.TABLES,
    **report_video.TABLES,
    **report_video_speed.TABLES,
    **report_recalkv.TABLES,
    **report_kv.TABLES,
    **report_scale.TABLES,
    **report_serving.TABLES,
}


def rendered(text: str) -> str:
    """Return a document with every table replaced by its current form."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- begin {name} -->\n{TABLES[name]()}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (?P<name>[\w-]+) -->\n.*?<!-- end (?P=name) -->", replace, text, flags=re.DOTALL)


def documents() -> dict[Path, str]:
    """Return the documents with tables, the example cards, and what each should read."""
    paths = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "compatibility.md"]
    paths.append(ROOT / "docs" / "serving.md")
    return {**{path: rendered(path.read_text(encoding="utf-8")) for path in paths}, **cards.documents()}


def main() -> Any:
    """Parse arguments; rewrite or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text("utf-8") != text]
    if arguments.check:
        return (
            f"out of date: {', '.join(path.name for path in stale)}; run python -m benchmarks.report" if stale else 0
        )
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
