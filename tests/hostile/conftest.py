"""Tiny packed models, made once; a test damages a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf.test_transformers import quick
from tests.tiny import tiny_model


def packed(folder: Path, name: str, noise: float = 0.0) -> None:
    """Write a tiny packed model of one block, whole as ``name`` and in shards as ``name-shards``."""
    dense = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    dense.save_pretrained(folder / f"{name}-dense")
    model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-dense", quantization_config=quick(calibration=None))
    model.save_pretrained(folder / name)
    model.save_pretrained(folder / f"{name}-shards", max_shard_size="20KB")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two models of the same make with other weights, "one" and "other", each also in shards."""
    folder = tmp_path_factory.mktemp("hostile")
    packed(folder, "one")
    packed(folder, "other", noise=0.05)
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a model; the copy may be damaged."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))


@pytest.fixture
def model(copy: Callable[[str], Path]) -> Path:
    """A copy of a packed model in one file."""
    return copy("one")


@pytest.fixture
def shards(copy: Callable[[str], Path]) -> Path:
    """A copy of a packed model in four files and an index."""
    return copy("one-shards")
