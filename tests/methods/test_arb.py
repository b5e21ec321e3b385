"""The package's ARB-LLM against the float64 oracle, and what it promises beyond the oracle."""

import dataclasses
import itertools

import arb_oracle as oracle
import numpy as np
import pytest
import torch

from hf_lowbit import ARBConfig
from hf_lowbit.methods.arb.algorithm import pack, quantize, quantize_blocks
from hf_lowbit.numerics import binary, partition

CASES = [
    ("billm", False, 1),
    ("arb", False, 1),
    ("arb", True, 1),
    ("x", False, 1),
    ("x", True, 1),
    ("rc", False, 1),
    ("rc", True, 1),
    ("rc", False, 3),
    ("x", False, 2),
]


def layer(rows=24, columns=144, seed=0):
    """A heavy-tailed weight and the Gram matrix of correlated inputs, float64.

    The weights are large, so that the small constants which the oracle adds to denominators do not show.
    """
    rng = np.random.default_rng(seed)
    weight = 20 * rng.standard_t(3, (rows, columns)) * np.exp(0.5 * rng.normal(size=columns))
    inputs = rng.normal(size=(400, columns)) @ (np.eye(columns) + 0.2 * rng.normal(size=(columns, columns)))
    return weight, inputs.T @ inputs / 400


def options(**changes):
    small = {"block_size": 64, "quantiles": 11, "max_salient_per_block": 20, "scale_dtype": "float32"}
    return ARBConfig(**{**small, **changes})


@pytest.mark.parametrize("compensation", ["exact", "reference", "none"])
@pytest.mark.parametrize(("variant", "cgb", "splits"), CASES)
def test_layer_equals_oracle(variant, cgb, splits, compensation):
    weight, moment = layer()
    config = options(variant=variant, column_group_bitmap=cgb, group_splits=splits, compensation=compensation)
    expected, info = oracle.quantize_layer(
        weight, moment, variant, 64, cgb, compensation, quantiles=11, max_salient=20, num_p=splits,
        round_scales=np.float32,
    )  # fmt: skip
    blocks, quantized = quantize_blocks(torch.tensor(weight), torch.tensor(moment), config, "layer")
    for block, known in zip(blocks, info, strict=True):
        assert (block.salient + block.start).tolist() == known["salient"].tolist()
    # Same decisions in float64; scales are rounded to float32, where the two may fall on either side of a tie: 1e-6.
    np.testing.assert_allclose(quantized.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
def test_saliency_metric_equals_oracle(metric):
    weight, moment = layer(seed=3)
    expected, _ = oracle.quantize_layer(
        weight, moment, "rc", 64, quantiles=11, max_salient=20, salient_metric=metric, round_scales=np.float32
    )
    config = options(salient_metric=metric)
    _, quantized = quantize_blocks(torch.tensor(weight), torch.tensor(moment), config, "layer")
    np.testing.assert_allclose(quantized.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(weight).max())


def test_rounding_equals_oracle():
    weight, _ = layer()
    _, quantized = quantize_blocks(torch.tensor(weight), None, options(variant="rtn", calibration=None), "layer")
    np.testing.assert_allclose(quantized.numpy(), oracle.rtn(weight, 64), rtol=1e-6)


def relative(weight, quantized, moment):
    return oracle.relative_errors(weight.numpy(), quantized.double().numpy(), moment.numpy())


@pytest.fixture(scope="module")
def synthetic():
    weight, _, moment = oracle.synthetic()
    return torch.tensor(weight), torch.tensor(moment)


# relative weight / output error of the method's specification for the synthetic 768 x 768 layer
PUBLISHED = {
    ("billm", False, "reference"): (0.4161, 0.1518),
    ("billm", False, "exact"): (0.4091, 0.1495),
    ("arb", False, "exact"): (0.3533, 0.1305),
    ("x", False, "exact"): (0.3277, 0.0732),
    ("x", True, "exact"): (0.3225, 0.0716),
    ("rc", False, "none"): (0.2021, 0.0825),
    ("rc", False, "exact"): (0.2791, 0.0659),
    ("rc", True, "none"): (0.1979, 0.0765),
    ("rc", True, "reference"): (0.2702, 0.0629),
    ("rc", True, "exact"): (0.2668, 0.0619),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "-".join(map(str, case)))
def test_synthetic_layer_reproduces_the_known_errors(synthetic, case):
    weight, moment = synthetic
    variant, cgb, compensation = case
    config = ARBConfig(variant=variant, column_group_bitmap=cgb, compensation=compensation)
    packed = quantize(weight.float(), moment.float(), config, "layer")
    found = relative(weight, packed.unpack(), moment)
    assert found == pytest.approx(PUBLISHED[case], rel=0.02)
    assert 0.03 < packed.spec.salient / 768 < 0.05  # the specification finds 0.039 to 0.040


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("variant", "cgb", "splits"), [*CASES, ("rtn", False, 1)])
@pytest.mark.parametrize("shape", [(1, 40), (5, 72), (7, 130), (3, 129), (4, 33), (2, 1)])
def test_unpack_is_what_compensation_saw(variant, cgb, splits, shape, dtype):
    weight, moment = layer(*shape)
    config = options(variant=variant, column_group_bitmap=cgb, group_splits=splits, scale_dtype=dtype, iterations=3)
    moment = torch.tensor(moment).float()
    blocks, quantized = quantize_blocks(torch.tensor(weight).float(), moment, config, "layer")
    packed = pack(blocks, shape[1], config)
    assert torch.equal(packed.unpack(), quantized)
    assert torch.isfinite(quantized).all()


@pytest.mark.parametrize("variant", ["rc", "x", "arb", "billm", "rtn"])
def test_degenerate_weights(variant):
    """Zero rows and columns, constant rows, a dead input column: finite, and what is representable is exact."""
    weight, moment = layer(8, 96)
    weight[1] = 0
    weight[2] = 0.25
    weight[:, 5] = 0
    moment[7] = moment[:, 7] = 0
    config = options(variant=variant, compensation="none")
    found = quantize(torch.tensor(weight).float(), torch.tensor(moment).float(), config, "layer").unpack()
    assert torch.isfinite(found).all()
    assert found[1].abs().max() < 1e-6
    if variant != "rc":  # a column scale is shared with rows that are not constant
        others = torch.arange(96) != 5
        torch.testing.assert_close(found[2, others], torch.full((95,), 0.25), rtol=0.35, atol=0)
    dead = torch.tensor(weight[:, 7]).float()
    assert ((found[:, 7] - dead).norm() / dead.norm()) < 1  # a column without inputs is approximated, not dropped


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fit", ["alternating", "row_column", "alternating_on_inputs"])
def test_no_iteration_raises_the_error(fit, order):
    weight, moment = map(torch.tensor, layer(32, 64))
    mask = weight.abs() > weight.abs().median()
    trace: list[float] = []
    if fit == "alternating_on_inputs":
        binary.alternating_on_inputs(weight, mask, moment, order, 5, 15, trace)
    else:
        getattr(binary, fit)(weight, mask, order, 15, trace)
    assert len(trace) == 16
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(trace))
    assert trace[-1] < trace[0]


def test_quick_search_equals_plain_search():
    saliency = torch.tensor(layer(40, 96)[0]).square()
    candidates = partition.quantiles(saliency, torch.linspace(0.1, 0.9, 33))
    quick = partition.split_by_magnitude(saliency, candidates, order=1)
    plain = partition.split_by_magnitude(saliency, candidates, 1, among=torch.ones_like(saliency, dtype=torch.bool))
    assert torch.equal(quick, plain)


def test_quick_judged_search_equals_plain_search():
    weight, moment = (torch.tensor(part) for part in layer(40, 96))
    saliency, salient = weight.square(), torch.tensor([3, 40, 41, 90])
    plain = torch.tensor([i for i in range(96) if i not in salient.tolist()])
    left = torch.ones_like(saliency, dtype=torch.bool)
    left[:, salient] = False
    candidates = partition.quantiles(saliency * left, torch.linspace(0.1, 0.9, 33))
    rest = partition.split_residual(saliency, (~left,), order=2)
    expected = partition.split_by_magnitude(saliency, candidates, 1, left, moment, rest)
    assert torch.equal(partition.plain_groups(saliency, plain, 1, 33, moment).bool(), expected[:, plain])


def test_quantiles_interpolate_like_numpy():
    values = torch.randn(7, 13, dtype=torch.float64)
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    np.testing.assert_allclose(partition.quantiles(values, levels), np.quantile(values.numpy(), levels.numpy()))


def test_input_is_untouched_and_result_is_deterministic():
    weight, moment = (torch.tensor(part).float() for part in layer())
    copies = weight.clone(), moment.clone()
    first, second = (quantize(weight, moment, options(), "layer") for _ in range(2))
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"variant": "x"}, {"variant": "rc"}),
        ({"block_size": 32}, {}),
        ({"iterations": 1}, {}),
        ({"variant": "x", "x_iterations": 1}, {"variant": "x"}),
        ({"column_group_bitmap": False}, {}),
        ({"group_splits": 3}, {}),
        ({"salient_metric": "magnitude"}, {}),
        ({"max_salient_per_block": 3}, {}),
        ({"quantiles": 2}, {}),
        ({"damping": 0.5}, {}),
        ({"compensation": "none"}, {}),
        ({"scale_dtype": "float16"}, {}),
    ],
)
def test_each_option_changes_the_result(change, other):
    weight, moment = (torch.tensor(part).float() for part in layer())
    dense = [quantize(weight, moment, options(**kind), "layer").unpack() for kind in (change, other)]
    assert not torch.equal(*dense)


def test_refusals_name_the_layer():
    weight, moment = (torch.tensor(part).float() for part in layer(4, 40))
    broken = weight.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"block\.q_proj: weight holds NaN"):
        quantize(broken, moment, options(), "block.q_proj")
    with pytest.raises(ValueError, match=r"block\.q_proj: second moment holds NaN"):
        quantize(weight, moment * float("inf"), options(), "block.q_proj")
    with pytest.raises(ValueError, match=r"block\.q_proj: second moment has shape \(39, 39\)"):
        quantize(weight, moment[1:, 1:], options(), "block.q_proj")
    with pytest.raises(ValueError, match=r"block\.q_proj: weight must be a floating-point matrix"):
        quantize(weight.int(), moment, options(), "block.q_proj")


@pytest.mark.parametrize("variant", ["rc", "x", "arb", "billm", "rtn"])
def test_result_scales_with_the_weights(variant):
    """Small weights are treated like large ones; a power of two changes no rounding."""
    weight, moment = (torch.tensor(part).float() for part in layer())
    config = options(variant=variant)
    small = quantize(weight * 2.0**-20, moment * 2.0**-10, config, "layer").unpack()
    assert torch.equal(small, quantize(weight, moment, config, "layer").unpack() * 2.0**-20)


def test_overflow_names_the_layer():
    """Weights beyond float16, and weights whose saliency overflows float32."""
    weight, moment = (torch.tensor(part).float() for part in layer())
    with pytest.raises(ValueError, match=r"block\.q_proj: a scale leaves the range of float16"):
        quantize(weight * 1e5, moment, options(scale_dtype="float16"), "block.q_proj")
    with pytest.raises(ValueError, match=r"block\.q_proj: no candidate of the search has a finite error"):
        quantize(weight * 1e25, moment, options(), "block.q_proj")


def test_singular_second_moment_is_damped():
    """Fewer tokens than columns: still positive definite after damping, result finite."""
    weight, _ = layer(6, 96)
    inputs = torch.randn(3, 96)
    packed = quantize(torch.tensor(weight).float(), inputs.T @ inputs, options(), "layer")
    assert torch.isfinite(packed.unpack()).all()


def test_stored_bits_match_the_formula_up_to_padding():
    """The bits of the storage formula, plus what 128-column planes pad and 31 extra bits per salient column index."""
    weight, moment = (torch.tensor(part).float() for part in layer(16, 256))
    for variant, cgb in [("billm", False), ("x", False), ("x", True), ("rc", False), ("rc", True)]:
        config = dataclasses.replace(
            options(variant=variant, column_group_bitmap=cgb), block_size=128, scale_dtype="float16"
        )
        packed = quantize(weight, moment, config, "layer")
        salient = packed.spec.salient
        formula = oracle.stored_bits(16, 256, salient, 128, variant, cgb)
        padding = 16 * (-salient % 128)
        index = 32 * salient - 256  # int32 indices instead of one bit per column
        if variant == "rc" and not cgb:
            # column scales of the second plane; the formula counts one set, 33 m = m + 2 · 16 m, and none of these
            index += 16 * salient
        assert 8 * packed.nbytes == formula + padding + index
