"""What the examples share: their options, the folder they write into, and tables of figures."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def parser_of(doc: str | None, out: str, quick: tuple[str, str]) -> argparse.ArgumentParser:
    """Return a parser with the two options that every example has.

    Args:
        doc: docstring of the example, shown as its help.
        out: default of ``--out``.
        quick: name and help of the option that makes the example small.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(quick[0], action="store_true", help=quick[1])
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder to write into (default {out})")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options and make the folder of ``--out``, before the work whose results it is to hold."""
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in the way, or no right to write there
        parser.error(f"--out {arguments.out}: {error.strerror}")
    return arguments


def figures(title: str | None, first: str, *others: str) -> Table:
    """Return an empty table: words in the first column, figures in the others."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table
