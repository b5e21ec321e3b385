"""QuantCache on whole pipelines of diffusers: what is reused, when nothing can be, and that it leaves no trace."""

import ast
import json
import logging
import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

import hf_lowbit
from hf_lowbit import QuantCacheConfig, UnsupportedModelError, apply_quantcache, remove_quantcache
from hf_lowbit.hf.quantcache import cache_report
from hf_lowbit.hf.quantcache_blocks import _MORE_BLOCKS
from hf_lowbit.methods.quantcache.algorithm import cache_bytes
from hf_lowbit.report.timeline import CacheReport
from tests import video_pipelines
from tests.video_pipelines import ARCHITECTURES, STEPS, latents

EVERY = {"intervals": (1, 1, 1)}
THIRD = {"intervals": (3, 3, 3), "deltas": (9.0, 9.0)}  # computed at 0, 1, 4 and, as the last, 5
GRANULARITIES = ("auto", "block", "sublayer")


def config(**changes):
    return QuantCacheConfig(**{"num_inference_steps": STEPS, "extrapolation": 0, **THIRD, **changes})


def hooks(model):
    return [
        (name, hook)
        for name, module in model.named_modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    ]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """A pipeline, its call and what it makes without a cache."""
    pipeline, call = ARCHITECTURES[request.param]()
    return pipeline, call, latents(pipeline, call)


@pytest.fixture
def plain():
    pipeline, call = video_pipelines.wan()
    return pipeline, call, latents(pipeline, call)


# Four architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_with_intervals_of_one_it_changes_no_bit(case, granularity):
    pipeline, call, expected = case
    pipeline.transformer.enable_cache(config(**EVERY, granularity=granularity))
    assert torch.equal(latents(pipeline, call), expected)
    assert pipeline.transformer.cache_report().computed == STEPS
    assert pipeline.transformer.cache_report().speed_up == 1
    pipeline.transformer.disable_cache()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reused_steps_come_close(case, granularity):
    pipeline, call, expected = case
    model = pipeline.transformer
    model.enable_cache(config(granularity=granularity))
    found = latents(pipeline, call)
    report = model.cache_report()
    assert [row["computed"] for row in report.rows] == [1, 1, 0, 0, 1, 1]
    assert (report.computed, report.skipped, report.speed_up) == (4, 2, 1.5)
    assert 0 < error(found, expected) < 0.01
    # a second trajectory begins anew, and is the same
    assert torch.equal(latents(pipeline, call), found)
    assert not model._diffusers_hook.get_hook("quantcache_root").engine.manager._state_cache
    model.disable_cache()


def test_nothing_stays_after_disable_cache(case):
    pipeline, call, expected = case
    model = pipeline.transformer
    forwards = {name: getattr(module.forward, "__func__", None) for name, module in model.named_modules()}
    for granularity in GRANULARITIES:
        model.enable_cache(config(granularity=granularity))
        assert model.is_cache_enabled
        assert len(hooks(model)) > 2
        latents(pipeline, call)
        model.disable_cache()
        assert hooks(model) == []
        assert not model.is_cache_enabled
        assert not hasattr(model, "cache_report")
        assert forwards == {n: getattr(m.forward, "__func__", None) for n, m in model.named_modules()}
    assert torch.equal(latents(pipeline, call), expected)


def test_bytes_held_are_the_formula(case):
    """What the stack adds, once for each context; by block so often. To measure with, one context's middle block."""
    pipeline, call, _ = case
    model = pipeline.transformer
    seen = []
    stacks = [getattr(model, name, ()) for name in ("blocks", "transformer_blocks", "single_transformer_blocks")]
    blocks = [block for stack in stacks for block in stack]
    handle = blocks[0].register_forward_hook(
        lambda module, args, out: seen.append([t.shape for t in (out if isinstance(out, tuple) else (out,))])
    )
    latents(pipeline, call, num_inference_steps=1)
    handle.remove()
    streams, contexts = seen[0], len(seen)
    for changes in ({}, {"extrapolation": 1}, {"cache_dtype": "int8"}):
        copies, int8 = 1 + changes.get("extrapolation", 0), "cache_dtype" in changes
        for granularity, count in (("stack", 1), ("block", len(blocks))):
            model.enable_cache(config(granularity=granularity, **changes))
            latents(pipeline, call)
            report = model.cache_report()
            model.disable_cache()
            assert report.cache_bytes == contexts * cache_bytes(streams * count, 4, copies, int8)
            own = granularity == "block" and not int8  # then it is one of those kept anyway
            assert report.metric_bytes == (0 if own else cache_bytes(streams[:1], 4))


def test_contexts_stay_in_phase():
    pipeline, call = video_pipelines.wan()
    pipeline.transformer.enable_cache(config())
    ran = []
    for index, block in enumerate(pipeline.transformer.blocks):
        block.norm1.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    latents(pipeline, call)
    report = pipeline.transformer.cache_report()
    assert report.calls == {"cond": STEPS, "uncond": STEPS}
    assert ran == [0, 1, 2] * 2 * report.computed
    assert report.block_calls == (3 * 2 * 4, 3 * 2 * STEPS)


def test_contexts_that_pipelines_enter():
    names = {"wan": {"cond", "uncond"}, "cogvideox": {"cond_uncond"}, "ltx": {"cond_uncond"}, "hunyuan": {"cond"}}
    for name, contexts in names.items():
        pipeline, call = ARCHITECTURES[name]()
        pipeline.transformer.enable_cache(config())
        latents(pipeline, call)
        assert set(pipeline.transformer.cache_report().calls) == contexts


# Other options -------------------------------------------------------------------------------------------------------


def made(plain, **changes):
    """What is made with a cache, and its report."""
    pipeline, call, _ = plain
    pipeline.transformer.enable_cache(config(**changes))
    found = latents(pipeline, call)
    report = pipeline.transformer.cache_report()
    pipeline.transformer.disable_cache()
    return found, report


def test_kept_in_int8(plain):
    found, report = made(plain, cache_dtype="int8")
    usual, usual_report = made(plain)
    assert 0 < error(found, usual) < 0.01
    assert report.cache_bytes < 0.5 * usual_report.cache_bytes


def test_extrapolation(plain):
    results = [made(plain, warmup=3, extrapolation=order)[0] for order in (0, 1, 2)]
    assert len({float(result.sum()) for result in results}) == 3
    assert max(error(result, plain[2]) for result in results) < 0.01


@pytest.mark.parametrize("mode", ["cached", "identity"])
def test_bypassed_blocks(plain, mode):
    pipeline, call = video_pipelines.wan(6)
    expected = latents(pipeline, call)
    pipeline.transformer.enable_cache(config(**EVERY, prune_high=-1.0, prune_mode=mode))
    found = latents(pipeline, call)
    report = pipeline.transformer.cache_report()
    assert 0 < error(found, expected) < (0.02 if mode == "cached" else 0.1)
    # 1 and 3 or 4, never 0, 2 (where D is measured) or 5, never a neighbour or the same block twice; in both contexts
    assert report.pruned == 2 * sum(len(row["pruned"]) for row in report.rows)
    assert report.rows[0]["pruned"] == []
    assert all(set(row["pruned"]) <= {1, 3, 4} for row in report.rows)
    assert all(not set(a["pruned"]) & set(b["pruned"]) for a, b in zip(report.rows, report.rows[1:], strict=False))
    assert sum(len(row["pruned"]) for row in report.rows) >= STEPS - 1
    assert report.block_calls == (2 * 6 * STEPS - report.pruned, 2 * 6 * STEPS)
    stream = (1, 32, 32)
    kept = 2 * cache_bytes([stream] * (4 if mode == "cached" else 1), 4)  # with the stack's own, in two contexts
    assert report.cache_bytes == kept


def test_blocks_with_schedules_of_their_own(plain):
    found, report = made(plain, schedule="per_block", deltas=(0.02, 0.05), intervals=(3, 2, 1))
    assert report.mode == "block"
    assert 0 < error(found, plain[2]) < 0.01


def test_motion(plain, caplog):
    latent_frames = 2
    for mode in ("adacache", "paper"):
        _, still = made(plain)
        _, moving = made(plain, motion=mode, num_frames=latent_frames)
        pairs = [
            (a["divergence"], b["divergence"])
            for a, b in zip(still.rows, moving.rows, strict=True)
            if a["divergence"] is not None and b["divergence"] is not None
        ]
        assert any(a != b for a, b in pairs)
        assert moving.remarks == ()
    for frames in (None, 5):
        _, report = made(plain, motion="adacache", num_frames=frames)
        assert len(report.remarks) == 1
        assert "D is measured without motion" in report.remarks[0]
    assert sum("without motion" in record.message for record in caplog.records) == 2  # once each


def test_bits_mean_nothing_to_a_dense_model(plain):
    found, report = made(plain, bit_policy="post_skip")
    assert torch.equal(found, made(plain, bit_policy="fixed")[0])
    assert report.bits is None


# Where it cannot work as it is ---------------------------------------------------------------------------------------


def test_pipeline_without_contexts_and_blocks_of_two_shapes(caplog):
    """Latte: the whole stack cannot be cached, each block can."""
    pipeline, call = video_pipelines.latte()
    expected = latents(pipeline, call)
    model = pipeline.transformer
    model.enable_cache(config())
    found = latents(pipeline, call)
    report = model.cache_report()
    assert (report.mode, report.computed, dict(report.calls)) == ("block", 4, {"inference": STEPS})
    assert 0 < error(found, expected) < 0.01
    assert not caplog.records
    model.disable_cache()
    model.enable_cache(config(granularity="stack"))
    for _ in range(2):
        assert torch.equal(latents(pipeline, call), expected)
    report = model.cache_report()
    assert (report.mode, report.computed, report.cache_bytes) == ("open", STEPS, 0)
    assert [record.message for record in caplog.records] == [f"QuantCache: {report.remarks[0]}"]
    assert "LatteTransformer3DModel does more between its blocks" in report.remarks[0]


def test_one_block():
    pipeline, call = video_pipelines.wan(1)
    expected = latents(pipeline, call)
    pipeline.transformer.enable_cache(config(prune_high=-1.0))
    assert error(latents(pipeline, call), expected) < 0.01
    assert pipeline.transformer.cache_report().computed == 4


def test_with_gradients_every_step_is_computed(plain, caplog):
    pipeline, _, _ = plain
    model = pipeline.transformer
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 4, 16),
        "return_dict": False,
    }  # fmt: skip
    model.enable_cache(config())
    for step in range(STEPS):
        inputs["timestep"] = torch.tensor([1000.0 - step])
        found = model(**inputs)[0]
        remove_quantcache(model)
        assert torch.equal(model(**inputs)[0], found)
        model.enable_cache(config())
    assert any("gradients are on" in record.message for record in caplog.records)


def test_steps_are_asked_for():
    pipeline, call = video_pipelines.ltx()
    pipeline.transformer.enable_cache(QuantCacheConfig())
    with pytest.raises(ValueError, match="needs the number of steps, which this pipeline does not tell"):
        latents(pipeline, call)
    pipeline, call = video_pipelines.wan()  # which tells
    pipeline.transformer.enable_cache(QuantCacheConfig())
    latents(pipeline, call, num_inference_steps=20)
    assert pipeline.transformer.cache_report().steps == 20


class Loop:
    """A denoising loop of one's own around a transformer, that resets nothing."""

    def __init__(self, model, contexts=("cond",), numbered=False):
        self.model, self.contexts, self.numbered = model, contexts, numbered

    @torch.no_grad()
    def __call__(self, steps, frames=2, start=0):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 4, frames, 8, 8, generator=generator)
        text = torch.randn(1, 4, 16, generator=generator)
        for step in range(start, start + steps):
            for name in self.contexts:
                more = {"step_index": step, "num_inference_steps": STEPS} if self.numbered else {}
                with self.model.cache_context(name, **more):
                    out = self.model(x, torch.tensor([1000.0 - 100 * step]), text, return_dict=False)[0]
            x = x - 0.1 * out
        return x


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("steps", [STEPS, STEPS - 2])
def test_trajectory_that_nobody_has_ended(numbered, steps):
    """The next one is told by its step or, where steps have no number, by timesteps that jump back or their number."""
    model = video_pipelines.wan()[0].transformer
    loop = Loop(model, ("cond", "uncond"), numbered)
    model.enable_cache(config())
    first = loop(steps)
    for _ in range(2):
        assert torch.equal(loop(steps), first)
        assert [row["step"] for row in model.cache_report().rows] == [*range(steps)]


def test_other_shape_inside_a_trajectory():
    model = video_pipelines.wan()[0].transformer
    model.enable_cache(config(num_inference_steps=100))
    fresh = Loop(model, numbered=True)
    fresh(3)  # the next step would be reused
    other = fresh(1, frames=1, start=3)
    report = model.cache_report()
    assert [row["computed"] for row in report.rows] == [1, 1, 0, 1]
    remove_quantcache(model)
    assert torch.equal(Loop(model)(1, frames=1, start=3), other)


def test_steps_left_out_drop_the_cache():
    model = video_pipelines.wan()[0].transformer
    model.enable_cache(config())
    loop = Loop(model, numbered=True)
    loop(3)
    loop(1, start=4)
    assert [row["step"] for row in model.cache_report().rows] == [4]
    assert model.cache_report().computed == 1


def test_interrupted_pipeline(plain):
    pipeline, call, _ = plain
    expected, _ = made(plain)
    model = pipeline.transformer
    model.enable_cache(config())

    def stop(pipeline, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        latents(pipeline, call, callback_on_step_end=stop)
    assert torch.equal(latents(pipeline, call), expected)


def test_two_transformers():
    """Of which the second takes over in the middle, and starts without a cache."""
    pipeline, call = video_pipelines.wan()
    other = video_pipelines.wan()[0].transformer
    both = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=pipeline.transformer, transformer_2=other,
        scheduler=pipeline.scheduler, boundary_ratio=0.9,
    )  # fmt: skip
    both.set_progress_bar_config(disable=True)
    expected = latents(both, call, num_inference_steps=20)
    for model in (both.transformer, both.transformer_2):
        model.enable_cache(config(**{"num_inference_steps": None}))
    found = latents(both, call, num_inference_steps=20)
    reports = [both.transformer.cache_report(), both.transformer_2.cache_report()]
    assert reports[0].steps + reports[1].steps == 20
    assert reports[1].rows[0]["step"] == reports[0].steps > 0
    assert [row["computed"] for row in reports[1].rows[:3]] == [1, 1, 0]
    assert 0 < error(found, expected) < 0.02
    both.transformer.disable_cache()
    assert both.transformer_2.is_cache_enabled


# Beside others -------------------------------------------------------------------------------------------------------


def test_a_second_cache_is_refused(plain):
    model = plain[0].transformer
    model.enable_cache(config())
    for other in (config(), FirstBlockCacheConfig()):
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(other)
    with pytest.raises(ValueError, match="already been enabled with QuantCacheConfig"):
        apply_quantcache(model, config())
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(config())
    model.disable_cache()
    apply_first_block_cache(model, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"blocks\.0 has the hooks of first_block_cache"):
        model.enable_cache(config())


def test_other_caches_still_work(plain):
    pipeline, call, expected = plain
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert not torch.equal(latents(pipeline, call), expected)
    pipeline.transformer.disable_cache()
    assert torch.equal(latents(pipeline, call), expected)
    with pytest.raises(ValueError, match="is not supported"):
        pipeline.transformer.enable_cache("fast")


def test_registering_again_wraps_nothing_twice():
    before = diffusers.CacheMixin.enable_cache
    hf_lowbit.register()
    assert diffusers.CacheMixin.enable_cache is before


def test_functions_without_the_mixin():
    """PixArt is no video model, and has no ``enable_cache``."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        caption_channels=16, cross_attention_dim=16,
    ).eval()  # fmt: skip
    assert not hasattr(model, "enable_cache")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 16)
    sizes = {"resolution": None, "aspect_ratio": None}

    def run():
        with torch.no_grad():
            outs = [model(x, text, torch.tensor([900 - step]), sizes, return_dict=False)[0] for step in range(STEPS)]
        return torch.stack(outs)

    expected = run()
    with pytest.raises(ValueError, match="has no QuantCache to report on"):
        cache_report(model)
    apply_quantcache(model, config())
    found = run()
    assert cache_report(model).computed == 4
    assert 0 < error(found, expected) < 0.1
    remove_quantcache(model)
    assert torch.equal(run(), expected)
    with pytest.raises(ValueError, match="has no QuantCache to remove"):
        remove_quantcache(model)
    with pytest.raises(TypeError, match=r"got str; of a pipeline, pass pipeline.transformer"):
        apply_quantcache("PixArt")


def test_blocks_that_diffusers_does_not_list():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=3, sample_height=8,
        sample_width=8, sample_frames=4, caption_channels=16, cross_attention_dim=48, patch_size_t=1,
    ).eval()  # fmt: skip
    kind = type(model.transformer_blocks[0])
    TransformerBlockRegistry._registry.pop(kind, None)
    with pytest.raises(ValueError, match="not registered"):
        model.enable_cache(FirstBlockCacheConfig())
    model._diffusers_hook = None
    del model._diffusers_hook
    model.enable_cache(config())
    assert TransformerBlockRegistry.get(kind).return_hidden_states_index == 0


def test_places_of_streams_are_those_in_the_source():
    """Arguments and results of every class that is listed beside diffusers' own registry, read without an import."""
    folder = Path(diffusers.__file__).parent / "models" / "transformers"
    classes = {}
    for file in folder.glob("*.py"):
        text = file.read_text()
        if any(f"class {name}(" in text for name in _MORE_BLOCKS):
            classes |= {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    for name, (hidden, second, argument) in _MORE_BLOCKS.items():
        forward = next(f for f in classes[name].body if isinstance(f, ast.FunctionDef) and f.name == "forward")
        names = [a.arg for a in forward.args.args]
        assert "hidden_states" in names
        assert (second is None) == (argument == "")
        assert not argument or argument in names
        for node in (node for node in ast.walk(forward) if isinstance(node, ast.Return)):
            found = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            assert len(found) == 1 + (second is not None), name
            assert found[hidden].id == "hidden_states", name
            assert second is None or found[second].id == argument, name


def test_unknown_blocks_are_refused(plain):
    class Odd(nn.Module):
        pass

    model = nn.Module()
    model.blocks = nn.ModuleList([Odd()])
    with pytest.raises(UnsupportedModelError, match="does not know what a Odd takes and returns"):
        apply_quantcache(model, config())
    model.blocks = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="has no list of blocks"):
        apply_quantcache(model, config())
    with pytest.raises(TypeError, match="must be a QuantCacheConfig"):
        apply_quantcache(plain[0].transformer, FirstBlockCacheConfig())
    assert hooks(plain[0].transformer) == []


# The report ----------------------------------------------------------------------------------------------------------


def test_report(plain, tmp_path):
    _, report = made(plain)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["computed"] == 4
    assert content["calls"] == {"cond": STEPS, "uncond": STEPS}
    assert len(content["rows"]) == STEPS
    assert "4 of 6 steps computed, 1.50 × fewer calls (stack)" in str(report)
    text = [cell for column in report.table().columns for cell in column.cells]
    assert any("6: 4 computed, 2 reused; calls: cond × 6, uncond × 6" in cell for cell in text)
    file = report.save_plot(tmp_path / "steps.png")
    assert file.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"end its name in \.png"):
        report.save_plot(tmp_path / "steps.pdf")
    plain[0].transformer.enable_cache(config())
    with pytest.raises(ValueError, match="there is no trajectory to draw yet"):
        plain[0].transformer.cache_report().save_plot(tmp_path / "none.png")


def test_report_is_json_whatever_was_measured():
    step = {"computed": 1.0, "bits": 8}
    rows = [{**step, "change": change, "divergence": change} for change in (0.5, math.inf, math.nan)]
    content = json.loads(json.dumps(CacheReport("stack", 2, rows).to_dict(), allow_nan=False))
    assert [row["change"] for row in content["rows"]] == [0.5, None, None]
    assert rows[1]["change"] == math.inf


def test_log_is_silent_when_all_is_well(plain, caplog):
    with caplog.at_level(logging.INFO):
        made(plain)
    assert [record for record in caplog.records if record.name.startswith("hf_lowbit")] == []
