"""Images for calibration and evaluation: all the forms they come in, patches, padding, and what is refused."""

import logging

import numpy
import pytest
import torch
from PIL import Image

from hf_lowbit import CalibrationError, CondiQuantConfig
from hf_lowbit.calibration.images import (
    calibration_patches,
    enlarge,
    load_images,
    padded,
    reconstructed,
    shrink,
)


def photo(height=40, width=56, seed=0):
    """Return an 8-bit image, (3, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture(photo(seed=number)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def config(data, **changes):
    return CondiQuantConfig(calibration=data, **{"samples": 5, "patch_size": 16, **changes})


def test_every_form_gives_the_same_image(folder):
    image = photo(seed=1)
    want = image.float() / 255
    forms = {
        "folder": load_images(folder)[1],
        "text": load_images(str(folder))[1],
        "file": load_images(folder / "1.png")[0],
        "names": load_images([folder / "0.png", str(folder / "1.png")])[1],
        "picture": load_images(picture(image))[0],
        "pictures": load_images([picture(image)])[0],
        "array": load_images([image.permute(1, 2, 0).numpy()])[0],
        "tensor": load_images([image])[0],
        "floats": load_images([want])[0],
        "batch": load_images(image.unsqueeze(0))[0],
        "one": load_images(image)[0],
        "rows": load_images([{"image": picture(image), "label": 3}])[0],
        "numpy batch": load_images(numpy.stack([want.numpy()]))[0],
    }
    for name, found in forms.items():
        assert found.dtype == torch.float32, name
        assert torch.equal(found, want), name
    assert len(load_images(folder)) == 3


def test_pictures_of_16_bits_are_not_clipped(tmp_path):
    grey = numpy.arange(0, 65536, 32, dtype=numpy.uint16).reshape(32, 64)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    want = torch.from_numpy(grey.astype(numpy.float32) / 65535).expand(3, -1, -1)
    for source in (tmp_path / "grey.png", Image.fromarray(grey)):
        torch.testing.assert_close(load_images(source)[0], want)
    for kind in (numpy.int32, numpy.float32):
        with pytest.raises(CalibrationError, match=r"image 0: pictures of mode [IF] are not taken"):
            load_images([Image.fromarray(grey.astype(kind))])


def test_grey_images_get_three_channels():
    grey = photo()[0]
    assert torch.equal(load_images([grey])[0], (grey.float() / 255).expand(3, -1, -1))
    assert torch.equal(load_images([Image.fromarray(grey.numpy())])[0], (grey.float() / 255).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("/nowhere", "neither a file nor a folder"),
        ("", "must be a folder, a file"),  # not the current folder
        ([], "there are no images"),
        ([torch.zeros(5, 4, 6)], "expected \\(3, H, W\\)"),
        ([torch.zeros(3, 4, 6, dtype=torch.int64)], "must be uint8, or floating"),
        ([torch.full((3, 4, 6), 2.0)], "must lie between 0 and 1"),
        ([torch.full((3, 4, 6), float("nan"))], "must lie between 0 and 1"),
        ([{"pixels": 1}], "must have an 'image'"),
        (["/nowhere.png"], "cannot read 'nowhere.png'"),
        ([object()], "image 0: is no image"),
        (3, "must be a folder"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        load_images(data)


def test_unreadable_files_and_empty_folders(tmp_path):
    with pytest.raises(CalibrationError, match="holds no images"):
        load_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(CalibrationError, match=r"cannot read 'broken.png'"):
        load_images(tmp_path)


def test_shrinking_is_that_of_pillow():
    """Bicubic with a = -0.5 and antialiasing; pillow rounds and clips after rows and again after columns."""
    image = 64 + photo(48, 64) // 2
    found = shrink(image.unsqueeze(0).float() / 255, 2)[0]
    want = numpy.asarray(picture(image).resize((32, 24), Image.Resampling.BICUBIC)).astype(int)
    assert numpy.abs((found * 255).round().permute(1, 2, 0).numpy().astype(int) - want).max() <= 2
    assert shrink(torch.zeros(1, 3, 7, 9), 4).shape == (1, 3, 1, 2)
    large = numpy.asarray(picture(image).resize((128, 96), Image.Resampling.BICUBIC)).astype(int)
    own = (enlarge(image.unsqueeze(0).float() / 255, 2)[0] * 255).round().permute(1, 2, 0).numpy().astype(int)
    assert numpy.abs(own - large).max() <= 2


def test_patches_are_the_same_every_time(folder):
    one, record = calibration_patches(config(str(folder)), 2, 8)
    assert one.shape == (5, 3, 16, 16)
    assert 0 <= one.min() <= one.max() <= 1
    again, other = calibration_patches(config(load_images(folder)), 2, 8)
    assert torch.equal(one, again)
    assert record.sha256 == other.sha256
    assert record.kind == "image folder"
    assert other.kind == "images"
    assert record.tokens == 5 * 16 * 16
    assert not torch.equal(one, calibration_patches(config(str(folder), seed=1), 2, 8)[0])


def test_patches_come_from_the_images():
    image = photo()
    patches, _ = calibration_patches(config([image], degradation="none", samples=1, seed=3), None, 1)
    windows = (image.float() / 255).unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    forms = [torch.rot90(patches[0].flip(-1) if m else patches[0], t, (-2, -1)) for m in (0, 1) for t in range(4)]
    assert any(bool((windows == form).flatten(1).all(1).any()) for form in forms)


def test_images_smaller_than_a_window_are_mirrored_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        patches, _ = calibration_patches(config([photo(10, 60)]), 2, 8)
    assert patches.shape == (5, 3, 16, 16)
    assert "1 of 1 calibration images are smaller than a patch of 16 pixels" in caplog.text
    odd, _ = calibration_patches(config([photo()], patch_size=10), 2, 8)
    assert odd.shape[-2:] == (16, 16)
    with pytest.raises(CalibrationError, match="smaller than the scale 4"):
        calibration_patches(config([photo(3, 3)]), 4, 8)


def test_a_scale_must_be_known():
    with pytest.raises(CalibrationError, match="degradation='none'"):
        calibration_patches(config([photo()]), None, 1)
    with pytest.raises(CalibrationError, match="names no calibration images"):
        calibration_patches(config(None), 2, 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 3), (20, 5)])
def test_padding_mirrors(size):
    image = torch.rand(2, 3, *size)
    found = padded(image, 8)
    assert all(side % 8 == 0 for side in found.shape[-2:])
    assert torch.equal(found[..., : size[0], : size[1]], image)
    if found.shape[-1] > size[1] > 1:
        assert torch.equal(found[..., : size[0], size[1]], image[..., -1])


class Dataset:
    """As those of `datasets` are: a shape of rows and columns, rows by index, and reading takes time."""

    def __init__(self, count):
        self.shape, self.read = (count, 2), []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        self.read.append(index)
        return {"image": picture(photo(seed=index)), "label": index}


def test_no_more_images_are_read_than_are_needed(folder):
    rows = Dataset(1000)
    calibration_patches(config(rows, samples=6), 2, 8)
    assert len(rows.read) == 6
    assert max(rows.read) > 100  # drawn from all of them
    first = Dataset(1000)
    assert len(load_images(first, 3)) == 3
    assert first.read == [0, 1, 2]
    assert len(load_images((photo(seed=i) for i in range(10)), 4, seed=0)) == 4
    assert len(load_images(folder, 2)) == 2
    assert len(load_images(Dataset(3))) == 3


def test_reconstruction_of_any_size():
    class Twice(torch.nn.Module):
        def forward(self, images):
            assert all(side % 8 == 0 for side in images.shape[-2:])
            return images.repeat_interleave(2, -1).repeat_interleave(2, -2)

    image = torch.rand(1, 3, 13, 5)
    assert torch.equal(reconstructed(Twice(), image, 2, 8), image.repeat_interleave(2, -1).repeat_interleave(2, -2))
