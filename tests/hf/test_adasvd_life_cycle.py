"""Low-rank models through transformers: compress, save, load, generate, mix with other methods, resume."""

import functools
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_lowbit
from hf_lowbit import AdaSVDConfig, ARBConfig, LowBitRecipe, RunOptions, UnsupportedModelError, packed_modules
from hf_lowbit.compress.dense import DenseWeights
from hf_lowbit.compress.engine import Run
from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.save import save_model
from hf_lowbit.methods.adasvd.ratios import kept
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import inspection_tables
from hf_lowbit.report.verify import verify
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model, tokens


def small(**changes):
    quiet = RunOptions(progress=False, batch_size=2)
    return AdaSVDConfig(**{"calibration": tokens(8), "samples": 8, "ratio": 0.6, "run": quiet, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Four blocks of which the first changes its input most, so that ratios differ."""
    folder = tmp_path_factory.mktemp("low-rank") / "dense"
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight *= 0.1 if i else 30.0
    model.save_pretrained(folder)
    return folder


def compress(dense, config):
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def saved(model, folder):
    save_model(model, folder)
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


def test_compress_save_load_generate(dense, tmp_path):
    model = compress(dense, small())
    ratios = model.config.quantization_config.layers
    assert list(ratios) == [f"model.layers.{i}" for i in range(4)]
    assert len({round(share, 3) for share in ratios.values()}) > 1
    layers = packed_modules(model)
    shapes = [
        [(layer.out_features, layer.in_features) for name, layer in layers.items() if name.startswith(f"{block}.")]
        for block in ratios
    ]
    budget = 0.6 * sum(n * m for block in shapes for n, m in block)
    held = sum(layer.packed.nbytes for layer in layers.values()) / 4  # numbers in float32
    assert held == sum(kept(block, share, 1) for block, share in zip(shapes, ratios.values(), strict=True))
    assert 0 <= budget - held < 2 * (64 + 96)
    first = saved(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generate(tokens(1, 4), max_new_tokens=4, do_sample=False).shape == (1, 8)
    assert saved(loaded, tmp_path / "again") == first
    restored = loaded.dequantize()
    assert not packed_modules(restored)
    assert torch.allclose(logits(restored), logits(model), atol=1e-4)


def test_layers_are_compressed_on_what_those_before_them_produce(dense):
    """Each group of a block, in the order in which it runs, on the compressed outputs; or all on the dense ones."""
    calls = {}
    for sequential in (True, False):
        seen = []
        own = Run._replace

        def watch(self, names, stats, own=own, seen=seen):
            tokens_of = {name: one.tokens for name, one in stats.items()}
            cross = {name: one.cross - one.seen.total for name, one in stats.items()}
            seen.append((names, tokens_of, cross))
            return own(self, names, stats)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_replace", watch)
            compress(dense, small(sequential=sequential))
        calls[sequential] = seen
    assert [len(names) for names, _, _ in calls[True]] == [3, 1, 2, 1] * 4
    assert [len(names) for names, _, _ in calls[False]] == [7] * 4
    assert all(count == 8 * 24 for seen in calls.values() for _, own, _ in seen for count in own.values())
    # in the first block dense and compressed inputs are the same, unless layers before are compressed already
    first = [max(float(gap.abs().max()) for gap in cross.values()) for _, _, cross in calls[True][:4]]
    assert first[0] < 1e-3 < min(first[1:])
    together = {name: float(gap.abs().max()) for name, gap in calls[False][0][2].items()}
    assert max(together.values()) < 1e-3


def test_stacked_samples_reach_the_refits(dense):
    """As many buckets as samples: the same second moment, in another order; fewer: other factors."""
    models = [compress(dense, small(buckets=buckets, iterations=2)) for buckets in (0, 8, 2)]
    weights = [packed_modules(m)["model.layers.1.mlp.down_proj"].packed.unpack() for m in models]
    assert torch.allclose(weights[0], weights[1], atol=1e-3 * float(weights[0].abs().max()))
    assert float((weights[2] - weights[0]).norm() / weights[0].norm()) > 0.01


def test_inspect_shows_the_rank_of_every_layer(dense, tmp_path):
    save_model(compress(dense, small(factor_dtype="bfloat16")), tmp_path / "packed")
    found = inspect(tmp_path / "packed")
    assert all(module.highlights == f"dtype bfloat16, rank {module.spec['rank']}" for module in found.modules)
    cells = list(inspection_tables(found, layers=True)[2].columns[3].cells)
    assert cells == [module.highlights for module in found.modules]
    assert found.total_bytes == sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())


HELD = {
    "int8": {"factors": "int8"},
    "int4": {"factors": "int4", "factor_group": 32},
    "signs": {"factors": ARBConfig(iterations=2, x_iterations=2, quantiles=9, max_salient_per_block=4)},
}


@pytest.mark.parametrize("kind", HELD)
def test_factors_in_another_format(dense, tmp_path, kind):
    """All of the life of such a model, journal and checksums included; no layer stays dense beside small factors."""
    journal = tmp_path / "journal"
    runs = [RunOptions(progress=False, batch_size=2, journal=journal, resume=resume) for resume in (False, True)]
    model = compress(dense, small(run=runs[0], **HELD[kind]))
    config = model.config.quantization_config
    assert len(config.modules) == len(packed_modules(model)) == 28
    assert max(config.layers.values()) < 1
    first = saved(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert saved(loaded, tmp_path / "again") == first
    assert saved(compress(dense, small(run=runs[1], **HELD[kind])), tmp_path / "resumed") == first
    assert torch.allclose(logits(loaded.dequantize()), logits(model), atol=1e-3)
    found = inspect(tmp_path / "packed")
    layers = packed_modules(model)
    assert sum(module.bytes for module in found.modules) == sum(layer.packed.nbytes for layer in layers.values())
    shown = {"int8": "down integer (bits 8, group size 64)", "int4": "down integer (group size 32)"}
    assert all(shown.get(kind, "down binary (") in module.highlights for module in found.modules)
    assert verify(tmp_path / "packed").problems == ()
    file = tmp_path / "packed" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_layers_that_would_gain_nothing_stay_dense(dense, tmp_path, caplog):
    """A block at ratio 1, given beforehand; its weights stay as they are, also when the run is resumed."""
    ratios = {f"model.layers.{i}": share for i, share in enumerate((1.0, 0.5, 0.5, 0.4))}
    journal = tmp_path / "journal"
    runs = [RunOptions(progress=False, batch_size=2, journal=journal, resume=resume) for resume in (False, True)]
    with caplog.at_level("INFO"):
        model = compress(dense, small(layers=ratios, run=runs[0]))
    assert "model.layers.0.mlp.up_proj stays dense: factors would save nothing at ratio 1" in caplog.text
    config = model.config.quantization_config
    left = [name for name, reason in config.left_dense.items() if "save nothing" in reason]
    assert len(left) == 7
    assert all(name.startswith("model.layers.0.") and name not in config.modules for name in left)
    assert len(config.modules) == len(packed_modules(model)) == 21
    original = AutoModelForCausalLM.from_pretrained(dense)
    for name in left:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, original.get_submodule(name).weight)
    first = saved(model, tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))
    assert saved(compress(dense, small(layers=ratios, run=runs[1])), tmp_path / "resumed") == first
    assert "save nothing" in json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"][
        "left_dense"
    ].get("model.layers.0.mlp.up_proj")


def test_a_run_that_was_killed_goes_on_with_the_same_bytes(dense, tmp_path, monkeypatch):
    want = saved(compress(dense, small()), tmp_path / "whole")
    journal = tmp_path / "journal"
    run = RunOptions(progress=False, batch_size=2, journal=journal)
    own = Run._replace
    calls = []

    def killed(self, names, stats):
        calls.append(names)
        if len(calls) == 10:  # in the middle of a block
            raise KeyboardInterrupt
        return own(self, names, stats)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, small(run=run))
    run = RunOptions(progress=False, batch_size=2, journal=journal, resume=True)
    assert saved(compress(dense, small(run=run)), tmp_path / "resumed") == want


@pytest.mark.parametrize("calibration", [None, tokens(8)], ids=["no data", "tokens"])
@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"layers": {f"model.layers.{i}": 1.0 for i in range(4)}}], ids=["ratio", "layers"]
)
def test_a_run_that_would_compress_nothing_is_refused_before_the_work(dense, calibration, options, monkeypatch):
    def too_late(*arguments):
        raise AssertionError("weights are read, or inputs gathered")

    monkeypatch.setattr(DenseWeights, "check", too_late)
    with pytest.raises(UnsupportedModelError, match=r"all stay dense .*factors would save nothing at ratio 1"):
        compress(dense, small(calibration=calibration, **options))


@pytest.mark.parametrize("calibration", [None, tokens(8)], ids=["no data", "tokens"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_experts_at_ratio_one_go_back_into_their_parameter(architecture, calibration, tmp_path):
    """A block at ratio 1 keeps its experts as the dense model has them, in memory, on disk and loaded again."""
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    layers = {"model.layers.0": 1.0, "model.layers.1": 0.4}
    model = compress(tmp_path / "dense", small(calibration=calibration, layers=layers))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for leaf in ("gate_up_proj", "down_proj"):
        kept_whole = getattr(model.model.layers[0].mlp.experts, leaf)
        assert torch.equal(kept_whole, getattr(original.model.layers[0].mlp.experts, leaf))
        reason = model.config.quantization_config.left_dense[f"model.layers.0.mlp.experts.{leaf}"]
        assert "save nothing" in reason
        assert f"model.layers.1.mlp.experts.each_{leaf}.3" in model.config.quantization_config.modules
    assert not any(".each_" in name for name in model.config.quantization_config.left_dense)
    save_model(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert inspect(tmp_path / "packed").total_bytes
    whole = tiny_model(architecture)
    hf_lowbit.quantize(whole, small(calibration=calibration, layers=layers))
    assert torch.allclose(logits(whole), logits(model), atol=1e-4)


def test_without_data(dense, tmp_path):
    model = compress(dense, small(calibration=None))
    assert model.config.quantization_config.layers is None
    weight = AutoModelForCausalLM.from_pretrained(dense).model.layers[1].mlp.up_proj.weight.detach()
    layer = model.model.layers[1].mlp.up_proj
    rank = layer.spec.rank
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    want = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert torch.allclose(layer.packed.unpack().double(), want, atol=1e-5)
    save_model(model, tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


def test_mixed_with_one_bit(dense, tmp_path):
    arb = functools.partial(quick, calibration=tokens(8), samples=8, run=RunOptions())
    rules = {"*.mlp": small(run=RunOptions()), "*": arb()}
    config = LowBitRecipe(rules, skip=["model.layers.3"], run=RunOptions(progress=False, batch_size=2))
    model = compress(dense, config)
    formats = {name: layer.format_type.name for name, layer in packed_modules(model).items()}
    assert len(formats) == 21
    assert all((kind == "low_rank") == (".mlp." in name) for name, kind in formats.items())
    (_, low_rank), (_, one_bit) = model.config.quantization_config.rules
    assert isinstance(one_bit, ARBConfig)
    assert len(low_rank.layers) == 3
    save_model(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generate(tokens(1, 4), max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "llama-bias"])
def test_other_layers(architecture, tmp_path):
    """Transposed weights, experts in one parameter, biases."""
    model = tiny_model(architecture)
    hf_lowbit.quantize(model, small(ratio=0.5))
    save_model(model, tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))
