"""Models with binary convolutions in transformers: which convolutions, training form, packed form, what is refused."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from hf_lowbit import (
    BiDRNConfig,
    BiDRNForBodyMesh,
    BodyMeshConfig,
    CheckpointError,
    LowBitRecipe,
    binarize_convs,
    pack_convs,
    quantize,
    unverified,
)
from hf_lowbit.conv_layers import PackedConv2d, packed_convs
from hf_lowbit.hf.save import save_model
from hf_lowbit.methods.bidrn.convert import RECTIFIERS, select, units
from hf_lowbit.methods.bidrn.modules import BinaryUnit
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.verify import verify

KINDS = ("bottleneck", "basic")


def resnet(kind="bottleneck"):
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 1], "num_labels": 5}
    return ResNetForImageClassification(ResNetConfig(layer_type=kind, **sizes)).eval()


def images(count=2, size=40):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model, steps=2):
    """Run some steps of training, and leave the model in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        model(images(), labels=torch.tensor([1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / request.param
    resnet(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A trained, packed model: its folder and its answers."""
    folder = tmp_path_factory.mktemp("packed")
    model = resnet()
    binarize_convs(model)
    trained(model)
    pack_convs(model)
    with torch.no_grad():
        answers = model(images()).logits
    model.save_pretrained(folder)
    return folder, answers


# Which convolutions --------------------------------------------------------------------------------------------------


def test_a_resnet_of_hugging_face():
    for kind, number in (("bottleneck", 9), ("basic", 6)):
        model = resnet(kind)
        found = binarize_convs(model)
        assert len(found.binary) == number == len(units(model))
        assert sorted(found.dense.values()) == [
            *["projection around a block, kept in full precision"] * 2,
            "reads 3 channels, fewer than min_channels=8",
        ]
        # no ReLU is left in front of a sign, behind a sum or behind the stem
        assert [type(m).__name__ for m in model.modules() if type(m).__name__ in RECTIFIERS] == []
        for unit in units(model).values():
            assert isinstance(unit.norm, nn.BatchNorm2d)
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(model(images()).logits).all()


def test_latents_are_the_weights():
    model = resnet()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name in binarize_convs(model).binary:
        unit = model.get_submodule(name)
        assert torch.equal(unit.weight, before[f"{name}.weight"])
        norm = name.replace("convolution", "normalization")
        assert torch.equal(unit.norm.weight, before[f"{norm}.weight"])


class TimmBlock(nn.Module):
    """A bottleneck in timm's names: its own activation behind each of two, one behind the sum."""

    def __init__(self, ins, outs):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(ins, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv3, self.bn3, self.act3 = nn.Conv2d(8, outs, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()
        self.downsample = nn.Sequential(nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x):
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(out)))))
        out += self.downsample(x)
        return self.act3(out)


class SharedBlock(nn.Module):
    """A basic block in torchvision's names: one ReLU is used twice."""

    def __init__(self, channels, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def generic(groups=1, head=True):
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    parts = [stem, TimmBlock(16, 24), SharedBlock(24, groups)]
    plain = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 40, 1))
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)] if head else []
    return nn.Sequential(*parts, plain, *tail)


def test_generic_modules():
    torch.manual_seed(0)
    model = generic().train()
    found = binarize_convs(model)
    assert found.binary == ("1.conv1", "1.conv2", "1.conv3", "2.conv1", "2.conv2", "3.0", "3.3")
    assert list(found.dense) == ["0.0", "1.downsample.0"]
    assert [type(m).__name__ for m in model.modules() if type(m).__name__ in RECTIFIERS] == []
    assert model.get_submodule("3.3").norm is None and model.get_submodule("3.3").bias is not None
    model(images()).square().sum().backward()
    model.eval()
    with torch.no_grad():
        expected = model(images())
        sizes = pack_convs(model)
        assert set(sizes) == set(found.binary) == set(packed_convs(model))
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def test_skipped_by_rule_and_listed():
    depthwise = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 16, 2, padding="same"),
        nn.Conv2d(32, 16, 1, groups=8), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    found = select(depthwise, BiDRNConfig())
    assert found.binary == ("2", "7")
    assert found.dense == {
        "0": "reads 3 channels, fewer than min_channels=8",
        "1": "depth-wise convolution",
        "3": "reads 4 channels, fewer than min_channels=8",
        "4": "padding_mode 'reflect' is not supported, only 'zeros'",
        "5": "padding 'same' of an even kernel differs from side to side, which is not supported",
        "6": "reads 4 channels, fewer than min_channels=8",
        "8": "last layer",
    }
    assert select(depthwise, BiDRNConfig(min_channels=4, skip=("7",))).dense["7"] == "skip pattern '7'"
    assert "6" in select(depthwise, BiDRNConfig(min_channels=4)).binary
    deep = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1))
    assert select(deep, BiDRNConfig()).dense == {"0": "first convolution", "2": "last layer"}


def test_selections_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="'nope': no module of Sequential matches"):
        select(generic(), BiDRNConfig(skip=("nope",)))
    with pytest.raises(ValueError, match="no convolution of Sequential becomes binary"):
        select(nn.Sequential(nn.Linear(2, 2)), BiDRNConfig())
    shared = "2.relu belongs to 2.conv1, which would become binary, and to 2.conv2, which would not"
    with pytest.raises(ValueError, match=f"{shared} \\(depth-wise convolution\\); add the whole block to skip"):
        select(generic(groups=24), BiDRNConfig())
    assert "2.conv1" not in select(generic(groups=24), BiDRNConfig(skip=("2.*",))).binary
    model = generic()
    binarize_convs(model)
    with pytest.raises(ValueError, match="has binary convolutions already"):
        binarize_convs(model)


def test_binary_projections_on_request():
    model = resnet()
    found = binarize_convs(model, BiDRNConfig(block_residual="binary"))
    shortcuts = [name for name in found.binary if "shortcut" in name]
    assert len(shortcuts) == 2
    assert model.get_submodule(shortcuts[0]).act is None
    assert not model.get_submodule(shortcuts[0]).options.lcr


@pytest.mark.parametrize(
    "change",
    [
        {"ste": "clip"}, {"ste": "tanh"}, {"shift": "affine"}, {"shift": "none"}, {"act": "none"}, {"lcr": False},
        {"residual_position": "before_act"}, {"side_dtype": "float16"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(change):
    def result(**options):
        model = resnet()
        binarize_convs(model, BiDRNConfig(**options))
        trained(model, 3)
        pack_convs(model)
        with torch.no_grad():
            return model(images()).logits, sum(module.packed.nbytes for module in packed_convs(model).values())

    (logits, size), (other, other_size) = result(), result(**change)
    assert not torch.equal(logits, other)
    assert (size != other_size) == bool({"shift", "act", "side_dtype"} & set(change))


# Training form -------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_is_refused(dense):
    with pytest.raises(ValueError, match=r"the checkpoint is a float model.*for_training=True"):
        AutoModelForImageClassification.from_pretrained(dense, quantization_config=BiDRNConfig())


def test_a_float_checkpoint_for_training_is_no_usable_model(dense, caplog):
    config = BiDRNConfig(for_training=True)
    with caplog.at_level(logging.WARNING, logger="hf_lowbit"):
        model = AutoModelForImageClassification.from_pretrained(dense, quantization_config=config)
    assert "not trained: the model computes nothing of use" in caplog.text
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match=r"have never been trained.*so it is not packed"):
        pack_convs(model)
    with pytest.raises(ValueError, match=r"the model is in training form; hf_lowbit\.pack_convs"):
        model.save_pretrained(dense.parent / "never")
    assert not (dense.parent / "never" / "model.safetensors").exists()
    pack_convs(model, allow_untrained=True)  # for tests and measurements


def test_the_training_form_comes_back(dense, tmp_path, caplog):
    config = BiDRNConfig(for_training=True, save_latents=True)
    model = AutoModelForImageClassification.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "untrained")
    with caplog.at_level(logging.WARNING, logger="hf_lowbit"):
        caplog.clear()
        AutoModelForImageClassification.from_pretrained(tmp_path / "untrained")
    assert "have never been trained" in caplog.text
    trained(model)
    with torch.no_grad():
        expected = model(images()).logits
    model.save_pretrained(tmp_path / "latents")
    caplog.clear()
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "latents")
    assert "never been trained" not in caplog.text
    with torch.no_grad():
        assert torch.equal(again(images()).logits, expected)
    assert again.hf_quantizer.is_qat_trainable
    for one, other in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    trained(again, 1)  # goes on
    with torch.no_grad():
        expected = again(images()).logits
        pack_convs(again)
        torch.testing.assert_close(again(images()).logits, expected, rtol=1e-4, atol=1e-4)


def test_latents_with_missing_buffers_are_refused(tmp_path):
    model = resnet()
    binarize_convs(model, BiDRNConfig(save_latents=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    victim = next(name for name in tensors if name.endswith("norm.running_var"))
    del tensors[victim]
    save_file(tensors, file, {"format": "pt"})
    with unverified(), pytest.raises(CheckpointError, match=f"{victim} is in none of the weight files"):
        ResNetForImageClassification.from_pretrained(tmp_path)


# Packed form ---------------------------------------------------------------------------------------------------------


def test_packed_models_come_back_bit_by_bit(packed, tmp_path):
    folder, answers = packed
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert not model.hf_quantizer.is_trainable
    assert len(packed_convs(model)) == 9 and not units(model)
    assert all(not p.requires_grad for m in packed_convs(model).values() for p in m.parameters())
    with torch.no_grad():
        assert torch.equal(model(images()).logits, answers)
    save_model(model, tmp_path / "again")
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    base = ResNetModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(images()).pooler_output, model.resnet(images()).pooler_output)


def test_other_dtypes_keep_what_is_stored(packed):
    folder, answers = packed
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for name, module in packed_convs(model).items():
        for leaf, parameter in module.packed_tensors():
            assert torch.equal(parameter, stored[f"{name}.{leaf}"])
    with torch.no_grad():
        found = model(images().bfloat16()).logits
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; some signs turn where an activation is next to 0
    assert (found.float() - answers).norm() < 0.1 * answers.norm()


def test_dequantized_models_compute_the_same(packed):
    folder, answers = packed
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.dequantize()
    assert not packed_convs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images()).logits, answers, rtol=1e-4, atol=1e-4)


def test_compiled_models_compute_the_same(packed):
    model = AutoModelForImageClassification.from_pretrained(packed[0])
    compiled = torch.compile(model.resnet.encoder.stages[1].layers[0], backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 32, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.resnet.encoder.stages[1].layers[0](x))


def test_inspect_and_verify(packed):
    folder, _ = packed
    assert verify(folder).problems == ()
    found = inspect(folder)
    assert len(found.modules) == 9 and {module.format for module in found.modules} == {"binary_conv"}
    assert found.total_bytes == sum(file.stat().st_size for file in folder.iterdir())
    with safe_open(folder / "model.safetensors", "pt") as file:
        size = sum(file.get_tensor(k).nbytes for k in file.keys() if ".weight_" in k)
    assert size == found.packed_bytes


def damage(folder, target, change):
    """Copy a model with other tensors or another config; checksums are not what is tested here."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


FIRST = "resnet.encoder.stages.0.layers.0.layer.0.convolution"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t[f"{FIRST}.weight_sign"].fill_(255), "damaged checkpoint: .*sign has padding bits set"),
        (lambda t, c: t[f"{FIRST}.weight_affine"].fill_(float("inf")), "affine holds NaN or infinity"),
        (lambda t, c: t.pop(f"{FIRST}.weight_act"), "weight_act is in none of the weight files"),
        (lambda t, c: t.update({f"{FIRST}.weight_shift": torch.zeros(17)}), r"weight_shift in .* is F32 \[17\]"),
        (
            lambda t, c: t.update({f"{FIRST}.weight_scale": torch.zeros(3)}),
            "the spec in config.json has no such tensor",
        ),
        (lambda t, c: t.update({f"{FIRST}.weight": torch.zeros(8, 16, 1, 1)}), "a packed layer has a stub"),
        (lambda t, c: c["modules"][FIRST]["spec"].update(kernel=[3, 3]), "in_features is 16"),
        (lambda t, c: c["modules"][FIRST]["spec"].update(stride=[2, 2]), "the model's layer is"),
        (lambda t, c: c["modules"][FIRST]["spec"].update(kernel=3), "kernel must be two integers"),
        (lambda t, c: c["modules"].update({"classifier.1": c["modules"][FIRST]}), "no convolution of this name"),
        (lambda t, c: c["modules"].pop(FIRST), "config.json does not list it"),
        (lambda t, c: c.update(latents=[FIRST]), "latents and modules must not be given together"),
        (lambda t, c: c.update(latents=["a\nb"], modules=None), "latents must be names of modules"),
        (lambda t, c: c.update(latents=[FIRST], modules=None), "is in none of the weight files"),
        (lambda t, c: c.update(latents=["nowhere"], modules=None), "nowhere: the model has no convolution"),
    ],
)
def test_damaged_models_are_refused(packed, tmp_path, change, message):
    folder = damage(packed[0], tmp_path / "damaged", change)
    with unverified(), pytest.raises((CheckpointError, ValueError), match=message):
        ResNetForImageClassification.from_pretrained(folder)


def test_a_flipped_bit_is_found(packed, tmp_path):
    tensors = load_file(packed[0] / "model.safetensors")
    with safe_open(packed[0] / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors[f"{FIRST}.weight_sign"][0, 0] ^= 1
    (tmp_path / "flipped").mkdir()
    save_file(tensors, tmp_path / "flipped" / "model.safetensors", metadata)
    (tmp_path / "flipped" / "config.json").write_bytes((packed[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"weight_sign in model\.safetensors: does not match its checksum"):
        ResNetForImageClassification.from_pretrained(tmp_path / "flipped")
    assert verify(tmp_path / "flipped").problems


def test_compression_runs_refuse_a_method_of_training():
    for config in (BiDRNConfig(), LowBitRecipe({"*": BiDRNConfig()})):
        with pytest.raises(ValueError, match="bidrn makes convolutions binary by training, not in a compression run"):
            quantize(resnet(), config)


def test_other_models_and_configs_are_refused():
    for run in (binarize_convs, pack_convs):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            run("resnet")
        with pytest.raises(TypeError, match="config must be a BiDRNConfig, got dict"):
            run(generic(), {"ste": "poly"})


def test_one_convolution_under_two_names_is_refused():
    model = generic()
    model.add_module("again", model[2].conv2)
    with pytest.raises(ValueError, match=r"2\.conv2 and again are the same convolution"):
        binarize_convs(model)
    assert not units(model)


def test_only_activations_that_would_make_signs_constant_go():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic"))
    first = model.encoder.stages[0].layers[0].layer[0]
    first.activation = nn.Tanh()
    binarize_convs(model, BiDRNConfig())
    assert isinstance(first.convolution, BinaryUnit) and isinstance(first.activation, nn.Tanh)


def test_strides_that_cannot_be_stored_stay_dense():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, 65), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 2)
    )
    assert "stride must be two integers from 1 to 64" in select(model, BiDRNConfig()).dense["1"]


def test_configs_that_make_no_sense_are_refused():
    for values, message in (
        ({"latents": "abc"}, "latents must be a list"),
        ({"latents": ["a."]}, "latents must be names of modules"),
        ({"ste": "none"}, "ste must be one of"),
        ({"min_channels": 0}, "min_channels must be"),
    ):
        with pytest.raises(ValueError, match=message):
            BiDRNConfig(**values)
    config = BiDRNConfig(latents=["a.b"], save_latents=True)
    assert BiDRNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="has no binary convolutions in training form"):
        pack_convs(resnet())


def test_a_layer_that_is_not_registered_fails_loudly(packed, tmp_path):
    """Without this package the stub does not fit a convolution's weight."""
    with safe_open(packed[0] / "model.safetensors", "pt") as file:
        assert list(file.get_slice(f"{FIRST}.weight").get_shape()) == [1]


# The body-mesh network -----------------------------------------------------------------------------------------------


def test_body_mesh_life_cycle(tmp_path):
    torch.manual_seed(0)
    model = BiDRNForBodyMesh(BodyMeshConfig.tiny()).train()
    x = images(2, 96)
    out = model(x)
    shapes = {"root_pose": (6,), "body_pose": (21, 6), "shape": (10,), "cam": (3,), "lhand_pose": (15, 6)}
    shapes |= {"rhand_pose": (15, 6), "expr": (10,), "jaw": (6,), "joint_img": (65, 3)}
    shapes |= {"box_centers": (3, 2), "box_sizes": (3, 2)}
    assert {name: tuple(value.shape) for name, value in out.items()} == {n: (2, *s) for n, s in shapes.items()}
    assert 0 <= out.box_centers.min() and out.box_centers.max() <= 1
    sum(value.square().mean() for value in out.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path / "latents")
    again = AutoModel.from_pretrained(tmp_path / "latents")
    assert isinstance(again, BiDRNForBodyMesh) and isinstance(
        AutoConfig.from_pretrained(tmp_path / "latents"), BodyMeshConfig
    )
    with torch.no_grad():
        assert all(torch.equal(again(x)[name], value) for name, value in expected.items())
        pack_convs(again)
        packed = again(x)
        for name, value in expected.items():  # relative to the size of the output
            assert (packed[name] - value).norm() <= 1e-4 * max(float(value.norm()), 1.0), name
        save_model(again, tmp_path / "packed")
        loaded = AutoModel.from_pretrained(tmp_path / "packed")
        assert all(torch.equal(loaded(x)[name], value) for name, value in packed.items())
        assert torch.equal(loaded(x, return_dict=False)[0], packed.root_pose)
    assert verify(tmp_path / "packed").problems == ()
    assert len(packed_convs(loaded)) == 3 * 16 + 3


def test_what_was_read_is_not_made_anew(tmp_path):
    model = BiDRNForBodyMesh(BodyMeshConfig.tiny(shift="affine"))
    with torch.no_grad():
        for unit in units(model).values():
            unit.act.fill_(0.75)
            unit.shift.fill_(0.5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    less = {name: tensor for name, tensor in tensors.items() if not name.endswith("trained_batches")}
    save_file(less, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for unit in units(AutoModel.from_pretrained(tmp_path)).values():
        assert unit.act.eq(0.75).all() and unit.shift.eq(0.5).all() and unit.trained_batches == 0


@pytest.mark.parametrize(
    "style", [{"binarize": False, "binarize_box": False}, {"named_modules": True}, {"lcr": False}]
)
def test_body_mesh_styles(style):
    torch.manual_seed(0)
    model = BiDRNForBodyMesh(BodyMeshConfig.tiny(**style)).eval()
    with torch.no_grad():
        assert all(torch.isfinite(value).all() for value in model(images(1, 64)).values())
    assert bool(units(model)) == style.get("binarize", True)
    if not units(model):
        assert len(binarize_convs(model, BiDRNConfig()).binary) > 40  # the float network can be converted, too


def test_body_mesh_configs_are_checked():
    for change, message in (
        ({"body_depth": 34}, "body_depth must be one of 18, 50"),
        ({"body_shape": (65, 64)}, "body_shape must be two multiples of 32"),
        ({"width": 0}, "width must be an integer from 1"),
        ({"block_residual": "x"}, "block_residual must be one of"),
        ({"body_depth": [18]}, "body_depth must be one of 18, 50"),
        ({"head_width": 5}, "head_width must be two multiples of 1"),
        ({"binarize": "no"}, "binarize must be true or false, got 'no'"),
        ({"lcr": 1}, "lcr must be true or false, got 1"),
        ({"width": 0, "ste": "x"}, "width must be an integer .*; ste must be one of"),
    ):
        with pytest.raises(ValueError, match=f"BodyMeshConfig: {message}"):
            BiDRNForBodyMesh(BodyMeshConfig.tiny(**change))
    model = BiDRNForBodyMesh(BodyMeshConfig.tiny())
    for shape in ((1, 4, 64, 64), (3, 64, 64), (0, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"pixel_values must be \(N, 3, H, W\)"):
            model(torch.zeros(shape))


def test_packed_convolutions_refuse_an_output_size():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    binarize_convs(model)
    pack_convs(model, allow_untrained=True)
    assert isinstance(model[1], PackedConv2d)
    with pytest.raises(ValueError, match="fixed output size"):
        model[1](torch.zeros(1, 8, 4, 4), [9, 9])
