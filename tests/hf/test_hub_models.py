"""Models, models with a cache of latents, diffusion models and pipelines: pushed, and pulled by somebody else.

Somebody else is another process with an empty cache, which imports nothing of this package but by autoload.
"""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_lowbit import CheckpointError, HubError, quantize
from hf_lowbit.hf.card import CardFields
from hf_lowbit.hf.hub import push_folder
from hf_lowbit.hf.pull import pull
from hf_lowbit.hf.push_model import push_model
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.headers import parts
from hf_lowbit.report.inspect import inspect
from tests.hf.test_recalkv_life_cycle import small
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model, tokens

MIT = CardFields("org/model", "mit")

STRANGER = """
import sys
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline, LTXVideoTransformer3DModel
from transformers import AutoModelForCausalLM
models = {name: AutoModelForCausalLM.from_pretrained(f"user/{name}") for name in ("weights", "cache")}
transformer = LTXVideoTransformer3DModel.from_pretrained("user/transformer")
pipeline = DiffusionPipeline.from_pretrained("user/pipeline")
sys.path.insert(0, sys.argv[1])
from safetensors.torch import save_file
from tests.tiny import tokens
from tests.video import latents, outputs
with torch.no_grad():
    found = {name: model(input_ids=tokens()).logits for name, model in models.items()}
    found["tokens"] = models["cache"].generate(tokens(1, 6), max_new_tokens=6, do_sample=False)
    found["transformer"], found["pipeline"] = outputs(transformer), latents(pipeline)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[2])
"""


def test_a_stranger_gets_the_same_logits(hub, paths, tmp_path):
    """Of every kind of model: from the call of the user to the numbers in another process."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    from tests.video import latents, outputs

    expected = {}
    weights, cache = tiny_model(), tiny_model(num_hidden_layers=3)
    quantize(weights, quick())
    quantize(cache, small())
    pipeline = DiffusionPipeline.from_pretrained(paths / "packed", dtype=torch.float32)
    for name, model in (("weights", weights), ("cache", cache), ("transformer", pipeline.transformer)):
        model.push_to_hub(f"user/{name}", base_model="org/model", license="mit")
    pipeline.save_pretrained(tmp_path / "pipeline")
    push_folder(tmp_path / "pipeline", "user/pipeline", MIT)
    with torch.no_grad():
        expected["weights"], expected["cache"] = logits(weights), logits(cache)
        expected["tokens"] = cache.generate(tokens(1, 6), max_new_tokens=6, do_sample=False)
        expected["transformer"] = outputs(pipeline.transformer)
        expected["pipeline"] = latents(pipeline)
    variables = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty"), "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", STRANGER, os.getcwd(), str(tmp_path / "found.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    assert set(found) == set(expected)
    # diffusers writes into every config where a model was loaded from; that is left out
    assert str(paths).encode() in (tmp_path / "pipeline" / "transformer" / "config.json").read_bytes()
    for name in ("transformer", "pipeline"):
        assert not any(str(paths).encode() in content for content in hub.files(f"user/{name}").values())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_cards_of_all_kinds(hub, paths):
    cache = tiny_model(num_hidden_layers=3)
    quantize(cache, small())
    push_model(cache, "user/cache", fields=MIT)
    push_folder(paths / "packed", "user/pipeline", MIT)
    page = hub.files("user/cache")["README.md"].decode()
    assert "- recalkv" in page
    assert "| cache per token, latents of 16 bits |" in page
    assert "AutoModelForCausalLM.from_pretrained" in page
    page = hub.files("user/pipeline")["README.md"].decode()
    assert "library_name: diffusers" in page
    assert "pipeline = DiffusionPipeline.from_pretrained" in page
    assert "### text\\_encoder" in page
    assert "### transformer" in page
    assert "no data was used" in page


# push_to_hub ---------------------------------------------------------------------------------------------------------


def test_push_to_hub_writes_the_card_and_replaces(hub, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quick())
    model.config._name_or_path = "org/model"  # as if it had been there that it was loaded from
    model.push_to_hub("user/one", license="mit", tags=["tiny"], commit_message="first", private=True)
    page = hub.files("user/one")["README.md"].decode()
    assert "base_model: org/model" in page
    assert "- tiny\n" in page
    assert hub.repos["user/one"].private
    assert json.loads(hub.files("user/one")["compression_run.json"])["base_model"] == "org/model"
    other = tiny_model(num_hidden_layers=1)
    quantize(other, quick())
    other.push_to_hub("one", license="mit", base_model="org/other", max_shard_size="50KB")  # of the owner of the token
    assert "model.safetensors" not in hub.files("user/one")
    assert "base_model: org/other" in hub.files("user/one")["README.md"].decode()
    with pytest.raises(ValueError, match="takes no variant"):
        other.push_to_hub("user/one", variant="fp16")
    with pytest.raises(ValueError, match="base_model is not known"):
        other.push_to_hub("user/one", license="mit")


def test_a_model_from_a_folder_keeps_the_record_of_its_run(hub, model_folder):
    loaded = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded.push_to_hub("user/again", license="mit")
    assert hub.files("user/again")["compression_run.json"] == (model_folder / "compression_run.json").read_bytes()
    assert "base_model: org/model" in hub.files("user/again")["README.md"].decode()


def test_of_a_model_with_an_adapter_the_adapter_is_pushed_as_ever(hub):
    model = tiny_model(num_hidden_layers=1)
    quantize(model, quick(calibration=None))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.push_to_hub("user/adapter", private=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("user/adapter"))
    assert "model.safetensors" not in hub.files("user/adapter")
    assert hub.repos["user/adapter"].private


def test_push_to_hub_belongs_to_one_packed_model():
    model = tiny_model(num_hidden_layers=1)
    quantize(model, quick(calibration=None))
    copied = copy.deepcopy(model)
    assert copied.push_to_hub._model() is copied
    restored = pickle.loads(pickle.dumps(model))
    assert restored.push_to_hub._model() is restored
    gone = weakref.ref(copied)
    left = copied.push_to_hub
    del copied
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="is gone"):
        left("user/gone")
    restored.dequantize()
    assert "push_to_hub" not in vars(restored)


# Pull ----------------------------------------------------------------------------------------------------------------


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_pull_brings_what_was_pushed(hub, model_folder, paths, tmp_path):
    push_folder(model_folder, "user/weights", MIT)
    push_folder(paths / "packed", "user/pipeline", MIT)
    for name in ("weights", "pipeline"):
        assert content(pull(f"user/{name}", tmp_path / name)) == hub.files(f"user/{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pipeline", "weights"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        pull("user/weights", tmp_path / "weights")
    pull("user/weights", tmp_path / "weights", overwrite=True)


def test_inspect_fetches_headers_only(hub, tmp_path, paths):
    model = tiny_model(hidden_size=256, intermediate_size=512, vocab_size=2048)
    quantize(model, quick(calibration=None, variant="rtn"))
    folder = save_model(model, tmp_path / "big", max_shard_size="700KB")
    push_folder(folder, "user/big", MIT)
    hub.requests.clear()
    found = inspect("user/big")
    fetched = [(method, wanted) for method, path, wanted, *_ in hub.requests if path.startswith("/lfs/")]
    assert fetched == [("GET", "bytes=0-100000"), ("GET", "bytes=0-7")] * len(list(folder.glob("*.safetensors")))
    assert len(fetched) > 2
    here = inspect(folder)
    assert (found.modules, found.groups, found.header_bytes) == (here.modules, here.groups, here.header_bytes)
    assert found.total_bytes == sum(map(len, hub.files("user/big").values())) + 25  # .gitattributes
    push_folder(paths / "packed", "user/pipeline", MIT)
    assert parts("user/pipeline") == ["text_encoder", "transformer"]
    with pytest.raises(CheckpointError, match="none of the models of this pipeline is compressed"):
        parts(paths / "dense")
    assert inspect("user/pipeline", "transformer").modules == inspect(paths / "packed", "transformer").modules


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"truncate": True}, None),
        ({"drop": True}, None),
        ({"truncate": True, "times": 10**6}, "connection to the Hub failed .*it goes on where it was"),
        ({"status": 500, "times": 10**6}, "trouble of its own"),
        ({"status": 403, "times": 10**6}, "may not|refused|no such"),
    ],
    ids=str,
)
def test_an_interrupted_pull_goes_on(hub, model_folder, tmp_path, how, message):
    push_folder(model_folder, "user/weights", MIT)
    hub.fail("GET /lfs/", skip=2, **how)  # what inspect asks for passes
    if message is not None:
        with pytest.raises(HubError, match=message) as caught:
            pull("user/weights", tmp_path / "out")
        assert "signature" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        hub.faults.clear()
    assert content(pull("user/weights", tmp_path / "out")) == hub.files("user/weights")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_ours_is_not_downloaded(hub, tmp_path, model_folder):
    push_folder(model_folder, "user/weights", MIT)
    repo = hub.repos["user/weights"]
    files = repo.commits[repo.branches["main"]]
    config = json.loads(files["config.json"][0])
    del config["quantization_config"]
    repo.commit("main", {**files, "config.json": (json.dumps(config).encode(), False)})
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="not compressed"):
        pull("user/weights", tmp_path / "out")
    assert not [path for _, path, wanted, *_ in hub.requests if path.startswith("/lfs/") and wanted is None]
    for repo_id, revision, message in (
        ("user/none", None, "no such repository"), ("user/weights", "v9", "no such revision"),
    ):  # fmt: skip
        with pytest.raises(HubError, match=message):
            pull(repo_id, tmp_path / "out", revision)


def test_a_model_that_lies_damaged_on_the_hub(hub, tmp_path, model_folder):
    push_folder(model_folder, "user/weights", MIT)
    repo = hub.repos["user/weights"]
    files = repo.commits[repo.branches["main"]]
    data = bytearray(files["model.safetensors"][0])
    data[-1] ^= 1
    repo.commit("main", {**files, "model.safetensors": (bytes(data), True)})
    with pytest.raises(CheckpointError, match=r"damaged before it was pushed, or on its way: .*checksum"):
        pull("user/weights", tmp_path / "out")
    repo.commit("main", {**files, "model.safetensors": (bytes(data) + b"more", True)})
    with pytest.raises(CheckpointError, match="header does not fit the file"):
        inspect("user/weights")
    repo.commit("main", {**files, "model.safetensors": (b"\x10" + bytes(7) + b"not json at all!", True)})
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        inspect("user/weights")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
