"""δ-GBS as a hook of diffusers: which call decides, when a trajectory ends, and what must go on working beside it."""

import copy
import math
import pickle

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry
from torch import nn

from assets import video
from hf_lowbit.formats.integer import IntegerFormat, IntegerSpec
from hf_lowbit.hf.delta_gbs import (
    DeltaReport,
    delta_gbs_report,
    disable_delta_gbs,
    enable_delta_gbs,
    reset_delta_gbs,
)
from hf_lowbit.layers import PackedLinear, packed_modules, set_act_bits
from tests.methods.test_delta_schedule import slow_strip

STEPS = 6


def packed_linear(dense, activation="token_group"):
    """A layer of four bits with rounded inputs: rounding to the nearest, symmetric."""
    weight = dense.weight.detach()
    scale = (weight.abs().amax(1, keepdim=True) / 7).half()
    codes = (weight / scale.float()).round().clamp(-8, 7).to(torch.int8) + 8
    group = 16 if activation == "token_group" else 0
    spec = IntegerSpec(*weight.shape, activation=activation, act_group_size=group)
    return PackedLinear.replacing(dense, IntegerFormat.pack(spec, codes, scale))


@pytest.fixture(scope="module")
def made():
    """A small Wan transformer with packed layers, from random weights."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3,
        text_dim=32, freq_dim=32, ffn_dim=48, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval().requires_grad_(False)  # fmt: skip
    for name, module in list(model.blocks.named_modules()):
        if type(module) is nn.Linear:
            model.blocks.set_submodule(name, packed_linear(module))
    return model


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


def run(model, steps=STEPS, guidance=1.0):
    return video.sample(model, video.PROMPTS[:1], steps, guidance=guidance)


def calls_of(model):
    """Note down of each call the bits of the layers and the output."""
    found = []

    def note(module, args, output):
        bits = {layer.act_bits for layer in packed_modules(module).values()}
        assert len(bits) == 1
        found.append((bits.pop(), output[0].double()))

    model.register_forward_hook(note)
    return found


def bits_of(changes, delta, warmup=2):
    return tuple(8 if high else 4 for high in slow_strip([0.0, *changes], delta, warmup))


def change(output, previous):
    return float((output - previous).abs().sum() / previous.abs().sum())


# Decisions -------------------------------------------------------------------------------------------------------


def median_change(model):
    """A delta that a few steps of the sampler reach."""
    enable_delta_gbs(model, delta=0)
    run(model)
    return 1.5 * sorted(delta_gbs_report(model).changes)[STEPS // 2]


def test_pipeline_follows_the_rule(model):
    delta = median_change(model)
    enable_delta_gbs(model, delta=delta)
    calls = calls_of(model)
    run(model)
    bits, outputs = zip(*calls, strict=True)
    changes = [change(*pair) for pair in zip(outputs[1:], outputs[:-1], strict=True)]
    report = delta_gbs_report(model)
    assert bits == report.bits == bits_of(changes, delta)
    assert {4, 8} == set(bits[2:])  # so that the test can fail
    assert report.changes == pytest.approx(changes, rel=1e-5)  # of float32 sums
    assert report.mean_bits == sum(bits) / STEPS
    assert report.skipped == 0


@pytest.mark.parametrize(("delta", "bits"), [(0.0, (8,) * STEPS), (math.inf, (8, 8, 4, 4, 4, 4))])
def test_ends_of_the_range(model, delta, bits):
    enable_delta_gbs(model, delta=delta)
    found = run(model)
    assert delta_gbs_report(model).bits == bits
    disable_delta_gbs(model)
    set_act_bits(model, 8)
    assert torch.equal(run(model), found) == (delta == 0)


def test_bits_and_warm_up_are_options(model):
    enable_delta_gbs(model, delta=math.inf, low=3, high=6, warmup=1)
    calls = calls_of(model)
    run(model, 3)
    assert [bits for bits, _ in calls] == [6, 3, 3]
    assert delta_gbs_report(model).mean_bits == 4.0


def test_both_calls_of_guidance_take_what_the_first_decides(model):
    delta = 1.0 * median_change(model)
    enable_delta_gbs(model, delta=delta)
    calls = calls_of(model)
    run(model, guidance=3.0)
    assert len(calls) == 2 * STEPS
    bits, outputs = zip(*calls, strict=True)
    assert bits[::2] == bits[1::2] == delta_gbs_report(model).bits
    cond = outputs[::2]  # the only ones that decide
    changes = [change(*pair) for pair in zip(cond[1:], cond[:-1], strict=True)]
    assert bits[::2] == bits_of(changes, delta)
    assert len({tuple(bits[::2])}) == 1


def call(model, timestep, latents=None, context=None):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 3, 2, 8, 8, generator=generator) if latents is None else latents
    words = video.embed(torch.tensor([[0, 4, 7]]))
    with torch.no_grad():
        if context is None:
            return model(latents, torch.tensor([timestep]), words, return_dict=False)[0]
        with model.cache_context(context):
            return model(latents, torch.tensor([timestep]), words).sample


def test_own_loop_without_contexts(model):
    enable_delta_gbs(model, delta=math.inf)
    calls = calls_of(model)
    for timestep in (900, 900, 600, 600, 300, 300):  # guidance by two calls: they share a step
        call(model, timestep)
    assert [bits for bits, _ in calls] == [8, 8, 8, 8, 4, 4]
    assert delta_gbs_report(model).bits == (8, 8, 4)
    reset_delta_gbs(model)
    call(model, 300)
    assert delta_gbs_report(model).bits == (8,)


def test_contexts_are_kept_apart(model):
    """Guidance in some of the steps only, with the call without prompt first: it is compared with its own outputs."""
    enable_delta_gbs(model, delta=0.0)
    outputs = []
    for timestep, contexts in ((900, "uc"), (700, "uc"), (500, "c"), (300, "c"), (100, "uc")):
        outputs.append(
            {name: call(model, timestep, (1 + (name == "u")) * torch.ones(1, 3, 2, 8, 8), name) for name in contexts}
        )
    expected = [
        change(outputs[1]["u"], outputs[0]["u"]),
        change(outputs[3]["c"], outputs[2]["c"]),
        change(outputs[4]["u"], outputs[1]["u"]),
    ]
    assert delta_gbs_report(model).changes == pytest.approx(expected, rel=1e-5)
    assert len(delta_gbs_report(model).bits) == 5


# Trajectories ----------------------------------------------------------------------------------------------------


def test_trajectories_do_not_leak(model):
    enable_delta_gbs(model, delta=median_change(model))
    first = run(model)
    report = delta_gbs_report(model)
    assert torch.equal(run(model), first)
    assert delta_gbs_report(model) == report
    hook = model.delta_gbs.hook
    assert hook.running == DeltaReport()
    assert not hook.states._state_cache  # nothing of the last video stays in memory
    assert math.isnan(DeltaReport().mean_bits)


def test_trajectory_left_by_an_exception(model):
    enable_delta_gbs(model, delta=median_change(model))
    first = run(model)

    class Enough(Exception):
        pass

    seen = []

    def stop(module, args):
        seen.append(1)
        if len(seen) == 4:
            raise Enough

    for place in (model, model.blocks[1]):  # between two calls, within a call
        seen.clear()
        handle = place.register_forward_pre_hook(stop)
        with pytest.raises(Enough):
            run(model)
        handle.remove()
        assert torch.equal(run(model), first)


def test_new_shape_starts_anew(model):
    enable_delta_gbs(model, delta=math.inf)
    calls = calls_of(model)
    for timestep, frames in ((900, 2), (600, 2), (300, 2), (200, 4), (100, 4), (50, 4)):
        call(model, timestep, torch.ones(1, 3, frames, 8, 8))
    assert [bits for bits, _ in calls] == [8, 8, 4, 8, 8, 4]


def test_jump_back_starts_anew(model):
    enable_delta_gbs(model, delta=math.inf)
    calls = calls_of(model)
    for timestep in (900, 600, 300, 900, 600, 300):
        call(model, timestep)
    assert [bits for bits, _ in calls] == [8, 8, 4, 8, 8, 4]


# Beside other things ---------------------------------------------------------------------------------------------


def test_step_cache_shows_it_no_reused_output(model):
    delta = median_change(model)
    enable_delta_gbs(model, delta=delta)
    ran = []
    model.blocks[-1].ffn.register_forward_pre_hook(lambda *_: ran.append(len(calls)))
    calls = calls_of(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    run(model, 10)
    report = delta_gbs_report(model)
    computed = [calls[index] for index in ran]
    assert 2 < len(computed) < 10
    assert report.skipped == 10 - len(computed)
    outputs = [output for _, output in computed]
    changes = [change(*pair) for pair in zip(outputs[1:], outputs[:-1], strict=True)]
    assert report.changes == pytest.approx(changes, rel=1e-5)
    assert report.bits == tuple(bits for bits, _ in computed) == bits_of(changes, delta)


def test_copies_have_a_hook_of_their_own(model):
    enable_delta_gbs(model, delta=median_change(model))
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in packed_modules(twin).values():
            layer.bias.data += 0.1  # what is left is not the original's
        assert not torch.equal(run(twin), expected)
        assert delta_gbs_report(twin).bits != ()
        disable_delta_gbs(twin)
        assert len(delta_gbs_report(model).bits) == STEPS
        assert {layer.act_bits for layer in packed_modules(twin).values()} == {None}
        assert torch.equal(run(model), expected)


def test_nothing_of_it_is_saved(model, made):
    expected = run(model)
    names = set(model.state_dict())
    enable_delta_gbs(model, delta=0.05)
    assert set(model.state_dict()) == names
    assert "delta=0.05, bits=4 or 8, warmup=2" in repr(model)
    assert not model.delta_gbs.state_dict()
    run(model)
    disable_delta_gbs(model)
    disable_delta_gbs(model)  # again does nothing
    assert {name for name, _ in model.named_modules()} == {name for name, _ in made.named_modules()}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(layer.on_call for layer in packed_modules(model).values())
    assert torch.equal(run(model), expected)


def test_enabling_again_replaces(model):
    enable_delta_gbs(model, delta=0.05)
    enable_delta_gbs(model, delta=math.inf)
    assert len(model._forward_hooks) == 1
    run(model, 4)
    assert delta_gbs_report(model).bits == (8, 8, 4, 4)
    assert HookRegistry.check_if_exists_or_initialize(model)._get_child_registries()  # a pipeline finds the hook


def test_blocks_compile_into_whole_graphs(model):
    torch._dynamo.reset()
    delta = median_change(model)
    enable_delta_gbs(model, delta=delta)
    expected = run(model)
    bits = delta_gbs_report(model).bits
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    found = run(model)
    assert delta_gbs_report(model).bits == bits
    assert video.psnr(found, expected) > 60  # the same ops; a product may be taken out of a sum


@pytest.mark.slow
def test_whole_model_compiles_with_breaks_at_the_hook(model):
    torch._dynamo.reset()
    enable_delta_gbs(model, delta=median_change(model))
    expected = run(model)
    bits = delta_gbs_report(model).bits
    model.compile(backend="eager")
    assert video.psnr(run(model), expected) > 60
    assert delta_gbs_report(model).bits == bits


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(model, kind):
    enable_delta_gbs(model, delta=median_change(model))
    expected = run(model)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind, **blocks)
    assert torch.equal(run(model), expected)
    assert len(delta_gbs_report(model).bits) == STEPS


def test_only_the_layers_named(model):
    chosen = [name for name in packed_modules(model) if ".ffn." in name]
    enable_delta_gbs(model, delta=math.inf, layers=chosen)
    run(model, 3)
    for name, layer in packed_modules(model).items():
        assert layer.act_bits == (4 if name in chosen else None), name


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta must be a number of at least 0, got -0.1"),
        ({"delta": math.nan}, "delta must be a number of at least 0, got nan"),
        ({"delta": "0.1"}, "delta must be a number of at least 0, got '0.1'"),
        ({"warmup": -1}, "warmup must be a whole number of steps"),
        ({"warmup": 1.5}, "warmup must be a whole number of steps"),
        ({"low": 1}, "2 to 8"),
        ({"high": 9}, "2 to 8"),
        ({"low": 8, "high": 4}, "low must be at most high, got 8 and 4"),
        ({"layers": ["blocks.0"]}, "WanTransformer3DModel: no packed layer rounds activations"),
        ({"layers": ["blocks.0.ffn.net.2", "blocks.9.x"]}, "no packed layer called 'blocks.9.x' rounds activations"),
        ({"layers": "blocks.0.ffn.net.2"}, "layers must be several names, got the text 'blocks.0.ffn.net.2'"),
    ],
)
def test_refusals(model, options, message):
    enable_delta_gbs(model, delta=0.2)
    with pytest.raises(ValueError, match=message):
        enable_delta_gbs(model, **options)
    assert model.delta_gbs.hook.delta == 0.2  # what was there stays


def test_models_without_rounded_activations_are_refused():
    dense = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, ffn_dim=8)
    for operation in (enable_delta_gbs, delta_gbs_report, reset_delta_gbs):
        with pytest.raises(ValueError, match="WanTransformer3DModel: "):
            operation(dense)
    disable_delta_gbs(dense)
    with pytest.raises(TypeError, match=r"got WanPipeline; of a pipeline, pass pipeline\.transformer"):
        enable_delta_gbs(video.pipeline(dense))
    with pytest.raises(TypeError, match=r"model must be a model, got WanPipeline; of a pipeline, pass pipeline\."):
        set_act_bits(video.pipeline(dense), 4)


def test_training_keeps_no_graph(model):
    enable_delta_gbs(model, delta=0.0)
    for timestep in (900, 600):
        latents = torch.ones(1, 3, 2, 8, 8, requires_grad=True)
        words = video.embed(torch.tensor([[0, 4, 7]]))
        model(latents, torch.tensor([timestep]), words).sample.sum().backward()
    assert len(delta_gbs_report(model).changes) == 1
    assert not model.delta_gbs.hook.states.get_state().previous.requires_grad
