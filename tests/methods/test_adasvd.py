"""AdaSVD against the paper's equations in float64, and what it promises beyond them."""

import itertools
import logging
import math

import adasvd_oracle as oracle
import numpy as np
import pytest
import torch

from benchmarks.quality.pbs2p import synthetic_layer
from hf_lowbit import AdaSVDConfig, ARBConfig, LowBitConfig, registry
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.formats import LowRankFormat
from hf_lowbit.methods.adasvd.algorithm import factorize
from hf_lowbit.methods.adasvd.options import rank_of, stays_dense
from hf_lowbit.methods.adasvd.ratios import filled, highest_factored, kept, ratios_within_budget
from hf_lowbit.numerics import integer, low_rank

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 30), (30, 1), (7, 130)]


def layer(rows=24, columns=40, tokens=300, seed=0):
    """A heavy-tailed weight and correlated inputs (columns, tokens), float64."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (rows, columns)) * np.exp(0.5 * rng.normal(size=columns))
    inputs = rng.normal(size=(tokens, columns)) @ (np.eye(columns) + 0.2 * rng.normal(size=(columns, columns)))
    return weight, (inputs * np.exp(0.5 * rng.normal(size=columns))).T


def tensors(weight, inputs):
    return torch.tensor(weight), torch.tensor(inputs @ inputs.T)


def product(factors):
    return (factors[0] @ factors[1]).numpy()


def errors_of(weight, moment, start, iterations):
    steps = [start, *low_rank.alternate(weight, moment, *start, iterations)]
    return [low_rank.output_error(weight, moment, *step) for step in steps]


# Truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_is_the_whitened_one_and_its_error_the_tail(shape, share):
    weight, inputs = layer(*shape)
    w, g = tensors(weight, inputs)
    rank = max(1, math.floor(share * min(shape)))
    up, right, values = oracle.whitened(weight, inputs, rank)
    found = low_rank.truncate(w, g, rank)
    assert found[0].shape == (shape[0], rank)
    np.testing.assert_allclose(product(found), up @ right.T, atol=1e-7 * np.abs(weight).max())
    total = float((values**2).sum())
    tail = float((values[rank:] ** 2).sum())
    assert low_rank.output_error(w, g, *found) == pytest.approx(tail, rel=1e-8, abs=1e-12 * total)
    plain = low_rank.truncate(w, None, rank)
    up, right = oracle.plain(weight, rank)
    np.testing.assert_allclose(product(plain), up @ right.T, atol=1e-8 * np.abs(weight).max())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_truncation_with_singular_moments(shape):
    """Doubled, dead and too few inputs: the least error that any factors have, and refits stay there."""
    weight, inputs = layer(*shape)
    inputs[3], inputs[5] = inputs[4], 0.0
    for tokens in (300, 17):
        w, g = tensors(weight, inputs[:, :tokens])
        values = np.linalg.svd(weight @ inputs[:, :tokens], compute_uv=False)
        found = low_rank.truncate(w, g, 8)
        tail = float((values[8:] ** 2).sum())
        assert low_rank.output_error(w, g, *found) == pytest.approx(tail, rel=1e-7)
        errors = errors_of(w, g, found, 2)
        assert max(errors) == pytest.approx(min(errors), rel=1e-7)


# adaComp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_refits_equal_the_literal_least_squares(shape, rank):
    weight, inputs = layer(*shape)
    w, g = tensors(weight, inputs)
    up, right = oracle.plain(weight, rank)
    want = oracle.compensated(weight, inputs, up, right, 4)
    start = (torch.tensor(up), torch.tensor(right.T))
    *_, found = low_rank.alternate(w, g, *start, 4)
    np.testing.assert_allclose(product(found), want[0] @ want[1].T, atol=1e-6 * np.abs(weight).max())
    np.testing.assert_allclose(errors_of(w, g, start, 4), want[2], rtol=1e-6)


def test_refits_with_dead_and_doubled_inputs_reach_the_same_error():
    weight, inputs = layer()
    inputs[3], inputs[5] = inputs[4], 0.0
    w, g = tensors(weight, inputs)
    up, right = oracle.plain(weight, 9)
    want = oracle.compensated(weight, inputs, up, right, 3)[2]
    np.testing.assert_allclose(errors_of(w, g, (torch.tensor(up), torch.tensor(right.T)), 3), want, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
def test_no_step_raises_the_error_and_plain_converges_to_whitened(ratio, seed):
    """What whitened truncation gives at once is where adaComp goes from the plain decomposition, and where it stays.

    A matrix this small needs more rounds than a layer of a model: 30 for 1 %.
    """
    w, g = tensors(*layer(48, 64, seed=seed))
    rank = rank_of((48, 64), ratio)
    best = low_rank.output_error(w, g, *low_rank.truncate(w, g, rank))
    errors = errors_of(w, g, low_rank.truncate(w, None, rank), 30)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert best * (1 - 1e-9) <= errors[-1] <= best * 1.01
    stays = errors_of(w, g, low_rank.truncate(w, g, rank), 5)
    np.testing.assert_allclose(stays, best, rtol=1e-6)


# ratio: plain, whitened, from plain: U, V, 3 rounds; relative squared errors known from an independent program
KNOWN = {
    0.8: (0.04684, 0.01734, 0.02322, 0.01990, 0.01786),
    0.6: (0.08322, 0.03552, 0.04668, 0.04066, 0.03663),
    0.4: (0.14524, 0.07103, 0.08984, 0.08016, 0.07293),
}


def test_known_errors_of_the_synthetic_layer():
    weight, moment = (part.double() for part in synthetic_layer())
    whole = low_rank.output_error(weight, moment, torch.zeros(768, 1).double(), torch.zeros(1, 768).double())
    plain, whitened = (low_rank.leading_outputs(weight, g) for g in (None, moment))
    for ratio, known in KNOWN.items():
        rank = rank_of((768, 768), ratio)
        pairs = [(up[:, :rank], up[:, :rank].T @ weight) for up in (plain, whitened)]
        steps = list(low_rank.alternate(weight, moment, *pairs[0], 3))
        found = [low_rank.output_error(weight, moment, *step) / whole for step in (*pairs, *steps[:2], steps[-1])]
        assert found == pytest.approx(known, rel=3e-3)


def test_stack_of_batch_is_an_approximation():
    """Means of samples give another second moment, and factors that leave a larger error: the package adds up all."""
    weight, inputs = layer(tokens=1600)
    w, g = tensors(weight, inputs)
    samples = inputs.T.reshape(16, 100, -1)
    same = oracle.stack_of_batch(samples, 16).reshape(-1, len(inputs)).T
    averaged = oracle.stack_of_batch(samples, 4).reshape(-1, len(inputs)).T
    np.testing.assert_array_equal(same, inputs)
    best, approximate = (
        low_rank.output_error(w, g, *low_rank.truncate(w, torch.tensor(x @ x.T), 8)) for x in (same, averaged)
    )
    assert approximate > 1.001 * best


@pytest.mark.parametrize("buckets", [4, 16])
def test_refits_on_stacked_samples(buckets):
    """No step raises the error on the averages; that on the samples rises, unless every sample is its own average."""
    weight, inputs = layer(tokens=1600)
    w, g = tensors(weight, inputs)
    averages = oracle.stack_of_batch(inputs.T.reshape(16, 100, -1), buckets).reshape(-1, len(inputs))
    stacked = torch.tensor(averages.T @ averages)
    trace = []
    options = AdaSVDConfig(ratio=0.6, iterations=4, buckets=buckets)
    found = factorize(w, g, options, "layer", trace=trace, stacked=stacked).unpack().double()
    errors = trace[0]["errors"]
    assert len(errors) == 9
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    plain = factorize(w, g, AdaSVDConfig(ratio=0.6, iterations=4), "layer").unpack().double()
    on_samples = [float(((r @ g) * r).sum()) for r in (w - found, w - plain)]
    if buckets == 16:
        assert on_samples[0] == pytest.approx(on_samples[1], rel=1e-6)
    else:
        assert errors[-1] < 0.99 * errors[0]
        assert on_samples[0] > 1.001 * on_samples[1]


def test_balanced_factors():
    w, g = tensors(*layer())
    factors = low_rank.truncate(w, g, 9)
    up, down = low_rank.balance(factors[0] * 1e6, factors[1] / 1e6)
    np.testing.assert_allclose(product((up, down)), product(factors), atol=1e-9)
    np.testing.assert_allclose(up.T @ up, down @ down.T, atol=1e-8)
    assert torch.equal((up.T @ up).diagonal().argsort(descending=True), torch.arange(9))
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()
    again = low_rank.balance(-factors[0], -factors[1])
    np.testing.assert_allclose(again[0], up, atol=1e-9)


# adaCR -----------------------------------------------------------------------------------------------------------


def test_ratios_are_those_of_the_paper_where_its_map_needs_no_repair():
    importance = [1.6, 0.5, 0.7, 1.2]
    want = oracle.ratios(importance, 0.6, 0.5)
    assert ratios_within_budget(importance, [7] * 4, 0.6, 0.5) == pytest.approx(list(want))
    assert ratios_within_budget(importance, [7] * 4, 0.6, 0.6) == [0.6] * 4


@pytest.mark.parametrize("seed", range(10))
def test_ratios_meet_the_budget(seed):
    rng = np.random.default_rng(seed)
    importance = np.exp(2 * rng.normal(size=12))
    sizes = rng.integers(100, 10000, 12).tolist()
    for ratio, low in ((0.8, 0.7), (0.6, 0.1), (0.3, 0.05), (0.95, 0.2), (1.0, 0.5)):
        found = ratios_within_budget((importance / importance.mean()).tolist(), sizes, ratio, low)
        assert all(low <= share <= 1 for share in found)
        assert float(np.dot(sizes, found)) == pytest.approx(ratio * sum(sizes), rel=1e-9)
        if ratio < 1:  # more for those that matter more
            ordered = [found[i] for i in importance.argsort()]
            assert all(before <= after + 1e-12 for before, after in itertools.pairwise(ordered))


@pytest.mark.parametrize("multiple", [1, 8])
def test_ranks_fill_the_budget(multiple):
    """What remains is less than one more rank of those layers of a block that would get it together."""
    shapes = [[(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]] * 6
    shapes[2] = [(40, 30), (30, 50)]
    sizes = [sum(n * m for n, m in block) for block in shapes]
    ratios = ratios_within_budget([3.9, 0.2, 0.3, 0.2, 0.3, 0.3], sizes, 0.6, 0.4)
    assert ratios[0] == 1.0
    budget = 0.6 * sum(sizes)
    found = filled(ratios, shapes, budget, multiple)
    used = sum(kept(block, share, multiple) for block, share in zip(shapes, found, strict=True))
    assert 0 <= budget - used < 1e-3 * multiple * budget
    for block, share in zip(shapes, found, strict=True):
        ranks = {shape: rank_of(shape, share, multiple) // multiple + 1 for shape in block}
        step = min(rank * multiple * sum(shape) / (shape[0] * shape[1]) for shape, rank in ranks.items())
        assert step >= 1 or kept(block, step, multiple) - kept(block, share, multiple) > budget - used
    assert all(share >= before for share, before in zip(found, ratios, strict=True))


def plan_of(config, cosines=(0.1, 0.9, 0.99), known=3):
    shapes = ((64, 64), (96, 64))
    blocks = [registry.BlockUnit(f"layers.{i}", 64 * 64 + 96 * 64, shapes) for i in range(known)]
    calls = []

    def similarity():
        calls.append(1)
        return {f"layers.{i}": cosine for i, cosine in enumerate(cosines)}

    return registry.get("adasvd").plan(blocks, config, similarity), len(calls)


def test_plan():
    found, calls = plan_of(AdaSVDConfig(ratio=0.5))
    assert calls == 1
    assert found["layers.0"] > found["layers.1"] > found["layers.2"] >= 0.4
    shapes = [(64, 64), (96, 64)]
    used = sum(kept(shapes, share, 1) for share in found.values())
    assert 0 <= 0.5 * 3 * (64 * 64 + 96 * 64) - used < 128
    assert plan_of(AdaSVDConfig(importance="uniform")) == ({}, 0)
    assert plan_of(AdaSVDConfig(ratio=0.5, min_ratio=0.5)) == ({}, 0)
    assert plan_of(AdaSVDConfig(), known=1) == ({}, 0)
    given = {f"layers.{i}": 0.3 for i in range(3)}
    assert plan_of(AdaSVDConfig(layers=given)) == ({}, 0)
    literal, _ = plan_of(AdaSVDConfig(ratio=0.5, importance="cos"))
    assert literal["layers.0"] < literal["layers.2"]
    with pytest.raises(ValueError, match=r"it lacks layers\.1, layers\.2"):
        plan_of(AdaSVDConfig(layers={"layers.0": 0.5}))


# Targets that follow the dense model ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_target_is_the_least_squares_fit_to_mixed_outputs(share):
    weight, dense = layer()
    rng = np.random.default_rng(1)
    seen = dense + 0.5 * rng.normal(size=dense.shape) * dense.std()
    wanted = (1 - share) * weight @ seen + share * weight @ dense
    want = np.linalg.lstsq(seen.T, wanted.T, rcond=None)[0].T
    w, g = tensors(weight, seen)
    found = low_rank.toward_dense(w, g, torch.tensor(dense @ seen.T), share, 0.0)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-8 * np.abs(want).max())
    held = low_rank.toward_dense(w, g, torch.tensor(dense @ seen.T), share, 1e9)
    np.testing.assert_allclose(held.numpy(), weight, rtol=1e-6, atol=1e-6)


def test_factors_of_the_target_are_nearer_to_the_dense_outputs():
    """Factors that aim at the dense outputs leave less of their error, on inputs that were not used to fit them."""
    weight, dense = layer(tokens=6000)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 6000))  # errors of earlier layers lie in few directions
    seen = dense + 0.3 * dense.std() * noise
    fit, judged = slice(0, 4000), slice(4000, None)
    w, g = tensors(weight, seen[:, fit])
    cross = torch.tensor(dense[:, fit] @ seen[:, fit].T)
    errors = []
    for share in (0.0, 0.5, 1.0):
        config = AdaSVDConfig(ratio=0.8, dense_target=share)
        found = factorize(w.float(), g, config, "layer", cross=cross).unpack().double().numpy()
        errors.append(np.linalg.norm(weight @ dense[:, judged] - found @ seen[:, judged]))
    assert errors[2] < errors[1] < 0.9 * errors[0]
    unused = factorize(w.float(), g, AdaSVDConfig(ratio=0.8, dense_target=0.0), "layer", cross=cross)
    assert torch.equal(unused.unpack(), factorize(w.float(), g, AdaSVDConfig(ratio=0.8), "layer").unpack())


def test_without_drift_the_target_is_the_weight():
    """Also with fewer tokens than columns, where directions that no input has must not fade."""
    weight, inputs = layer(tokens=20)
    w, g = tensors(weight, inputs)
    plain, followed = (
        factorize(w.float(), g, AdaSVDConfig(ratio=0.8), "layer", tokens=20, cross=cross).unpack()
        for cross in (None, g.clone())
    )
    assert torch.allclose(plain, followed, atol=1e-5)


def test_streams_and_order_follow_the_options():
    assert AdaSVDConfig().streams == {"compressed", "cross"}
    assert AdaSVDConfig(dense_target=0.0).streams == {"compressed"}
    assert AdaSVDConfig().in_order
    assert (AdaSVDConfig().stack_into, AdaSVDConfig(buckets=32, samples=8).stack_into) == (0, 8)
    assert not AdaSVDConfig(sequential=False).in_order


# One layer -------------------------------------------------------------------------------------------------------


def small(rows=24, columns=40, seed=0):
    weight, inputs = layer(rows, columns, seed=seed)
    return torch.tensor(weight).float(), torch.tensor(inputs @ inputs.T)


def stored(weight, moment, **options):
    return factorize(weight, moment, AdaSVDConfig(**options), "layer")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 30), (30, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
def test_rank_and_bytes(shape, ratio):
    weight, moment = small(*shape)
    packed = stored(weight, moment, ratio=ratio)
    rank = rank_of(shape, ratio)
    assert packed.spec.rank == rank >= 1
    assert packed.nbytes == 4 * rank * sum(shape)
    reason = registry.get("adasvd").leaves_dense("layer", shape, AdaSVDConfig(ratio=ratio))
    assert (reason is not None) == stays_dense(shape, ratio)
    assert stays_dense(shape, ratio) == (ratio == 1 or packed.nbytes >= 4 * shape[0] * shape[1])


def test_every_option_changes_the_result():
    weight, moment = small()
    base = stored(weight, moment, ratio=0.6)
    error = low_rank.output_error(weight.double(), moment, base.up.double(), base.down.double())
    for options in ({"init": "svd"}, {"ratio": 0.5}, {"rank_multiple": 4}, {"layers": {"layer": 0.4}}):
        other = stored(weight, moment, **{"ratio": 0.6, **options})
        assert low_rank.output_error(weight.double(), moment, other.up.double(), other.down.double()) > error
    steps = [stored(weight, moment, ratio=0.6, init="svd", iterations=i) for i in (0, 1, 9)]
    errors = [low_rank.output_error(weight.double(), moment, s.up.double(), s.down.double()) for s in steps]
    assert errors[0] > errors[1] > errors[2] >= error * (1 - 1e-6)
    assert stored(weight, moment, factor_dtype="float16").up.dtype == torch.float16
    assert stored(weight.bfloat16(), moment).up.dtype == torch.bfloat16
    assert stored(weight.double(), moment).up.dtype == torch.float32
    damped = [
        factorize(weight, moment, AdaSVDConfig(damping=damping), "layer", tokens=10).unpack() for damping in (0.01, 1)
    ]
    assert not torch.equal(*damped)


def test_the_last_refit_takes_back_rounding():
    weight, moment = small(48, 64)
    without, refitted = (stored(weight.bfloat16(), moment, ratio=0.9, iterations=i) for i in (0, 1))
    w = weight.bfloat16().double()
    before, after = (low_rank.output_error(w, moment, f.up.double(), f.down.double()) for f in (without, refitted))
    assert after < before


def test_degenerate_weights_and_moments(caplog):
    weight, moment = small()
    zero = stored(torch.zeros_like(weight), moment)
    assert not zero.unpack().any()
    thin = weight[:, :3] @ torch.randn(3, 40)
    packed = stored(thin, moment)
    assert packed.spec.rank > 3
    assert torch.allclose(packed.unpack(), thin, atol=1e-4 * float(thin.abs().max()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(stored(weight, moment * 0).unpack(), stored(weight, None).unpack())
    assert "layer: all its inputs are zero" in caplog.text
    dead = moment.clone()
    dead[:25], dead[:, :25] = 0, 0
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(stored(weight, dead).unpack()).all()
    assert "25 of its 40 input channels are always zero" in caplog.text
    for scale in (1e-20, 1e20):
        assert torch.allclose(stored(weight, moment * scale).unpack(), stored(weight, moment).unpack(), atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight, moment = small()
    moment[2, 3] = value
    with pytest.raises(ValueError, match="layer: second moment holds NaN or infinity"):
        stored(weight, moment)
    with pytest.raises(ValueError, match=r"layer: second moment has shape \(39, 39\)"):
        stored(weight, moment[:39, :39])


def test_fewer_tokens_than_columns_are_damped_and_said_so(caplog):
    weight, inputs = layer(tokens=20)
    stats = LinearStats("layer", 40)
    stats.update(torch.tensor(inputs.T).unsqueeze(0))
    unit = registry.LinearUnit("layer", torch.tensor(weight).float())
    with caplog.at_level(logging.WARNING):
        packed = registry.get("adasvd").compress(unit, stats, AdaSVDConfig(ratio=0.5))
    assert "calibrated on 20 tokens, fewer than its 40 columns" in caplog.text
    assert unit.trace[0]["damped"]
    assert unit.trace[0]["rank"] == packed.spec.rank == rank_of((24, 40), 0.5)
    assert isinstance(packed, LowRankFormat)


@pytest.mark.parametrize(
    "factors", ["int8", "int4", ARBConfig(iterations=3, quantiles=9)], ids=["int8", "int4", "signs"]
)
def test_factors_are_held_for_what_they_receive(factors):
    """V is held for the inputs, U is refitted to what V became: better than holding each for itself."""
    weight, moment = small(96, 160)
    options = {"ratio": 0.6, "factors": factors, "factor_group": 0}
    plain, held, unfitted = (
        stored(weight, moment, ratio=0.6),
        stored(weight, moment, **options),
        stored(weight, moment, **options, iterations=0),
    )
    errors = [
        float(((r @ moment) * r).sum()) for r in ((weight - f.unpack()).double() for f in (plain, held, unfitted))
    ]
    assert errors[0] < errors[1] < errors[2]
    assert held.nbytes < 0.3 * plain.nbytes  # of float32
    assert held.spec.rank == plain.spec.rank
    if factors == "int4":
        best = low_rank.balance(*low_rank.truncate(weight.double(), moment, held.spec.rank))
        alone = [
            integer.fit(
                factor, None, bits=4, group_size=0, symmetric=True, scale_dtype=torch.float16, damping=0.01, where=""
            )
            for factor in best
        ]
        up, down = ((fit.codes.double() - 8) * fit.scale.double() for fit in alone)
        assert low_rank.output_error(weight.double(), moment, up, down) > errors[2]
    assert torch.isfinite(stored(weight, None, **options).unpack()).all()


def test_ratios_of_held_factors_leave_no_layer_dense():
    found, _ = plan_of(AdaSVDConfig(ratio=0.6, factors="int4"), cosines=(-1.0, 0.99, 0.99))
    shapes = [(64, 64), (96, 64)]
    assert not any(stays_dense(shape, found["layers.0"]) for shape in shapes)
    used = sum(kept(shapes, share, 1) for share in found.values())
    assert 0 <= 0.6 * 3 * (64 * 64 + 96 * 64) - used < 160
    assert highest_factored([[(64, 64), (96, 64)], [(2, 2)]], 1) == 0.0
    assert stays_dense((64, 64), highest_factored([[(64, 64)]], 1) + 1 / 32)


# Config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be from 0.001 to 1.0"),
        ({"ratio": 1.2}, "ratio must be from"),
        ({"ratio": float("nan")}, "ratio must be from"),
        ({"ratio": -0.5}, "ratio must be from"),
        ({"ratio": 0.5, "min_ratio": 0.6}, "min_ratio must not exceed ratio = 0.5, got 0.6"),
        ({"layers": {"a": 0}}, "layers\\['a'\\] must be a number above 0 and at most 1, got 0"),
        ({"layers": {"a": float("nan")}}, "layers\\['a'\\]"),
        ({"layers": {"a": True}}, "layers\\['a'\\]"),
        ({"layers": {"\n": 0.5}}, "not the name of a module"),
        ({"layers": [0.5]}, "layers must map names of decoder blocks to a ratio"),
        ({"factor_dtype": "int8"}, "factor_dtype must be one of"),
        ({"importance": "inverse_cos"}, "importance must be one of"),
        ({"iterations": -1}, "iterations must be"),
        ({"factors": "int3"}, "factors must be one of"),
        ({"factors": "method"}, "factor_config is needed"),
        ({"factor_config": ARBConfig()}, "factor_config is needed for factors=.method., and only then"),
        ({"factors": AdaSVDConfig()}, "adasvd makes low_rank, factors may be binary, integer"),
        ({"factors": ARBConfig(skip=["a"])}, "put skip on the config itself"),
        ({"factors": "method", "factor_config": 3}, "must be the config of a method, got int"),
        ({"factors": ARBConfig(variant="x"), "calibration": None}, "variant 'x' .* needs calibration data"),
        ({"factor_group": -1}, "factor_group must be"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaSVDConfig(**options)


def test_config_in_json_and_defaults():
    config = AdaSVDConfig(ratio=0.6, layers={"a": 0.4, "a.b": 1.0})
    assert LowBitConfig.from_dict(config.to_dict()) == config
    mixed = AdaSVDConfig(calibration="c4", seed=3, factors=ARBConfig(variant="x"))
    assert LowBitConfig.from_dict(mixed.to_dict()) == mixed
    assert (mixed.factors, mixed.factor_config.variant, mixed.factor_config.seed) == ("method", "x", 3)
    nested = mixed.to_dict()
    for inner in (config.to_dict(), {"method": "recipe"}, [1]):
        with pytest.raises(ValueError, match="factor_config must be the config of another method"):
            LowBitConfig.from_dict({**nested, "factor_config": inner})
    assert config.ratio_of("a.q") == 0.4
    assert config.ratio_of("a.b.q") == 1.0
    with pytest.raises(ValueError, match=r"c\.q: is in none of the blocks that layers gives a ratio for"):
        config.ratio_of("c.q")
    assert [AdaSVDConfig(ratio=r).floor for r in (0.8, 0.12, 0.03)] == pytest.approx([0.7, 0.05, 0.03])
    assert AdaSVDConfig(min_ratio=0.2).floor == 0.2
