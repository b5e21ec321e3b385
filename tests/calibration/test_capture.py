"""Blocks run one by one must give what the model gives, and leave it as it was."""

import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_lowbit import CalibrationError, UnsupportedModelError
from hf_lowbit.calibration import capture
from tests.tiny import tiny_model, tokens

LAYERS = 3
LENGTH = 24  # longer than the sliding windows of the tiny models
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# name of the list of blocks by architecture
PREFIXES = {
    "llama": "model.layers",
    "llama-tied": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "gemma3": "model.layers",
    "opt": "model.decoder.layers",
    "phi": "model.layers",
    "gpt_neox": "gpt_neox.layers",
}


def model_of(architecture, **changes):
    if architecture == "gemma3":
        changes["layer_types"] = MIXED
    return tiny_model(architecture, num_hidden_layers=LAYERS, **changes)


def batches():
    return list(tokens(5, LENGTH).split(2))  # the last batch is short


def own_outputs(model, blocks, batch):
    """What each block returns inside the model's own forward pass."""
    found = []
    handles = [
        block.register_forward_hook(lambda module, args, output: found.append(capture.hidden_of(output)))
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def traces(model):
    """Everything that a hook or a replaced method would leave in a module."""
    return {
        name: (
            "forward" in module.__dict__,
            [len(hooks) for key, hooks in sorted(module.__dict__.items()) if key.endswith("_hooks") and hooks],
        )
        for name, module in model.named_modules()
    }


def block_by_block(model, blocks):
    """Hidden states after each block, for each batch, the way a compression run goes."""
    with torch.no_grad():
        first = capture.first_block_inputs(model, blocks, batches())
        hidden = [states for states, _ in first]
        probe = next(iter(capture.run_block(blocks[0], hidden[:1], [first[0][1]])))
        wrap = capture.output_wrapper(probe)
        calls = [capture.block_calls(model, blocks, batch, wrap) for batch in batches()]
    after = []
    for number, block in enumerate(blocks):
        outputs = capture.run_block(block, hidden, [call[number] for call in calls])
        hidden = [capture.hidden_of(output) for output in outputs]
        after.append(hidden)
    return after


# Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", PREFIXES)
def test_blocks_are_found_in_order(architecture):
    model = model_of(architecture)
    blocks = capture.find_stacks(model)[0]
    assert list(blocks) == [f"{PREFIXES[architecture]}.{number}" for number in range(LAYERS)]
    assert all(model.get_submodule(name) is block for name, block in blocks.items())


def test_more_than_ten_blocks_stay_in_order():
    blocks = capture.find_stacks(tiny_model("llama", num_hidden_layers=12))[0]
    assert list(blocks) == [f"model.layers.{number}" for number in range(12)]


def test_encoder_and_decoder_are_two_stacks():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    encoder, decoder = capture.find_stacks(T5ForConditionalGeneration(config))
    assert list(encoder) == ["encoder.block.0", "encoder.block.1"]
    assert list(decoder) == ["decoder.block.0", "decoder.block.1"]


def test_blocks_of_transposed_layers():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    assert list(capture.find_stacks(GPT2LMHeadModel(config))[0]) == ["transformer.h.0", "transformer.h.1"]


def test_no_linear_layers_in_a_list():
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        capture.find_stacks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match="no list of blocks with linear layers"):
        capture.find_stacks(nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(2)])}))


def test_lists_inside_blocks_and_lists_without_linears_do_not_count():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    model = nn.Module()
    model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
    model.layers = nn.ModuleList(Block() for _ in range(2))
    assert list(capture.find_stacks(model)[0]) == ["layers.0", "layers.1"]


# Running blocks alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", PREFIXES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_one_by_one_give_exactly_what_the_model_gives(architecture, attention):
    model = model_of(architecture, attn_implementation=attention)
    blocks = list(capture.find_stacks(model)[0].values())
    before = traces(model)
    after = block_by_block(model, blocks)
    for number, batch in enumerate(batches()):
        own = own_outputs(model, blocks, batch)
        assert len(own) == LAYERS
        for block in range(LAYERS):
            assert torch.equal(after[block][number], own[block]), (number, block)
    assert traces(model) == before


def test_hidden_states_are_those_before_the_last_norm():
    """The same against the model's own output, without a hook of ours."""
    model = model_of("llama")
    after = block_by_block(model, list(capture.find_stacks(model)[0].values()))
    with torch.no_grad():
        for hidden, batch in zip(after[-1], batches(), strict=True):
            assert torch.equal(model.model.norm(hidden), model.model(input_ids=batch).last_hidden_state)


def test_each_block_gets_its_own_arguments():
    """Sliding and full layers differ in mask and in rotary angles; one block's arguments do not serve another."""
    model = model_of("gemma3")
    blocks = list(capture.find_stacks(model)[0].values())
    batch = batches()[0]
    with torch.no_grad():
        ((hidden, _),) = capture.first_block_inputs(model, blocks, [batch])
        calls = capture.block_calls(model, blocks, batch, lambda states: states)
        right, wrong = (capture.hidden_of(call(blocks[1], hidden)) for call in (calls[1], calls[0]))
    assert not torch.equal(right, wrong)


def test_the_first_call_is_what_block_calls_sees_too():
    model = model_of("phi")
    blocks = list(capture.find_stacks(model)[0].values())
    ((hidden, call),) = capture.first_block_inputs(model, blocks, batches()[:1])
    again = capture.block_calls(model, blocks, batches()[0], lambda states: states)[0]
    with torch.no_grad():
        assert torch.equal(capture.hidden_of(call(blocks[0], hidden)), capture.hidden_of(again(blocks[0], hidden)))


class Toy(nn.Module):
    """Calls its blocks in an order of choice, hidden states by keyword or not, plain or in a tuple."""

    def __init__(self, order, keyword=False, in_tuple=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(ToyBlock(in_tuple) for _ in range(3))
        self.order, self.keyword = order, keyword

    def forward(self, input_ids, use_cache, logits_to_keep=0):
        assert use_cache is False
        hidden = self.embed(input_ids)
        for number in self.order:
            output = (
                self.layers[number](hidden_states=hidden, scale=number + 1.0)
                if self.keyword
                else self.layers[number](hidden, number + 1.0)
            )
            hidden = capture.hidden_of(output)
        return hidden


class ToyBlock(nn.Module):
    def __init__(self, in_tuple):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.in_tuple = in_tuple

    def forward(self, hidden_states, scale):
        out = hidden_states + scale * self.proj(hidden_states)
        return (out, "attention weights") if self.in_tuple else out


@pytest.mark.parametrize(("keyword", "in_tuple"), itertools.product([False, True], repeat=2))
def test_any_way_of_calling_a_block(keyword, in_tuple):
    toy = Toy([0, 1, 2], keyword, in_tuple)
    batch = torch.tensor([[1, 2, 3], [4, 5, 6]])
    blocks = list(toy.layers)
    with torch.no_grad():
        ((hidden, call),) = capture.first_block_inputs(toy, blocks, [batch])
        assert torch.equal(hidden, toy.embed(batch))
        output = call(blocks[0], hidden)
        assert isinstance(output, tuple) is in_tuple
        calls = capture.block_calls(toy, blocks, batch, capture.output_wrapper(output))
        for own, block in zip(calls, blocks, strict=True):
            hidden = capture.hidden_of(own(block, hidden))
        assert torch.equal(hidden, toy(batch, use_cache=False))


def test_blocks_that_are_not_called_are_named():
    batch = torch.tensor([[1, 2, 3]])
    skipping = Toy([0, 2])
    with pytest.raises(UnsupportedModelError, match="does not call its block 1"):
        capture.block_calls(skipping, list(skipping.layers), batch, lambda hidden: hidden)
    idle = Toy([1, 2])
    with pytest.raises(UnsupportedModelError, match="does not call its first block"):
        capture.first_block_inputs(idle, list(idle.layers), [batch])
    assert not any("forward" in block.__dict__ for block in [*skipping.layers, *idle.layers])


def test_blocks_that_are_called_twice_are_refused():
    toy = Toy([0, 1, 2, 0, 1, 2])
    with pytest.raises(UnsupportedModelError):
        capture.block_calls(toy, list(toy.layers), torch.tensor([[1, 2, 3]]), lambda hidden: hidden)


# Nothing stays behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first_block_inputs", "block_calls"])
def test_forwards_are_restored_after_an_error_in_the_model(name):
    model = model_of("llama")
    blocks = list(capture.find_stacks(model)[0].values())
    before = traces(model)
    beyond = torch.full((1, 4), 10**6)
    with pytest.raises(IndexError):
        if name == "first_block_inputs":
            capture.first_block_inputs(model, blocks, [*batches(), beyond])
        else:
            capture.block_calls(model, blocks, beyond, lambda hidden: hidden)
    assert traces(model) == before


def test_replaced_forward_ends_with_its_statement():
    modules = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = torch.ones(1, 2)
    expected = [module(x) for module in modules]
    with (
        pytest.raises(ZeroDivisionError),
        capture.replaced_forward(modules, lambda number: lambda x: (number, x)),
    ):
        assert [module(x) for module in modules] == [(0, x), (1, x)]
        raise ZeroDivisionError
    assert all(torch.equal(module(x), want) for module, want in zip(modules, expected, strict=True))


def test_replaced_forward_ends_when_making_one_fails():
    modules = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def make(number):
        return [lambda x: x][number]

    with pytest.raises(IndexError), capture.replaced_forward(modules, make):
        pass
    assert not any("forward" in module.__dict__ for module in modules)


def test_a_forward_of_the_instance_comes_back():
    module = nn.Linear(2, 2)
    own = module.forward
    module.forward = lambda x: own(x) + 1  # what accelerate does to move weights in and out
    before = module(torch.ones(1, 2))
    with capture.replaced_forward([module], lambda _: lambda x: x):
        pass
    assert torch.equal(module(torch.ones(1, 2)), before)


# Statistics ------------------------------------------------------------------------------------------------------


def linears_of(block, prefix):
    return {f"{prefix}.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def run_first_block(model, poison=None):
    """Statistics of the first block's linear layers, and their inputs kept beside."""
    (prefix, block), *_ = capture.find_stacks(model)[0].items()
    linears = linears_of(block, prefix)
    with torch.no_grad():
        first = capture.first_block_inputs(model, [block], batches())
    hidden, calls = [states.clone() for states, _ in first], [call for _, call in first]
    if poison is not None:
        hidden[poison // 2][poison % 2, 3, 5] = float("nan")
    inputs = {name: [] for name in linears}
    handles = [
        m.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0].clone()))
        for name, m in linears.items()
    ]
    try:
        with capture.collect_stats(linears, [len(states) for states in hidden]) as stats:
            for _ in capture.run_block(block, hidden, calls):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return stats, inputs


@pytest.mark.parametrize("architecture", PREFIXES)
def test_statistics_are_the_inputs_second_moment(architecture):
    model = model_of(architecture)
    before = traces(model)
    stats, inputs = run_first_block(model)
    assert traces(model) == before
    assert set(stats) == set(inputs)
    for name, seen in inputs.items():
        rows = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in seen]).double()
        # float32 sums over 120 tokens: 2^-24 per step, far below this even if all errors had one sign
        assert (stats[name].total - rows.T @ rows).norm() < 1e-5 * (rows.T @ rows).norm(), name
        assert (stats[name].tokens, stats[name].sequences) == (5 * LENGTH, 5)


@pytest.mark.parametrize(
    ("architecture", "shared"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
        ("gemma3", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        # attention and feed-forward run side by side on one normalised input
        ("phi", [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_layers_with_one_input_share_one_object(architecture, shared):
    stats, _ = run_first_block(model_of(architecture))
    groups = {}
    for name, own in stats.items():
        groups.setdefault(id(own), set()).add(name.rpartition(".")[2])
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, shared))


@pytest.mark.parametrize("sample", [0, 1, 2, 4])
def test_not_a_number_names_layer_and_sample_and_leaves_no_hook(sample):
    model = model_of("llama")
    before = traces(model)
    message = rf"model\.layers\.0\.self_attn\.q_proj: inputs hold NaN or infinity in calibration sample {sample}$"
    with pytest.raises(CalibrationError, match=message):
        run_first_block(model, poison=sample)
    assert traces(model) == before


def test_layers_that_are_not_reached_have_no_statistics():
    used, idle = nn.Linear(2, 2), nn.Linear(2, 2)
    with capture.collect_stats({"used": used, "idle": idle}) as stats:
        used(torch.ones(1, 3, 2))
    assert list(stats) == ["used"]


def test_equal_inputs_that_are_two_tensors_are_kept_apart():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 3, 2)
    with capture.collect_stats({"a": a, "b": b}) as stats:
        a(x)
        b(x.clone())
    assert stats["a"] is not stats["b"]
    assert torch.equal(stats["a"].total, stats["b"].total)


def test_sharing_must_not_stop_in_a_later_batch():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 3, 2)
    with (
        pytest.raises(UnsupportedModelError, match="b: shares its input with a in some batches only"),
        capture.collect_stats({"a": a, "b": b}),
    ):
        a(x)
        b(x)
        a(x + 1)
        b(x + 2)
    assert not a._forward_pre_hooks
    assert not b._forward_pre_hooks


def test_input_changed_in_place_between_two_layers():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 3, 2)
    with torch.no_grad(), capture.collect_stats({"a": a, "b": b}) as stats:
        a(x)
        x.mul_(2)
        b(x)
    assert stats["b"].total.tolist() == [[12.0, 12.0], [12.0, 12.0]]
