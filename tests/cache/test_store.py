"""The cache of a prefix in a file: what comes back, and files that must not be believed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from hf_lowbit.cache import ReCalKVCache, cache_bytes, load_cache, save_cache, store
from hf_lowbit.errors import CheckpointError
from tests.cache.features import generated
from tests.cache.latent_models import compress, dense_model
from tests.tiny import tokens

PROMPT = tokens(2, 11)
OPTIONS = {
    "latents": {},
    "codes": {"latent_bits": 4, "sink_tokens": 0},
    "first": {"latent_bits": 4, "sink_tokens": 3},
    "recent": {"latent_bits": 3, "recent_window": 4},
}


@pytest.fixture(scope="module")
def latent():
    return compress(dense_model("llama"), ranks=16)


def prefix(model, length=10, **options):
    cache = ReCalKVCache.from_model(model, **options)
    with torch.no_grad():
        model(PROMPT[:, :length], past_key_values=cache)
    return cache


@pytest.fixture
def path(latent, tmp_path):
    save_cache(prefix(latent), latent, tmp_path / "prefix.safetensors")
    return tmp_path / "prefix.safetensors"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
def test_generation_goes_on_as_if_it_had_not_been_interrupted(family, options, tmp_path):
    model = compress(dense_model(family), ranks=24, rotated=True)
    cache = prefix(model, **options)
    save_cache(cache, model, tmp_path / "a")
    again = compress(dense_model(family), ranks=24, rotated=True)
    loaded = load_cache(again, tmp_path / "a")
    assert cache_bytes(loaded) == cache_bytes(cache)
    ids, logits = generated(model, PROMPT, past_key_values=cache)
    found, found_logits = generated(again, PROMPT, past_key_values=loaded)
    assert torch.equal(found, ids)
    assert torch.equal(torch.stack(found_logits), torch.stack(logits))


def test_the_cache_of_generate_can_be_saved_and_a_file_replaced(latent, tmp_path):
    path = tmp_path / "prefix.safetensors"
    path.write_bytes(b"something else")
    found = latent.generate(PROMPT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    save_cache(found.past_key_values, latent, path)
    loaded = load_cache(latent, path)
    assert loaded.get_seq_length() == 14
    assert [file.name for file in tmp_path.iterdir()] == ["prefix.safetensors"]
    for ours, right in zip(loaded.layers, found.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, right.keys)
        assert torch.equal(ours.stored_positions, right.stored_positions)


def test_fewer_recent_tokens_after_a_crop(latent, tmp_path):
    cache = prefix(latent, latent_bits=4, recent_window=4)
    cache.crop(-3)
    save_cache(cache, latent, tmp_path / "a")
    assert load_cache(latent, tmp_path / "a").layers[0].recent(9)[0].shape[2] == 1
    cache.crop(-2)
    save_cache(cache, latent, tmp_path / "a")
    assert load_cache(latent, tmp_path / "a").layers[0].recent(9) is None


def test_padded_rows_keep_their_positions(latent, tmp_path):
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    cache = DynamicCache(config=latent.config)
    expected, _ = generated(latent, PROMPT, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
    save_cache(cache, latent, tmp_path / "a")
    loaded = load_cache(latent, tmp_path / "a")
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    longer = [generated(latent, expected, attention_mask=mask, past_key_values=c)[0] for c in (cache, loaded)]
    assert torch.equal(*longer)


class TestSaving:
    def test_an_empty_cache(self, latent, tmp_path):
        with pytest.raises(ValueError, match=r"layer 0 of the cache is a DynamicLayer"):
            save_cache(DynamicCache(config=latent.config), latent, tmp_path / "a")
        with pytest.raises(ValueError, match=r"the cache holds \[0\] tokens in 2 layers; it must be filled"):
            save_cache(ReCalKVCache.from_model(latent), latent, tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_a_static_cache(self, latent, tmp_path):
        with pytest.raises(ValueError, match="LatentStaticLayer; a file takes dynamic caches"):
            save_cache(prefix(latent, max_cache_len=20), latent, tmp_path / "a")

    def test_dense_keys(self, latent, tmp_path):
        cache = dense_model("llama")(PROMPT).past_key_values
        with pytest.raises(ValueError, match="whose layers all hold latents"):
            save_cache(cache, latent, tmp_path / "a")

    def test_the_cache_of_another_model(self, latent, tmp_path):
        other = compress(dense_model("llama"), ranks=8)
        with pytest.raises(ValueError, match="filled by another model"):
            save_cache(prefix(other), latent, tmp_path / "a")

    def test_what_no_file_could_be_read_with(self, latent, tmp_path):
        cache = prefix(latent)
        cache.layers[1].values[0, 0, 3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"cannot be saved: layers.1.values holds NaN or infinity"):
            save_cache(cache, latent, tmp_path / "a")
        double = compress(dense_model("llama"), ranks=16).double()
        with pytest.raises(ValueError, match="the cache holds float64 latents; a file takes float16"):
            save_cache(prefix(double), double, tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_not_there(self, latent, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
            save_cache(prefix(latent), latent, tmp_path / "nowhere" / "a")
        with pytest.raises(IsADirectoryError, match="is a folder; give the file a name in it"):
            save_cache(prefix(latent), latent, tmp_path)

    def test_arguments_the_wrong_way_round(self, latent, tmp_path):
        with pytest.raises(TypeError, match="cache must be a cache of transformers, got LlamaForCausalLM"):
            save_cache(latent, prefix(latent), tmp_path / "a")
        with pytest.raises(TypeError, match="model must be a model, got ReCalKVCache"):
            load_cache(prefix(latent), tmp_path / "a")


class TestLoading:
    def refused(self, error, message, latent, path):
        with pytest.raises(error, match=message):
            load_cache(latent, path)

    def rewritten(self, path, change=lambda header: None, tensors=lambda found: found, checksum=True):
        """Write a file again after a change to its header or tensors, by default with a checksum that fits."""
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[store._KEY])
            found = tensors({name: file.get_tensor(name) for name in file.keys()})
        if checksum:
            header["checksum"] = store._checksum(found)
        change(header)
        save_file(found, path, metadata={store._KEY: header if isinstance(header, str) else json.dumps(header)})

    def test_another_model_of_the_same_shapes(self, path):
        other = dense_model("llama")
        with torch.no_grad():
            other.model.layers[1].self_attn.v_proj.weight[3, 3] += 1e-3
        self.refused(ValueError, "filled by another model", compress(other, ranks=16), path)

    def test_another_dtype(self, latent, path):
        model = compress(dense_model("llama"), ranks=16).bfloat16()
        self.refused(ValueError, "holds float32 latents, the model computes in torch.bfloat16", model, path)

    def test_a_model_without_latents(self, path):
        self.refused(ValueError, "no attention that works on latents", dense_model("llama"), path)

    def test_a_flipped_bit_anywhere_in_the_tensors(self, latent, path):
        whole = path.read_bytes()
        start = int.from_bytes(whole[:8], "little") + 8
        for at in range(start, len(whole), (len(whole) - start) // 20):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            self.refused(CheckpointError, "do not fit their checksum", latent, path)

    @pytest.mark.parametrize("length", [0, 5, 100, -1])
    def test_a_file_cut_short(self, latent, path, length):
        path.write_bytes(path.read_bytes()[:length])
        self.refused(CheckpointError, "cannot be read as a safetensors file", latent, path)

    def test_a_file_that_is_not_there_or_something_else(self, latent, tmp_path):
        self.refused(CheckpointError, "cannot be read", latent, tmp_path / "a")
        (tmp_path / "a").mkdir()
        self.refused(CheckpointError, "cannot be read", latent, tmp_path / "a")
        (tmp_path / "b").write_bytes(b"\x80\x04\x95pickle")
        self.refused(CheckpointError, "cannot be read", latent, tmp_path / "b")
        save_file({"layers.0.keys": torch.zeros(1)}, tmp_path / "c")
        self.refused(CheckpointError, "not a cache file", latent, tmp_path / "c")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "version 2 of cache files is not known"),
            ({"version": "1"}, "version '1' of cache files is not known"),
            ({"batch": "2"}, "must hold version, fingerprint"),
            ({"batch": True}, "must hold version, fingerprint"),
            ({"extra": 1}, "must hold version, fingerprint"),
            ({"batch": 0}, "out of range in its metadata: batch 0"),
            ({"length": -1}, "out of range in its metadata: length -1"),
            ({"length": 2**40}, "out of range in its metadata: length"),
            ({"layers": 10**9}, "out of range in its metadata: layers"),
            ({"bits": 2}, "out of range in its metadata: bits 2"),
            ({"dtype": "float8"}, "out of range in its metadata: dtype 'float8'"),
            ({"recent": 3}, "out of range in its metadata: recent"),
            ({"recent": -3}, "out of range in its metadata: recent -3"),
            ({"layers": 1}, "has 1 layers, the model 2"),
            ({"layers": 3}, "has 3 layers, the model 2"),
            (
                {"batch": 3},
                r"layers.0.keys is torch.float32 \(2, 1, 10, 16\), expected torch.float32 \(3, 1, 10, 16\)",
            ),
            ({"first": -1}, "out of range in its metadata: first -1"),
            ({"length": 9}, r"expected torch.float32 \(2, 1, 9, 16\)"),
            ({"bits": 4}, r"expected torch.uint8 \(2, 1, 10, 12\)"),
            ({"checksum": "0" * 64}, "do not fit their checksum"),
            ({"fingerprint": "0" * 64}, "filled by another model"),
        ],
    )
    def test_a_header_that_lies(self, latent, path, change, message):
        self.rewritten(path, lambda header: header.update(change))
        self.refused((CheckpointError, ValueError), message, latent, path)

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 10000, '"' + "x" * 2**21 + '"'])
    def test_a_header_that_is_no_header(self, latent, path, text):
        save_file({"layers.0.keys": torch.zeros(1)}, path, metadata={store._KEY: text})
        self.refused(CheckpointError, "in its metadata", latent, path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: {k: v for k, v in t.items() if k != "layers.1.values"}, "layers.1.values is missing"),
            (lambda t: {**t, "layers.7.keys": torch.zeros(1)}, "'layers.7.keys' does not belong there"),
            (lambda t: {**t, "layers.0.recent_keys": torch.zeros(2, 1, 1, 16)}, "does not belong there"),
            (
                lambda t: {**t, "layers.0.keys": t["layers.0.keys"][..., :8].clone()},
                r"layers.0.keys is .* \(2, 1, 10, 8\)",
            ),
            (lambda t: {**t, "layers.0.keys": t["layers.0.keys"].half()}, "layers.0.keys is torch.float16"),
            (lambda t: {**t, "layers.0.keys": t["layers.0.keys"].reshape(-1)}, r"layers.0.keys is .* \(320,\)"),
            (lambda t: {**t, "layers.0.keys": t["layers.0.keys"] * torch.inf}, "layers.0.keys holds NaN or infinity"),
            (lambda t: {**t, "layers.1.positions": t["layers.1.positions"] - 5}, "holds a negative position"),
            (
                lambda t: {**t, "layers.1.positions": t["layers.1.positions"].long()},
                "layers.1.positions is torch.int64",
            ),
            (
                lambda t: {**t, **{f"x{i}": torch.zeros(1) for i in range(11)}},
                "17 tensors are too many for 2 layers",
            ),
        ],
    )
    def test_wrong_tensors(self, latent, path, change, message):
        self.rewritten(path, tensors=change)
        self.refused(CheckpointError, message, latent, path)

    def test_wrong_recent_tokens(self, latent, tmp_path):
        save_cache(prefix(latent, latent_bits=4, recent_window=4), latent, tmp_path / "a")
        for shape in ((2, 1, 5, 16), (2, 1, 4, 15), (4,), (2, 1, 0, 16)):
            self.rewritten(tmp_path / "a", tensors=lambda t, s=shape: {**t, "layers.0.recent_keys": torch.zeros(s)})
            self.refused(CheckpointError, "layers.0.recent_", latent, tmp_path / "a")


def test_the_fingerprint_is_of_the_weights_and_not_of_the_object():
    first, again = (compress(dense_model("qwen2"), ranks=8) for _ in range(2))
    assert store.fingerprint(first) == store.fingerprint(again)
    assert store.fingerprint(first) != store.fingerprint(compress(dense_model("qwen2"), ranks=8, rotated=True))
    with torch.no_grad():
        again.model.layers[0].self_attn.k_proj.bias[0] += 1
    # a bias is added when keys are rebuilt and is no part of a latent
    assert store.fingerprint(first) == store.fingerprint(again)
