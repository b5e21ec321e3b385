"""A packed tiny model, made once; a test that damages it takes a copy."""

import shutil
from pathlib import Path

import pytest

from tests.serving import cases


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose layers are of all formats, with some of them dense."""
    return cases.save(tmp_path_factory.mktemp("served") / "mixed", cases.QUICK)


@pytest.fixture
def copy(served: Path, tmp_path: Path) -> Path:
    """Folder of a copy of it."""
    return Path(shutil.copytree(served, tmp_path / "copy"))
