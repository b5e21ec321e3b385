"""QuantCache with DVD-Quant: who chooses the bits of activations, and which weights get how many."""

import pytest
import torch
from diffusers import WanTransformer3DModel

import hf_lowbit
from hf_lowbit import (
    ARBConfig,
    DVDQuantConfig,
    QuantCacheConfig,
    UnsupportedModelError,
    delta_gbs_report,
    enable_delta_gbs,
    packed_modules,
    set_act_bits,
)
from hf_lowbit.hf.quantcache_weights import noise_calls, plan_weight_bits, record_calls
from tests import video_pipelines
from tests.video_pipelines import ARCHITECTURES, STEPS, latents

LAYER = "blocks.0.attn1.to_q"


def config(**changes):
    return QuantCacheConfig(**{"num_inference_steps": STEPS, "intervals": (1, 1, 1), **changes})


@pytest.fixture
def packed():
    pipeline, call = video_pipelines.wan()
    hf_lowbit.quantize(pipeline.transformer, DVDQuantConfig())
    return pipeline, call


def bits_seen(pipeline, call):
    """The bits that the first layer has whenever it runs in the leading context, and the report."""
    seen, model = [], pipeline.transformer
    layer = model.get_submodule(LAYER)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(module.act_bits))
    latents(pipeline, call)
    handle.remove()
    return seen, model.cache_report()


@pytest.mark.parametrize("policy", ["redundancy", "post_skip", "fixed", "delta_gbs"])
def test_bits_are_set_before_the_first_layer_runs(packed, policy):
    pipeline, call = packed
    pipeline.transformer.enable_cache(config(bit_policy=policy, bits=(7, 5, 3)))
    seen, report = bits_seen(pipeline, call)
    bits = [row["bits"] for row in report.rows]
    assert seen == [b for b in bits for _ in range(2)]  # the same for both contexts
    assert set(bits) <= {7, 5, 3}
    assert bits[:2] == [7, 7]
    assert report.bits == pytest.approx(sum(bits) / STEPS)
    if policy == "fixed":
        assert set(bits) == {7}
    elif policy == "redundancy":  # a random model's features hardly change from step to step
        assert bits[2:] == [3] * (STEPS - 2)
    elif policy == "delta_gbs":
        assert set(bits[2:]) == {3, 7}
    else:
        assert set(bits[2:]) == {7}  # all three intervals are the longest


def test_delta_gbs_on_computed_steps_is_that_of_dvd_quant(packed):
    pipeline, call = packed
    model = pipeline.transformer
    enable_delta_gbs(model, delta=0.09, low=4, high=8)
    latents(pipeline, call)
    alone = list(delta_gbs_report(model).bits)
    assert len({*alone[2:]}) == 2  # both kinds of steps
    model.enable_cache(config(bit_policy="delta_gbs", bit_delta=0.09))
    latents(pipeline, call)
    assert [row["bits"] for row in model.cache_report().rows] == alone


def test_delta_gbs_steps_aside_and_comes_back(packed):
    pipeline, call = packed
    model = pipeline.transformer
    enable_delta_gbs(model, delta=0.5, low=3, high=7, warmup=3)
    for policy in ("redundancy", "delta_gbs"):
        model.enable_cache(config(bit_policy=policy))
        assert hasattr(model, "delta_gbs") == (policy == "delta_gbs")
        latents(pipeline, call)
        model.disable_cache()
        hook = model.delta_gbs.hook
        assert (hook.delta, hook.low, hook.high, hook.warmup) == (0.5, 3, 7, 3)
        assert packed_modules(model)[LAYER].act_bits is None


@pytest.mark.parametrize("policy", ["redundancy", "delta_gbs"])
def test_transformer_that_is_quantized_after_the_cache_is_on(policy):
    pipeline, call = video_pipelines.wan()
    model = pipeline.transformer
    model.enable_cache(config(bit_policy=policy, bits=(7, 5, 3)))
    hf_lowbit.quantize(model, DVDQuantConfig())  # which enables delta-GBS of its own
    seen, report = bits_seen(pipeline, call)
    assert set(seen) <= {7, 5, 3}
    assert seen[::2] == [row["bits"] for row in report.rows]
    model.disable_cache()
    assert (model.delta_gbs.hook.low, model.delta_gbs.hook.high) == (4, 8)


def test_layers_get_their_stored_bits_back():
    pipeline, call = video_pipelines.wan()
    model = pipeline.transformer
    hf_lowbit.quantize(model, DVDQuantConfig(preset="w4a8"))
    expected = latents(pipeline, call)
    model.enable_cache(config(bits=(4, 4, 4)))
    assert not torch.equal(latents(pipeline, call), expected)
    model.disable_cache()
    assert torch.equal(latents(pipeline, call), expected)


def test_weights_alone_have_no_bits_to_choose():
    pipeline, call = video_pipelines.wan()
    hf_lowbit.quantize(pipeline.transformer, ARBConfig(variant="rtn", calibration=None))
    expected = latents(pipeline, call)
    pipeline.transformer.enable_cache(config())
    assert torch.equal(latents(pipeline, call), expected)
    pipeline.transformer.disable_cache()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_pipelines_with_a_cache(name):
    pipeline, call = ARCHITECTURES[name]()
    expected = latents(pipeline, call)
    hf_lowbit.quantize(pipeline.transformer, DVDQuantConfig())
    plain = latents(pipeline, call)
    pipeline.transformer.enable_cache(config(intervals=(3, 3, 3), deltas=(9.0, 9.0)))
    found = latents(pipeline, call)
    assert pipeline.transformer.cache_report().computed == 4
    alone = float((plain - expected).norm() / expected.norm())
    assert 0 < float((found - expected).norm() / expected.norm()) < 2 * alone + 0.01


# Weights -------------------------------------------------------------------------------------------------------------


def recorded(pipeline, call, count=3):
    with record_calls(pipeline.transformer, count) as calls:
        latents(pipeline, call)
    return calls


def test_calls_are_recorded_at_even_distances():
    pipeline, call = video_pipelines.ltx()
    calls = recorded(pipeline, call)
    every = recorded(pipeline, call, 100)
    assert len(every) == STEPS
    times = [float(kwargs["timestep"].max()) for _, kwargs in every]
    assert [float(kwargs["timestep"].max()) for _, kwargs in calls] == [times[0], times[2], times[-1]]
    assert not pipeline.transformer._forward_pre_hooks
    with pytest.raises(ValueError, match="count must be at least 1"), record_calls(pipeline.transformer, 0):
        pass


def test_weight_bits_under_a_budget(tmp_path):
    pipeline, call = video_pipelines.wan()
    model = pipeline.transformer
    expected = latents(pipeline, call)
    calls = recorded(pipeline, call)
    plan = plan_weight_bits(model, calls, b_avg=5.0)
    assert torch.equal(latents(pipeline, call), expected)  # nothing was changed
    assert set(plan.bits) == {f"blocks.{i}.{part}" for i in range(3) for part in ("attn1", "attn2", "ffn")}
    assert plan.parameters["blocks.0.ffn"] == 2 * 32 * 32
    assert 4 < plan.mean_bits <= 5
    for rows in plan.damage.values():
        assert all(many < few for many, few in zip(rows[8].terms, rows[4].terms, strict=True))
    assert sum(rows[4] for rows in plan.sensitivity.values()) == pytest.approx(1)
    hf_lowbit.quantize(model, plan.recipe())
    layers = packed_modules(model)
    for part, bits in plan.bits.items():
        assert {layer.spec.bits for name, layer in layers.items() if name.startswith(f"{part}.")} == {bits}
    set_act_bits(model, 16)
    found = latents(pipeline, call)
    model.save_pretrained(tmp_path)
    pipeline.transformer = WanTransformer3DModel.from_pretrained(tmp_path)
    set_act_bits(pipeline.transformer, 16)
    assert torch.equal(latents(pipeline, call), found)


def test_dense_parts_stay_dense_and_all_dense_is_no_recipe():
    pipeline, call = video_pipelines.wan()
    calls = recorded(pipeline, call, 1)
    plan = plan_weight_bits(pipeline.transformer, calls, b_avg=12.0, choices=(4, 16))
    assert set(plan.bits.values()) == {4, 16}
    hf_lowbit.quantize(pipeline.transformer, plan.recipe())
    names = packed_modules(pipeline.transformer)
    assert {part for part in plan.bits if any(name.startswith(f"{part}.") for name in names)} == {
        part for part, bits in plan.bits.items() if bits == 4
    }
    whole = plan_weight_bits(video_pipelines.wan()[0].transformer, calls, b_avg=16.0)
    with pytest.raises(ValueError, match="leaves every part dense"):
        whole.recipe()


def test_without_any_call_noise_is_used(caplog):
    for name in ("wan", "cogvideox", "ltx"):
        model = ARCHITECTURES[name](1)[0].transformer
        plan = plan_weight_bits(model, b_avg=6.0)
        assert plan.mean_bits <= 6
        assert all(rows[4].temporal > 0 for rows in plan.damage.values())
    assert sum("sensitivities are measured on Gaussian noise" in record.message for record in caplog.records) == 3
    with pytest.raises(ValueError, match="what HunyuanVideoTransformer3DModel is called with is not known"):
        noise_calls(video_pipelines.hunyuan()[0].transformer)


def test_bad_plans_are_refused_before_the_work():
    model = video_pipelines.wan(1)[0].transformer
    with pytest.raises(ValueError, match="b_avg must be at least 4"):
        plan_weight_bits(model, [((), {})], b_avg=3.0)
    with pytest.raises(ValueError, match="ARBConfig stores weights in"):
        plan_weight_bits(model, [((), {})], config=ARBConfig(calibration=None))
    with pytest.raises(ValueError, match="choices must hold bits"):
        plan_weight_bits(model, [((), {})], choices=(16,))
    with pytest.raises(ValueError, match="calls is empty"):
        plan_weight_bits(model, [])
    with pytest.raises(ValueError, match="w_bits must be one of"):
        plan_weight_bits(model, [((), {})], choices=(5, 16), b_avg=6.0)
    with pytest.raises(ValueError, match="choices must be numbers of bits"):
        plan_weight_bits(model, [((), {})], choices=("4", 16))
    with pytest.raises(ValueError, match=r"b_avg must be at least 4, .* got nan"):
        plan_weight_bits(model, [((), {})], b_avg=float("nan"))
    with pytest.raises(ValueError, match="sensitivity_weights must be 3 numbers"):
        plan_weight_bits(model, [((), {})], sensitivity_weights=(1, 1))
    with pytest.raises(ValueError, match="calls must be pairs of a tuple and a dict"):
        plan_weight_bits(model, [torch.zeros(1)])
    with pytest.raises(ValueError, match="frame_axis must be an axis of the output"):
        plan_weight_bits(model, noise_calls(model, 1), frame_axis=5)
    with pytest.raises(TypeError, match="config must be a config of one method, got str"):
        plan_weight_bits(model, [((), {})], config="dvd_quant")
    with pytest.raises(TypeError, match=r"of a pipeline, pass pipeline.transformer"):
        plan_weight_bits(video_pipelines.wan(1)[0], [((), {})])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        noise_calls(model, 0)
    assert not packed_modules(model)


def test_a_plan_of_no_layers_is_refused():
    model = video_pipelines.wan(1)[0].transformer
    with pytest.raises(UnsupportedModelError, match="dvd_quant quantizes no layer of its blocks"):
        plan_weight_bits(model, [((), {})], config=DVDQuantConfig(skip=["blocks"]))
