"""What a compression run leaves beside a model for its card: where it came from, how long it took, on what machine.

``compression_run.json`` holds the name of the dense model if it has one on the Hub (never a path), the seconds, the
processor and the versions of packages. It is read back like any file of a stranger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowbit.config import parse_json
from hf_lowbit.errors import CheckpointError

RUN_FILE = "compression_run.json"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_LONGEST = 200


def public_name(model: Any) -> str | None:
    """Return the name of a model on the Hub, None for a folder or for what cannot be such a name."""
    name = str(model or "")
    return name if REPOSITORY.fullmatch(name) and ".." not in name and not Path(name).exists() else None


def run_record(base_model: Any, seconds: float) -> dict[str, Any]:
    """Return the record of a run on this machine, as JSON types.

    Args:
        base_model: the dense model as it was named: on the Hub, or a folder, which is not recorded.
        seconds: of the run.
    """
    import torch

    from hf_lowbit.report.environment import devices, packages

    versions = packages()
    kept = ("hf_lowbit", "python", "torch", "transformers", "diffusers")
    return {
        "base_model": public_name(base_model),
        "seconds": round(seconds, 3),
        "devices": [str(device["name"]) for device in devices()],
        "threads": torch.get_num_threads(),
        "packages": {name: versions[name] for name in kept if name in versions},
    }


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder, empty without one.

    Raises:
        CheckpointError: it is not as :func:`run_record` writes it.
    """
    try:
        content = parse_json((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{RUN_FILE} of {folder.name}: is not valid JSON") from error
    checks = {
        "base_model": lambda value: value is None or (_is_line(value) and bool(REPOSITORY.fullmatch(value))),
        "seconds": lambda value: type(value) in (int, float) and 0 <= value < 1e9,
        "devices": lambda value: isinstance(value, list) and all(map(_is_line, value)),
        "threads": lambda value: type(value) is int and 0 < value < 10**6,
        "packages": lambda value: isinstance(value, Mapping) and all(map(_is_line, [*value, *value.values()])),
    }
    if not isinstance(content, dict):
        raise CheckpointError(f"{RUN_FILE} of {folder.name}: must be an object")
    wrong = [key for key in content if key not in checks] + [
        key for key, fits in checks.items() if key in content and not fits(content[key])
    ]
    if wrong:
        raise CheckpointError(f"{RUN_FILE} of {folder.name}: {json.dumps(wrong[0][:80])} is not as a run writes it")
    return content


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()
