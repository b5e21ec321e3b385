"""What every benchmark shares: the real model and text, and result files that say how they came about."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import assets
from hf_lowbit.calibration.data import load_texts, sample_sequences, tokenize

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Return commit, command, versions and machine, to be stored with a result."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    arguments = " ".join(sys.argv[1:])
    return {
        "commit": git.stdout.strip() or None,
        "command": f"python -m {sys.modules['__main__'].__spec__.name.removesuffix('.__main__')} {arguments}".strip(),  # type: ignore[union-attr]
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "packages": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write one result file; ``name`` is a path below ``benchmarks/results`` without the ending."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "environment": environment()}, indent=1) + "\n")
    return path


def read_results(folder: str) -> dict[str, dict[str, Any]]:
    """Return the result files of a folder below ``benchmarks/results``, by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))}


def calibration_sequences(tokenizer: Any, samples: int, length: int) -> Tensor:
    """Return (samples, length) token ids of articles that are not used for measuring."""
    stream = tokenize(load_texts(str(assets.wikipedia("calibration"))), tokenizer)
    return sample_sequences(stream, samples, length, seed=0)


def heldout_sequences(tokenizer: Any, samples: int, length: int) -> Tensor:
    """Return (samples, length) token ids of articles that are not used for calibration, evenly spaced."""
    stream = tokenize(load_texts(str(assets.wikipedia("heldout"))), tokenizer)
    step = len(stream) // samples
    return torch.stack([stream[i * step : i * step + length] for i in range(samples)])
