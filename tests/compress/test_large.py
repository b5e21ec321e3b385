"""The large checkpoint of the benchmarks, small: made shard by shard, compressed under a ceiling, killed, resumed."""

import pytest

from benchmarks import big
from tests.tiny import tiny_model

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPTIONS = "--method dvd_quant --option layers=all --option weight_init=minmax".split()


def test_a_process_above_the_ceiling_is_ended(tmp_path):
    with pytest.raises(RuntimeError, match=r"GiB of 0.001, ended with -9"):
        big.watched(["python", "-c", "import time; data = bytes(50_000_000); time.sleep(30)"], 0.001)


def test_shards_hold_what_the_index_says(tmp_path):
    elements = big.make(tmp_path / "dense", 2, **SMALL)
    source = big.CheckpointSource(sorted((tmp_path / "dense").glob("*.safetensors")))
    assert len(source.files) == 4
    again = big.weight("model.layers.1.mlp.down_proj.weight", 256, 512)
    assert source.read("model.layers.1.mlp.down_proj.weight", again.dtype).equal(again)
    blocks = sum(parameter.numel() for parameter in tiny_model(**SMALL).parameters())
    assert elements == blocks


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch):
    results = {}

    def write(name, result):
        results[name] = result
        (tmp_path / "result.json").write_text("{}")
        return tmp_path / "result.json"

    monkeypatch.setattr(big, "write_result", write)
    big.make(tmp_path / "dense", 6, **SMALL)
    big.run(tmp_path / "dense", tmp_path / "work", 2.0, OPTIONS, "small", whole=True)
    found = results["scale/small"]
    assert 21 <= found["killed"]["layers"] < 42
    assert found["resumed"]["layers"] == 42
    assert not found["sampled"]["differing"]
    assert found["whole"]["same"]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["small.json"]
