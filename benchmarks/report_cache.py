"""Tables of QuantCache for ``benchmarks.report``: quality over work beside diffusers' caches, and with DVD-Quant."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.common import read_results
from benchmarks.tables import number, table

Made = dict[str, Any]
NOT_YET = "Not measured yet."
OWN = "QuantCache"
# Rows beyond this many times less work are drawn, not listed.
MOST = 5.0


def usable(rows: list[Made]) -> list[Made]:
    """Return the rows that were measured, and skipped something."""
    return [row for row in rows if "failure" not in row and row["psnr"] is not None and row["work"] < 0.999]


def frontier(rows: list[Made]) -> list[Made]:
    """Return the rows that no other one beats in both work and quality, by falling work."""
    found: list[Made] = []
    for row in sorted(rows, key=lambda row: (-row["work"], -row["error"])):
        found = [kept for kept in found if kept["error"] < row["error"]]
        found.append(row)
    return found


def family(row: Made) -> str:
    """Return what a row is listed and drawn as."""
    if row["cache"] != OWN:
        return str(row["cache"])
    return OWN if row["settings"].get("extrapolation", 1) else f"{OWN}, extrapolation=0"


def at_most(rows: list[Made], work: float) -> Made | None:
    """Return the best row with no more work than this."""
    fitting = [row for row in rows if row["work"] <= work * (1 + 1e-9)]
    return min(fitting, key=lambda row: float(row["error"])) if fitting else None


def _rows() -> list[Made]:
    return list(read_results("video_cache").get("sweep", {}).get("rows", []))


def _settings(row: Made) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"({', '.join(map(text, value))})"
        return f"{value:g}" if isinstance(value, float) else str(value)

    shown = ", ".join(f"{name}={text(value)}" for name, value in row["settings"].items())
    return f"`{shown}`" if shown else "defaults"


def _pair(row: Made | None) -> str:
    return "–" if row is None else f"{number(row['psnr'], 1)} ({1 / row['work']:.2f} ×)"


def compared() -> str:
    """Return each cache's best settings beside the best of QuantCache's that do no more work."""
    rows = usable(_rows())
    if not rows:
        return NOT_YET
    ours = [row for row in rows if row["cache"] == OWN]
    printed = [row for row in ours if not row["settings"].get("extrapolation", 1)]
    lines, above, lost = [], 0, []
    for name in dict.fromkeys(family(row) for row in rows if row["cache"] != OWN):
        for row in frontier([row for row in rows if family(row) == name]):
            if 1 / row["work"] > MOST:
                continue
            best = at_most(ours, row["work"])
            gain = None if best is None else best["psnr"] - row["psnr"]
            above += gain is not None and gain >= 0
            if gain is None or gain < 0:
                lost.append(f"{name} at {1 / row['work']:.2f} ×")
            shown = "–" if gain is None else f"{gain:+.1f}" if gain >= 0 else f"**{gain:+.1f}**"
            line = [f"{name} {_settings(row)}", f"{1 / row['work']:.2f} ×", number(row["psnr"], 1)]
            lines.append([*line, _pair(best), shown, _pair(at_most(printed, row["work"]))])
    failed = {row["cache"]: row["failure"] for row in _rows() if "failure" in row}
    text = f"QuantCache is on or above {above} of these {len(lines)} points"
    text += f"; it is below {'; '.join(lost)}." if lost else "."
    text += "".join(f" {name} does not run on this model ({why[:90]})." for name, why in failed.items())
    header = ["cache and settings", "fewer block calls", "PSNR, dB", "QuantCache with no more work", "difference"]
    return table([*header, "its `extrapolation=0` with no more work"], lines) + "\n\n" + text


def curve() -> str:
    """Return QuantCache's own best settings, with and without extrapolation, and the default."""
    rows = [row for row in usable(_rows()) if row["cache"] == OWN]
    if not rows:
        return NOT_YET
    lines = []
    default = [row for row in rows if not row["settings"]]
    for name in (OWN, f"{OWN}, extrapolation=0"):
        own = [row for row in rows if family(row) == name]
        for row in frontier(own) + [row for row in default if family(row) == name and row not in frontier(own)]:
            computed = f"{row['computed']} of {_setup('steps')}"
            size = number(row["cache_bytes"] / 1e3, 0)
            lines.append([_settings(row), computed, f"{1 / row['work']:.2f} ×", number(row["psnr"], 1), size])
    return table(["settings", "steps computed", "fewer block calls", "PSNR, dB", "cache, kB"], lines)


def parts() -> str:
    """Return what bypassed blocks, schedules by block and sublayers do."""
    rows = [row for row in usable(_rows()) if row["cache"] == OWN]
    chosen = [row for row in rows if {"prune_high", "schedule", "granularity"} & set(row["settings"])]
    if not chosen:
        return NOT_YET
    lines = []
    for row in chosen:
        plain = at_most([other for other in rows if other not in chosen], row["work"])
        lines.append([_settings(row), f"{1 / row['work']:.2f} ×", number(row["psnr"], 1), _pair(plain)])
    return table(["settings", "fewer block calls", "PSNR, dB", "best of whole stacks with no more work"], lines)


def together() -> str:
    """Return the errors of DVD-Quant and QuantCache alone and of both, with the sum of the two."""
    results = read_results("video_cache")
    rows = [row for name in ("together", "together-outliers") for row in results.get(name, {}).get("rows", [])]
    if not rows:
        return NOT_YET
    lines, over = [], 0
    for row in rows:
        roots = [math.sqrt(error) for error in row["errors"]]
        over += roots[2] > (roots[0] + roots[1]) * (1 + 1e-9)
        lines.append(
            [
                f"{row['quantized']}{', outliers' if row['outliers'] else ''}, {row['bit_policy']}, "
                f"extrapolation={row['cache']['extrapolation']}",
                number(row["bits"], 1),
                " / ".join(map(str, row["computed"])),
                *(f"{100 * root:.2f}" for root in roots),
                f"{100 * (roots[0] + roots[1]):.2f}",
                number(row["psnr"][2], 1),
            ]
        )
    header = ["weights, bit policy", "mean bits", "steps computed: dense / quantized", "DVD-Quant alone"]
    header += ["QuantCache alone", "both", "sum", "both, dB"]
    text = f"In {len(lines) - over} of {len(lines)} rows the error of both is not above the sum."
    return table(header, lines) + "\n\n" + text + " Errors: root mean square of pixels in [-1, 1], times 100."


def _setup(key: str) -> Any:
    return read_results("video_cache").get("sweep", {}).get(key)


def setup() -> str:
    """Return one line on how the figures were taken."""
    result = read_results("video_cache").get("sweep")
    if result is None:
        return NOT_YET
    environment = result["environment"]
    return (
        f"{result['prompts']} prompts × {len(result['seeds'])} noises, {result['steps']} Euler steps, "
        f"{result['blocks']} blocks, {len(usable(result['rows']))} settings; {environment['cpu']}, torch "
        f"{environment['packages']['torch']}, commit {environment['commit']}."
    )


TABLES = {
    "cache-compared": compared,
    "cache-curve": curve,
    "cache-parts": parts,
    "cache-together": together,
    "cache-setup": setup,
}
