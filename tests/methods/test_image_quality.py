"""PSNR and SSIM of the luma against definitions written with loops."""

import math

import pytest
import torch

from hf_lowbit.numerics.image_quality import luma, psnr, ssim


def slow_luma(image):
    values = [
        [[round(float(image[c, y, x]) * 255) / 255 for x in range(image.shape[2])] for y in range(image.shape[1])]
        for c in range(3)
    ]
    red, green, blue = (torch.tensor(part, dtype=torch.float64) for part in values)
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def slow_ssim(a, b):
    weights = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    window = torch.outer(weights, weights) / weights.sum() ** 2
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 6.5025) * (2 * cov + 58.5225)
            found.append(top / ((mean_p**2 + mean_q**2 + 6.5025) * (var_p + var_q + 58.5225)))
    return torch.stack(found).mean()


@pytest.mark.parametrize("border", [0, 2, 3])
def test_the_definitions(border):
    images = torch.rand(2, 3, 19, 23)
    truth = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    own = slice(border, -border or None)
    for number in range(2):
        a, b = (slow_luma(one[number])[own, own] for one in (images, truth))
        torch.testing.assert_close(luma(images)[number][own, own], a)
        want = 10 * math.log10(255**2 / float((a - b).square().mean()))
        assert float(psnr(images, truth, border)[number]) == pytest.approx(want, abs=1e-9)
        assert float(ssim(images, truth, border)[number]) == pytest.approx(float(slow_ssim(a, b)), abs=1e-9)


def test_known_values():
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert float(luma(black)[0, 0, 0]) == 16
    assert float(luma(white)[0, 0, 0]) == pytest.approx(235)
    assert float(psnr(black, white)) == pytest.approx(10 * math.log10(255**2 / 219**2))
    assert float(psnr(white, white)) == math.inf
    assert float(ssim(white, white)) == pytest.approx(1)
    # rounded to 8 bits and clipped first
    assert float(psnr(white, white - 0.001)) == math.inf
    assert float(psnr(white, white + 3)) == math.inf


@pytest.mark.parametrize(
    ("images", "truth", "border", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), 0, "the true ones"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), 0, "must be floating"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), 8, "border must leave pixels"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), 4, "SSIM needs 11 pixels"),
    ],
)
def test_misfits_are_refused(images, truth, border, message):
    with pytest.raises(ValueError, match=message):
        ssim(images, truth, border)
