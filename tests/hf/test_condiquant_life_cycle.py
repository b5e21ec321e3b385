"""A super-resolution model from dense to packed, saved, loaded, checked, pushed, measured; and what is damaged."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageToImage, Swin2SRForImageSuperResolution, Swin2SRModel
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import CheckpointError, CondiQuantConfig, packed_modules, unverified
from hf_lowbit.calibration.images import enlarge, load_images, shrink
from hf_lowbit.cli import app
from hf_lowbit.compress.checksums import metadata_of
from hf_lowbit.hf.card import CardFields, facts_of
from hf_lowbit.hf.card_page import render
from hf_lowbit.hf.pull import pull
from hf_lowbit.hf.push_model import push_model
from hf_lowbit.methods.condiquant.attention import QuantizedAttention, converted
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.super_resolution import evaluate_images
from hf_lowbit.report.verify import verify
from tests.calibration.test_images import photo, picture
from tests.methods.test_condiquant import photos, quick, tiny_model

GRIDS = "swin2sr.encoder.stages.0.layers.0.attention.self.activation.bounds"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "sr"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        picture(photo(48, 60, number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def packed(dense, images, tmp_path_factory):
    """A model of two bits in its folder, and what it makes of an image."""
    folder = tmp_path_factory.mktemp("packed") / "sr-2bit"
    config = quick(calibration=str(images), weight_bits=2, act_bits=2)
    model = Swin2SRForImageSuperResolution.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder)
    return folder, reconstruction(model)


def reconstruction(model):
    with torch.no_grad():
        return model(photos(2, 24).to(model.dtype)).reconstruction


def test_loaded_model_makes_the_same_images(packed):
    folder, want = packed
    for kind in (AutoModelForImageToImage, Swin2SRForImageSuperResolution):
        model = kind.from_pretrained(folder)
        assert torch.equal(reconstruction(model), want)
        assert len(packed_modules(model)) == 12
        assert {layer.packed.name for layer in packed_modules(model).values()} == {"integer"}
        assert len(dict(converted(model))) == 2


def test_compressed_while_loading_is_compressed_in_memory(dense, images, packed):
    model = Swin2SRForImageSuperResolution.from_pretrained(dense)
    report = hf_lowbit.quantize(model, quick(calibration=str(images), weight_bits=2, act_bits=2))
    assert torch.equal(reconstruction(model), packed[1])
    assert len(report.rows) == 12
    assert all(
        row["trace"][0]["condition_after"] <= row["trace"][0]["condition_before"] * 1.001 for row in report.rows
    )


def test_config_holds_no_path_and_no_image(packed, images):
    text = (packed[0] / "config.json").read_text()
    assert str(images) not in text
    stored = json.loads(text)["quantization_config"]
    assert stored["calibration"]["kind"] == "image folder"
    assert len(stored["calibration"]["sha256"]) == 64
    assert stored["weight_bits"] == stored["act_bits"] == 2
    assert set(stored["left_dense"].values()) == {"convolution", "makes a table of positions"}


def test_inspect_adds_up_to_the_disk_and_verify_finds_it_sound(packed):
    folder, _ = packed
    inspection = inspect(folder)
    assert inspection.total_bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    weights = {name: 24 * 24 for name in ("query", "key", "value")}
    assert inspection.packed_weights == 2 * (sum(weights.values()) + 24 * 24 + 2 * 24 * 48)
    assert inspection.packed_bytes == inspection.packed_weights * 2 // 8 + 12 * 16  # codes, and four ends a layer
    found = verify(folder)
    assert not found.problems
    assert found.modules == 12


def test_saved_again_it_is_the_same(packed, tmp_path):
    folder, want = packed
    model = AutoModelForImageToImage.from_pretrained(folder)
    reconstruction(model)
    model.save_pretrained(tmp_path / "again")
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(reconstruction(AutoModelForImageToImage.from_pretrained(tmp_path / "again")), want)


def test_half_precision_keeps_the_grids(packed):
    folder, want = packed
    model = Swin2SRForImageSuperResolution.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(grids.bounds.dtype == torch.float32 for _, grids in converted(model))
    assert all(layer.weight_bounds.dtype == torch.float32 for layer in packed_modules(model).values())
    found = reconstruction(model)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - want).norm() / want.norm()) < 0.1


def test_dequantized_model_is_the_packed_one_without_rounded_activations(packed):
    folder, _ = packed
    model = AutoModelForImageToImage.from_pretrained(folder)
    hf_lowbit.set_act_bits(model, 16)
    for _, grids in converted(model):
        grids.off = True
    want = reconstruction(model)
    plain = AutoModelForImageToImage.from_pretrained(folder).dequantize()
    assert not packed_modules(plain)
    assert not any(isinstance(module, QuantizedAttention) for module in plain.modules())
    torch.testing.assert_close(reconstruction(plain), want, atol=1e-4, rtol=1e-4)


def test_base_model_loads_from_the_files(packed):
    model = Swin2SRModel.from_pretrained(packed[0])
    assert len(packed_modules(model)) == 12
    assert all((grids.bounds[:, 0] < grids.bounds[:, 1]).all() for _, grids in converted(model))


def test_without_images_the_error_names_the_way(dense):
    with pytest.raises(hf_lowbit.CalibrationError, match=r"hf_lowbit\.quantize\(model, config\)"):
        Swin2SRForImageSuperResolution.from_pretrained(dense, quantization_config=CondiQuantConfig(weight_bits=2))


def test_without_images_dynamic_grids_survive_the_files(dense, tmp_path):
    config = quick(calibration=None, act_mode="dynamic", cond_strength=0)
    model = Swin2SRForImageSuperResolution.from_pretrained(dense, quantization_config=config)
    want = reconstruction(model)
    model.save_pretrained(tmp_path / "dynamic")
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path / "dynamic")
    assert torch.equal(reconstruction(loaded), want)
    assert len(dict(converted(loaded))) == 2


def rewritten(folder, target, change):
    """Copy a model with changed tensors and checksums that fit them."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt", **metadata_of(tensors)})
    return target


def test_missing_grids_are_an_error(packed, tmp_path):
    broken = rewritten(packed[0], tmp_path / "broken", lambda tensors: tensors.pop(GRIDS))
    with unverified(), pytest.raises(CheckpointError, match="missing from the checkpoint"):
        AutoModelForImageToImage.from_pretrained(broken)


@pytest.mark.parametrize("name", [GRIDS, "swin2sr.encoder.stages.0.layers.0.output.dense.weight_act_bounds"])
@pytest.mark.parametrize("bad", [[2.0, 1.0], [float("nan"), 1.0]])
def test_damaged_grids_are_an_error(packed, tmp_path, name, bad):
    def change(tensors):
        tensors[name] = torch.tensor(bad).expand_as(tensors[name]).contiguous()

    broken = rewritten(packed[0], tmp_path / "broken", change)
    with unverified(), pytest.raises(CheckpointError, match="bounds"):
        AutoModelForImageToImage.from_pretrained(broken)
    if name != GRIDS:  # of grids inside attention, verify compares the checksums, and loading looks at the values
        assert any("bounds" in problem for problem in verify(broken).problems)


def test_eval_is_beside_bicubic(packed, dense, images):
    result = evaluate_images(packed[0], str(images), dense, samples=2)
    assert list(result["models"]) == ["sr-2bit", "sr", "bicubic"]
    assert result["images"] == 2
    assert result["models"]["sr-2bit"]["bytes"] < result["models"]["sr"]["bytes"]
    from hf_lowbit.numerics.image_quality import psnr

    expected = [
        float(psnr(enlarge(shrink(image.unsqueeze(0), 2), 2), image.unsqueeze(0), 2))
        for image in load_images(images)[:2]
    ]
    assert result["models"]["bicubic"]["psnr"] == pytest.approx(sum(expected) / 2)


def test_pushed_and_loaded_from_the_hub(packed, hub):
    folder, want = packed
    model = AutoModelForImageToImage.from_pretrained(folder)
    push_model(model, "user/sr-2bit", fields=CardFields("org/sr", "mit"))
    assert torch.equal(reconstruction(AutoModelForImageToImage.from_pretrained("user/sr-2bit")), want)
    assert "CondiQuant" in (pull("user/sr-2bit", folder.with_name("pulled")) / "README.md").read_text()
    assert not verify(folder.with_name("pulled")).problems


def test_card_shows_what_eval_measured(packed, dense, images):
    result = json.loads(json.dumps(evaluate_images(packed[0], str(images), dense)))
    text = render(facts_of(packed[0], "user/sr-2bit", CardFields("org/sr", "mit"), results=result))
    own = result["models"]["sr-2bit"]
    assert f"| sr-2bit (this model) | {own['psnr']:.2f} | {own['ssim']:.4f} |" in text
    assert f"| bicubic | {result['models']['bicubic']['psnr']:.2f} |" in text
    assert "pipeline_tag: image-to-image" in text
    assert "AutoModelForImageToImage.from_pretrained" in text
    assert "a folder of images, not published; 4 patches of 16 pixels" in text
    data = ModelCard(text).data
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("psnr", round(own["psnr"], 2)),
        ("ssim", round(own["ssim"], 4)),
    ]
    for change in ({"models": {}}, {"scale": "two"}, {"images": None}):
        with pytest.raises(ValueError, match="results must be what"):
            facts_of(packed[0], "user/sr-2bit", CardFields("org/sr", "mit"), results={**result, **change})


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(dense, images, tmp_path):
    out = tmp_path / "sr-w3"
    options = (
        "weight_bits=3",
        "act_bits=3",
        "cond_strength=0.01",
        "cond_steps=2",
        "patch_size=16",
        "dobi_candidates=5",
    )
    flags = [item for option in options for item in ("--option", option)]
    done = run("quantize", dense, out, "--method", "condiquant", "--calibration", images, "--samples", 3, *flags)
    assert done.exit_code == 0, done.output
    assert "packed 12 layers" in done.output
    assert run("verify", out).exit_code == 0
    shown = run("eval", out, "--against", dense, "--data", images, "--json")
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.stdout)["models"]) == {"sr-w3", "sr", "bicubic"}
    assert "PSNR" in run("eval", out, "--data", images).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibration", "nowhere"), "neither a file nor a folder"),
        ((), "needs calibration images"),
        (("--calibration", "none"), "needs calibration images"),
        (("--calibration", "IMAGES", "--sequence-length", "8"), "takes no sequence_length"),
        (("--calibration", "IMAGES", "--option", "weight_bits=5"), "weight_bits must be one of 2, 3, 4, 8"),
        (("--calibration", "IMAGES", "--option", "cond_strength=high"), "cond_strength must be 'auto' or a number"),
    ],
)
def test_command_line_says_what_is_wrong(dense, images, tmp_path, arguments, message):
    given = [str(images) if item == "IMAGES" else item for item in arguments]
    done = run("quantize", dense, tmp_path / "out", "--method", "condiquant", *given)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
