"""DVD-Quant: the search against a loop in float64, errors of weights and activations, options, layers, refusals."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit import DVDQuantConfig, LowBitConfig, UnsupportedModelError, packed_modules, registry
from hf_lowbit.kernels.rounding import quantize_activation
from hf_lowbit.methods.dvd_quant import places
from hf_lowbit.methods.dvd_quant.algorithm import (
    Search,
    column_balance,
    fit,
    grids,
    quantize,
    rotation_of,
    turned_moment,
)
from hf_lowbit.numerics.rotation import rotate

HALF = torch.float16
STARTS = tuple(i / 20 for i in range(10))
BGR = Search(4, HALF, STARTS, 20, 1e-4)
FULL = dataclasses.replace(BGR, full=True)
MINMAX, ABSMAX = Search(4, HALF), Search(4, HALF, symmetric=True)


# The search ------------------------------------------------------------------------------------------------------


def literal_start(row, share, most):
    """One start, number by number: the ends moved inwards, its step in half precision, its zero point."""
    low, high = min(*row, 0.0), max(*row, 0.0)
    span = high - low
    low, high = low + share * span, high - share * span
    step = float(torch.tensor((high - low) / most, dtype=torch.float64).to(HALF)) or 1.0
    return step, float(min(max(round(-low / step), 0), most))


def literal_codes(row, step, zero, most):
    return [min(max(round(w / step + zero), 0), most) for w in row]


def literal_error(row, step, zero, codes):
    return sum((w - step * (q - zero)) ** 2 for w, q in zip(row, codes, strict=True))


def literal_refined(row, step, zero, codes, most):
    below = sum((q - zero) ** 2 for q in codes)
    if below:
        found = sum((q - zero) * w for q, w in zip(codes, row, strict=True)) / below
        found = float(torch.tensor(found, dtype=torch.float64).to(HALF))
        step = found if found > 0 else step
    zero = round(sum(codes) / len(codes) - sum(row) / len(row) / step)
    zero = float(min(max(zero, 0), most))
    return step, zero, literal_codes(row, step, zero, most)


def literal_search(row, full, bits=4, rounds=20):
    """The best of all grids of all starts, or of the refinements of the best start."""
    most, best = 2**bits - 1, (math.inf, 1.0, 0.0)
    starts = [literal_start(row, share, most) for share in STARTS]
    if not full:
        errors = [literal_error(row, *s, literal_codes(row, *s, most)) for s in starts]
        starts = [starts[errors.index(min(errors))]]
    for step, zero in starts:
        codes = literal_codes(row, step, zero, most)
        for _ in range(rounds + 1):
            best = min(best, (literal_error(row, step, zero, codes), step, zero), key=lambda grid: grid[0])
            step, zero, codes = literal_refined(row, step, zero, codes, most)
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("full", [True, False])
def test_search_is_the_written_one(full, bits):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    rows[2] += 8  # no zero inside: the range is extended to it
    rows[3] = rows[3].abs() * -2
    rows[4] = rows[4] ** 3
    search = Search(bits, HALF, STARTS, 20, 0.0, full)
    scale, zero, error = grids(rows, search)
    for i, row in enumerate(rows.tolist()):
        want = literal_search(row, full, bits)
        # A row that gains nothing goes on as long as another one gains; where two grids are equally good up to the
        # last digit, either is right, so errors are compared.
        assert float(error[i]) <= want[0] * (1 + 1e-9)
        codes = literal_codes(row, float(scale[i]), float(zero[i]), 2**bits - 1)
        assert literal_error(row, float(scale[i]), float(zero[i]), codes) == pytest.approx(float(error[i]), rel=1e-9)
        assert float(error[i]) >= want[0] * (1 - 1e-9) or full is False
    assert torch.equal(scale, scale.to(HALF).double())
    assert torch.equal(zero, zero.round())


def relative(rows, search, group=0):
    found = fit(rows, group, search, "layer")
    size = group or rows.shape[1]
    wide = lambda part: part.float().repeat_interleave(size, 1)  # noqa: E731
    zero = 8.0 if found.zero is None else wide(found.zero)
    return float((rows - wide(found.scale) * (found.codes - zero)).square().sum() / rows.square().sum())


def drawn(kind, seed, count=32, columns=3072):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator)
    if kind == "laplace":
        uniform = torch.rand(count, columns, generator=generator) - 0.5
        return -uniform.sign() * torch.log1p(-2 * uniform.abs())
    if kind == "student":  # four degrees of freedom
        return rows / (torch.randn(4, count, columns, generator=generator).square().mean(0)).sqrt()
    if kind == "outliers":
        rows[:, torch.randperm(columns, generator=generator)[:3]] *= 20
    return rows


# Errors of a first implementation on one draw of 32 x 3072, relative to the weights' squares.
TABLE = {
    ("gaussian", "absmax"): 0.0244, ("gaussian", "minmax"): 0.0191, ("gaussian", "bounds"): 0.0120,
    ("gaussian", "full"): 0.0119, ("gaussian", "turned"): 0.0119,
    ("laplace", "absmax"): 0.0651, ("laplace", "minmax"): 0.0483, ("laplace", "bounds"): 0.0266,
    ("laplace", "full"): 0.0260, ("laplace", "turned"): 0.0120, ("laplace", "blocks"): 0.0124,
    ("student", "absmax"): 0.157, ("student", "minmax"): 0.106, ("student", "bounds"): 0.0500,
    ("student", "full"): 0.0468, ("student", "turned"): 0.0117, ("student", "blocks"): 0.0123,
    ("outliers", "absmax"): 0.479, ("outliers", "minmax"): 0.309, ("outliers", "bounds"): 0.177,
    ("outliers", "full"): 0.145, ("outliers", "turned"): 0.0102, ("outliers", "turned minmax"): 0.0161,
    (64, "absmax"): 0.0116, (64, "minmax"): 0.0083, (64, "full"): 0.0076,
    (128, "absmax"): 0.0137, (128, "minmax"): 0.0101, (128, "full"): 0.0089,
}  # fmt: skip
SEARCHES = {"absmax": ABSMAX, "minmax": MINMAX, "bounds": Search(4, HALF, STARTS), "full": FULL, "turned": FULL,
            "blocks": FULL, "turned minmax": MINMAX}  # fmt: skip


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "outliers", 64, 128])
def test_errors_of_weights(kind):
    """Within 3 % of the table where draws agree to that; with heavy tails single weights or channels decide."""
    within = {"laplace": 0.1, "student": 0.1, "outliers": 0.22}.get(kind, 0.03)
    group = kind if isinstance(kind, int) else 0
    for name in [name for row, name in TABLE if row == kind]:
        errors = []
        for seed in range(2):
            rows = drawn("gaussian" if group else kind, seed)
            order = {"turned": 3072, "turned minmax": 3072, "blocks": 128}.get(name, 0)
            errors.append(relative(rotate(rows, order), SEARCHES[name], group))
        found, want = torch.tensor(errors), TABLE[kind, name]
        assert abs(float(found.mean()) - want) <= within * want, (name, found, want)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "outliers"])
def test_order_of_searches(kind):
    """Never worse than minimum and maximum, row by row; the quick search within 10 % of the full one."""
    rows = drawn(kind, 5)
    plain, quick, full = (grids(rows, search)[2] for search in (MINMAX, BGR, FULL))
    assert bool((quick <= plain).all())
    assert bool((full <= quick * (1 + 1e-6)).all())
    assert float(quick.sum() / full.sum()) < 1.1


def test_few_rows_at_a_time_are_only_a_matter_of_memory(monkeypatch):
    rows = drawn("laplace", 0, 40, 200)
    want = fit(rows, 64, BGR, "layer")
    from hf_lowbit.methods.dvd_quant import algorithm

    monkeypatch.setattr(algorithm, "_AT_ONCE", 1000)
    alone = fit(rows, 64, dataclasses.replace(BGR, tol=0.0), "layer")
    monkeypatch.undo()
    assert want.codes.shape == alone.codes.shape == (40, 200)
    assert want.scale.shape == alone.scale.shape == (40, 4)  # the last group has 8 columns
    together = fit(rows, 64, dataclasses.replace(BGR, tol=0.0), "layer")
    assert float((alone.scale.float() - together.scale.float()).abs().max()) < 1e-3


def test_degenerate_rows():
    rows = torch.randn(6, 64)
    rows[0], rows[1], rows[2], rows[3] = 0.0, 0.25, -3.0, 1e-9
    rows[4, 1:] = 0.0
    found = fit(rows, 0, BGR, "layer")
    values = found.scale.float() * (found.codes - found.zero.float())
    assert not values[0].any()
    assert float(found.scale[0]) == 1.0
    assert int(found.zero[0]) == 0
    assert not values[3].any()  # its step would vanish in half precision
    for i in (1, 2):
        assert torch.allclose(values[i], rows[i], rtol=1e-3)
    assert torch.allclose(values[4], rows[4], rtol=1e-3)
    with pytest.raises(ValueError, match=r"layer: a scale leaves the range of float16; use scale_dtype='float32'"):
        fit(rows * 1e7, 0, BGR, "layer")
    assert torch.isfinite(fit(torch.full((1, 16), 900_000.0), 0, BGR, "layer").scale).all()


# Activations -----------------------------------------------------------------------------------------------------

# Relative errors of 4 bits on 384 columns, of a first implementation; groups are of 64 and of 128 columns.
ACTIVATIONS = {
    ("gaussian", 128): (0.0139, 0.0139, 0.0174, 0.0116, 0.0139),
    ("gaussian", 16384): (0.0291, 0.0179, 0.0172, 0.0116, 0.0137),
    ("tokens", 16384): (0.174, 0.0238, 0.0172, 0.0116, 0.0138),
    ("channels", 16384): (0.0290, 0.0180, 0.0429, 0.0218, 0.0289),
    ("both", 16384): (0.142, 0.0211, 0.0501, 0.0235, 0.0322),
}


@pytest.mark.parametrize(("kind", "tokens"), ACTIVATIONS)
def test_errors_of_activations(kind, tokens):
    """One scale for all tokens decays with their number, one for each token and group of columns does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 384, generator=generator)
    if kind in ("tokens", "both"):
        x *= torch.exp(0.5 * torch.randn(tokens, 1, generator=generator))
    if kind in ("channels", "both"):
        x *= torch.exp(0.5 * torch.randn(1, 384, generator=generator))
    modes = ("channel", 0), ("channel_token", 0), ("token", 0), ("token_group", 64), ("token_group", 128)
    for (mode, group), want in zip(modes, ACTIVATIONS[kind, tokens], strict=True):
        rounded = quantize_activation(x, mode, 4, group).dequantized()
        error = float((x - rounded).square().sum() / x.square().sum())
        # the loudest of all tokens decides for a channel, the loudest of 384 channels for a token
        within = 0.03 if kind == "gaussian" or (kind == "tokens" and "channel" not in mode) else 0.2
        assert error == pytest.approx(want, rel=within), mode


# The method ------------------------------------------------------------------------------------------------------


def weight_of(rows=24, columns=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()


def error_of(weight, **options):
    found = quantize(weight, DVDQuantConfig(**options), "layer").unpack()
    return float((weight - found).norm() / weight.norm())


# what an option is compared with, beside itself; both are given where the default is None
CHANGES = {
    "w_bits": {"w_bits": 3}, "group_size": {"group_size": 64}, "weight_init": {"weight_init": "minmax"},
    "refine": {"refine": "full"}, "n_bounds": {"n_bounds": 7}, "max_shrink": {"max_shrink": 0.0},
    "iters": {"iters": 0}, "tol": {"tol": 0.9}, "rotation": {"rotation": "full"}, "scale_dtype":
    {"scale_dtype": "float32"}, "rotation_block": {"rotation_block": 16}, "rotation_signs_seed":
    {"rotation_signs_seed": 1}, "balance": {"balance": "none"}, "beta": {"beta": 0.5},
    "balance_beyond": {"balance_beyond": 1.0}, "act_scale":
    {"act_scale": "token"}, "act_group_size": {"act_group_size": 32}, "delta": {"delta": None},
    "a_bits_high": {"a_bits_high": 7},
}  # fmt: skip
# options that need others to matter, and options of the run-time part
ELSEWHERE = {"a_bits": {"delta": None}, "modulation": None, "layers": None, "a_bits_low": None, "warmup_steps": None}
ELSEWHERE |= {"damping": None, "samples": None, "sequence_length": None, "seed": None}  # with calibration


def test_every_option_is_looked_at():
    assert set(CHANGES) | set(ELSEWHERE) == set(DVDQuantConfig.options())


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_result(name):
    x, weight = torch.randn(4, 256), weight_of()

    def out(**options):
        return quantize(weight, DVDQuantConfig(**options), "layer").linear(x, None)

    assert not torch.equal(out(), out(**CHANGES[name]))


def inputs_of(columns=256, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(600, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    return mixed + 0.3 * torch.randn(600, columns, generator=generator)


@pytest.mark.parametrize("options", [{}, {"rotation": "full"}, {"rotation": "none"}, {"rotation_signs_seed": 3}])
def test_the_second_moment_is_that_of_the_inputs_that_meet_the_codes(options):
    x, weight = inputs_of().double(), weight_of()
    weight[:, 5] *= 300  # so that a factor is stored
    form = quantize(weight, DVDQuantConfig(preset="weights", **options), "layer")
    turned = x if form.smooth is None else x / form.smooth.double()
    turned = turned if form.rotation_signs is None else turned * form.rotation_signs.double()
    turned = rotate(turned, form.spec.rotation)
    found = turned_moment(x.T @ x, form.smooth, form.rotation_signs, form.spec.rotation)
    torch.testing.assert_close(found, turned.T @ turned, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_calibration_outputs_lose_less(bits):
    x, weight = inputs_of(), weight_of(48)
    options = {"w_bits": bits, "group_size": 64, "preset": "weights"}

    def lost(moment, **more):
        found = quantize(weight, DVDQuantConfig(**options, **more), "layer", second_moment=moment).unpack()
        return float((x @ (weight - found).T).square().sum() / (x @ weight.T).square().sum())

    alone, together = lost(None), lost(x.T @ x)
    assert together < 0.5 * alone
    assert lost(x.T @ x, damping=1.0) > together
    # inputs that have nothing in common leave nothing to make up for
    own, same = (quantize(weight, DVDQuantConfig(**options), "layer", second_moment=moment)
                 for moment in (torch.eye(256), 7 * torch.eye(256)))  # fmt: skip
    assert torch.equal(own.packed, same.packed)


def test_calibration_is_for_the_search_only():
    with pytest.raises(ValueError, match="baseline without data"):
        DVDQuantConfig(calibration="wikitext2", weight_init="minmax")
    assert DVDQuantConfig().needs == "none" and DVDQuantConfig(calibration="wikitext2").needs == "tokens"


def test_bits_of_activations_and_aliases():
    weight, x = weight_of(), torch.randn(4, 256)
    forms = {bits: quantize(weight, DVDQuantConfig(delta=None, a_bits=bits), "layer") for bits in (4, 8, 16)}
    assert [form.spec.act_bits for form in forms.values()] == [4, 8, 8]
    assert forms[16].spec.activation == "none"
    plain = x @ forms[16].unpack().T
    errors = [float((form.linear(x, None) - plain).norm()) for form in forms.values()]
    assert errors[0] > 4 * errors[1] > 40 * errors[2]
    assert quantize(weight, DVDQuantConfig(), "layer").spec.act_bits == 8  # the many, where nobody chooses
    pbq = quantize(weight, DVDQuantConfig(weight_init="pbq"), "layer")
    assert torch.equal(pbq.packed, forms[8].packed)
    same = quantize(weight, DVDQuantConfig(), "layer", activations=False)
    assert same.spec.activation == "none"
    assert torch.equal(same.packed, pbq.packed)


def test_presets():
    paper = DVDQuantConfig(preset="paper", w_bits=3)
    assert (paper.rotation, paper.balance, paper.group_size, paper.delta, paper.w_bits) == (
        "full",
        "none",
        -1,
        0.09,
        3,
    )
    assert DVDQuantConfig(preset="default") == DVDQuantConfig()
    assert DVDQuantConfig(preset="w4a4").delta is None
    assert DVDQuantConfig(preset="w4a8", group_size=32) == DVDQuantConfig(delta=None, a_bits=8, group_size=32)
    assert LowBitConfig.from_dict(paper.to_dict()) == paper
    assert "preset" not in paper.to_dict()
    assert LowBitConfig(method="dvd_quant", preset="w4a4").a_bits == 4
    assert dataclasses.replace(paper, beta=0.2).group_size == -1
    with pytest.raises(ValueError, match="preset must be one of default, paper, w4a8, w4a4, weights, got 'w8a8'"):
        DVDQuantConfig(preset="w8a8")


def test_rotation_balance_and_groups_each_help_on_outliers():
    weight = weight_of(64, 512)
    plain = {"balance": "none", "rotation": "none", "group_size": -1}
    errors = [
        error_of(weight, weight_init="absmax", **plain),
        error_of(weight, weight_init="minmax", **plain),
        error_of(weight, **plain),
        error_of(weight, **{**plain, "rotation": "full"}),
        error_of(weight, **{**plain, "rotation": "full", "group_size": 64}),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize("columns", [384, 192, 96, 48, 40])
def test_rotation_follows_the_columns(columns):
    config = DVDQuantConfig()
    assert rotation_of(columns, config) == {384: 128, 192: 64, 96: 32, 48: 16, 40: 0}[columns]
    assert rotation_of(columns, DVDQuantConfig(rotation="full")) == columns
    assert rotation_of(columns, DVDQuantConfig(rotation="none")) == 0
    weight = weight_of(8, columns)
    form = quantize(weight, DVDQuantConfig(rotation_signs_seed=3), "layer")
    assert form.spec.rotation_signs == (columns != 40)  # no signs without a rotation
    # stored in the rotated basis, returned in the plain one
    assert float((form.unpack() - weight).norm() / weight.norm()) < 0.15


def test_factors_that_change_nothing_are_not_stored():
    even = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    loud = even.clone()
    loud[:, 3] *= 20
    for weight, stored in ((even, False), (loud, True)):
        packed = quantize(weight, DVDQuantConfig(), "layer")
        assert (packed.spec.smooth, packed.smooth is not None) == (stored, stored)


def test_balance_of_columns():
    weight = weight_of() * torch.logspace(-3, 3, 256)
    weight[:, 5] = 0
    largest = weight.abs().amax(0)
    median = float(largest[largest > 0].median())
    for beta in (0.5, 1.0):
        for beyond in (1.0, 4.0):
            factors = column_balance(weight, beta, beyond)
            for j, value in enumerate((largest / median).tolist()):
                stands_out = value > 0 and (value > beyond or value < 1 / beyond)
                want = min(max(value**-beta, 1 / 1024), 1024) if stands_out else 1.0
                assert float(factors[j]) == pytest.approx(want, rel=1e-5)
    assert torch.equal(column_balance(weight, 0.0, 1.0), torch.ones(256))
    assert torch.equal(column_balance(torch.zeros(3, 16), 1.0, 1.0), torch.ones(16))
    assert torch.equal(column_balance(torch.randn(64, 256), 1.0, 4.0), torch.ones(256))  # nothing stands out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 24}, r"group_size must be -1 \(rows\) or a multiple of 16 up to 16384, got 24"),
        ({"group_size": 0}, "group_size must be -1"),
        ({"act_group_size": -1}, "act_group_size must be a multiple of 16"),
        ({"w_bits": 5}, "w_bits must be one of 2, 3, 4, 8"),
        ({"a_bits": 9}, "a_bits must be from 2 to 8, or 16"),
        ({"a_bits": True}, "a_bits must be from 2 to 8"),
        ({"a_bits_low": 1}, "a_bits_low must be from 2 to 8"),
        ({"a_bits_low": 8, "a_bits_high": 4}, "a_bits_low must not exceed a_bits_high = 4"),
        ({"delta": -0.1}, "delta must be None or a number from 0 to 1e6, got -0.1"),
        ({"delta": math.nan}, "delta must be"),
        ({"delta": math.inf}, "delta must be"),
        ({"delta": True}, "delta must be"),
        ({"warmup_steps": 0}, "warmup_steps must be from 1"),
        ({"rotation": "hadamard"}, "rotation must be one of 'block', 'full', 'none'"),
        ({"rotation_block": 100}, "rotation_block must be one of 128, 64, 32, 16"),
        ({"rotation_signs_seed": -1}, "rotation_signs_seed must be None or an integer"),
        ({"beta": 1.5}, "beta must be from 0.0 to 1.0"),
        ({"max_shrink": 0.5}, "max_shrink must be from 0.0 to 0.49"),
        ({"act_scale": "tile"}, "act_scale must be one of"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"DVDQuantConfig: {message}"):
        DVDQuantConfig(**options)
    stored = {**DVDQuantConfig().to_dict(), **options}
    with pytest.raises(ValueError, match="DVDQuantConfig"):
        LowBitConfig.from_dict(stored)


# Layers ----------------------------------------------------------------------------------------------------------

BOTH, WEIGHTS, DENSE = "both", "weights", "dense"
# Names from diffusers' and transformers' models.
LAYERS = {
    "blocks.0.attn1.to_q": BOTH, "blocks.29.attn2.to_out.0": BOTH, "blocks.3.ffn.net.0.proj": BOTH,
    "blocks.3.ffn.net.2": BOTH, "transformer_blocks.0.attn.add_k_proj": BOTH, "transformer_blocks.1.norm1.linear":
    WEIGHTS, "transformer_blocks.1.norm1_context.linear": WEIGHTS, "single_transformer_blocks.7.norm.linear": WEIGHTS,
    "single_transformer_blocks.7.proj_out": BOTH, "single_transformer_blocks.7.proj_mlp": BOTH,
    "transformer_blocks.2.ff_context.net.2": BOTH, "temporal_transformer_blocks.1.attn1.to_k": BOTH,
    "condition_embedder.time_embedder.linear_1": DENSE, "condition_embedder.time_proj": DENSE,
    "condition_embedder.image_embedder.ff.net.0.proj": DENSE, "condition_embedder.text_embedder.linear_2": DENSE,
    "context_embedder.token_refiner.refiner_blocks.0.attn.to_q": DENSE, "context_embedder.proj_in": DENSE,
    "context_embedder.token_refiner.refiner_blocks.1.norm_out.linear": DENSE, "proj_out": DENSE, "proj_in": DENSE,
    "norm_out.linear": DENSE, "caption_projection.linear_1": DENSE, "time_embed.emb.timestep_embedder.linear_1":
    DENSE, "adaln_single.linear": DENSE, "patch_embed.text_proj": DENSE, "time_text_embed.guidance_embedder.linear_2":
    DENSE, "x_embedder": DENSE, "model.layers.0.self_attn.q_proj": BOTH, "model.decoder.layers.3.fc1": BOTH,
    "transformer.h.3.mlp.c_fc": BOTH, "encoder.block.0.layer.0.SelfAttention.q": BOTH,
    "layers.0.norm1.linear": WEIGHTS, "layers.4.adaLN_modulation.0": WEIGHTS, "layers.4.attention.to_q": BOTH,
    "double_stream_blocks.2.block.adaLN_modulation.1": WEIGHTS, "transformer_blocks.0.img_mod.1": WEIGHTS,
    "visual_transformer_blocks.0.visual_modulation.out_layer": WEIGHTS, "transformer_blocks.3.norm2.linear_1": WEIGHTS,
    "visual_transformer_blocks.0.feed_forward.out_layer": BOTH, "single_stream_modulation.linear": DENSE,
    "model.layers.0.mlp.experts.3.up_proj": BOTH, "lm_head": DENSE, "transformer.blocks.2.ffn.up_proj": BOTH,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_name(name):
    config = DVDQuantConfig()
    dense = places.reason_to_leave(name, (64, 64), config)
    assert dense == ("outside the repeated blocks" if LAYERS[name] == DENSE else None)
    if dense is None:
        assert places.rounds_activations(name, config) == (LAYERS[name] == BOTH)
        assert places.rounds_activations(name, DVDQuantConfig(modulation="full"))
        skipped = places.reason_to_leave(name, (64, 64), DVDQuantConfig(modulation="skip"))
        assert skipped == ("modulation='skip'" if LAYERS[name] == WEIGHTS else None)
    assert places.reason_to_leave(name, (64, 64), DVDQuantConfig(layers="all")) is None
    misfit = "in_features 72 is not a multiple of 16"
    assert places.cannot_take(name, (64, 72), DVDQuantConfig(layers="all")) == misfit
    assert places.cannot_take(name, (64, 72), config) == (misfit if dense is None else None)
    none = "no Hadamard matrix of order 688 is known here; rotation='block' needs none"
    assert places.cannot_take(name, (64, 688), DVDQuantConfig(layers="all", rotation="full")) == none
    assert places.cannot_take(name, (64, 688), DVDQuantConfig(layers="all")) is None


class Toy(nn.Module):
    """A stack of two blocks, a head and an odd layer."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(32, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(64, 64), "norm1": nn.ModuleDict({"linear": nn.Linear(64, 64)})})
            for _ in range(2)
        )
        self.blocks[1]["odd"] = nn.Linear(72, 64)
        self.config = SimpleNamespace(model_type="toy")

    def forward(self, x):
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block["to_q"](x) * block["norm1"]["linear"](x.mean(0, keepdim=True))
        return x


def test_a_run_over_a_model():
    from hf_lowbit.compress import compress_model

    torch.manual_seed(0)
    model = Toy()
    before, x = copy.deepcopy(model), torch.randn(5, 32)
    finished, report = compress_model(model, DVDQuantConfig(run=hf_lowbit.RunOptions(progress=False)))
    layers = packed_modules(model)
    assert list(layers) == ["blocks.0.to_q", "blocks.0.norm1.linear", "blocks.1.to_q", "blocks.1.norm1.linear"]
    assert [layer.spec.activation for layer in layers.values()] == ["token_group", "none"] * 2
    assert finished.left_dense == report.dense == {
        "proj_in": "outside the repeated blocks", "blocks.1.odd": "in_features 72 is not a multiple of 16",
    }  # fmt: skip
    assert hf_lowbit.set_act_bits(model, 16) == 2
    with torch.no_grad():
        want = before(x)
        errors = []
        for bits in (4, 8, 16):
            hf_lowbit.set_act_bits(model, bits)
            errors.append(float((model(x) - want).norm() / want.norm()))
    assert errors[0] > errors[1] > 0.99 * errors[2]
    assert errors[2] < 0.25


def test_a_model_in_which_nothing_is_compressed_is_refused():
    from hf_lowbit.compress import compress_model

    with pytest.raises(UnsupportedModelError, match=r"all stay dense \(outside the repeated blocks\)"):
        compress_model(nn.Sequential(nn.Linear(32, 32)), DVDQuantConfig())


def test_it_is_registered_as_free_of_data():
    method = registry.get("dvd_quant")
    assert (method.needs, method.format, method.unit) == ("none", "integer", "linear")
    assert DVDQuantConfig().needs == "none"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(64), r"weight must be floating \(n, m\), got torch.float32 \(64,\)"),
        (torch.ones(0, 64), "weight must be floating"),
        (torch.ones(4, 64, dtype=torch.int32), "weight must be floating"),
        (torch.full((4, 64), 1e300, dtype=torch.float64), "a scale leaves the range of float32$"),
    ],
    ids=["vector", "no rows", "whole numbers", "beyond float32"],
)
def test_no_weight_is_refused_with_the_layer_named(weight, message):
    with pytest.raises(ValueError, match=f"^blocks.0.to_q: {message}"):
        quantize(weight, DVDQuantConfig(scale_dtype="float32"), "blocks.0.to_q")


@pytest.mark.parametrize("moment", [torch.eye(32), torch.full((64, 64), math.nan)], ids=["other columns", "NaN"])
def test_no_second_moment_is_refused_with_the_layer_named(moment):
    with pytest.raises(ValueError, match=r"^blocks.0.to_q: second moment must be finite \(64, 64\), got"):
        quantize(torch.randn(4, 64), DVDQuantConfig(), "blocks.0.to_q", second_moment=moment)
