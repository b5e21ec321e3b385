"""What several files of tests share: folders of a tiny pipeline of diffusers."""

import shutil

import pytest


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of a tiny pipeline, dense and with two packed parts; tests must not write to them."""
    from tests.video import save_pipelines  # imports diffusers, which other tests want to see absent

    folder = tmp_path_factory.mktemp("diffusers")
    save_pipelines(folder)
    return folder


@pytest.fixture
def dense_path(paths):
    return paths / "dense" / "transformer"


@pytest.fixture
def packed_path(paths):
    return paths / "packed" / "transformer"


@pytest.fixture
def packed(packed_path):
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel.from_pretrained(packed_path)


@pytest.fixture
def copied(packed_path, tmp_path):
    shutil.copytree(packed_path, tmp_path / "copy")
    return tmp_path / "copy"
