"""Pieces of the tables that ``python -m benchmarks.report`` renders."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]], words: bool = False) -> str:
    """Return a Markdown table; the first column is words, the others numbers unless ``words``."""
    lines = [header, ["---", *["---" if words else "---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int) -> str:
    """Return a number with this many digits, large ones without and with commas; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}f}"
