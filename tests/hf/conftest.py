"""What several files of tests share: folders of a tiny pipeline of diffusers, a Hub, and a model to push there."""

import shutil
import time
from pathlib import Path

import pytest

from tests.hub_server import Hub


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


class Waits(list):
    """Takes the place of the module `time` in the clients: waits are noted down, not spent."""

    def sleep(self, seconds):
        self.append(seconds)

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own that the clients in this process talk to, with a token to write and an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    from hf_lowbit.hf import hub_errors

    waits = Waits()
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # made once, when the module is imported
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made once, at its first use
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        for module in (_http, file_download, hub_errors):
            monkeypatch.setattr(module, "time", waits)
        server.waits = waits
        huggingface_hub.close_session()  # of another test's server
        yield server


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny calibrated model with the records of its run."""
    from hf_lowbit import quantize
    from hf_lowbit.hf.record import run_record
    from hf_lowbit.hf.save import save_model
    from tests.hf.test_transformers import quick
    from tests.tiny import tiny_model

    model = tiny_model()
    report = quantize(model, quick())
    record = run_record("org/model", report.seconds)
    return save_model(model, tmp_path_factory.mktemp("hub") / "tiny-1bit", rows=report.rows, record=record)


@pytest.fixture
def own_folder(model_folder, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "tiny-1bit"))
