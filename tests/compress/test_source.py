"""Single tensors out of safetensors files, by the names they have in the model."""

import pytest
import torch
from safetensors.torch import save_file

from hf_lowbit import CheckpointError
from hf_lowbit.compress import CheckpointSource
from hf_lowbit.compress.headers import names_metadata


@pytest.fixture
def files(tmp_path):
    """Two shards of a checkpoint saved from a model with a head."""
    tensors = {
        "model.layers.0.q.weight": torch.randn(4, 6),
        "model.layers.0.q.bias": torch.randn(4, dtype=torch.float64),
        "lm_head.weight": torch.randn(3, 4).bfloat16(),
    }
    save_file({"model.layers.0.q.weight": tensors["model.layers.0.q.weight"]}, tmp_path / "model-1.safetensors")
    save_file(
        {key: tensor for key, tensor in tensors.items() if not key.endswith("q.weight")},
        tmp_path / "model-2.safetensors",
    )
    return [tmp_path / "model-1.safetensors", str(tmp_path / "model-2.safetensors")], tensors


@pytest.mark.parametrize("prefix", ["", "model"])
def test_reading_by_the_stored_name(files, prefix):
    source = CheckpointSource(files[0], prefix)
    for key, tensor in files[1].items():
        assert source.locate(key) == key
        assert torch.equal(source.read(key, tensor.dtype), tensor)


def test_a_base_model_reads_a_checkpoint_with_a_head(files):
    """The model lacks the prefix that the file has."""
    source = CheckpointSource(files[0], "model")
    assert source.locate("layers.0.q.weight") == "model.layers.0.q.weight"
    assert torch.equal(source.read("layers.0.q.weight", torch.float32), files[1]["model.layers.0.q.weight"])
    assert CheckpointSource(files[0]).locate("layers.0.q.weight") is None


def test_a_model_with_a_head_reads_the_checkpoint_of_its_base(tmp_path):
    """The model has the prefix that the file lacks."""
    weight = torch.randn(2, 2)
    save_file({"layers.0.q.weight": weight}, tmp_path / "base.safetensors")
    source = CheckpointSource([tmp_path / "base.safetensors"], "model")
    assert source.locate("model.layers.0.q.weight") == "layers.0.q.weight"
    assert torch.equal(source.read("model.layers.0.q.weight", torch.float32), weight)
    assert source.locate("other.layers.0.q.weight") is None


def test_the_exact_name_is_preferred(tmp_path):
    tensors = {"q.weight": torch.zeros(1), "model.q.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "both.safetensors")
    source = CheckpointSource([tmp_path / "both.safetensors"], "model")
    assert float(source.read("q.weight", torch.float32)) == 0
    assert float(source.read("model.q.weight", torch.float32)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_of_the_model(files, dtype):
    got = CheckpointSource(files[0]).read("lm_head.weight", dtype)
    assert got.dtype == dtype
    assert got.device.type == "cpu"
    assert torch.equal(got, files[1]["lm_head.weight"].to(dtype))


def test_a_read_tensor_belongs_to_the_reader(files):
    source = CheckpointSource(files[0])
    first = source.read("model.layers.0.q.weight", torch.float32)
    first.zero_()
    files[0][0].unlink()  # nothing is mapped any more
    assert not first.any()
    assert source.locate("model.layers.0.q.weight")  # headers were read at the start


@pytest.mark.parametrize("name", ["layers.9.q.weight", "", "model", "model.layers.0.q"])
def test_missing_keys_are_named(files, name):
    source = CheckpointSource(files[0], "model")
    assert source.locate(name) is None
    with pytest.raises(CheckpointError, match=f"^{name}: not in the checkpoint"):
        source.read(name, torch.float32)


def test_a_parameter_may_be_a_part_of_a_stored_tensor(tmp_path):
    fused = torch.arange(24.0).view(2, 3, 4)
    save_file({"experts": fused}, tmp_path / "fused.safetensors")
    source = CheckpointSource([tmp_path / "fused.safetensors"])
    source.alias("whole", "experts")
    source.alias("second", "experts", 1)
    source.alias("turned", "experts", 0, transposed=True)
    assert torch.equal(source.read("whole", torch.float32), fused)
    assert torch.equal(source.read("second", torch.float32), fused[1])
    assert torch.equal(source.read("turned", torch.float32), fused[0].T)
    assert source.read("turned", torch.float32).is_contiguous()
    source.alias("lost", "nowhere")
    assert source.locate("lost") is None


def test_names_in_the_model_may_differ_from_those_in_the_file(tmp_path):
    stored = {"m.0.mlp.q.weight_sign": "m.0.moe.q.weight_sign", "m.0.mlp.q.weight": "m.0.moe.q.weight", "m.k": "m.k"}
    tensors = {key: torch.full((1,), float(i)) for i, key in enumerate(stored.values())}
    table = names_metadata(stored)
    assert table == {"hf_lowbit_names": '{"m.0.moe":"m.0.mlp"}'}
    save_file(tensors, tmp_path / "renamed.safetensors", metadata=table)
    source = CheckpointSource([tmp_path / "renamed.safetensors"])
    for i, name in enumerate(stored):
        assert float(source.read(name, torch.float32)) == i
    assert names_metadata({"a.b": "a.b"}) == {}


@pytest.mark.parametrize("table", ["[]", "{", '{"a": 1}', '{"a": "same", "b": "same"}', '{"a": "b"}', "[" * 10**5])
def test_a_broken_table_of_names_is_refused(tmp_path, table):
    save_file({"a.x": torch.zeros(1), "b.x": torch.ones(1)}, tmp_path / "a.safetensors", {"hf_lowbit_names": table})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its table of names"):
        CheckpointSource([tmp_path / "a.safetensors"])


def test_no_files():
    assert CheckpointSource([]).locate("weight") is None


def damage(content):
    return {
        "empty": b"",
        "no safetensors": b"PK\x03\x04 a zip archive, as pickled checkpoints are" + bytes(64),
        "header cut": content[:20],
        "data cut": content[:-1],
        "header longer than the file": (2**40).to_bytes(8, "little") + content[8:],
        "header no json": content[:8] + b"x" + content[9:],
        "data after the end": content + b"\0",
    }


@pytest.mark.parametrize("kind", damage(bytes(100)))
def test_damaged_files_are_named(files, kind):
    path = files[0][0]
    path.write_bytes(damage(path.read_bytes())[kind])
    with pytest.raises(CheckpointError, match=r"^model-1\.safetensors: not a readable safetensors file"):
        CheckpointSource(files[0])


def test_a_file_that_is_not_there_is_named(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"^gone\.safetensors: not a readable"):
        CheckpointSource([*files[0], tmp_path / "gone.safetensors"])


@pytest.mark.parametrize("late", ["removed", "cut"])
def test_damage_during_the_run_is_named(files, late):
    source = CheckpointSource(files[0])
    path = files[0][0]
    if late == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        source.read("model.layers.0.q.weight", torch.float32)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"weight": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    with pytest.raises(CheckpointError, match="weight"):
        CheckpointSource([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
