"""CondiQuant: one layer against its definition, attention against the model's own, grids that are learned."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

import hf_lowbit
from hf_lowbit import CalibrationError, CondiQuantConfig, PackedLinear, RunOptions, packed_modules, registry
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.formats import IntegerFormat
from hf_lowbit.formats.integer import IntegerSpec
from hf_lowbit.kernels.rounding import on_range, range_codes
from hf_lowbit.methods.condiquant import attention
from hf_lowbit.methods.condiquant.algorithm import fit, parts_of
from hf_lowbit.methods.condiquant.distill import Ends, feature_distance
from hf_lowbit.numerics.bounds import search_bounds
from hf_lowbit.numerics.conditioning import condition, condition_number

QUIET = RunOptions(progress=False)
QUICK = {"cond_steps": 3, "dobi_candidates": 10, "samples": 4, "patch_size": 16, "run": QUIET}


def tiny_model(**changes):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depths": [2], "num_heads": [2], "window_size": 8, "image_size": 16, "mlp_ratio": 2.0}
    config = Swin2SRConfig(**{**sizes, "upsampler": "pixelshuffledirect", "drop_path_rate": 0.0, **changes})
    model = Swin2SRForImageSuperResolution(config).eval()
    with torch.no_grad():  # fresh weights are so small that nothing inside would count
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def photos(count=3, size=48):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, size, size, generator=generator)


def quick(**changes):
    return CondiQuantConfig(**{**QUICK, "calibration": photos(), **changes})


def stats_of(rows, keep=64):
    stats = LinearStats("layer", rows.shape[1], keep=keep)
    stats.update(rows.unsqueeze(0))
    return stats


def relative(found, want):
    return float((found - want).norm() / want.norm())


# One layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "slack", "meant"), [(2, 0, 0), (3, 0, 0), (4, None, 0), (2, None, 0.1), (3, 0.5, 0.5)]
)
def test_a_layer_is_the_definition(bits, slack, meant):
    """Every strength conditioned, rounded and multiplied by hand; the largest of nearly the least error wins."""
    torch.manual_seed(1)
    weight, rows = torch.randn(10, 14), torch.randn(64, 14) @ torch.randn(14, 14)
    stats, trace = stats_of(rows), []
    options = quick(weight_bits=bits, act_bits=bits, bound_search="dobi", cond_slack=slack)
    found = fit(weight, stats, options, "layer", trace)
    bounds = torch.tensor(search_bounds(rows, bits, candidates=10))
    errors = {}
    for strength in (0.0, 0.003, 0.01, 0.03, 0.06):
        changed = condition(weight, stats.second_moment(torch.float64), strength, 3)
        ends = torch.tensor(search_bounds(changed, bits, candidates=10))
        product = on_range(rows, bounds, bits) @ on_range(changed, ends, bits).T
        errors[strength] = relative(product, rows @ weight.T)
        if strength == trace[0]["strength"]:
            torch.testing.assert_close(found.bounds[0], ends)
            assert torch.equal(found.codes, range_codes(changed, ends, bits).to(torch.uint8))
            assert trace[0]["condition_after"] == pytest.approx(condition_number(changed), rel=1e-4)
    largest = max(strength for strength, error in errors.items() if error <= (1 + meant) * min(errors.values()))
    assert trace[0]["strength"] == largest
    assert trace[0]["total_error"] == pytest.approx(errors[largest], rel=1e-4)
    torch.testing.assert_close(found.act_bounds, bounds)


def ranges_of(values, count):
    """Every range that is tried: so many narrower and narrower ones, and those between percentiles."""
    low, high = float(values.min()), float(values.max())
    found = [(low + i * (high - low) / (2 * count), high - i * (high - low) / (2 * count)) for i in range(count)]
    ordered = values.flatten().sort().values
    for share in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999):
        ends = [ordered[round(s * (len(ordered) - 1))] for s in (1 - share, share)]
        found.append(tuple(map(float, ends)))
    return found


@pytest.mark.parametrize("name", ["layer", "block.qkv"])
@pytest.mark.parametrize("bits", [2, 4])
def test_grids_chosen_by_outputs_are_the_definition(name, bits):
    """All products in float64: first the inputs' grid on the dense weight, then each weight's on rounded inputs."""
    torch.manual_seed(3)
    weight, rows = torch.randn(12, 14) ** 3, (torch.randn(200, 14) @ torch.randn(14, 14)) ** 3
    options = quick(weight_bits=bits, act_bits=bits, bound_search="output", cond_strength=0)
    trace = []
    found = fit(weight, stats_of(rows, 200), options, name, trace)
    exact = rows.double() @ weight.double().T

    def of_inputs(ends):
        return float((on_range(rows, torch.tensor(ends), bits).double() @ weight.double().T - exact).norm())

    assert of_inputs(found.act_bounds.tolist()) == pytest.approx(min(map(of_inputs, ranges_of(rows, 10))), rel=1e-5)
    met = on_range(rows, found.act_bounds, bits).double()
    parts = 3 if name.endswith("qkv") else 1
    for number, (part, wanted) in enumerate(zip(weight.chunk(parts), exact.chunk(parts, 1), strict=True)):

        def of_weight(ends, part=part, wanted=wanted):
            return float((met @ on_range(part, torch.tensor(ends), bits).double().T - wanted).norm())

        own = of_weight(found.bounds[number].tolist())
        assert own == pytest.approx(min(map(of_weight, ranges_of(part, 10))), rel=1e-5)
    assert trace == []  # nothing was conditioned


def test_queries_keys_and_values_in_one_are_three():
    assert parts_of("blocks.0.attn.qkv", 36) == 3
    assert parts_of("blocks.0.attn.qkv", 35) == 1
    assert parts_of("blocks.0.attn.query", 36) == 1
    weight = torch.cat([scale * torch.randn(4, 8) for scale in (1, 10, 100)])
    rows = torch.randn(50, 8)
    found = fit(weight, stats_of(rows), quick(), "a.qkv", [])
    assert found.bounds.shape == (3, 2)
    assert found.bounds[2, 1] > 5 * found.bounds[0, 1]
    for part, own in zip(weight.chunk(3), found.weight.chunk(3), strict=True):
        alone = fit(part.contiguous(), stats_of(rows), quick(cond_strength=0.003), "a", [])
        joint = fit(weight, stats_of(rows), quick(cond_strength=0.003), "a.qkv", [])
        assert own.shape == part.shape
        assert any(torch.allclose(alone.weight, piece, atol=1e-5) for piece in joint.weight.chunk(3))


def test_a_larger_strength_is_taken_where_it_costs_little():
    weight, rows = torch.randn(12, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    chosen = []
    for slack in (0, 0.1, 10):
        trace = []
        fit(weight, stats_of(rows, 200), quick(weight_bits=4, act_bits=8, cond_slack=slack), "layer", trace)
        chosen.append(trace[0]["strength"])
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[2] == 0.06
    assert CondiQuantConfig(weight_bits=2, act_bits=3).slack == 0.1
    assert (
        CondiQuantConfig(weight_bits=2, act_bits=4).slack == CondiQuantConfig(cond_slack=0, weight_bits=2).slack == 0
    )


def test_every_option_of_a_layer_changes_the_result():
    weight, rows = torch.randn(12, 16), torch.randn(200, 16) ** 3
    stats = stats_of(rows, 200)
    base = {"weight_bits": 3, "act_bits": 3, "cond_strength": 0.05, "bound_search": "dobi"}
    plain = fit(weight, stats, quick(**base), "layer", [])
    for changes in (
        {"cond_strength": 0.0}, {"cond_strength": 0.5}, {"cond_steps": 40}, {"regularizer": "top"},
        {"regularizer": "clip", "cond_limit": 2.0}, {"bound_search": "minmax"}, {"bound_search": "percentile"},
        {"bound_search": "output"}, {"dobi_candidates": 50}, {"search_sides": "one"}, {"act_bits": 2},
        {"weight_bits": 2}, {"act_mode": "none"},
    ):  # fmt: skip
        other = fit(weight, stats, quick(**{**base, **changes}), "layer", [])
        same = torch.equal(plain.codes, other.codes) and torch.equal(plain.bounds, other.bounds)
        if plain.act_bounds is not None and other.act_bounds is not None:
            same = same and torch.equal(plain.act_bounds, other.act_bounds)
        else:
            same = same and plain.act_bounds is other.act_bounds
        assert not same, changes
    narrow = fit(weight, stats, quick(**{**base, "bound_search": "percentile", "percentile": 0.9}), "layer", [])
    assert narrow.bounds[0, 1] < plain.bounds[0, 1] * 1.01


def test_what_cannot_be_conditioned_is_kept_and_named(caplog):
    weight = torch.randn(4, 6)
    stats = stats_of(torch.zeros(8, 6))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(fit(weight, stats, quick(cond_strength=0.1), "dead", []).weight, weight)
    assert "dead: receives only zeros" in caplog.text
    stats = stats_of(torch.randn(8, 6))
    stats.total[0, 0] = math.inf
    with caplog.at_level(logging.WARNING):
        assert torch.equal(fit(weight, stats, quick(cond_strength=0.1), "wild", []).weight, weight)
    assert "wild: the second moment of its inputs is not finite" in caplog.text
    with pytest.raises(CalibrationError, match="layer: a stored grid of activations needs a sample"):
        fit(weight, None, quick(cond_strength=0), "layer", [])
    weight, small = torch.randn(9, 6), quick(regularizer="top", cond_strength=3)
    assert torch.isfinite(fit(weight, stats_of(torch.randn(8, 6)), small, "proj", []).weight).all()
    with pytest.raises(ValueError, match=r"block.qkv: cond_strength of regularizer 'top' must be below 3, .* got 3"):
        fit(weight, stats_of(torch.randn(8, 6)), small, "block.qkv", [])  # three parts of three rows


@pytest.mark.parametrize("inputs", [1e15, 1e20])
def test_products_beyond_float32_take_the_weakest_strength(inputs):
    """Of the larger inputs the second moment is infinite, too."""
    weight, rows, trace = 1e25 * torch.randn(6, 8), inputs * torch.randn(40, 8), []
    options = quick(weight_bits=2, act_bits=2, bound_search="dobi")
    assert torch.equal(fit(weight, stats_of(rows), options, "huge", trace).weight, weight)
    assert [row["strength"] for row in trace] == ([0] if inputs == 1e15 else [])


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replica_of_attention_is_the_models_own_bit_for_bit(dtype, masked):
    model = tiny_model().to(dtype)
    for block in model.swin2sr.encoder.stages[0].layers:
        own = block.attention.self
        hidden = torch.randn(8, 64, 24, dtype=dtype)
        mask = block.get_attn_mask(16, 16, dtype) if masked else None
        with torch.no_grad():
            want = own(hidden, mask, True)
            replica = copy.deepcopy(own)
            attention.convert(replica, 4, True).off = True
            found = replica(hidden, mask, True)
        assert isinstance(replica, type(own))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        attention.revert(replica)
        assert type(replica) is type(own)
        assert set(replica.state_dict()) == set(own.state_dict())


def test_whole_model_with_grids_off_is_the_dense_one():
    model = tiny_model()
    images = photos(2, 24)
    with torch.no_grad():
        want = model(images).reconstruction
        for module in list(model.modules()):
            if attention.is_known(module):
                attention.convert(module, 2, True).off = True
        assert torch.equal(model(images).reconstruction, want)


def test_each_grid_is_applied_where_it_belongs():
    own = tiny_model().swin2sr.encoder.stages[0].layers[0].attention.self
    grids = attention.convert(own, 3, True)
    bounds = torch.tensor([[-0.5, 0.6], [-0.4, 0.7], [-1.0, 2.0], [0.0, 0.2]])
    grids.bounds.data.copy_(bounds)
    seen = {}
    grids.watch = lambda part, values: seen.setdefault(part, values)
    hidden = torch.randn(3, 64, 24)
    with torch.no_grad():
        found = own(hidden)[0]
        parts = {part: on_range(seen[part], bounds[i], 3) for i, part in enumerate(attention.PARTS)}
        scores = parts["query"] @ parts["key"].transpose(-2, -1) * own.logit_scale.clamp(max=math.log(100)).exp()
        want = (scores + attention._position_bias(own)).softmax(-1)
        torch.testing.assert_close(seen["probabilities"], want)
        context = (parts["probabilities"] @ parts["value"]).transpose(1, 2).reshape(3, 64, 24)
        torch.testing.assert_close(found, context)
    assert float(seen["query"].norm(dim=-1).max()) == pytest.approx(1, abs=1e-5)
    assert float(seen["probabilities"].min()) >= 0


def test_grids_keep_their_dtype():
    model = tiny_model()
    hf_lowbit.quantize(model, quick())
    model.to(torch.bfloat16)
    grids = dict(attention.converted(model))
    assert len(grids) == 2
    assert all(one.bounds.dtype == torch.float32 for one in grids.values())
    assert all((one.bounds[:, 0] < one.bounds[:, 1]).all() for one in grids.values())


# Whole models --------------------------------------------------------------------------------------------------------


def test_more_bits_are_nearer_to_the_dense_model():
    images = photos(2, 32)
    dense = tiny_model()
    with torch.no_grad():
        want = dense(images).reconstruction
        errors = []
        for bits in (2, 3, 4, 8):
            model = tiny_model()
            hf_lowbit.quantize(model, quick(weight_bits=bits, act_bits=bits))
            errors.append(relative(model(images).reconstruction, want))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_grids_inside_attention_can_be_left_out():
    model = tiny_model()
    hf_lowbit.quantize(model, quick(quantize_attention=False))
    assert not dict(attention.converted(model))
    assert len(packed_modules(model)) == 12


def test_dynamic_grids_follow_each_call():
    model = tiny_model()
    hf_lowbit.quantize(model, quick(act_mode="dynamic", act_bits=8, weight_bits=8))
    assert not any("act_bounds" in name or name.endswith("activation.bounds") for name in model.state_dict())
    dense, images = tiny_model(), photos(2, 16)
    with torch.no_grad():
        assert relative(model(images).reconstruction, dense(images).reconstruction) < 0.02


def test_in_sequence_each_layer_sees_the_quantized_ones_before_it():
    models = {flag: tiny_model() for flag in (False, True)}
    for flag, model in models.items():
        hf_lowbit.quantize(model, quick(sequential=flag, weight_bits=2, act_bits=2))
    first, last = (
        "swin2sr.encoder.stages.0.layers.0.attention.self.query",
        "swin2sr.encoder.stages.0.layers.1.output.dense",
    )
    bounds = {flag: packed_modules(model) for flag, model in models.items()}
    assert torch.equal(bounds[False][first].weight_act_bounds, bounds[True][first].weight_act_bounds)
    assert not torch.equal(bounds[False][last].weight_act_bounds, bounds[True][last].weight_act_bounds)


class Other(nn.Module):
    """A model of no known library, with a fused projection and a convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.qkv = nn.Linear(12, 36)
        self.body = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, images):
        hidden = self.first(images).movedim(1, -1)
        query, key, value = self.qkv(hidden).chunk(3, -1)
        hidden = self.body((query * key).softmax(-1) * value)
        return self.last(hidden).movedim(-1, 1)


def test_other_models_get_linear_layers_and_a_statement(caplog):
    torch.manual_seed(0)
    model, images = Other().eval(), photos(1, 16)
    from hf_lowbit.compress import compress_model

    with torch.no_grad(), caplog.at_level(logging.WARNING):
        want = model(images)
        finished, _ = compress_model(model, quick(degradation="none", weight_bits=8, act_bits=8))
        assert relative(model(images), want) < 0.05
    assert set(finished.modules) == {"qkv", "body", "last"}
    assert finished.modules["qkv"]["spec"]["parts"] == 3
    assert finished.left_dense == {"first": "convolution"}
    assert "1 attention modules (Other) are of no known kind" in caplog.text
    with pytest.raises(CalibrationError, match="no 'upscale'"):
        compress_model(Other(), quick())


def test_models_of_other_colours_are_refused_by_name():
    with pytest.raises(hf_lowbit.UnsupportedModelError, match="takes images of 1 channels"):
        hf_lowbit.quantize(tiny_model(num_channels=1, num_channels_out=1), quick())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model, dense, images = tiny_model().to(dtype), tiny_model(), photos(2, 16)
    hf_lowbit.quantize(model, quick(weight_bits=8, act_bits=8))
    with torch.no_grad():
        found = model(images.to(dtype)).reconstruction
        assert found.dtype == dtype
        assert relative(found.float(), dense(images).reconstruction) < 0.05
    assert {layer.weight_bounds.dtype for layer in packed_modules(model).values()} == {torch.float32}


def test_a_name_filter_leaves_layers_dense():
    model = tiny_model()
    hf_lowbit.quantize(model, quick(skip=("intermediate.dense",)))
    names = packed_modules(model)
    assert len(names) == 10
    assert not any("intermediate" in name for name in names)


def test_attention_of_which_a_part_is_dense_gets_no_grids(caplog):
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        hf_lowbit.quantize(model, quick(skip=("layers.0.attention.self.key",)))
    assert [name for name, _ in attention.converted(model)] == ["swin2sr.encoder.stages.0.layers.1.attention.self"]
    assert "1 attention modules have no grids" in caplog.text


# Learned grids -------------------------------------------------------------------------------------------------------


def distance(model, dense, images):
    with torch.no_grad():
        return float((model(images).reconstruction - dense(images).reconstruction).abs().mean())


def test_learned_grids_are_nearer_to_the_dense_model():
    dense, images = tiny_model(), photos(4, 32)
    plain, learned = tiny_model(), tiny_model()
    options = {"weight_bits": 2, "act_bits": 2, "cond_strength": 0.01, "bound_search": "dobi"}
    options |= {"degradation": "none", "calibration": images}
    hf_lowbit.quantize(plain, quick(**options))
    before = {name: layer.packed.codes() for name, layer in packed_modules(plain).items()}
    hf_lowbit.quantize(learned, quick(**options, refine="dqc", refine_steps=25, refine_batch=4))
    assert distance(learned, dense, images) < 0.97 * distance(plain, dense, images)
    after = packed_modules(learned)
    assert all(type(layer) is PackedLinear for layer in after.values())
    assert any(not torch.equal(before[name], after[name].packed.codes()) for name in before)
    for name, grids in attention.converted(plain):
        assert not torch.equal(grids.bounds, dict(attention.converted(learned))[name].bounds)
    assert not any(parameter.requires_grad for layer in after.values() for n, parameter in layer.packed_tensors())
    biases = {n: p for n, p in dense.named_parameters() if n.endswith("bias")}
    assert all(
        torch.equal(p, learned.get_parameter(n)) for n, p in biases.items() if n in dict(learned.named_parameters())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grids_of_half_precision_models_are_learned(dtype):
    model, dense, images = tiny_model().to(dtype), tiny_model(), photos(2, 16)
    hf_lowbit.quantize(model, quick(weight_bits=8, act_bits=8, refine="dqc", refine_steps=2, refine_lr=1e-4))
    with torch.no_grad():
        found = model(images.to(dtype)).reconstruction
    assert found.dtype == dtype
    assert relative(found.float(), dense(images).reconstruction.detach()) < 0.05
    assert all(grids.bounds.dtype == torch.float32 for _, grids in attention.converted(model))


def test_ends_never_cross():
    ends = Ends(torch.tensor([[-1.0, 1.0], [2.0, 2.0]]))
    ends.moved.data = torch.tensor([[3.0, -2.0], [0.0, 0.0]])
    found = ends.values()
    torch.testing.assert_close(found[0], torch.tensor([-3.0, 5.0]))
    assert found[1, 1] >= found[1, 0]


def test_distance_of_features_is_that_of_each_sample_by_itself():
    """The published code compares every sample with every other, and divides by the number of elements twice."""
    own, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    want = sum(float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(own, other, strict=True)) / 2
    assert float(feature_distance([own], [other])) == pytest.approx(want, rel=1e-5)
    scaled = torch.tensor([2.0, 0.1]).view(2, 1, 1) * other
    assert float(feature_distance([own], [scaled])) == pytest.approx(want, rel=1e-5)
    assert float(feature_distance([own, own], [own, own])) == pytest.approx(0, abs=1e-9)


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, "weight_bits must be one of 2, 3, 4, 8"),
        ({"act_bits": 1}, "act_bits must be one of 2, 3, 4, 8"),
        ({"cond_strength": -1}, "cond_strength must be 'auto' or a number from 0 to 10"),
        ({"cond_strength": "strong"}, "cond_strength must be 'auto' or a number"),
        ({"cond_slack": -0.1}, "cond_slack must be None or a number from 0 to 10, got -0.1"),
        ({"cond_slack": float("nan")}, "cond_slack must be None or a number from 0 to 10, got nan"),
        ({"cond_slack": True}, "cond_slack must be None or a number from 0 to 10, got True"),
        ({"calibration": {}}, "calibration must be a folder"),
        ({"calibration": 3}, "calibration must be a folder"),
        ({"refine": "more"}, "refine must be one of"),
        ({"patch_size": 1}, "patch_size must be from 4"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CondiQuantConfig(**options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "act_mode='static'"),
        ({"act_mode": "dynamic"}, "cond_strength='auto'"),
        ({"cond_strength": 0}, "act_mode='static'"),
        ({"act_mode": "none", "cond_strength": 0, "refine": "dqc"}, "refine='dqc'"),
        ({"act_mode": "none", "cond_strength": 0, "regularizer": "clip"}, "cond_strength"),
    ],
)
def test_without_images_what_needs_them_is_refused(options, wanted):
    with pytest.raises(CalibrationError, match=r"needs calibration images for .*hf_lowbit\.quantize") as caught:
        hf_lowbit.quantize(tiny_model(), CondiQuantConfig(**options, run=QUIET))
    assert wanted in str(caught.value)


def test_clipping_has_no_strengths_to_try():
    assert CondiQuantConfig(regularizer="clip").strengths == (0.0,)
    assert len(CondiQuantConfig(regularizer="top").strengths) > 1


def test_without_images_what_needs_none_works():
    model, dense, images = tiny_model(), tiny_model(), photos(1, 16)
    hf_lowbit.quantize(
        model, CondiQuantConfig(act_mode="dynamic", cond_strength=0, weight_bits=8, act_bits=8, run=QUIET)
    )
    with torch.no_grad():
        assert relative(model(images).reconstruction, dense(images).reconstruction) < 0.05
    assert len(dict(attention.converted(model))) == 2  # each call finds their grids


def test_rules_share_their_images():
    one, other = quick(), quick()
    with pytest.raises(ValueError, match="calibration differs"):
        hf_lowbit.quantize(tiny_model(), hf_lowbit.LowBitRecipe({"*.query": one, "*": other}))
    text = hf_lowbit.ARBConfig(calibration=[[1, 2, 3]])
    with pytest.raises(ValueError, match="they need images and tokens"):
        hf_lowbit.quantize(tiny_model(), hf_lowbit.LowBitRecipe({"*.query": quick(), "*": text}))


def test_rules_of_a_recipe_finish_their_own_layers():
    data = photos()
    model = tiny_model()
    rules = {"*.attention.*": quick(calibration=data), "*": quick(calibration=data, weight_bits=2)}
    hf_lowbit.quantize(model, hf_lowbit.LowBitRecipe(rules, run=QUIET))
    bits = {name: layer.spec.bits for name, layer in packed_modules(model).items()}
    assert {b for n, b in bits.items() if ".attention." in n} == {4}
    assert {b for n, b in bits.items() if ".attention." not in n} == {2}
    assert len(dict(attention.converted(model))) == 2


# SwinIR-light, without its tables of positions: 24 blocks of width 60, whose four layers are quantized
WIDTH, BLOCKS, GROUPS = 60, 24, 4
LAYERS = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH))


def swinir_light(scale):
    """Parameters of the model, and those of them that are quantized."""
    weights = sum(rows * columns for rows, columns in LAYERS)
    norms, biases = 2 * 2 * WIDTH, sum(rows for rows, _ in LAYERS)
    convolution = 9 * WIDTH * WIDTH + WIDTH
    up = (9 * WIDTH + 1) * 3 * scale**2
    ends = (9 * 3 * WIDTH + WIDTH) + 2 * (2 * WIDTH) + convolution + up
    return BLOCKS * (weights + norms + biases) + GROUPS * convolution + ends, BLOCKS * weights


@pytest.mark.parametrize(
    ("scale", "parameters", "ratios"),
    [(2, 877_752, (3.82, 3.49, 3.22)), (3, 885_867, (3.72, 3.41, 3.15)), (4, 897_228, (3.60, 3.31, 3.07))],
)
def test_compression_ratios_of_the_paper(scale, parameters, ratios):
    """It counts bits of codes alone; 3.60 is scale 4 at 2 bits. Packed, ends of grids and rows of full bytes add."""
    assert swinir_light(scale) == (parameters, 691_200)
    for bits, ratio in zip((2, 3, 4), ratios, strict=True):
        dense, packed = 4 * (parameters - 691_200), 0
        assert 4 * parameters / (dense + bits * 691_200 / 8) == pytest.approx(ratio, abs=0.005)
        for (rows, columns), parts in zip(LAYERS, (3, 1, 1, 1), strict=True):
            spec = IntegerSpec(rows, columns, bits, parts=parts, activation="static", act_bits=bits)
            codes, ends = torch.zeros(rows, columns, dtype=torch.uint8), torch.tensor([[0.0, 1.0]])
            form = IntegerFormat.pack(spec, codes, bounds=ends.expand(parts, 2), act_bounds=ends[0])
            assert form.nbytes == rows * -(-columns * bits // 8) + 8 * (parts + 1)
            packed += BLOCKS * form.nbytes
        assert 0.99 * ratio < 4 * parameters / (dense + packed) < ratio + 0.005
    assert registry.get("condiquant").format == "integer"
