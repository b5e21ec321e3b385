"""ReCalKV against its definition in float64, and every option where it changes the result."""

import dataclasses
import itertools
import math

import pytest
import torch

from hf_lowbit import ReCalKVConfig, registry
from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.compress.measures import GradientStats
from hf_lowbit.kernels.latent_codec import decode_rows, encode_rows
from hf_lowbit.methods.recalkv.algorithm import Inputs, factorize, group_heads, spread
from hf_lowbit.numerics import grouping, low_rank, ranks
from hf_lowbit.numerics.rotation import spreading
from hf_lowbit.registry import Projection

HEADS, ROWS, COLUMNS = 6, 4, 40


def projection(part="key", heads=HEADS, rows=ROWS, columns=COLUMNS, name="layers.0.self_attn.k_proj"):
    return Projection(name, part, heads, (heads * rows, columns))


def config(**options):
    given = {"calibration": None, "rank_multiple": 1, "key_group_size": 2, "factor_dtype": "float32", **options}
    return ReCalKVConfig(**given)


@pytest.fixture(scope="module")
def layer():
    """A weight whose heads come in alike pairs, its inputs, and inputs that have drifted."""
    torch.manual_seed(0)
    shared = torch.randn(3, ROWS, COLUMNS, dtype=torch.float64)
    heads = [shared[i % 3] + 0.3 * torch.randn(ROWS, COLUMNS, dtype=torch.float64) for i in range(HEADS)]
    mix = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64) * torch.logspace(0, -1, COLUMNS, dtype=torch.float64)
    inputs = torch.randn(400, COLUMNS, dtype=torch.float64) @ mix
    return torch.cat(heads), inputs, inputs + 0.2 * torch.randn(400, COLUMNS, dtype=torch.float64)


def moments(layer, weighed=False):
    _, x, drifted = layer
    return Inputs(x.T @ x, drifted.T @ drifted, x.T @ drifted, gradients() if weighed else None)


def gradients():
    """Second moment of the gradients at the outputs: some matter a hundred times as much as others."""
    torch.manual_seed(2)
    g = torch.randn(60, HEADS * ROWS, dtype=torch.float64) * torch.logspace(0, -1, HEADS * ROWS).double()
    g = g @ torch.linalg.qr(torch.randn(HEADS * ROWS, HEADS * ROWS).double()).Q
    return 1e-6 * g.T @ g


def error(layer, found, drifted=False):
    """Squared error of the outputs that are wanted: those of the dense model."""
    weight, x, other = layer
    return float((x @ weight.T - (other if drifted else x) @ found.unpack().double().T).square().sum())


# The whitened decomposition -----------------------------------------------------------------------------------------


def test_eigenvectors_give_the_whitened_decomposition(layer):
    """``truncate`` against the published form: Cholesky, decomposition of W S, inverse of S."""
    weight, x, _ = layer
    gram = x.T @ x
    root = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    for rank in (1, 7, 20):
        published = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
        up, down = low_rank.truncate(weight, gram, rank)
        assert torch.allclose(up @ down, published, atol=1e-8 * float(published.abs().max()))


def test_what_is_lost_is_the_tail_of_the_energies(layer):
    weight, x, _ = layer
    energies = low_rank.output_energies(weight, x.T @ x)
    assert bool((energies[:-1] >= energies[1:]).all())
    for rank in (1, 10, 23, 24):
        up, down = low_rank.truncate(weight, x.T @ x, rank)
        lost = float((x @ (weight - up @ down).T).square().sum())
        assert lost == pytest.approx(float(energies[rank:].sum()), rel=1e-9, abs=1e-9 * float(energies.sum()))
    few = x[:5]  # fewer tokens than columns: no whitening could be inverted
    up, down = low_rank.truncate(weight, few.T @ few, 5)
    assert torch.allclose(few @ (up @ down).T, few @ weight.T, atol=1e-8)


def test_calibration_of_values_on_the_same_inputs_changes_nothing(layer):
    """The alternation that the paper runs starts at its own fixed point."""
    weight, x, _ = layer
    gram = x.T @ x
    start = low_rank.truncate(weight, gram, 9)
    for up, down in low_rank.alternate(weight, gram, *start, 2):
        assert torch.allclose(up @ down, start[0] @ start[1], atol=1e-10)


def test_crossed_calibration_is_the_best_there_is(layer):
    """Against gradient: no small change of the factors lowers the error on the drifted inputs."""
    weight, x, drifted = layer
    cross, gram = x.T @ drifted, drifted.T @ drifted
    up, down = low_rank.regress(weight, cross, gram, 9)
    product = (up @ down).requires_grad_(True)
    loss = (x @ weight.T - drifted @ product.T).square().sum()
    (gradient,) = torch.autograd.grad(loss, product)
    # stationary within the matrices of this rank: nothing left in the column space of U or the row space of D
    assert float((up.T @ gradient).norm()) < 1e-8 * float(loss.detach())
    plain = low_rank.truncate(weight, x.T @ x, 9)
    assert float(loss.detach()) < float((x @ weight.T - drifted @ (plain[0] @ plain[1]).T).square().sum())
    damped = low_rank.regress(weight, cross, gram, 9, damping=0.5)
    assert not torch.allclose(damped[0] @ damped[1], product.detach())


def test_crossed_calibration_leaves_what_it_did_not_see(layer):
    """Inputs that calibration lacks come to tokens that it did not meet: there the weight stays as it was."""
    weight, x, drifted = layer
    unseen = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)).Q[:, :5]
    x, drifted = (inputs - inputs @ unseen @ unseen.T for inputs in (x, drifted))
    up, down = low_rank.regress(weight, x.T @ drifted, drifted.T @ drifted, len(weight), damping=1e-6)
    assert torch.allclose(up @ down @ unseen, weight @ unseen, atol=1e-8)
    assert not torch.allclose(up @ down, weight, atol=1e-3)


# Groups -------------------------------------------------------------------------------------------------------------


def plain_cka(weight, gram, one, other):
    """The definition, with m x m matrices and centring on both sides."""
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    centre = torch.eye(COLUMNS, dtype=torch.float64) - 1 / COLUMNS
    grams = [centre @ root @ w.T @ w @ root @ centre for w in weight.unflatten(0, (HEADS, -1))[[one, other]]]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


def test_similarity_is_the_definition(layer):
    weight, x, _ = layer
    found = grouping.head_similarity(weight, x.T @ x, HEADS)
    for one, other in itertools.combinations(range(HEADS), 2):
        assert float(found[one, other]) == pytest.approx(plain_cka(weight, x.T @ x, one, other), rel=1e-9)
    assert torch.equal(found.diagonal(), torch.ones(HEADS, dtype=torch.float64))
    weight = weight.clone()
    weight[:ROWS] = 0
    assert float(grouping.head_similarity(weight, None, HEADS)[0, 1]) == 0


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 3], [6], [1] * 6, [4, 2], [5, 1]], ids=str)
def test_groups_are_a_partition_of_the_sizes_asked_for(sizes):
    torch.manual_seed(1)
    for _ in range(5):
        noise = torch.rand(6, 6)
        groups = grouping.greedy(noise + noise.T, sizes)
        assert [len(group) for group in groups] == sizes
        assert sorted(itertools.chain(*groups)) == list(range(6))
        assert all(group == sorted(group) for group in groups)


def test_the_most_similar_pair_comes_first():
    similarity = torch.eye(4)
    similarity[0, 3] = similarity[3, 0] = 0.9
    similarity[1, 2] = similarity[2, 1] = 0.5
    assert grouping.greedy(similarity, [2, 2]) == [[0, 3], [1, 2]]


def partitions(heads, size):
    if not heads:
        yield []
        return
    for rest in itertools.combinations(heads[1:], size - 1):
        group = [heads[0], *rest]
        for others in partitions([head for head in heads if head not in group], size):
            yield [group, *others]


def test_energy_grouping_finds_the_best_partition(layer):
    weight, x, _ = layer
    gram = low_rank.output_gram(weight, x.T @ x)

    def loss(groups):
        return sum(grouping.lost_energy(gram, group, ROWS, 4) for group in groups)

    found = grouping.least_loss(gram, HEADS, [grouping.contiguous(HEADS, 2)], [4] * 3)
    assert sorted(found) == [[0, 3], [1, 4], [2, 5]]  # the alike pairs
    assert loss(found) == min(map(loss, partitions(list(range(HEADS)), 2)))


def test_energy_grouping_is_never_worse_than_its_starts():
    torch.manual_seed(3)
    for _ in range(3):
        weight = torch.randn(9 * 3, 30, dtype=torch.float64)
        gram = weight @ weight.T
        starts = [grouping.contiguous(9, 3), grouping.greedy(grouping.head_similarity(weight, None, 9), [3] * 3)]

        def loss(groups, gram=gram):
            return sum(grouping.lost_energy(gram, group, 3, 4) for group in groups)

        assert loss(grouping.least_loss(gram, 9, starts, [4] * 3)) <= min(map(loss, starts))


@pytest.mark.parametrize("chosen", ["energy", "cka", "contiguous"])
def test_rows_stay_in_the_order_of_the_model(layer, chosen):
    """At full rank every grouping gives the weight back, bit for bit, so a bias needs no reordering either."""
    weight = layer[0].float()
    found = factorize(weight, projection(), moments(layer), config(grouping=chosen, ratio=1.0))
    assert torch.equal(found.unpack(), weight)
    lossy = factorize(weight, projection(), moments(layer), config(grouping=chosen))
    heads = lossy.unpack().unflatten(0, (HEADS, -1)) - weight.unflatten(0, (HEADS, -1))
    assert float(heads.norm()) < float(weight.norm())
    for group, start, rank in zip(lossy.spec.groups, lossy.spec.offsets, lossy.spec.ranks, strict=True):
        block = weight.unflatten(0, (HEADS, -1))[list(group)].flatten(0, 1).double()
        up, down = low_rank.truncate(block, moments(layer).dense, rank)
        own = lossy.up[list(group), :, :rank].flatten(0, 1).double() @ lossy.down[start : start + rank].double()
        assert torch.allclose(own, up @ down, atol=1e-4)


# Ranks --------------------------------------------------------------------------------------------------------------


def test_a_budget_is_never_exceeded_and_hardly_left_over():
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        count = int(torch.randint(1, 12, (1,), generator=generator))
        step = int(torch.randint(1, 9, (1,), generator=generator))
        most = [step * int(m) for m in torch.randint(2, 12, (count,), generator=generator)]
        shares = (torch.rand(count, generator=generator) ** 4).tolist()
        budget = int(torch.randint(step * count, sum(most) + 20, (1,), generator=generator))
        found = ranks.allocate(shares, most, budget, [step] * count, [step] * count)
        assert sum(found) <= budget
        assert all(step <= rank <= high and rank % step == 0 for rank, high in zip(found, most, strict=True))
        if any(shares) and sum(found) < sum(most):
            assert budget - sum(found) < step * count


def test_ranks_follow_shares_between_limits():
    assert ranks.allocate([1, 1, 2], [100] * 3, 80, [1] * 3, [1] * 3) == [20, 20, 40]
    # the one above its limit is cut, and its excess goes to the others in proportion
    assert ranks.allocate([1, 3, 16], [100, 100, 40], 80, [1] * 3, [1] * 3) == [10, 30, 40]
    # the one below its least is lifted at the others' cost
    assert ranks.allocate([0, 1, 1], [100] * 3, 60, [8] * 3, [8] * 3) == [8, 24, 24]
    # the remainder goes to who lost most by rounding
    assert ranks.allocate([30, 34], [64, 64], 64, [8, 8], [8, 8]) == [32, 32]
    assert ranks.allocate([0, 0], [10, 10], 10, [1, 1], [1, 1]) == [5, 5]
    assert ranks.split(9, [2, 1], [8, 4]) == [6, 3]
    with pytest.raises(ValueError, match="lowest ranks add up to 16, above the budget of 15"):
        ranks.allocate([1, 1], [9, 9], 15, [8, 8], [8, 8])
    with pytest.raises(ValueError, match="finite and not negative"):
        ranks.allocate([1, math.nan], [9, 9], 15, [1, 1], [1, 1])


def test_one_threshold_over_all_matrices():
    assert ranks.above_threshold([[0.7, 0.2, 0.1], [0.5, 0.5]], 3) == [1, 2]
    assert ranks.above_threshold([[1.0], [0.0, 0.0]], 2) == [1, 1]


class Told:
    """Measurements that are known beforehand."""

    def __init__(self, gradients, inputs=()):
        self.values, self.inputs, self.asked = gradients, inputs, None

    def gradients(self, names, samples, length, recall):
        self.asked = (samples, length, recall)
        return {name: self.values[name] for name in names}

    def dense_inputs(self, names):
        return iter(self.inputs)


def stack(count=2, heads=3, rows=16):
    return [
        Projection(f"layers.{i}.self_attn.{leaf}", part, heads, (heads * rows, 64))
        for i in range(count)
        for leaf, part in (("k_proj", "key"), ("v_proj", "value"))
    ]


def test_ranks_by_gradients_meet_the_budget():
    method, units = registry.get("recalkv"), stack()
    told = Told({unit.name: GradientStats(1.0 + (unit.part == "value"), torch.eye(48).double()) for unit in units})
    chosen = config(
        key_group_size=0,
        rank_allocation="fisher_uniform",
        gradient_samples=3,
        gradient_length=7,
        recall=0.5,
        calibration=["text"],  # not read here: a second moment is told
    )
    found = method.allocate(units, chosen, told)
    assert told.asked == (3, 7, 0.5)
    assert found == {unit.name: 32 if unit.part == "value" else 16 for unit in units}
    assert sum(found.values()) == 0.5 * 4 * 48
    by_eights = method.allocate(units, dataclasses.replace(chosen, rank_multiple=0), told)
    assert all(rank % 8 == 0 for rank in by_eights.values())
    lifted = method.allocate(units, dataclasses.replace(chosen, min_rank=20), told)
    assert min(lifted.values()) == 20
    assert sum(lifted.values()) <= 96
    assert method.allocate(units, dataclasses.replace(chosen, rank_allocation="uniform"), told) == {}
    assert method.allocate(units, dataclasses.replace(chosen, layers=found), told) == {}


def test_ranks_by_energy_are_one_threshold():
    torch.manual_seed(0)
    units = stack(1)
    inputs = []
    for unit, decay in zip(units, (-2, 0), strict=True):  # the keys' energy lies in few directions
        scale = torch.logspace(0, decay, 48)[:, None]
        stats = LinearStats(unit.name, 64)
        stats.update(torch.randn(1, 500, 64))
        inputs.append((unit.name, torch.linalg.qr(torch.randn(64, 48)).Q.T * scale, stats))
    chosen = config(key_group_size=0, weighting="none")
    found = registry.get("recalkv").allocate(units, chosen, Told({}, inputs))
    assert sum(found.values()) == 48
    assert found[units[0].name] < 20 < found[units[1].name]
    # weighed by the loss, energies count as they are: keys that matter much more get more after all
    for weighting in ("loss", "loss_by_head"):
        weights = (1e4, 1.0)
        told = Told(
            {
                unit.name: GradientStats(0.0, torch.eye(48).double() * w)
                for unit, w in zip(units, weights, strict=True)
            },
            inputs,
        )
        weighed = registry.get("recalkv").allocate(units, config(key_group_size=0, weighting=weighting), told)
        assert sum(weighed.values()) == 48
        assert weighed[units[0].name] > 40
        assert told.asked == (16, 512, 0.25)


# Options ------------------------------------------------------------------------------------------------------------

CHANGES = {
    "ratio": {"ratio": 0.25},
    "key_group_size": {"key_group_size": 3},
    "grouping": {"grouping": "contiguous"},
    "whiten": {"whiten": False},
    "rank_multiple": {"rank_multiple": 4, "ratio": 0.7},
    "ocmf": {"ocmf": "sequential", "ocmf_for": "both"},
    "cross": {"ocmf": "cross", "ocmf_for": "both"},
    "damping": {"ocmf": "cross", "ocmf_for": "both", "damping": 0.5},
    "latent_bits": {"latent_bits": 4},
    "weighting": {"weighting": "none"},
    "by head": {"weighting": "loss_by_head"},
    "gradient_damping": {"gradient_damping": 1.0},
    "factor_dtype": {"factor_dtype": "float16"},
    "layers": {"layers": {"layers.0": 9}},
    "min_rank": {"min_rank": 3, "ratio": 0.4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_the_result(layer, name):
    weight, inputs = layer[0].float(), moments(layer, weighed=True)
    before = {"ratio": CHANGES[name].get("ratio", 0.5)} if name in ("rank_multiple", "min_rank") else {}
    if name == "damping":
        before = {"ocmf": "cross", "ocmf_for": "both"}
    if name == "min_rank":  # what it does to ranks under one budget is tested above
        with pytest.raises(ValueError, match="below the least"):
            factorize(weight, projection(), inputs, config(ratio=0.3, min_rank=3))
        return
    plain = factorize(weight, projection(), inputs, config(**before))
    other = factorize(weight, projection(), inputs, config(**CHANGES[name]))
    assert plain.spec != other.spec or not torch.equal(plain.down, other.down)


def test_options_of_values_and_of_grouping(layer):
    weight, inputs = layer[0].float(), moments(layer)
    values = projection("value", name="layers.0.self_attn.v_proj")

    def down(**options):
        return factorize(weight, values, inputs, config(**options)).down

    assert torch.equal(down(), down(key_group_size=3, grouping="cka"))  # those are for keys
    assert not torch.equal(down(), down(value_group_size=2))
    assert not torch.equal(down(), down(ocmf="sequential"))
    keys = factorize(weight, projection(), inputs, config())
    assert torch.equal(keys.down, factorize(weight, projection(), inputs, config(ocmf="sequential")).down)
    ragged = config(key_group_size=4, ragged_groups=True)
    assert [len(group) for group in group_heads(layer[0], inputs.dense, projection(), ragged)] == [4, 2]
    with pytest.raises(ValueError, match="key_group_size=4 does not divide its 6 heads; use one of 1, 2, 3, 6"):
        config(key_group_size=4).group_sizes(projection())


def test_what_each_calibration_is_best_at(layer):
    """Sequential fits the inputs that it was given; cross comes nearest to the dense outputs from the drifted ones."""
    weight, inputs = layer[0].float(), moments(layer)
    found = {
        ocmf: factorize(weight, projection(), inputs, config(ocmf=ocmf, ocmf_for="both", key_group_size=6))
        for ocmf in ("off", "sequential", "cross")
    }
    assert error(layer, found["off"]) < min(error(layer, found["sequential"]), error(layer, found["cross"]))
    drifted = {ocmf: error(layer, one, drifted=True) for ocmf, one in found.items()}
    assert drifted["cross"] < min(drifted["off"], drifted["sequential"])


def test_grouping_orders_of_error(layer):
    """One group loses least at the same total rank, then the best pairs, then the heads as they come."""
    weight, inputs = layer[0].float(), moments(layer)

    def lost(**options):
        return error(layer, factorize(weight, projection(), inputs, config(**options)))

    assert lost(key_group_size=6) < lost(grouping="energy") < lost(grouping="contiguous")
    assert lost() < lost(whiten=False)


def test_similarities_that_say_nothing_are_reported(layer, caplog):
    weight = layer[0].float()
    trace = []
    factorize(weight, projection(), Inputs(torch.eye(COLUMNS).double()), config(grouping="cka"), trace)
    assert trace[0]["similarity_spread"] > 0.02
    one = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    one[0, 0] = 1.0  # all heads see one direction: they are all alike
    with caplog.at_level("INFO"):
        factorize(weight, projection(), Inputs(one), config(grouping="cka"), trace)
    assert trace[1]["similarity_spread"] < 0.02
    assert "close to chance" in caplog.text


def test_rotation_spreads_latents_and_leaves_the_product(layer):
    weight, inputs = layer[0].float(), moments(layer)
    plain = factorize(weight, projection(), inputs, config(latent_bits=4, rotation=False, key_group_size=6))
    turned = factorize(weight, projection(), inputs, config(latent_bits=4, key_group_size=6))
    assert torch.allclose(plain.unpack(), turned.unpack(), atol=1e-5)

    def uneven(form):
        deviation = (layer[1].float() @ form.down.T).std(0)
        return float(deviation.max() / deviation.min())

    assert uneven(turned) < uneven(plain) / 3
    unrotated = factorize(weight, projection(), inputs, config(key_group_size=6))
    assert torch.equal(unrotated.down, plain.down)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_spread_latents_suffer_least_from_few_bits(layer, bits):
    """Coded as a cache does it: below factors that are mixed only, and these below those that are neither."""
    weight, x, _ = layer
    mixing = spreading(12)
    up, down = low_rank.truncate(weight, x.T @ x, 12)
    forms = [spread(up, down, x.T @ x), (up @ mixing.T, mixing @ down), (up, down)]
    found = []
    for left, right in forms:
        z = x @ right.T
        rounded = decode_rows(encode_rows(z.float(), [12], bits), [12], bits, torch.float32).double()
        found.append(float(((rounded - z) @ left.T).square().sum()))
    assert found == sorted(found)
    assert found[0] < 0.95 * found[1]


def test_scales_of_spread_latents_are_the_best_there_are(layer):
    """No other scales give less of ``Σ a² λ · Σ 1 / a²``, the noise that equal steps leave; it is ``(Σ √λ)²``."""
    weight, x, _ = layer
    up, down = low_rank.truncate(weight, x.T @ x, 12)
    turned = spread(up, down, x.T @ x)
    energies = low_rank.output_energies(weight, x.T @ x)[:12]

    def noise(left, right):
        return float((x @ right.T).square().sum() * left.square().sum())

    assert noise(*turned) == pytest.approx(float(energies.sqrt().sum() ** 2), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = 1 + 0.1 * torch.randn(12, generator=generator).double()
        best = energies.pow(-0.25) * other
        assert noise(up / best, best[:, None] * down) >= noise(*turned)
    none = spread(up, torch.zeros_like(down), x.T @ x)
    assert torch.isfinite(none[0]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 96])
def test_rotations_are_orthogonal_and_mix(size):
    matrix = spreading(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, spreading(size))
    if size > 1:
        assert float(matrix.abs().max()) < 1
    if size % 2 and size > 1:
        assert not torch.equal(matrix, spreading(size, seed=1))


# Refusals and degenerate cases --------------------------------------------------------------------------------------


def test_ratios_and_group_sizes_that_do_not_work_are_refused():
    check = registry.get("recalkv").check
    assert check(stack(), config(key_group_size=0)) == []
    small = check(stack(), ReCalKVConfig(calibration=None, ratio=0.05))
    assert small[0] == (
        "layers.0.self_attn.k_proj: ratio 0.05 leaves rank 2 of 48, below the least, 8; use a ratio of at least "
        "0.167, or a smaller rank_multiple"
    )
    assert len(small) == 4
    assert len(check(stack(), config(key_group_size=2))) == 2  # keys only: 3 heads
    assert "value_group_size=5 does not divide" in check(stack(), config(value_group_size=5, key_group_size=1))[0]
    outside = check(stack(), config(key_group_size=0, layers={"layers": 49}))
    assert outside[0] == "layers.0.self_attn.k_proj: layers gives it rank 49; it must be from 1 to 48"
    assert "in none of the blocks" in check(stack(), config(key_group_size=0, layers={"other": 4}))[0]
    for bad in ({"ratio": 0.0}, {"ratio": 1.5}, {"latent_bits": 5}, {"layers": {"a": 0}}, {"layers": {"a": 1.5}}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ReCalKVConfig(**bad)


def test_default_group_sizes_divide_the_heads():
    chosen = ReCalKVConfig()
    sizes = {heads: chosen.group_sizes(projection(heads=heads)) for heads in (1, 3, 4, 5, 6, 8, 9, 32)}
    assert {heads: found[0] for heads, found in sizes.items()} == {1: 1, 3: 3, 4: 4, 5: 1, 6: 3, 8: 4, 9: 3, 32: 4}
    assert all(sum(found) == heads for heads, found in sizes.items())
    assert chosen.group_sizes(projection("value", heads=32)) == [32]


def test_degenerate_inputs(layer):
    weight = layer[0].float()
    zero = Inputs(torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64))
    assert torch.equal(
        factorize(weight, projection(), zero, config()).down, factorize(weight, projection(), Inputs(), config()).down
    )
    found = factorize(torch.zeros_like(weight), projection(), moments(layer), config())
    assert not found.unpack().any()
    with pytest.raises(ValueError, match="k_proj: weight holds NaN"):
        factorize(weight * float("nan"), projection(), moments(layer), config())
    with pytest.raises(ValueError, match="k_proj: second moment holds NaN"):
        factorize(weight, projection(), Inputs(torch.full((COLUMNS, COLUMNS), math.inf)), config())
    before = weight.clone()
    factorize(weight, projection(), moments(layer), config())
    assert torch.equal(weight, before)


def test_the_papers_preset():
    paper = ReCalKVConfig.paper(ratio=0.3)
    assert (paper.grouping, paper.ocmf, paper.ratio) == ("cka", "sequential", 0.3)
    assert paper.streams == {"dense", "compressed"}
    assert ReCalKVConfig().streams == {"dense", "gradients"}
    assert ReCalKVConfig(ocmf="sequential", ocmf_for="both", weighting="none").streams == {"compressed"}
    assert paper.returning == 0
    assert ReCalKVConfig(ocmf="cross").streams == {"dense", "compressed", "cross", "gradients"}


def test_passages_return_only_where_gradients_are_taken():
    assert ReCalKVConfig.paper(recall=0.25).returning == 0.25
    assert ReCalKVConfig().returning == 0.25
    assert ReCalKVConfig(recall=0).returning == 0
    for options in ({"calibration": None}, {"weighting": "none"}):
        assert ReCalKVConfig(**options).recall is None  # the default stands in nobody's way
        assert ReCalKVConfig(recall=0.0, **options).recall == 0
        with pytest.raises(ValueError, match="recall is for gradients, and none are taken"):
            ReCalKVConfig(recall=0.25, **options)
    for recall in (-0.1, 0.91, math.nan, True, "0.25"):
        with pytest.raises(ValueError, match=r"recall must be None or from 0.0 to 0.9, got"):
            ReCalKVConfig(recall=recall)


def cost(layer, found, metric):
    """What an error of the outputs costs in a metric, ``Tr(F E G Eᵀ)``."""
    lost = layer[0] - found.unpack().double()
    return float(((metric @ lost) * (lost @ (layer[1].T @ layer[1]))).sum())


@pytest.mark.parametrize("part", ["key", "value"])
def test_weighed_factors_cost_the_loss_least(layer, part):
    """Against the definition, the best of rank r of ``F^½ W G^½``, and against all outputs alike."""
    metric = gradients() / gradients().diagonal().mean()
    damped = metric + 0.05 * float(torch.linalg.eigvalsh(metric).mean()) * torch.eye(HEADS * ROWS).double()
    options = {"key_group_size": 6, "factor_dtype": "float32"}
    inputs, weight = moments(layer, weighed=True), layer[0]
    found = factorize(weight, projection(part), inputs, config(**options))
    roots = [torch.linalg.cholesky(m) for m in (damped, layer[1].T @ layer[1])]
    left, values, right = torch.linalg.svd(roots[0].T @ weight @ roots[1], full_matrices=False)
    best = torch.linalg.solve(roots[0].T, (left[:, :12] * values[:12]) @ right[:12]) @ torch.linalg.inv(roots[1])
    assert torch.allclose(found.unpack().double(), best, atol=1e-4)
    alike = factorize(weight, projection(part), inputs, config(weighting="none", **options))
    by_head = factorize(weight, projection(part), inputs, config(weighting="loss_by_head", **options))
    assert cost(layer, found, damped) < cost(layer, by_head, damped) < cost(layer, alike, damped)
    assert error(layer, alike) < error(layer, found)


def test_weights_that_say_nothing_change_nothing(layer):
    plain = factorize(layer[0], projection(), moments(layer), config())
    for metric in (torch.zeros(HEADS * ROWS, HEADS * ROWS), 7.0 * torch.eye(HEADS * ROWS)):
        inputs = dataclasses.replace(moments(layer), gradients=metric.double())
        assert torch.allclose(factorize(layer[0], projection(), inputs, config()).unpack(), plain.unpack(), atol=1e-5)
    some = torch.zeros(HEADS * ROWS).double()
    some[: 3 * ROWS] = 1.0  # the loss looks at three heads only
    inputs = dataclasses.replace(moments(layer), gradients=some.diag())
    found = factorize(layer[0], projection(), inputs, config(grouping="contiguous"))
    assert torch.isfinite(found.unpack()).all()
    with pytest.raises(ValueError, match="second moment of its gradients holds NaN"):
        factorize(layer[0], projection(), dataclasses.replace(inputs, gradients=some.diag() / 0), config())


def test_statistics_of_both_streams_reach_the_algorithm(layer):
    """The record's ``compress`` scales the three moments alike."""
    weight, x, drifted = (part.float() for part in layer)
    pair = []
    for name, rows in (("dense", x), ("compressed", drifted)):
        stats = LinearStats(name, COLUMNS)
        stats.update(rows[None])
        pair.append(stats)
    unit = registry.LinearUnit("v_proj", weight, projection=projection("value", name="v_proj"))
    both = PairedStats(*pair, x.double().T @ drifted.double())
    found = registry.get("recalkv").compress(unit, both, config(ocmf="cross"))
    wanted = factorize(weight, projection("value", name="v_proj"), moments(layer), config(ocmf="cross"))
    assert torch.allclose(found.unpack(), wanted.unpack(), atol=1e-4)
    with pytest.raises(ValueError, match="q_proj: recalkv compresses key and value projections"):
        registry.get("recalkv").compress(registry.LinearUnit("q_proj", weight), None, config())
