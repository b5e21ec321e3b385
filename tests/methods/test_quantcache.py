"""QuantCache's rules on sequences made by hand, and its formulas against slow float64 versions from the paper."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from hf_lowbit import LowBitConfig, LowBitRecipe, QuantCacheConfig, quantize, registry
from hf_lowbit.methods.quantcache import algorithm
from hf_lowbit.methods.quantcache.decisions import Clock, Pruner, Trajectory, mean_bits
from hf_lowbit.methods.quantcache.store import History
from tests.video import tiny_video

BLOCKS = 6
# change per step of a trained video model: fast, slow in the middle, fast again
SHAPE = (0.21, 0.14, 0.12, 0.11, 0.09, 0.06, 0.04, 0.04, 0.03, 0.04, 0.06, 0.08, 0.12, 0.13, 0.2, 0.3)


def config(**changes) -> QuantCacheConfig:
    return QuantCacheConfig(**{"intervals": (4, 2, 1), "deltas": (0.05, 0.1), "num_inference_steps": 16, **changes})


def run(options, rates=SHAPE, contexts=("cond",), similarities=None, steps=None):
    """Drive a trajectory: at each computed step the change is that of all steps since the last one."""
    trajectory = Trajectory(options, steps, BLOCKS)
    last: dict[int, int] = {}
    decisions = []
    for step in range(len(rates)):
        found = [trajectory.begin(context, step, step > 0) for context in contexts]
        decisions.append(found)
        ran = [block for block in range(BLOCKS) if found[0].runs[block] and block not in found[0].pruned]
        if not ran:
            continue
        per_block = options.schedule == "per_block"
        measured = ran if per_block else [trajectory.measured_block]
        changes = {
            block: (sum(_rate(rates[i], block) for i in range(last[block] + 1, step + 1)) if block in last else None)
            for block in measured
        }
        last |= dict.fromkeys(measured, step)
        seen = {block: value for block, value in (similarities or {}).items() if block in ran}
        trajectory.measured({block: (change, None) for block, change in changes.items()}, seen)
    return trajectory, decisions


def _rate(rates, block):
    return rates[block] if isinstance(rates, tuple) else rates


def pattern(decisions) -> str:
    return "".join("x" if found[0].computes else "." for found in decisions)


# When steps are computed ---------------------------------------------------------------------------------------------


def test_steps_of_a_trajectory_with_known_change():
    """By hand: 0 and 1 warm up; D = .14 at 1, so 2; .12, so 3; .11, so 4; .09 gives 2, so 6; .05 at 6 is not below
    .05, so 8; .035 gives 4, so 12; (.04 + .06 + .08 + .12) / 4 = .075 gives 2, so 14; .165, so 15, which is the last.
    """
    trajectory, decisions = run(config())
    assert pattern(decisions) == "xxxxx.x.x...x.xx"
    rows = {row["step"]: row for row in trajectory.rows}
    assert rows[8]["divergence"] == pytest.approx((0.04 + 0.03) / 2)
    assert rows[12]["divergence"] == pytest.approx((0.04 + 0.06 + 0.08 + 0.12) / 4)
    assert [rows[step]["interval"] for step in (1, 4, 8, 12)] == [1, 2, 4, 2]
    assert rows[5] == {
        "step": 5, "computed": 0.0, "bits": None, "change": None, "divergence": None, "interval": None, "pruned": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"intervals": (1, 1, 1)}, "xxxxxxxxxxxxxxxx"),
        ({"intervals": (3, 3, 3)}, "xx..x..x..x..x.x"),
        ({"intervals": (3, 3, 3), "warmup": 1}, "xx..x..x..x..x.x"),  # D needs two steps
        ({"intervals": (3, 3, 3), "warmup": 5}, "xxxxx..x..x..x.x"),
        ({"intervals": (3, 3, 3), "tail": 3}, "xx..x..x..x..xxx"),
        ({"intervals": (3, 3, 3), "tail": 0}, "xx..x..x..x..x.."),
        ({"intervals": (4, 4, 4), "max_consecutive_cached": 1}, "xx.x.x.x.x.x.x.x"),
        ({"intervals": (4, 4, 4), "max_consecutive_cached": 0}, "xxxxxxxxxxxxxxxx"),
        ({"deltas": (0.0, 0.0)}, "xxxxxxxxxxxxxxxx"),
        ({"deltas": (9.0, 9.0)}, "xx...x...x...x.x"),
        ({"deltas": (0.0, 9.0)}, "xx.x.x.x.x.x.x.x"),
        ({"delta_offset": 0.2}, "xx...x...x...x.x"),
    ],
)
def test_each_option_of_the_schedule_does_what_it_says(changes, expected):
    assert pattern(run(config(**changes))[1]) == expected


def test_trajectory_no_longer_than_warm_up_and_tail_is_computed():
    assert pattern(run(config(intervals=(3, 3, 3), warmup=2, tail=1), SHAPE[:3], steps=3)[1]) == "xxx"


def test_defaults_follow_the_number_of_steps():
    assert algorithm.default_intervals(100) == (12, 8, 4)
    assert algorithm.default_intervals(30) == (4, 2, 1)
    assert algorithm.default_intervals(50) == (6, 4, 2)
    assert algorithm.default_intervals(4) == (1, 1, 1)
    assert algorithm.default_deltas(100) == (0.05, 0.09)
    rules = QuantCacheConfig().rules(50)
    assert (rules.intervals, rules.deltas, rules.most_cached) == ((6, 4, 2), (0.1, 0.18), 5)
    assert QuantCacheConfig(num_inference_steps=100).rules(30).intervals == (4, 2, 1)  # the pipeline knows better
    assert QuantCacheConfig(num_inference_steps=100).rules(None).intervals == (12, 8, 4)


def test_number_of_steps_is_asked_for_where_it_is_needed():
    with pytest.raises(ValueError, match="needs the number of steps"):
        QuantCacheConfig().rules(None)
    with pytest.raises(ValueError, match="needs the number of steps"):
        QuantCacheConfig(intervals=(2, 2, 2), deltas=(1, 1)).rules(None)
    assert QuantCacheConfig(intervals=(2, 2, 2), deltas=(1, 1), tail=0).rules(None).steps is None


def test_contexts_of_a_step_share_its_decision():
    _, decisions = run(config(), contexts=("cond", "uncond"))
    for cond, uncond in decisions:
        assert cond.leads
        assert not uncond.leads
        assert dataclasses.replace(uncond, leads=True) == cond


def test_context_without_a_cache_is_computed_alone():
    trajectory = Trajectory(config(intervals=(4, 4, 4)), None, BLOCKS)
    for step in range(2):
        trajectory.begin("cond", step, step > 0)
        trajectory.measured({2: (None if step == 0 else 0.1, None)})
    assert not trajectory.begin("cond", 2).computes
    assert trajectory.begin("uncond", 2, has_cache=False).computes
    assert not trajectory.begin("cond", 3).computes  # the others go on
    assert trajectory.begin("cond", 4, has_cache=False).computes


def test_cache_that_does_not_fit_makes_a_computed_step():
    trajectory = Trajectory(config(intervals=(4, 4, 4)), None, BLOCKS)
    for step in range(2):
        trajectory.begin("cond", step, step > 0)
        trajectory.measured({2: (None if step == 0 else 0.1, None)})
    assert not trajectory.begin("cond", 2).computes
    assert trajectory.without_cache(leads=True).computes
    assert trajectory.rows[-1]["computed"] == 1.0
    assert trajectory.begin("uncond", 2).computes
    assert trajectory.begin("cond", 3).computes  # nothing was measured


def test_each_block_may_have_its_own_schedule():
    """Blocks 0 to 2 change fast, the others slowly."""
    rates = [(0.2, 0.2, 0.2, 0.01, 0.01, 0.01)] * 12
    trajectory, decisions = run(config(schedule="per_block", num_inference_steps=12), rates)
    runs = [found[0].runs for found in decisions]
    assert all(all(row[:3]) for row in runs)
    assert "".join("x" if row[4] else "." for row in runs) == "xx...x...x.x"
    assert [row["computed"] for row in trajectory.rows][2] == 0.5


def test_broken_features_are_not_reused():
    clock = Clock(config(), config().rules(None))
    for change in (math.nan, math.inf):
        clock.computed(3)
        clock.last = 2
        clock.measured(3, change, None)
        assert clock.length == 1


# D, Eq. (5), and the interval, Eq. (6) -------------------------------------------------------------------------------


def test_relative_change_against_float64():
    torch.manual_seed(0)
    for shape in ((2, 300, 40), (1, 7), (3, 900, 700)):
        new, old = torch.randn(shape), torch.randn(shape)
        expected = float((new.double() - old.double()).abs().sum() / old.double().abs().sum())
        # float32 sums of a piece of a million elements, in double beyond
        assert float(algorithm.relative_change(new, old)) == pytest.approx(expected, rel=1e-5)
        low = (new.bfloat16(), old.bfloat16())
        expected = float((low[0].double() - low[1].double()).abs().sum() / low[1].double().abs().sum())
        assert float(algorithm.relative_change(*low)) == pytest.approx(expected, rel=1e-5)
    assert float(algorithm.relative_change(torch.ones(3, 2), torch.zeros(3, 2))) == math.inf
    assert math.isnan(float(algorithm.relative_change(torch.full((3, 2), math.nan), torch.ones(3, 2))))
    assert float(algorithm.relative_change(torch.ones(0, 2), torch.ones(0, 2))) == 0


def test_motion_against_float64():
    torch.manual_seed(0)
    features = torch.randn(2, 4 * 9, 5)
    frames = features.double().reshape(2, 4, 9, 5)
    step, size = 0.0, 0.0
    for b in range(2):
        for f in range(1, 4):
            step += float((frames[b, f] - frames[b, f - 1]).abs().sum())
            size += float(frames[b, f].abs().sum() + frames[b, f - 1].abs().sum())
    assert float(algorithm.motion(features, 4)) == pytest.approx(step / size, rel=1e-5)
    assert float(algorithm.motion(torch.ones(1, 8, 3), 4)) == 0
    assert float(algorithm.motion(torch.zeros(1, 8, 3), 4)) == 0
    with pytest.raises(ValueError, match="36 tokens are not those of 5 frames"):
        algorithm.motion(features, 5)


def test_divergence_by_mode():
    assert algorithm.divergence(0.3, 3) == pytest.approx(0.1)
    assert algorithm.divergence(0.3, 3, "paper", 0.5, 0.2) == pytest.approx(0.1 * 0.3 / 3)
    assert algorithm.divergence(0.3, 3, "paper", 0.5, 0.5) == 0  # steady motion, however wrong the cache: the flaw
    assert algorithm.divergence(0.3, 3, "paper", 0.5, None) == pytest.approx(0.1)
    now, before = (0.4 / 0.385) ** 8, (0.3 / 0.385) ** 8
    expected = 0.1 * (now + abs(10 * (now - before) / 3))
    assert algorithm.divergence(0.3, 3, "adacache", 0.4, 0.3) == pytest.approx(expected)
    assert algorithm.divergence(0.3, 3, "adacache", 0.4, 0.3, progress=0.05) == pytest.approx(0.1)
    assert algorithm.divergence(0.3, 3, "adacache", None, None) == pytest.approx(0.1)


@pytest.mark.parametrize("mode", ["adacache", "paper"])
def test_motion_changes_when_steps_are_computed(mode):
    clocks = [Clock(config(motion=motion), config().rules(None)) for motion in ("none", mode)]
    for clock in clocks:
        for step, moved in ((5, 0.3), (6, 0.5)):
            clock.computed(step)
            clock.measured(step, 0.07 if step > 5 else None, moved)
    assert clocks[0].value == pytest.approx(0.07)
    assert clocks[1].value != pytest.approx(0.07)
    assert clocks[1].rate == pytest.approx(0.07)  # what the bits go by


def test_interval_by_thresholds():
    values = (0.0, 0.0499, 0.05, 0.0999, 0.1, 5.0, math.inf, math.nan)
    assert [algorithm.interval(v, (4, 2, 1), (0.05, 0.1)) for v in values] == [4, 4, 2, 2, 1, 1, 1, 1]


# Activation bits, Eq. (8) --------------------------------------------------------------------------------------------


def test_bits_by_redundancy():
    """Expected similarity 1 - change * length: below .6 many, below .8 middle, else few."""
    cases = {
        (0.5, 1): 8,
        (0.41, 1): 8,
        (0.3, 1): 6,
        (0.21, 1): 6,
        (0.19, 1): 4,
        (0.04, 4): 4,
        (0.06, 4): 6,
        (2.0, 2): 8,
    }
    for (change, length), bits in cases.items():
        assert algorithm.bits_by_redundancy(change, length, (8, 6, 4), (0.6, 0.8)) == bits
    assert algorithm.bits_by_redundancy(None, 1, (8, 6, 4), (0.6, 0.8)) == 8
    assert algorithm.bits_by_redundancy(math.nan, 1, (8, 6, 4), (0.6, 0.8)) == 8
    assert algorithm.bits_by_redundancy(math.inf, 1, (8, 6, 4), (0.6, 0.8)) == 8


def test_bits_after_a_skip():
    assert [algorithm.bits_after_skip(n, (4, 2, 1), (8, 6, 4)) for n in (None, 4, 2, 1)] == [8, 8, 6, 4]


def test_policies_along_a_trajectory():
    def bits(**changes):
        return [row["bits"] for row in run(config(**changes))[0].rows if row["bits"] is not None]

    # steps 0 1 2 3 4 6 8 12 14 15, each by what was measured at the one before
    assert bits() == [8, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert bits(thetas=(0.875, 0.895)) == [8, 8, 8, 6, 6, 8, 4, 8, 8, 8]
    assert bits(bit_policy="post_skip") == [8, 8, 4, 4, 4, 6, 6, 8, 6, 4]
    assert bits(bit_policy="post_skip", bits=(7, 5, 3)) == [7, 7, 3, 3, 3, 5, 5, 7, 5, 3]
    assert set(bits(bit_policy="fixed")) == {8}
    assert mean_bits(run(config(bit_policy="fixed"))[0].rows) == 8
    assert mean_bits([]) is None


# Pruning, Eqs. (9) to (11) -------------------------------------------------------------------------------------------

SIMILAR = {0: 1.0, 1: 0.97, 2: 1.0, 3: 0.99, 4: 0.98, 5: 1.0}


def pruned(**changes):
    options = config(intervals=(1, 1, 1), **changes)
    return [row["pruned"] for row in run(options, similarities=SIMILAR)[0].rows]


def test_similarity_against_float64():
    torch.manual_seed(0)
    before, after = torch.randn(2, 3000, 64), torch.randn(2, 3000, 64)
    a, b = before.double().reshape(-1, 64), after.double().reshape(-1, 64)
    expected = float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
    assert float(algorithm.similarity(before, after)) == pytest.approx(expected, abs=1e-7)
    assert float(algorithm.similarity(before, 3 * before)) == pytest.approx(1, abs=1e-6)
    assert float(algorithm.similarity(before, torch.zeros_like(before))) == 0


def test_pruned_blocks_keep_apart_and_come_back():
    """Ends and the measured block (2) run; 3 is more redundant than its neighbour 4; who was left out runs next."""
    found = pruned(prune_high=0.96)
    assert found[0] == []
    # 3 goes before 4, and 1 is apart from both; at the next step both must run, so that 4 has its turn
    assert found[1:5] == [[1, 3], [4], [1, 3], [4]]
    assert pruned() == [[]] * 16
    assert pruned(prune_high=0.985)[1:4] == [[3], [], [3]]
    assert pruned(prune_high=0.99)[1:4] == [[], [], []]  # above, not at
    for before, after in itertools.pairwise(found):
        assert not set(before) & set(after)
        assert all(b - a > 1 for a, b in itertools.pairwise(after))


def test_pruning_by_chance_is_seeded():
    def chance(**changes):
        return pruned(prune_high=1.0, prune_low=0.9, **changes)

    assert chance() == [[]] * 16
    assert chance(p_base=0.5) == chance(p_base=0.5)
    assert chance(p_base=0.5) != chance(p_base=0.5, seed=1)
    assert chance(p_base=1.0) == pruned(prune_high=0.9)
    count = sum(map(len, chance(p_base=0.5)))
    assert 0 < count < sum(map(len, chance(p_base=1.0)))
    assert pruned(prune_high=1.0, prune_low=0.995, p_base=1.0) == [[]] * 16


def test_cumulative_change_raises_and_lowers_pruning():
    # while less than 0.3 has changed, 0.985 is 0.975, so that 4 is redundant too
    assert pruned(prune_high=0.985, v_low=0.3)[1:6] == [[3], [4], [3], [], [3]]
    # .14 + .12 is above 0.2: the step after goes without, and the sum begins anew
    assert pruned(prune_high=0.985, v_high=0.2)[1:6] == [[3], [], [], [3], []]


def test_pruner_leaves_ends_and_measured_block_alone():
    pruner = Pruner(config(prune_high=0.5), BLOCKS, 2)
    assert [pruner.may(block) for block in range(BLOCKS)] == [False, True, False, True, True, False]
    assert not any(Pruner(config(), BLOCKS, 2).may(block) for block in range(BLOCKS))
    assert not Pruner(config(prune_high=0.5), 1, 0).may(0)


# What is kept --------------------------------------------------------------------------------------------------------


def test_int8_copy_is_within_half_a_step_of_its_token():
    torch.manual_seed(0)
    values = torch.randn(2, 50, 64) * torch.exp(torch.randn(2, 50, 1))
    values[0, 3] = 0
    codes, scale = algorithm.to_int8(values)
    assert codes.dtype == torch.int8
    assert scale.shape == (2, 50, 1)
    back = algorithm.from_int8(codes, scale, torch.float32)
    error = (back - values).abs() / values.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    assert float(error.max()) <= 0.5 / 127 * (1 + 1e-5)
    assert float(error.max()) <= 0.004
    assert torch.equal(back[0, 3], values[0, 3])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_history_continues_polynomials_of_its_order(order):
    history = History(order)
    assert not history
    for step in (0, 1, 3, 4):
        history.put(step, [torch.full((1, 2, 3), float(step**order)), torch.full((1, 1, 3), 2.0 * step**order)])
    first, second = history.at(7)
    torch.testing.assert_close(first, torch.full((1, 2, 3), float(7**order)))
    torch.testing.assert_close(second, torch.full((1, 1, 3), 2.0 * 7**order))
    torch.testing.assert_close(history.last()[0], torch.full((1, 2, 3), float(4**order)))
    assert history.nbytes == algorithm.cache_bytes([(1, 2, 3), (1, 1, 3)], 4, order + 1)
    assert history.count == 2


def test_history_of_one_step_is_that_step():
    kept = torch.randn(1, 2, 3)
    history = History(2)
    history.put(5, [kept])
    assert torch.equal(history.at(9)[0], kept)


def test_history_drops_what_no_longer_fits():
    history = History(1)
    history.put(0, [torch.zeros(1, 2, 3)])
    assert history.fits([torch.ones(1, 2, 3)])
    for other in (torch.ones(1, 3, 3), torch.ones(1, 2, 3).half(), torch.ones(1, 2, 3, device="meta")):
        assert not history.fits([other])
    assert not history.fits([torch.ones(1, 2, 3)] * 2)
    history.put(1, [torch.ones(1, 3, 3)])
    assert torch.equal(history.at(5)[0], torch.ones(1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_history_are_the_formula(dtype):
    shapes = [(2, 7, 24), (2, 3, 24)]
    for int8 in (False, True):
        history = History(1, int8)
        for step in range(3):
            history.put(step, [torch.randn(shape).to(dtype) for shape in shapes])
        assert history.nbytes == algorithm.cache_bytes(shapes, dtype.itemsize, 2, int8)
        assert history.at(4)[0].dtype == dtype
    # the example of a 720p video of 129 frames: 730 MB
    assert algorithm.cache_bytes([(1, 118800, 3072)], 2) == 729907200


def test_extrapolation_weights():
    assert algorithm.extrapolation_weights([3], 9) == [1]
    assert algorithm.extrapolation_weights([3, 2], 5) == [3, -2]
    assert sum(algorithm.extrapolation_weights([7, 4, 2], 9)) == pytest.approx(1)


# The config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": (2, 4, 6)}, "intervals must be three integers"),
        ({"intervals": (4, 2, 0)}, "intervals must be three integers"),
        ({"intervals": (4, 2)}, "intervals must be three integers"),
        ({"intervals": (4.0, 2, 1)}, "intervals must be three integers"),
        ({"intervals": 4}, "intervals must be three integers"),
        ({"deltas": (0.2, 0.1)}, "deltas must be two numbers"),
        ({"deltas": (-0.1, 0.1)}, "deltas must be two numbers"),
        ({"deltas": (math.nan, 1)}, "deltas must be two numbers"),
        ({"thetas": (0.9, 0.8)}, "thetas must be two numbers, at least 0 and at most 1"),
        ({"thetas": (0.9, 1.8)}, "thetas must be two numbers"),
        ({"thetas": None}, "thetas must be two numbers"),
        ({"bits": (4, 6, 8)}, "bits must be three integers"),
        ({"bits": (16, 8, 4)}, "bits must be three integers .* from 2 to 8"),
        ({"bits": (8, 6, 1)}, "bits must be three integers"),
        ({"bits": None}, "bits must be three integers"),
        ({"num_inference_steps": 0}, "num_inference_steps must be None or an integer of at least 1"),
        ({"num_frames": 1}, "num_frames must be None or an integer of at least 2"),
        ({"max_consecutive_cached": -1}, "max_consecutive_cached must be None or an integer"),
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"tail": -1}, "tail must be at least 0"),
        ({"metric_block": 1.5}, "metric_block must be from 0"),
        ({"schedule": "both"}, "schedule must be one of"),
        ({"granularity": "layer"}, "granularity must be one of"),
        ({"schedule": "per_block", "granularity": "stack"}, "schedule 'per_block' caches each block"),
        ({"motion": "yes"}, "motion must be one of"),
        ({"extrapolation": 3}, "extrapolation must be one of"),
        ({"bit_policy": "free"}, "bit_policy must be one of"),
        ({"prune_high": 2.0}, "prune_high must be None or from -1 to 1"),
        ({"prune_low": 0.5}, "prune_low must not be above prune_high"),
        ({"prune_high": 0.4, "prune_low": 0.5}, "prune_low must not be above prune_high"),
        ({"prune_high": 0.9, "p_base": 0.5}, "p_base has no effect without prune_low"),
        ({"prune_high": 0.9, "p_base": 1.5, "prune_low": 0.1}, "p_base must be from 0"),
        ({"prune_high": 0.9, "v_low": 2.0, "v_high": 1.0}, "v_low must not be above v_high"),
        ({"v_low": 2.0}, "v_low and v_high have no effect without prune_high"),
        ({"cache_dtype": "int4"}, "cache_dtype must be one of"),
        ({"skip": ["blocks.0"]}, "belong to methods that compress weights"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantCacheConfig(**options)


def test_config_survives_json():
    for options in (
        {},
        {"intervals": (6, 4, 2), "deltas": (0.1, 0.3), "prune_high": 0.98, "cache_dtype": "int8", "extrapolation": 1},
        {"bit_policy": "post_skip", "bits": (8, 5, 3), "thetas": (0.5, 0.6), "motion": "adacache", "num_frames": 8},
    ):
        made = QuantCacheConfig(**options)
        text = json.dumps(made.to_dict())
        assert LowBitConfig.from_dict(json.loads(text)) == made
        assert "skip" not in made.to_dict()
    with pytest.raises(ValueError, match=r"unknown key 'interval' \(did you mean 'intervals'\?\)"):
        LowBitConfig.from_dict({"method": "quantcache", "interval": [3, 2, 1]})


def test_it_compresses_no_weights():
    method = registry.get("quantcache")
    assert method.unit == "pipeline"
    for wrong in (QuantCacheConfig(), LowBitRecipe({"*": QuantCacheConfig()})):
        with pytest.raises(ValueError, match="QuantCacheConfig compresses no weights"):
            quantize(tiny_video(), wrong)
    with pytest.raises(ValueError, match="quantcache compresses no weights"):
        method.compress(registry.LinearUnit("layer", torch.zeros(2, 2)), None, QuantCacheConfig())
