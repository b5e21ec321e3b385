"""Checkpoints as a forger makes them: whatever is changed, every checksum is written anew, so that it fits.

Checksums find damage, not forgery. What is tested here is therefore all that stands behind them: a file that is wrong
must be refused for what it says.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_lowbit import CheckpointError
from hf_lowbit.compress.checksums import metadata_of
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.verify import verify

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj"
# A message is read on a terminal: whatever a file holds, it stays this short.
LONGEST_MESSAGE = 6000


def seal(folder: Path) -> None:
    """Write fitting checksums of all tensors and configs into every weight file."""
    shards = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    configs = {}
    for name in ("config.json", "generation_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            continue
        configs[name] = text
    everything = {key: tensor for tensors in shards.values() for key, tensor in tensors.items()}
    for file, tensors in shards.items():
        save_file(tensors, file, metadata={"format": "pt", **metadata_of(everything, configs)})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the quantization config, by a function that gets it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    file.write_text(json.dumps(config), encoding="utf-8")
    seal(folder)
    return folder


def write_into_config(folder: Path, text: str) -> Path:
    """Put raw text, which need not be sound JSON, at the start of the quantization config."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    start = '"quantization_config": {'
    file.write_text(json.dumps(config).replace(start, f"{start}{text}, ", 1), encoding="utf-8")
    seal(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors, by a function that gets them by name."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE)
    seal(folder)
    return folder


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the header of the weight file and leave its data as they are."""
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the index of a sharded model."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


def load(folder: Path) -> Any:
    """Load a model as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder)


def sound(folder: Path) -> None:
    """Raise what ``hf-lowbit verify`` reports."""
    if problems := verify(folder).problems:
        raise CheckpointError("; ".join(problems))


WAYS: dict[str, Callable[[Path], Any]] = {"load": load, "inspect": inspect, "verify": sound}


def refused(folder: Path, *parts: str, ways: tuple[str, ...] = ("load", "inspect", "verify")) -> None:
    """Check that a model is refused, by one short and printable message that holds ``parts``, in each of some ways."""
    for way in ways:
        with pytest.raises((CheckpointError, ValueError)) as caught:
            WAYS[way](folder)
        message = str(caught.value)
        assert len(message) <= LONGEST_MESSAGE, way
        assert message.isprintable(), way
        for part in parts:
            assert part in message, way
