"""Adapters of peft on packed layers: train, save, reload; merging is refused, since there is no dense weight."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_lowbit
from hf_lowbit import PackedLinear, packed_modules
from tests.hf.test_transformers import logits, quick
from tests.tiny import VOCABULARY, tiny_model, tokens

MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter, safe": lambda model: model.merge_adapter(safe_merge=True),
    "one layer": lambda model: model.base_model.model.model.layers[1].mlp.down_proj.merge(),
    "one layer, safe": lambda model: model.base_model.model.model.layers[1].mlp.down_proj.merge(safe_merge=True),
}
IMPOSSIBLE = r"merging into packed weights is impossible.*Call model\.dequantize\(\) first"


@pytest.fixture(scope="module")
def packed_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    model = tiny_model()
    hf_lowbit.quantize(model, quick(calibration=None))
    model.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(packed_path):
    return AutoModelForCausalLM.from_pretrained(packed_path)


def lora(target_modules="all-linear", **changes):
    # started at random: an untrained adapter would otherwise change nothing, and losing it would go unseen
    return LoraConfig(**{"r": 4, "target_modules": target_modules, "init_lora_weights": False, **changes})


def stored(model):
    """Names and values of all that is in a model but not in its adapters, by the name in the model without them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): state[name] for name in state}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def train(model, steps=6):
    """A few steps on one batch; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], "all-linear"], ids=str)
def test_adapters_sit_on_packed_layers(packed, target_modules):
    names = list(packed_modules(packed))
    expected = logits(packed)
    model = get_peft_model(packed, lora(target_modules, init_lora_weights=True))
    assert torch.equal(logits(model), expected)  # starts as the identity
    wrapped = [name for name in packed_modules(model) if name.endswith(".base_layer")]
    assert len(wrapped) == (len(names) if target_modules == "all-linear" else 4)
    assert len(packed_modules(model)) == len(names)
    assert type(packed.lm_head) is nn.Linear  # the head is dense; "all-linear" leaves it alone


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], "all-linear"], ids=str)
def test_training_changes_the_adapters_alone(packed, target_modules):
    model = get_peft_model(packed, lora(target_modules, init_lora_weights=True))
    before = stored(model)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert_same(stored(model), before)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.requires_grad == ("lora_" in name), name


def test_gradients_are_those_of_the_dense_model(packed):
    """Same adapters, same batch: once through the op's own backward, once through a dense matrix product."""
    dense = copy.deepcopy(packed)
    dense.dequantize()
    found = []
    for base in (packed, dense):
        torch.manual_seed(0)
        model = get_peft_model(base, lora())
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2 * len(packed_modules(packed))
    for name, grad in found[1].items():
        # float32 with sums in the same order or nearly so: some roundings of 2^-24, over two blocks
        assert (found[0][name] - grad).norm() < 1e-5 * grad.norm(), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(packed, reentrant):
    model = get_peft_model(packed, lora()).train()
    model.enable_input_require_grads()
    calls = []
    layer = packed_modules(model)["base_model.model.model.layers.0.mlp.up_proj.base_layer"]
    layer.register_forward_hook(lambda *_: calls.append(1))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(calls) == 1 + 2  # the second time forward runs once more, within backward
    assert_same(grads[1], grads[0])


def test_trainer_takes_adapters_and_refuses_packed_weights_alone(packed, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=packed, args=arguments, train_dataset=rows)
    model = get_peft_model(packed, lora(init_lora_weights=True))
    before = stored(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert_same(stored(model), before)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_preparing_for_training_keeps_what_is_stored(scale_dtype, tmp_path):
    """peft makes every half-precision parameter float32; scales are given their own dtype back when next used."""
    model = tiny_model()
    hf_lowbit.quantize(model, quick(calibration=None, scale_dtype=scale_dtype))
    model.save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weight_" in name}
    assert {str(tensor.dtype) for tensor in before.values()} == {"torch.uint8", "torch.int32", f"torch.{scale_dtype}"}
    model = prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.float32  # it did something
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = logits(model)
    assert_same({name: tensor for name, tensor in model.state_dict().items() if ".weight_" in name}, before)
    for layer in packed_modules(model).values():
        layer.packed.validate("after use")
    model = prepare_model_for_kbit_training(model)
    model.save_pretrained(tmp_path / "packed")  # straight after the cast
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert_same({name: tensor for name, tensor in loaded.state_dict().items() if ".weight_" in name}, before)
    assert torch.equal(logits(loaded), expected)
    losses = train(get_peft_model(model, lora(init_lora_weights=True)))
    assert losses[-1] < losses[0]


def test_a_cast_that_loses_digits_is_not_papered_over():
    """float32 scales cast to bfloat16 are damaged; turning the dtype back would hide that from the next check."""
    model = tiny_model()
    hf_lowbit.quantize(model, quick(calibration=None, scale_dtype="float32"))
    layer = packed_modules(model)["model.layers.0.mlp.up_proj"]
    layer.weight_row_scale.data = layer.weight_row_scale.data.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"row_scale is torch\.bfloat16"):
        layer.packed.validate("layer")


# Saving and loading ----------------------------------------------------------------------------------------------


def test_saved_adapter_fits_a_freshly_loaded_model(packed, packed_path, tmp_path):
    model = get_peft_model(packed, lora())
    train(model, steps=2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_path), tmp_path)
    assert torch.equal(logits(wrapped), expected)
    loaded = AutoModelForCausalLM.from_pretrained(packed_path)
    plain = logits(loaded)
    assert not torch.equal(plain, expected)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), plain)


def test_adapter_folder_alone_loads_model_and_adapter(packed_path, tmp_path):
    """The adapter's config names the packed model; transformers then loads both."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(packed_path), lora())
    model.save_pretrained(tmp_path)
    both = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(both.model.layers[0].mlp.up_proj.base_layer, PackedLinear)
    assert torch.equal(logits(both), logits(model))


def test_disabled_adapter_gives_the_base_model(packed):
    expected = logits(packed)
    model = get_peft_model(packed, lora())
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_two_adapters(packed, packed_path, tmp_path):
    model = get_peft_model(packed, lora(), adapter_name="first")
    model.add_adapter("second", lora(["q_proj", "up_proj"], r=2))
    found = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        found[name] = logits(model)
    assert not torch.equal(found["first"], found["second"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(packed_path), tmp_path / "first", adapter_name="first"
    )
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), found[name])
    loaded.delete_adapter("first")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), found["second"])


def test_saving_the_base_beside_its_adapters(packed, packed_path, tmp_path):
    """With adapters the layers have other names; without them again, the model is saved as it came."""
    before = stored(packed)
    model = get_peft_model(packed, lora())
    model.unload().save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), before)


# Merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
def test_merging_is_refused_and_changes_nothing(packed, merge):
    # The embedding is dense and comes first: it must not have been merged when the first packed layer refuses.
    model = get_peft_model(packed, lora(["embed_tokens", "q_proj", "down_proj"]))
    before, expected = stored(model), logits(model)
    structure = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=IMPOSSIBLE):
        merge(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == structure
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())
    assert_same(stored(model), before)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("merge", [merge for name, merge in MERGES.items() if "safe" not in name])
def test_merging_is_refused_for_methods_that_would_not_notice(packed, merge):
    """IA3 multiplies the weight: a stub of one element goes along with that, and the adapter would be lost."""
    model = get_peft_model(packed, IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=[]))
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    expected = logits(model)
    with pytest.raises(ValueError, match=IMPOSSIBLE):
        merge(model)
    assert torch.equal(logits(model), expected)


def test_adapters_put_in_by_transformers_refuse_merging(packed):
    packed.add_adapter(lora(["q_proj"]))
    expected = logits(packed)
    with pytest.raises(ValueError, match=IMPOSSIBLE):
        packed.model.layers[0].self_attn.q_proj.merge()
    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
@pytest.mark.parametrize("merge", [merge for name, merge in MERGES.items() if "one layer" not in name])
def test_dequantized_first_merging_works(packed, merge, when):
    if when == "before attaching":
        packed.dequantize()
    model = get_peft_model(packed, lora())
    expected = logits(model)
    if when == "after attaching":
        model.dequantize()
        assert torch.equal(logits(model), expected)
    merged = merge(model) or model
    assert not packed_modules(merged)
    # the update is added to a float32 weight before the product rather than after: roundings of 2^-24, two blocks
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if merged is not model:
        assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def test_adapter_of_a_dense_layer_merges_beside_packed_ones(packed):
    model = get_peft_model(packed, lora(["lm_head"]))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert len(packed_modules(merged)) == 14
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_copy_refuses_on_its_own(packed):
    model = get_peft_model(packed, lora())
    twin = copy.deepcopy(model)
    twin.dequantize()
    twin.merge_and_unload()
    assert len(packed_modules(model)) == 14
    with pytest.raises(ValueError, match=IMPOSSIBLE):
        model.merge_and_unload()


def test_dora_is_refused_and_works_on_the_dense_model(packed):
    """It scales by the norms of the dense weight; the stub's norm is zero, and every output would be NaN."""
    with pytest.raises(ValueError, match="DoRA needs the norms of dense weights"):
        get_peft_model(copy.deepcopy(packed), lora(use_dora=True))
    model = get_peft_model(copy.deepcopy(packed), lora())
    with pytest.raises(ValueError, match="DoRA needs the norms of dense weights"):
        model.add_adapter("second", lora(use_dora=True))
    packed.dequantize()
    assert torch.isfinite(logits(get_peft_model(packed, lora(use_dora=True)))).all()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_weight_fail_before_they_do(packed, start):
    before = stored(packed)
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        get_peft_model(packed, lora(init_lora_weights=start))
    assert_same(stored(packed), before)


@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
def test_transposed_layers_merge_the_right_way_round(when):
    """GPT-2 keeps its weights transposed, and some are square; while packed they are plain linear layers to peft."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=VOCABULARY)).eval()
    hf_lowbit.quantize(base, quick(calibration=None))
    if when == "before attaching":
        base.dequantize()
    model = get_peft_model(base, lora(["attn.c_proj", "c_fc"]))
    expected = logits(model)
    if when == "after attaching":
        model.dequantize()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
