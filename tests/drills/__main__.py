"""Hurt the package and count what happens; one command for all drills.

    python -m tests.drills                  # everything, at full size (about half an hour on two cores)
    python -m tests.drills --only kills     # one drill; --only may be given more than once
    python -m tests.drills --small          # small sizes, a minute; nothing is written

Writes ``benchmarks/results/drills.json``, from which ``python -m benchmarks.report`` renders the table in
``benchmarks/README.md``. Ends with 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import RESULTS, environment
from tests.drills import byte_flips, kills, load, memory

DRILLS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "byte_flips": byte_flips.drill,
    "kills": kills.drill,
    "memory": memory.drill,
    "load": load.drill,
}


def write(results: dict[str, Any]) -> None:
    """Put results into the result file; those of drills that were not run now stay."""
    path = RESULTS / "drills.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **results}, indent=1) + "\n")


def main() -> int:
    """Parse arguments, run, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(DRILLS), metavar="NAME", help=", ".join(DRILLS))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.getLogger("hf_lowbit").addHandler(logging.NullHandler())  # what it warns of here is meant to happen
    console, failed = Console(), 0
    for name in arguments.only or DRILLS:
        began = time.perf_counter()
        found = DRILLS[name](arguments.small)
        found["seconds"] = round(time.perf_counter() - began)
        found["environment"] = {**environment(), "command": " ".join(["python -m tests.drills", *sys.argv[1:]])}
        if not arguments.small:
            write({name: found})
        table = Table("requirement", "found", "met", title=f"{name}, {found['seconds']} s")
        for check in found["checks"]:
            met = {True: "yes", False: "[bold red]NO", None: "not judged"}[check["met"]]
            table.add_row(check["requirement"], check["found"], met)
            failed += check["met"] is False
        console.print(table)
        for problem in found.get("problems", []):
            console.print(f"[bold red]{problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
