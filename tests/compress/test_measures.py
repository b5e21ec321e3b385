"""What is measured of dense blocks one at a time, against hooks and gradients of the whole model in memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

import hf_lowbit
from hf_lowbit import CalibrationError, ReCalKVConfig, RunOptions, UnsupportedModelError
from hf_lowbit.calibration.recall import with_returns
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.measures import StackMeasures
from tests.tiny import tiny_model, tokens

TEXT = tokens(6, 20)


def config(**changes):
    quiet = RunOptions(progress=False, batch_size=4)
    return ReCalKVConfig(**{"calibration": TEXT, "samples": 6, "rank_multiple": 4, "run": quiet, **changes})


def measures_of(model):
    run = Run(model, config())
    return StackMeasures(run, run.stacks[0], run.batches), list(run.targets.methods)


def by_autograd(model, names, samples, length):
    """Squares of weight gradients and products of output gradients, from the whole model at once."""
    squares, products, outputs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), {}
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(True)
        handles.append(layer.register_forward_hook(lambda _m, _a, out, name=name: outputs.__setitem__(name, out)))
    for row in TEXT[:samples, :length]:
        logits = model(input_ids=row[None], use_cache=False).logits
        weights = [model.get_submodule(name).weight for name in names]
        loss = cross_entropy(logits[0, :-1], row[1:])
        found = torch.autograd.grad(loss, [*weights, *(outputs[name] for name in names)])
        for i, name in enumerate(names):
            squares[name] = squares[name] + found[i].double().square() / samples
            rows = found[len(names) + i][0].double()
            products[name] = products[name] + rows.T @ rows / samples
    for handle in handles:
        handle.remove()
    return {name: float(square.sqrt().mean()) for name, square in squares.items()}, products


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "gemma3", "opt"])
def test_gradients_block_by_block_are_those_of_the_whole_model(architecture):
    model = tiny_model(
        architecture, num_hidden_layers=3, **({"layer_types": None} if architecture == "gemma3" else {})
    )
    model.requires_grad_(False)
    measures, names = measures_of(model)
    with torch.no_grad():  # as in a run
        found = measures.gradients(names, 3, 16)
    fisher, products = by_autograd(model, names, 3, 16)
    for name in names:
        assert found[name].fisher == pytest.approx(fisher[name], rel=1e-3)
        difference = (found[name].second_moment - products[name]).norm() / products[name].norm()
        assert float(difference) < 1e-4  # float32, other order of sums
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_passages_return_in_what_gradients_are_taken_of():
    model = tiny_model().requires_grad_(False)
    run = Run(model, config())
    names = list(run.targets.methods)
    with torch.no_grad():
        found = StackMeasures(run, run.stacks[0], run.batches).gradients(names, 6, 20, 0.5)
        run.batches = [torch.stack([with_returns(row, 0.5) for row in batch]) for batch in run.batches]
        expected = StackMeasures(run, run.stacks[0], run.batches).gradients(names, 6, 20)
    for name in names:
        assert torch.equal(found[name].second_moment, expected[name].second_moment)


def test_gradients_are_measured_once_and_nothing_is_left_behind(monkeypatch):
    model = tiny_model().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    measures, names = measures_of(model)
    calls = []
    original = StackMeasures._measured_gradients
    monkeypatch.setattr(StackMeasures, "_measured_gradients", lambda *a: calls.append(a) or original(*a))
    with torch.no_grad():
        first = measures.gradients(names, 2, 8)
        assert measures.gradients(names, 2, 8) is first
        assert measures.gradients(names, 3, 8) is not first
        assert measures.gradients(names, 2, 8, 0.5) is not first
    assert len(calls) == 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_streamed_gradients_hold_one_dense_block_at_a_time(tmp_path, monkeypatch):
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    most = []
    original = StackMeasures.gradients

    def look(self, names, samples, length, recall):
        found = original(self, names, samples, length, recall)
        weights = [self._run.model.get_submodule(name).weight.numel() for name in names]
        most.append(sum(size > 1 for size in weights))
        return found

    monkeypatch.setattr(StackMeasures, "gradients", look)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config())
    assert most and max(most) == 0  # all are stubs again
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    hf_lowbit.quantize(model, config())
    assert model.config.quantization_config.layers == streamed.config.quantization_config.layers


def test_inputs_of_the_dense_model():
    model = tiny_model(num_hidden_layers=3)
    measures, names = measures_of(model)
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        model(input_ids=TEXT)
        expected = {name: torch.cat(rows).T @ torch.cat(rows) for name, rows in seen.items()}
        found = {name: (weight, stats.total.clone()) for name, weight, stats in measures.dense_inputs(names)}
    assert list(found) == names
    for name, (weight, total) in found.items():
        assert torch.equal(weight, model.get_submodule(name).weight)
        assert torch.allclose(total, expected[name], rtol=1e-4, atol=1e-4)


def test_models_without_a_head_and_gradients_that_blow_up_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="gradients need a model that predicts tokens"):
        hf_lowbit.quantize(AutoModel.from_pretrained(tmp_path / "dense"), config())
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(CalibrationError, match=r"layers\.\d\.self_attn\.._proj: "):
        hf_lowbit.quantize(model, config())


@pytest.mark.parametrize("change", [{"gradient_samples": 1}, {"gradient_length": 5}, {"recall": 0.5}], ids=str)
def test_what_gradients_are_taken_of_changes_the_result(change):
    found = []
    for options in ({}, change):
        model = tiny_model()
        hf_lowbit.quantize(model, config(**options))
        found.append(model.model.layers[0].self_attn.k_proj.packed)
    assert found[0].spec != found[1].spec or not torch.equal(found[0].down, found[1].down)
