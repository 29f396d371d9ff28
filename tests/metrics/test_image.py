import math

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from talk3d.metrics.image import MAX_PSNR_DB, box_mask, psnr, ssim, ssim_map


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
