import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from talk3d.metrics.image import (
    MAX_PSNR_DB,
    box_around,
    box_mask,
    distribution_distances,
    flicker,
    outline_mask,
    psnr,
    root_mean,
    ssim,
    ssim_map,
    structure_loss,
)


def test_psnr_of_a_constant_difference_is_its_logarithm() -> None:
    truth = torch.rand(2, 3, 8, 8) * 0.5
    image = truth + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(image, truth), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)


def test_psnr_of_equal_pictures_is_finite() -> None:
    picture = torch.rand(1, 3, 8, 8)
    assert psnr(picture, picture).item() == MAX_PSNR_DB


def test_masked_psnr_looks_at_the_mask_alone() -> None:
    truth = torch.zeros(1, 3, 4, 4)
    image, mask = truth.clone(), torch.zeros(1, 1, 4, 4)
    image[..., :2, :] = 0.1
    image[..., 2:, :] = 0.9
    mask[..., :2, :] = 1
    assert math.isclose(psnr(image, truth, mask).item(), 20, abs_tol=1e-3)


def test_masked_psnr_weighs_soft_pixels() -> None:
    image, truth = torch.tensor([0.2, 0.4]).view(1, 1, 1, 2).expand(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    mask = torch.tensor([1.0, 0.5]).view(1, 1, 1, 2)
    expected = -10 * math.log10((1.0 * 0.04 + 0.5 * 0.16) / 1.5)
    assert math.isclose(psnr(image, truth, mask).item(), expected, rel_tol=1e-5)


def test_masked_psnr_of_noise_does_not_depend_on_the_area() -> None:
    truth = torch.full((1, 3, 256, 256), 0.5)
    image = truth + 0.1 * torch.randn(truth.shape)
    small, large = torch.zeros(1, 1, 256, 256), torch.ones(1, 1, 256, 256)
    small[..., :96, :96] = 1
    assert abs(psnr(image, truth, small).item() - psnr(image, truth, large).item()) < 0.1


def test_an_empty_mask_measures_nothing() -> None:
    picture = torch.rand(1, 3, 16, 16)
    assert psnr(picture, picture, torch.zeros(1, 1, 16, 16)).isnan().all()
    assert ssim(picture, picture, torch.zeros(1, 1, 16, 16)).isnan().all()


def test_ssim_of_constant_pictures_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert math.isclose(ssim(a, b).item(), expected, rel_tol=1e-3)


def test_ssim_agrees_with_torchmetrics_where_windows_fit_whole() -> None:
    a = torch.rand(2, 3, 40, 32)
    b = (a + 0.1 * torch.randn(a.shape)).clamp(0, 1)
    _, local = structural_similarity_index_measure(a, b, data_range=1.0, sigma=1.5, kernel_size=11, return_full_image=True)
    torch.testing.assert_close(ssim_map(a, b), local[..., 5:-5, 5:-5], atol=1e-4, rtol=0)


def test_masked_ssim_is_the_mean_of_the_map_inside() -> None:
    a, b = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 24, 24)
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 8:12, 6:20] = 1
    expected = ssim_map(a, b)[..., 3:7, 1:15].mean()
    torch.testing.assert_close(ssim(a, b, mask)[0], expected)


def test_box_mask_counts_pixel_centres() -> None:
    mask = box_mask(torch.tensor([[1.0, 0.6, 3.0, 2.5]]), 4, 5)
    expected = torch.zeros(1, 1, 4, 5)
    expected[..., 1:2, 1:3] = 1
    torch.testing.assert_close(mask, expected)


class Pixels(torch.nn.Module):
    """Eight features of a picture: its first pixels' red."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, 0, 0, :8].float() / 255


def test_the_same_pictures_are_no_distance_apart_and_moved_ones_as_far_as_they_moved() -> None:
    pictures = np.random.default_rng(0).integers(0, 200, (64, 16, 16, 3)).astype(np.uint8)
    fid, kid = distribution_distances(Pixels(), pictures, pictures)
    assert fid == pytest.approx(0, abs=1e-4) and abs(kid) < 0.01
    moved = pictures + np.uint8(51)  # every feature by 0.2, spread unchanged: the Fréchet distance is 8 · 0.2²
    fid, kid = distribution_distances(Pixels(), pictures, moved)
    assert fid == pytest.approx(8 * 0.04, rel=1e-3) and kid > 0.01


def test_flicker_of_noise_and_of_equal_change() -> None:
    rng = np.random.default_rng(0)
    inside = np.ones((200, 200), bool)
    still, noise = np.full((2, 200, 200, 3), 100, np.uint8), (100 + 5 * rng.standard_normal((2, 200, 200, 3))).round().astype(np.uint8)
    assert root_mean([flicker(noise, still, inside)]) == pytest.approx(5 * 2**0.5, rel=0.02)
    assert flicker(noise, noise, inside) == 0
    assert root_mean([flicker(np.stack([still[0], still[0] + np.uint8(4)]), None, inside)]) == 4
    assert np.isnan(flicker(noise, None, ~inside)) and np.isnan(root_mean([float("nan")]))


def test_known_noise_has_the_psnr_of_its_deviation() -> None:
    real = torch.full((1, 3, 300, 300), 0.5)
    noisy = real + 0.05 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    assert float(psnr(noisy, real)) == pytest.approx(-20 * np.log10(0.05), abs=0.05)
    half = box_mask(torch.tensor([[0.0, 0.0, 150.0, 300.0]]), 300, 300)
    assert float(psnr(noisy, real, half)) == pytest.approx(float(psnr(noisy, real)), abs=0.1)  # whatever the mask's size


def test_an_outline_covers_what_lies_inside() -> None:
    points = torch.tensor([[10.0, 10.0], [30.0, 10.0], [30.0, 20.0], [10.0, 20.0], [0.0, 0.0]])
    mask = outline_mask(points, (0, 1, 2, 3), 40, 40)
    assert float(mask.sum()) == pytest.approx(20 * 10, rel=0.2) and mask[0, 15, 20] == 1 and mask[0, 5, 5] == 0
    torch.testing.assert_close(box_around(points[None, :4], 0.5), torch.tensor([[0.0, 0.0, 40.0, 30.0]]))


def test_structure_is_one_less_the_similarity() -> None:
    image, target = (2 * torch.rand(2, 3, 24, 24) - 1 for _ in range(2))
    even = structure_loss(image, target, torch.ones(2, 1, 24, 24))
    torch.testing.assert_close(even, 1 - ssim(0.5 * (image + 1), 0.5 * (target + 1)).mean())
    assert structure_loss(target, target, torch.ones(2, 1, 24, 24)).abs() < 1e-6
