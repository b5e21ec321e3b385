"""Errors on layers of the real model against figures that were measured independently, on English manual text.

The text of those figures is not to be had; Python's own language manual (``pydoc_data``) is of the same kind. How far
the inputs of a layer differ between the two limits what can be asked.
"""

import pytest

from hf_lowbit import ARBConfig
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.methods.arb.algorithm import quantize
from tests.methods.real import block_15

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VARIANTS = {
    "billm reference": {"variant": "billm", "compensation": "reference"},
    "billm": {"variant": "billm"},
    "arb": {"variant": "arb", "column_group_bitmap": False},
    "x": {"variant": "x"},
    "rc reference": {"variant": "rc", "compensation": "reference"},
    "rc": {"variant": "rc"},
}
# block 15: relative squared error of weights and of outputs, 32 x 512 tokens, 41 quantiles
KNOWN = {
    "q_proj": [(0.253, 0.0225), (0.260, 0.0205), (0.224, 0.0171), (0.227, 0.0170), (0.217, 0.0186), (0.222, 0.0170)],
    "k_proj": [(0.250, 0.0176), (0.257, 0.0160), (0.219, 0.0131), (0.221, 0.0129), (0.209, 0.0143), (0.215, 0.0128)],
    "gate_proj": [
        (0.247, 0.0503),
        (0.253, 0.0455),
        (0.217, 0.0383),
        (0.221, 0.0381),
        (0.214, 0.0427),
        (0.219, 0.0386),
    ],
    "down_proj": [
        (0.311, 0.1073),
        (0.316, 0.1013),
        (0.272, 0.0805),
        (0.266, 0.0724),
        (0.242, 0.0665),
        (0.244, 0.0627),
    ],
}


@pytest.fixture(scope="module")
def layers(smollm2_path):
    """The linears of block 15 with the statistics of their inputs."""
    return block_15(smollm2_path)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=list(VARIANTS))
@pytest.mark.parametrize("kind", KNOWN)
def test_errors_of_real_layers(layers, kind, number):
    weight, stats = layers[kind]
    config = ARBConfig(quantiles=41, **list(VARIANTS.values())[number])
    packed = quantize(weight, stats.second_moment(), config, kind)
    errors = relative_errors(weight, packed.unpack(), stats)
    # The inputs of queries and keys depend little on the text, those of the feed-forward layers more: on other windows
    # of the same manual the output error of down_proj varies by a tenth.
    weights, outputs = {"gate_proj": (0.05, 0.10), "down_proj": (0.07, 0.12)}.get(kind, (0.05, 0.05))
    assert errors["weight_error"] == pytest.approx(KNOWN[kind][number][0], rel=weights)
    assert errors["output_error"] == pytest.approx(KNOWN[kind][number][1], rel=outputs)
