"""Models with a cache of latents through transformers: compress, save, load, generate, mix with other methods."""

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

import hf_lowbit
from hf_lowbit import (
    AdaSVDConfig,
    CheckpointError,
    LowBitConfig,
    LowBitRecipe,
    ReCalKVConfig,
    RunOptions,
    UnsupportedModelError,
    packed_modules,
)
from hf_lowbit.cache import ReCalKVCache, cache_bytes
from hf_lowbit.cache.attention import LatentAttention
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.measures import StackMeasures
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.latents import cache_json, cache_table
from hf_lowbit.report.verify import verify
from tests.cache.latent_models import dense_model
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_llava, tiny_model, tiny_t5, tokens

QUIET = RunOptions(progress=False, batch_size=2)
# family -> tokens that the cache of each layer holds of 11: a window of 8 keeps 7
FAMILIES = {
    "llama": (11, 11),
    "llama-bias": (11, 11),
    "qwen2": (11, 11),
    "qwen3": (11, 11),
    "mistral": (7, 7),
    "gemma3": (7, 11),
    "phi3": (7, 7),
    "phi3-partial": (7, 7),
    "opt": (11, 11),
}


def small(**changes):
    options = {"calibration": tokens(8), "samples": 8, "rank_multiple": 4, "run": QUIET}
    return ReCalKVConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "dense"
    tiny_model(num_hidden_layers=3).save_pretrained(folder)
    return folder


def compress(dense, config):
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def headers(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


@contextlib.contextmanager
def killed(monkeypatch, at):
    """End the run that is started inside when it compresses the layers of its block number ``at``."""
    original, calls = Run.compress_layers, []

    def fail(self, names, stats):
        calls.append(names)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, names, stats)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "compress_layers", fail)
        yield


def saved(model, folder):
    save_model(model, folder)
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_save_load_generate(family, tmp_path):
    dense_model(family).save_pretrained(tmp_path / "dense")
    model = compress(tmp_path / "dense", small())
    ranks = model.config.quantization_config.layers
    widths = [layer.out_features for layer in packed_modules(model).values()]
    assert 0 <= 0.5 * sum(widths) - sum(ranks.values()) < 4 * len(widths)
    assert {name: layer.spec.width for name, layer in packed_modules(model).items()} == ranks
    first = saved(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert saved(loaded, tmp_path / "again") == first
    assert not verify(tmp_path / "packed").problems
    prompt = tokens(2, 6)
    out = loaded.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(prompt, max_new_tokens=6, do_sample=False))
    held = cache_bytes(out.past_key_values)
    assert held["dense"] == 0
    by_layer = [sum(rank for name, rank in ranks.items() if f"layers.{i}." in name) for i in range(2)]
    numbers = sum(length * width for length, width in zip(FAMILIES[family], by_layer, strict=True))
    assert held["latents"] == 4 * 2 * numbers  # float32, 2 rows
    restored = loaded.dequantize()
    assert not packed_modules(restored)
    assert not any(isinstance(module, LatentAttention) for module in restored.modules())
    assert torch.allclose(logits(restored), logits(model), atol=1e-4)
    restored.generate(prompt, max_new_tokens=2, do_sample=False)
    restored.save_pretrained(tmp_path / "restored")  # as the model was, for programs that know nothing of latents
    assert headers(tmp_path / "restored") == headers(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored")), logits(restored))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_logits_are_those_of_the_dense_model(family, tmp_path):
    model = dense_model(family)
    want, wanted_tokens = logits(model), model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False)
    hf_lowbit.quantize(model, small(ratio=1.0))
    assert torch.allclose(logits(model), want, atol=1e-6)
    assert torch.equal(model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False), wanted_tokens)
    save_model(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))


class TestFusedProjections:
    """Phi 3 computes queries, keys and values in one layer, which is cut while the checkpoint is read."""

    def recipe(self):
        data = {"calibration": tokens(8), "samples": 8}
        return LowBitRecipe({"*.self_attn": small(), "*.q_proj": quick(**data)}, run=QUIET)

    @pytest.fixture(scope="class")
    def phi3(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("phi3") / "dense"
        model = dense_model("phi3")
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "config",
        [
            small(),
            small(ocmf="sequential"),
            small(skip=("layers.0.self_attn",)),
            ReCalKVConfig(calibration=None, rank_multiple=4, run=QUIET),
            "recipe",
        ],
        ids=["default", "sequential", "one skipped", "without data", "recipe"],
    )
    def test_streamed_and_in_memory_give_the_same_bytes(self, phi3, tmp_path, config):
        config = self.recipe() if config == "recipe" else config
        memory = AutoModelForCausalLM.from_pretrained(phi3)
        hf_lowbit.quantize(memory, config)
        model = compress(phi3, config)
        assert saved(memory, tmp_path / "memory") == saved(model, tmp_path / "streamed")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
        assert torch.equal(logits(loaded), logits(model))
        assert not verify(tmp_path / "streamed").problems

    def test_what_stays_dense_has_memory_of_its_own(self, phi3):
        query = compress(phi3, small()).model.layers[0].self_attn.q_proj.weight
        assert query.untyped_storage().nbytes() == query.numel() * 4

    def test_weights_of_files_that_are_not_safetensors(self, phi3, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(phi3)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((phi3 / "config.json").read_text())
        found = compress(tmp_path, small())
        assert torch.equal(logits(found), logits(compress(phi3, small())))

    def test_a_killed_run_goes_on_with_the_same_bytes(self, phi3, tmp_path, monkeypatch):
        def run(**more):
            return small(run=dataclasses.replace(QUIET, journal=tmp_path / "journal", **more))

        with killed(monkeypatch, 2):
            compress(phi3, run())
        expected = saved(compress(phi3, small()), tmp_path / "expected")
        assert saved(compress(phi3, run(resume=True)), tmp_path / "resumed")[0] == expected[0]

    def test_bad_weights_are_named_before_the_work(self, phi3, tmp_path, monkeypatch):
        monkeypatch.setattr(Run, "block_by_block", lambda *_: pytest.fail("began"))
        model = AutoModelForCausalLM.from_pretrained(phi3)
        model.model.layers[1].self_attn.qkv_proj.weight.data[100, 0] = float("nan")
        model.save_pretrained(tmp_path / "nan")
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj"):
            compress(tmp_path / "nan", small())

    def test_a_config_of_other_heads(self, phi3, tmp_path):
        shutil.copytree(phi3, tmp_path / "other")
        config = json.loads((phi3 / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.qkv_proj\.weight: 128 rows are stored.*192"):
            compress(tmp_path / "other", small())

    def test_a_base_model_is_compressed_and_loaded(self, phi3, tmp_path):
        """Names in the checkpoint have a prefix that names in the model lack."""
        model = compress(phi3, small(weighting="none"))
        save_model(model, tmp_path / "packed")
        with torch.no_grad():
            expected = model.model(tokens()).last_hidden_state
            base = AutoModel.from_pretrained(phi3, quantization_config=small(weighting="none"))
            assert torch.equal(base(tokens()).last_hidden_state, expected)
            base = AutoModel.from_pretrained(tmp_path / "packed")
            assert torch.equal(base(tokens()).last_hidden_state, expected)


def test_a_recipe_mixes_cache_and_weights(dense, tmp_path):
    """Keys and values belong to the cache, all other layers of the same attention to another method."""
    recipe = LowBitRecipe(
        {
            "*.self_attn": small(),
            "*.mlp": AdaSVDConfig(calibration=tokens(8), samples=8, ratio=0.6),
            "*": quick(calibration=tokens(8), samples=8),
        },
        run=QUIET,
    )
    model = compress(dense, recipe)
    by_method = {
        name.rpartition(".")[2]: row["method"] for name, row in model.config.quantization_config.modules.items()
    }
    assert by_method == {
        "q_proj": "arb",
        "k_proj": "recalkv",
        "v_proj": "recalkv",
        "o_proj": "arb",
        "gate_proj": "adasvd",
        "up_proj": "adasvd",
        "down_proj": "adasvd",
    }
    save_model(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    out = loaded.generate(tokens(1, 6), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert cache_bytes(out.past_key_values)["dense"] == 0
    with pytest.raises(ValueError, match="latent_bits, recent_window and sink_tokens must be alike"):
        compress(dense, LowBitRecipe({"*.0.self_attn": small(latent_bits=4), "*": small()}, run=QUIET))


def test_low_bit_latents_by_config(dense, tmp_path):
    save_model(compress(dense, small(latent_bits=4)), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    out = model.generate(tokens(1, 6), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    held = cache_bytes(out.past_key_values)
    assert held["codes"] == 11 * cache_json(inspect(tmp_path / "packed"))["bytes_per_token"]
    assert held["latents"] == held["dense"] == 0
    whole = ReCalKVCache.from_model(model, latent_bits=None, recent_window=0)
    model.generate(tokens(1, 6), max_new_tokens=6, do_sample=False, past_key_values=whole)
    assert whole.memory_footprint()["codes"] == 0
    assert compress(dense, small(latent_bits=8, recent_window=4)).generate(tokens(1, 6), max_new_tokens=2).shape == (
        1,
        8,
    )


def test_first_tokens_in_full_by_config(dense, tmp_path):
    held = {}
    for first in (0, 2):
        save_model(compress(dense, small(latent_bits=4, sink_tokens=first)), tmp_path / str(first))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(first))
        out = model.generate(tokens(1, 6), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        held[first] = cache_bytes(out.past_key_values)["first"]
        width = sum(sum(layer.layout.key_ranks + layer.layout.value_ranks) for layer in out.past_key_values.layers)
        assert held[first] == first * width * 4  # float32
    assert held[2] > held[0] == 0


def test_inspect_draws_ranks_and_counts_bytes(dense, tmp_path):
    model = compress(dense, small(key_group_size=1))
    save_model(model, tmp_path / "packed")
    found = inspect(tmp_path / "packed")
    content = json.loads(json.dumps(cache_json(found)))
    ranks = model.config.quantization_config.layers
    assert content["bytes_per_token"] == 2 * sum(ranks.values())
    assert content["dense_bytes_per_token"] == 2 * 3 * 2 * 32
    assert content["layers"]["model.layers.1.self_attn"]["keys"] == [ranks["model.layers.1.self_attn.k_proj"] // 2] * 2
    table = cache_table(found)
    bars = [len(cell) for cell in table.columns[4].cells]
    values = [ranks[f"model.layers.{i}.self_attn.v_proj"] for i in range(3)]
    assert bars == [round(24 * rank / 32) for rank in values]
    save_model(compress(dense, quick()), tmp_path / "binary")
    assert cache_table(inspect(tmp_path / "binary")) is None


def test_a_base_model_loads_too(dense, tmp_path):
    model = compress(dense, small())
    save_model(model, tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


@pytest.mark.parametrize("options", [{}, {"ocmf": "sequential", "weighting": "none"}], ids=str)
def test_a_killed_run_goes_on_with_the_same_ranks_and_bytes(dense, tmp_path, monkeypatch, options):
    def run(folder, **more):
        return small(run=dataclasses.replace(QUIET, journal=folder, **more), **options)

    expected = saved(compress(dense, run(tmp_path / "whole")), tmp_path / "expected")
    with killed(monkeypatch, 3):
        compress(dense, run(tmp_path / "journal"))
    monkeypatch.setattr(StackMeasures, "dense_inputs", lambda *_: pytest.fail("measured again"))
    resumed = compress(dense, run(tmp_path / "journal", resume=True))
    assert saved(resumed, tmp_path / "resumed") == expected


def test_streamed_and_in_memory_give_the_same_bytes(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    hf_lowbit.quantize(model, small())
    assert saved(model, tmp_path / "memory") == saved(compress(dense, small()), tmp_path / "streamed")


def test_refusals_come_before_the_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "block_by_block", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj: ratio 0.05 leaves rank 1 of 32"):
        compress(dense, small(ratio=0.05))
    with pytest.raises(ValueError, match="key_group_size=3 does not divide its 2 heads"):
        compress(dense, small(key_group_size=3))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj: stays dense while k_proj is compressed; skip"):
        compress(dense, small(skip=("layers.1.self_attn.v_proj",)))
    with pytest.raises(ValueError, match="layers gives it rank 99"):
        compress(dense, small(layers={"model": 99}))
    with pytest.raises(ValueError, match="is in none of the blocks that layers gives a rank for"):
        compress(dense, small(layers={"model.layers.0": 8}))
    for model in (tiny_model("gpt2"), tiny_model("gpt_neox"), tiny_t5()):
        with pytest.raises(UnsupportedModelError):
            hf_lowbit.quantize(model, small())
    with pytest.raises(ValueError, match="recent_window needs latent_bits"):
        small(recent_window=4)


def test_towers_of_other_kind_stay_dense():
    model = tiny_llava()
    report = hf_lowbit.quantize(model, small())
    assert {row["module"].rpartition(".self_attn")[0] for row in report.rows} == {
        f"model.language_model.layers.{i}" for i in range(2)
    }
    assert not any(isinstance(module, LatentAttention) for module in model.model.vision_tower.modules())


def test_skipped_layers_keep_keys_and_values(dense):
    model = compress(dense, small(skip=("layers.1.self_attn",)))
    assert {name.split(".")[2] for name in packed_modules(model)} == {"0", "2"}
    out = model.generate(tokens(1, 6), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    held = cache_bytes(out.past_key_values)
    assert held["dense"] == 4 * 2 * 32 * 8
    assert held["latents"] == 4 * 8 * sum(model.config.quantization_config.layers.values())


def test_the_config_is_plain_and_comes_back(dense):
    config = compress(dense, small()).config.quantization_config
    assert LowBitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.calibration.kind == "tokens"


def test_a_spec_that_does_not_fit_the_model_is_refused(dense, tmp_path):
    save_model(compress(dense, small()), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    content = json.loads(path.read_text())
    row = content["quantization_config"]["modules"]["model.layers.0.self_attn.k_proj"]
    row["spec"].update(num_heads=4, groups=[[0, 1, 2, 3]])
    path.write_text(json.dumps(content))
    with pytest.raises((CheckpointError, ValueError), match=r"layers.0.self_attn.k_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
