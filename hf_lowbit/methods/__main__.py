"""``python -m hf_lowbit.methods [--json | --markdown | --page [FILE]] [--bibtex NAME ...]``: the table of methods."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_lowbit.methods import as_table, bibtex


def main(arguments: list[str] | None = None) -> int:
    """Write what is asked for; the page as Markdown if nothing is. Wrong arguments end the process with status 2."""
    parser = argparse.ArgumentParser(prog="python -m hf_lowbit.methods", description="The table of methods.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="all records as JSON")
    what.add_argument("--markdown", action="store_true", help="the page as Markdown (default)")
    what.add_argument("--bibtex", nargs="*", metavar="NAME", help="entries to cite, of all methods without a name")
    what.add_argument("--page", nargs="?", const="docs/methods.md", metavar="FILE", help="write the page to a file")
    given = parser.parse_args(arguments)
    if given.page is not None:
        try:
            Path(given.page).write_text(as_table("markdown"), encoding="utf-8")
        except OSError as error:
            parser.error(f"--page {given.page}: {error.strerror}")
        return 0
    try:
        text = bibtex(*given.bibtex) if given.bibtex is not None else as_table("json" if given.json else "markdown")
    except KeyError as error:
        parser.error(str(error.args[0]))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
