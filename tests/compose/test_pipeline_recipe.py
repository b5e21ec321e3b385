"""DVD-Quant and QuantCache on one transformer: one config, one set of files, and the same videos after loading."""

import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from safetensors.torch import load_file

import hf_lowbit
from hf_lowbit import (
    ARBConfig,
    DVDQuantConfig,
    LowBitConfig,
    LowBitRecipe,
    QuantCacheConfig,
    ReCalKVConfig,
    RunOptions,
    UnsupportedModelError,
    delta_gbs_report,
    packed_modules,
)
from hf_lowbit.compress.engine import Run
from hf_lowbit.hf.card import CardFields, facts_of
from hf_lowbit.hf.card_page import render
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import shares_of
from hf_lowbit.report.verify import verify
from tests import pipelines, video_pipelines
from tests.hf.conftest import hub  # noqa: F401 - the Hub of our own
from tests.tiny import tiny_model
from tests.video_pipelines import STEPS, latents

QUIET = RunOptions(progress=False)
CACHE = QuantCacheConfig(num_inference_steps=STEPS, intervals=(3, 3, 3), deltas=(9.0, 9.0))


def recipe(**changes):
    """Integers of 4 bits, signs in one block, and steps that are skipped."""
    rules = {"blocks.1": ARBConfig(variant="rtn", calibration=None), "*": DVDQuantConfig()}
    return LowBitRecipe(rules, **{"cache": CACHE, "run": QUIET, **changes})


@pytest.fixture(scope="module")
def quantized():
    pipeline, call = video_pipelines.wan()
    expected = latents(pipeline, call)
    hf_lowbit.quantize(pipeline.transformer, recipe())
    return pipeline, call, expected


def test_a_recipe_brings_its_cache_along(quantized):
    pipeline, call, expected = quantized
    model = pipeline.transformer
    found = latents(pipeline, call)
    report = model.cache_report()
    assert report.computed < STEPS
    assert not torch.equal(found, expected)
    by_hand, _ = video_pipelines.wan()
    hf_lowbit.quantize(by_hand.transformer, recipe(cache=None))
    every_step = latents(by_hand, call)
    by_hand.transformer.enable_cache(CACHE)
    assert torch.equal(latents(by_hand, call), found)
    assert not torch.equal(every_step, found)


def test_the_same_latents_after_loading(quantized, tmp_path):
    pipeline, call, _ = quantized
    found = latents(pipeline, call)
    pipeline.transformer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stored["cache"]["intervals"] == [3, 3, 3]
    assert not verify(tmp_path).problems
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert LowBitConfig.from_dict(stored).cache == CACHE
    again, _ = video_pipelines.wan()
    again.transformer = loaded
    assert torch.equal(latents(again, call), found)
    assert loaded.cache_report().computed == pipeline.transformer.cache_report().computed < STEPS
    shares = {(share.method, share.held_as) for share in shares_of(inspect(tmp_path))}
    assert shares == {("arb", "binary"), ("dvd_quant", "integer")}
    loaded.disable_cache()  # every step then, with the steps judged by the policy of DVD-Quant again
    every_step = latents(again, call)
    assert not torch.equal(every_step, found)
    assert delta_gbs_report(loaded).bits
    loaded.enable_cache(CACHE)
    assert torch.equal(latents(again, call), found)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert again["quantization_config"] == stored
    before, after = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whole_pipelines_by_their_own_config(hub, tmp_path):  # noqa: F811
    """``quant_mapping`` with a recipe, ``save_pretrained``, a push and ``from_pretrained`` from a Hub."""
    pipelines.build("wan").save_pretrained(tmp_path / "dense")
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": recipe(cache=QuantCacheConfig())})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "dense", quantization_config=mapping)
    expected, computed = pipelines.clip(pipeline, "wan"), pipeline.transformer.cache_report().computed
    pipeline.save_pretrained(tmp_path / "packed")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert torch.equal(pipelines.clip(loaded, "wan"), expected)
    assert loaded.transformer.cache_report().computed == computed
    page = render(facts_of(tmp_path / "packed", "me/video", CardFields(base_model="org/model", license="mit")))
    for part in (
        "| dvd\\_quant | integer |",
        "| arb | binary |",
        "arxiv.org/abs/2503.06545",
        '"method": "quantcache"',
    ):
        assert part in page
    loaded.transformer.push_to_hub("me/video", base_model="org/model", license="mit")
    pulled = WanTransformer3DModel.from_pretrained("me/video")
    assert packed_modules(pulled).keys() == packed_modules(loaded.transformer).keys()
    loaded.transformer = pulled
    assert torch.equal(pipelines.clip(loaded, "wan"), expected)


def test_a_cache_set_by_hand_is_kept(quantized):
    own = QuantCacheConfig(num_inference_steps=STEPS, intervals=(2, 2, 2))
    pipeline, _ = video_pipelines.wan()
    pipeline.transformer.enable_cache(own)
    hf_lowbit.quantize(pipeline.transformer, recipe())
    assert pipeline.transformer._cache_config == own


def test_what_cannot_be_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "compress_layers", lambda *_, **__: pytest.fail("began"))
    free = ARBConfig(variant="rtn", calibration=None)
    message = r"cache=QuantCacheConfig skips steps of transformers of diffusers"
    with pytest.raises(ValueError, match=message):
        hf_lowbit.quantize(tiny_model(), LowBitRecipe({"*": free}, cache=CACHE))
    tiny_model().save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowBitRecipe({"*": free}, cache=CACHE))
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    with pytest.raises(UnsupportedModelError, match="AutoencoderKL"):
        hf_lowbit.quantize(vae, LowBitRecipe({"*": free}, cache=CACHE))
    other, _ = video_pipelines.wan()
    other.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="caching has already been enabled with FirstBlockCacheConfig"):
        hf_lowbit.quantize(other.transformer, recipe())
    with pytest.raises(ValueError, match="QuantCacheConfig compresses no weights"):
        hf_lowbit.quantize(video_pipelines.wan()[0].transformer, LowBitRecipe({"*": CACHE}))


@pytest.mark.parametrize("cache", [ARBConfig(), ReCalKVConfig(), 3, LowBitRecipe({"*": ARBConfig()})], ids=str)
def test_bad_caches(cache):
    with pytest.raises(ValueError, match="cache must be the config of a method for pipelines"):
        LowBitRecipe({"*": DVDQuantConfig()}, cache=cache)
    stored = cache.to_dict() if isinstance(cache, LowBitConfig) else cache
    with pytest.raises(ValueError, match="cache must be the config of a method for pipelines"):
        LowBitConfig.from_dict({**recipe(cache=None).to_dict(), "cache": stored})
