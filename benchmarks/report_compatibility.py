"""The tables of docs/compatibility.md, from what ``python -m benchmarks.compatibility`` has tried."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import table
from hf_lowbit import registry

Tries = dict[str, str | None]
_FILE = RESULTS / "compatibility.json"


def read() -> dict[str, Any]:
    """Return the result file, empty if nothing was tried."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8")) if _FILE.exists() else {}
    return found


def _kind(host: str, tries: Tries) -> str:
    """Return the section of one kind of model: a matrix, and the sentences behind its numbers."""
    names = list(registry.methods())
    reasons: dict[str, int] = {}

    def cell(one: str, other: str) -> str:
        key = one if one == other else " + ".join(sorted((one, other), key=names.index))
        if key not in tries:
            return "–"
        reason = tries[key]
        return "yes" if reason is None else f"[{reasons.setdefault(_plain(reason), len(reasons) + 1)}]"

    rows = [[f"**{one}**", *(cell(one, other) for other in names)] for one in names]
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    works = sum(reason is None for key, reason in tries.items() if " + " in key)
    pairs = sum(" + " in key for key in tries)
    text = f"### {host.capitalize()}\n\n{works} of {pairs} pairs work.\n\n{table(['', *names], rows, words=True)}"
    return f"{text}\n\n{listed}" if listed else text


def _plain(reason: str) -> str:
    """Return a sentence of the package as Markdown that shows it; patterns hold asterisks, names underscores."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", reason)


def compatibility() -> str:
    """Return all kinds of models, one after the other, and where this was tried."""
    found = read()
    if not found:
        return "Not tried yet."
    environment = found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    sections = [_kind(host, tries) for host, tries in found["tries"].items()]
    return "\n\n".join(
        [*sections, f"Tried with `{environment['command']}`, {packages}, commit {environment['commit']}."]
    )


TABLES: dict[str, Callable[[], str]] = {"compatibility": compatibility}
