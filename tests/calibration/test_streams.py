"""Dense and compressed inputs side by side, and layers observed in the order in which they run."""

import pytest
import torch
from torch import nn

from hf_lowbit import UnsupportedModelError
from hf_lowbit.calibration import capture
from tests.tiny import tiny_model, tokens


def observed(architecture="llama"):
    """A model's first block with hidden states of two batches and the other arguments."""
    model = tiny_model(architecture)
    stack = capture.find_stacks(model)[0]
    batches = list(tokens(4).split(2))
    inputs = capture.first_block_inputs(model, list(stack.values()), batches)
    block = next(iter(stack.values()))
    hidden = [states for states, _ in inputs]
    wraps = capture.output_wrappers(block, hidden, [call for _, call in inputs])
    calls = [
        capture.block_calls(model, list(stack.values()), b, wrap)[0] for b, wrap in zip(batches, wraps, strict=True)
    ]
    return block, hidden, calls


def linears_of(block):
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def left_by_hooks(block):
    return sum(len(module._forward_pre_hooks) for module in block.modules())


def test_layers_run_in_stages_that_share_an_input():
    block, hidden, calls = observed()
    layers = linears_of(block)
    spare = nn.Linear(4, 4)  # never called, as an expert may be
    found = capture.stages(block, hidden[0], calls[0], {**dict(reversed(layers.items())), "spare": spare})
    assert [sorted(stage) for stage in found] == [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
        ["spare"],
    ]
    assert capture.stages(block, hidden[0], calls[0], {"spare": spare}) == [["spare"]]
    assert not left_by_hooks(block)


@pytest.mark.parametrize("last", ["self_attn.o_proj", None])
def test_a_block_runs_up_to_a_layer(last):
    block, hidden, calls = observed()
    layers = linears_of(block)
    with capture.collect_stats(layers) as stats:
        capture.run_until(block, hidden, calls, None if last is None else layers[last])
    reached = {name for name, one in stats.items() if one.tokens}
    attention = {name for name in layers if name.startswith("self_attn")}
    assert reached == (attention if last else set(layers))
    assert {stats[name].tokens for name in reached} == {4 * 24}
    assert not left_by_hooks(block)


def test_products_of_inputs_in_two_models():
    block, hidden, calls = observed()
    layers = {name: layer for name, layer in linears_of(block).items() if "q_proj" in name or "k_proj" in name}
    with capture.collect_inputs(layers) as dense:
        capture.run_until(block, hidden, calls, None)
    drifted = [states + 0.1 * torch.randn_like(states) for states in hidden]
    with capture.collect_inputs(layers) as compressed, capture.collect_cross(layers, dense) as cross:
        capture.run_until(block, drifted, calls, None)
    for name in layers:
        want = sum(
            a.reshape(-1, a.shape[-1]).double().T @ b.reshape(-1, b.shape[-1]).double()
            for a, b in zip(dense[name], compressed[name], strict=True)
        )
        torch.testing.assert_close(cross[name], want, rtol=1e-4, atol=1e-4)
    assert not left_by_hooks(block)


@pytest.mark.parametrize("buckets", [1, 2, 3, 4])
def test_averages_of_samples(buckets):
    """Four samples in two batches; with as many buckets as samples nothing is averaged."""
    block, hidden, calls = observed()
    layers = {"q": linears_of(block)["self_attn.q_proj"]}
    with capture.collect_inputs(layers) as seen, capture.collect_stacked(layers, 4, buckets) as found:
        capture.run_until(block, hidden, calls, None)
    samples = torch.cat(seen["q"]).double()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)) // -(-4 // buckets)
    means = torch.cat([samples[order == bucket].mean(0) for bucket in range(int(order.max()) + 1)])
    want = means.T @ means * 2 / (int(order.max()) + 1)
    torch.testing.assert_close(found["q"], want, rtol=1e-5, atol=1e-6)
    assert not left_by_hooks(block)


def test_samples_that_cannot_be_told_are_named():
    block, hidden, calls = observed()
    layers = {"q": linears_of(block)["self_attn.q_proj"]}
    with (
        pytest.raises(UnsupportedModelError, match=r"q: receives .*, whose samples cannot be told"),
        capture.collect_stacked(layers, 3, 2),
    ):
        capture.run_until(block, hidden, calls, None)
    assert not left_by_hooks(block)


def test_layers_that_receive_other_tokens_are_named():
    block, hidden, calls = observed()
    layers = {"q": linears_of(block)["self_attn.q_proj"]}
    with (
        pytest.raises(UnsupportedModelError, match="q: receives other tokens"),
        capture.collect_cross(layers, {"q": [torch.zeros(3, 64)]}),
    ):
        capture.run_until(block, hidden, calls, None)
    assert not left_by_hooks(block)
