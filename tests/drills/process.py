"""What the drills share: work done in a process of its own, the memory it takes there, and how a finding is put."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[2]
_KINDS = {"total": "VmRSS", "anonymous": "RssAnon", "of files": "RssFile", "highest": "VmHWM"}
MB = 1e6


def check(requirement: str, found: str, met: bool | None) -> dict[str, Any]:
    """Return a finding, a row of the table of a drill; ``met`` is None where nothing is required or judged."""
    return {"requirement": requirement, "found": found, "met": met}


def called(function: str, fresh: bool, **arguments: Any) -> dict[str, Any]:
    """Call a function of this package, given as ``module:name``, in a new interpreter.

    Args:
        function: which; it returns a dict of JSON types.
        fresh: False calls it in this process, which is quicker and good enough for what is not judged.
        arguments: for it, JSON types.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it wrote.
    """
    if not fresh:
        return _call(function, arguments)
    command = [sys.executable, "-m", "tests.drills.process", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function}: ended with {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _call(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = function.partition(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), name)(**arguments)
    return found


def resident() -> dict[str, int]:
    """Return the resident bytes of this process: all of them, anonymous ones, and those that are pages of files."""
    status = Path("/proc/self/status").read_text().splitlines()
    lines = dict(line.split(":", 1) for line in status)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in _KINDS.items()}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Find the highest resident memory within a ``with`` statement, above what there is at its start.

    Yields:
        Megabytes by kind, filled in when the statement ends. "total" is the kernel's own high-water mark, which
        misses nothing; the other kinds are sampled every two milliseconds.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident()
    highest = dict(before)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            for kind, size in resident().items():
                highest[kind] = max(highest[kind], size)

    thread = threading.Thread(target=sample)
    thread.start()
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        done.set()
        thread.join()
    peak = {**highest, "total": resident()["highest"]}
    found |= {kind: round((peak[kind] - before[kind]) / MB, 1) for kind in ("total", "anonymous", "of files")}
    found["at the start"] = round(before["total"] / MB, 1)


def main() -> None:
    """Call the function that the arguments name, and print what it returns."""
    torch.manual_seed(0)
    print(json.dumps(_call(sys.argv[1], json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
