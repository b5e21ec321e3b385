"""Every form of packed layer has a line in ``hf-lowbit bench``: none is left out in silence."""

import pytest
import torch

from hf_lowbit import AdaSVDConfig, ARBConfig, LowBitRecipe, packed_modules, quantize
from hf_lowbit.hf.save import save_model
from hf_lowbit.kernels import low_rank
from hf_lowbit.report import bench
from tests.tiny import tiny_model

RULES = {
    "*.q_proj": AdaSVDConfig(calibration=None, factors=ARBConfig(variant="rtn")),
    "*.self_attn": AdaSVDConfig(calibration=None, factors="int8"),
    "*.up_proj": ARBConfig(variant="rtn", calibration=None),
    "*": AdaSVDConfig(calibration=None, ratio=0.5),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_model()
    quantize(model, LowBitRecipe(RULES))
    return save_model(model, tmp_path_factory.mktemp("bench") / "mixed"), model


def test_every_kind_of_layer_is_listed(saved):
    kinds = bench.layer_kinds(saved[0])
    assert sum(int(kind.split(" ")[0]) for kind in kinds) == len(packed_modules(saved[1])) == 14
    assert "2 × (64 × 96, low_rank, rank 19)" in kinds
    text = {kind: set(bench.kernels_of(spec, torch.bfloat16, "cpu")) for kind, spec in kinds.items()}
    assert {"cpu", "triton", "reference", "as the factors"} <= set().union(*text.values())
    assert any(set(names) == set(low_rank.TABLE.kernels) for names in text.values())
    table = bench.kernel_table(saved[0], "cpu")
    assert {cell.partition(" × ")[0] for cell in table.columns[0].cells} == {"2", "4"}


def test_every_kind_of_layer_is_measured(saved):
    table = bench.speed_table(saved[0], (1, 2), 0.01)
    assert table.row_count == 2 * len(bench.layer_kinds(saved[0]))
    for layer in packed_modules(saved[1]).values():
        made = bench.random_format(layer.spec)
        made.validate("random")
        assert made.nbytes == layer.packed.nbytes
