"""What is decided for a whole stack before its first block is compressed: measured right, kept, and never twice."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_lowbit
from hf_lowbit import CheckpointError, LowBitRecipe, PBS2PConfig, RunOptions, packed_modules
from hf_lowbit.compress import measures
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.journal import LINES
from hf_lowbit.hf.save import save_model
from tests.hf.test_transformers import logits, quick
from tests.tiny import tiny_model, tiny_t5, tokens

BLOCKS = [f"model.layers.{i}" for i in range(4)]


def sparse(**changes):
    options = {
        "calibration": tokens(), "samples": 4, "block_size": 32, "iterations": 2, "quantiles": 5,
        "max_salient_per_block": 6, "run": RunOptions(progress=False, batch_size=2),
    }  # fmt: skip
    return PBS2PConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Four blocks of which the first changes its input most, so that N differ."""
    folder = tmp_path_factory.mktemp("planned") / "dense"
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight *= 0.1 if i else 30.0
    model.save_pretrained(folder)
    return folder


def compress(dense, journal=None, resume=False, **changes):
    run = RunOptions(progress=False, batch_size=2, journal=journal, resume=resume)
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=sparse(run=run, **changes))


def saved(model, folder):
    save_model(model, folder)
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


def layers_of(model):
    return model.config.quantization_config.layers


def test_n_of_every_block_follows_from_the_dense_model(dense, tmp_path):
    model = compress(dense)
    counts = layers_of(model)
    assert list(counts) == BLOCKS
    assert sum(counts.values()) == 16
    assert len(set(counts.values())) > 1
    for name, layer in packed_modules(model).items():
        n = counts[".".join(name.split(".")[:3])]
        assert (layer.spec.keep_n, layer.spec.keep_m) == ((n, 8) if n < 8 else (0, 0))
    loaded = AutoModelForCausalLM.from_pretrained(save_and_return(model, tmp_path / "packed"))
    assert torch.equal(logits(loaded), logits(model))
    assert layers_of(loaded) == counts


def save_and_return(model, folder):
    save_model(model, folder)
    return folder


def test_cosines_are_those_of_inputs_and_outputs(dense, monkeypatch):
    """Against hooks on the dense model."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    expected = []

    def watch(block, args, output):
        a, b = args[0].double(), (output[0] if isinstance(output, tuple) else output).double()
        expected.append(float(torch.cosine_similarity(a, b, dim=-1).mean()))

    for block in model.model.layers:
        block.register_forward_hook(watch)
    logits(model)
    found = []
    sums = measures.cosine_sums

    def recorded(*arguments):
        for part in sums(*arguments):
            found.append(float(part[0] / part[1]))
            yield part

    monkeypatch.setattr(measures, "cosine_sums", recorded)
    compress(dense)
    assert found == pytest.approx(expected, rel=1e-5)


def test_streamed_and_in_memory_decide_alike(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    hf_lowbit.quantize(model, sparse())
    assert layers_of(model) == layers_of(compress(dense))


def test_the_pass_lets_go_of_each_block(dense, monkeypatch):
    """One dense block at a time: when the first is compressed, the later ones are stubs again."""
    original, seen = Run.compress_layers, []

    def look(self, names, stats):
        if not seen:
            weights = [self.model.get_submodule(name).weight.numel() for name in self.targets.methods]
            seen.append((sum(size > 1 for size in weights), len(names)))
        return original(self, names, stats)

    monkeypatch.setattr(Run, "compress_layers", look)
    compress(dense)
    assert seen == [(7, 7)]


@pytest.mark.parametrize("after", [0, 2])
def test_a_killed_run_goes_on_with_the_same_plan(dense, tmp_path, monkeypatch, after):
    expected = saved(compress(dense, tmp_path / "whole"), tmp_path / "expected")
    original, calls = Run.compress_layers, []

    def fail(self, names, stats):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(names)
        return original(self, names, stats)

    monkeypatch.setattr(Run, "compress_layers", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(dense, tmp_path / "journal")
    monkeypatch.setattr(Run, "compress_layers", original)
    monkeypatch.setattr(measures, "cosine_sums", lambda *_: pytest.fail("measured again"))
    assert saved(compress(dense, tmp_path / "journal", resume=True), tmp_path / "resumed") == expected


def test_a_plan_torn_by_a_kill_is_made_again(dense, tmp_path):
    expected = saved(compress(dense, tmp_path / "journal"), tmp_path / "expected")
    first, plan, *_ = (tmp_path / "journal" / LINES).read_bytes().splitlines(keepends=True)
    (tmp_path / "journal" / LINES).write_bytes(first + plan[:-10])
    assert saved(compress(dense, tmp_path / "journal", resume=True), tmp_path / "resumed") == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["*"].update({BLOCKS[0]: 9}),
        lambda plan: plan["*"].update({BLOCKS[0]: 0}),
        lambda plan: plan["*"].update({BLOCKS[0]: "4"}),
        lambda plan: plan["*"].update({BLOCKS[0]: float("nan")}),
        lambda plan: plan["*"].update({BLOCKS[0]: 4.5}),
        lambda plan: plan["*"].update({"model.layers.9": 4}),
        lambda plan: plan.update({"*": [4, 4, 4, 4]}),
        lambda plan: plan.update({"other": plan.pop("*")}),
    ],
    ids=["large", "zero", "text", "nan", "fraction", "block", "list", "rule"],
)
def test_a_journal_with_a_strange_plan_is_refused(dense, tmp_path, change):
    compress(dense, tmp_path / "journal")
    lines = (tmp_path / "journal" / LINES).read_text().splitlines()
    entry = json.loads(lines[1])
    change(entry["plan"])
    (tmp_path / "journal" / LINES).write_text("\n".join([lines[0], json.dumps(entry), *lines[2:], ""]))
    with pytest.raises(CheckpointError, match="journal") as caught:
        compress(dense, tmp_path / "journal", resume=True)
    assert len(str(caught.value)) < 1000


def test_given_counts_are_used_as_they_are(dense, monkeypatch):
    monkeypatch.setattr(measures, "cosine_sums", lambda *_: pytest.fail("measured"))
    given = dict(zip(BLOCKS, (2, 8, 1, 5), strict=True))
    model = compress(dense, layers=given)
    assert layers_of(model) == given
    assert [packed_modules(model)[f"{name}.mlp.up_proj"].spec.keep_n for name in BLOCKS] == [2, 0, 1, 5]
    with pytest.raises(ValueError, match=r"lacks model\.layers\.3"):
        compress(dense, layers={name: 4 for name in BLOCKS[:3]})


def test_uniform_counts_need_no_pass(dense, monkeypatch):
    monkeypatch.setattr(measures, "cosine_sums", lambda *_: pytest.fail("measured"))
    for changes in ({"importance": "uniform"}, {"calibration": None}, {"n_low": 4, "n_high": 4}):
        model = compress(dense, **changes)
        assert layers_of(model) is None
        assert {layer.spec.keep_n for layer in packed_modules(model).values()} == {4}


def test_recipe_plans_each_rule_for_itself(dense):
    """Rules of one method with their own budgets; a block of which a rule has nothing does not count for it."""
    rules = {"*.self_attn": sparse(n=6), "layers.3.mlp": quick(), "*.mlp": sparse(n=2, m=4, block_size=32)}
    recipe = LowBitRecipe(rules, run=RunOptions(progress=False))
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=recipe)
    (_, attention), (_, other), (_, feed_forward) = model.config.quantization_config.rules
    assert list(attention.layers) == BLOCKS
    assert sum(attention.layers.values()) == 24
    assert list(feed_forward.layers) == BLOCKS[:3]
    assert sum(feed_forward.layers.values()) == 6
    assert not hasattr(other, "layers")
    assert packed_modules(model)[f"{BLOCKS[3]}.mlp.up_proj"].spec.keep_m == 0


def test_each_stack_of_an_encoder_decoder_meets_the_budget(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "dense")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", quantization_config=sparse())
    counts = layers_of(model)
    for stack in ("encoder", "decoder"):
        assert sum(n for name, n in counts.items() if name.startswith(stack)) == 8


def test_experts_without_tokens_are_compressed_from_their_weights(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=sparse(calibration=tokens(2, 3), samples=2, sequence_length=3)
    )
    assert sum(layers_of(model).values()) == 8
    assert torch.isfinite(logits(model)).all()


def test_the_config_that_was_passed_stays_as_it_was(dense):
    config = sparse()
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert config == dataclasses.replace(sparse())
    assert config.layers is None
