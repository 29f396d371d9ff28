"""Picture measures, one number per frame, so that a mean over frames is a mean of frames. Pure functions on tensors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MAX_PSNR_DB = 100.0
"""What equal pictures score: the mean square is floored at 1e-10, so that means stay finite."""
SSIM_WINDOW = 11
"""Side of the Gaussian window in pixels."""
SSIM_SIGMA_PX = 1.5
"""Its standard deviation."""


def psnr(image: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"] | None = None) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each picture, with the squares averaged over the mask's pixels only.

    10 log10(1 / (Σ m d² / (c Σ m))): the masked area's size does not enter, unlike with pictures multiplied by a mask.

    Args:
        image: [0, 1].
        truth: [0, 1].
        mask: weights in [0, 1]; everything if left out. A frame whose mask is empty scores nan.

    Reference: Talk3D (arXiv 2403.20153) reports PSNR; the masked definition is ours.
    """
    square = (image - truth).double().square().mean(1, keepdim=True)
    weight = torch.ones_like(square) if mask is None else mask.double()
    mean = (weight * square).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return (-10 * mean.clamp_min(10 ** (-MAX_PSNR_DB / 10)).log10()).float()


def ssim(image: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"] | None = None) -> Float[Tensor, " b"]:
    """Structural similarity of each picture: the mean of `ssim_map`, weighted by the mask at the windows' centres.

    Args:
        image: [0, 1].
        truth: [0, 1].
        mask: weights in [0, 1]; everything if left out. A frame whose mask is empty scores nan.
    """
    local = ssim_map(image, truth).mean(1, keepdim=True)
    border = SSIM_WINDOW // 2
    weight = torch.ones_like(local) if mask is None else mask[..., border:-border, border:-border].to(local)
    return (weight * local).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def ssim_map(image: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h-10 w-10"]:
    """Structural similarity at every place where the 11×11 Gaussian window (σ 1.5) fits whole, per channel, for pictures in [0, 1].

    Reference: Wang et al., Image quality assessment: from error visibility to structural similarity, TIP 2004, equation 13
    (K1 0.01, K2 0.03, range 1).
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float32, device=image.device) - SSIM_WINDOW // 2
    window = (-0.5 * (offsets / SSIM_SIGMA_PX).square()).exp()
    window = window / window.sum()
    channels = image.shape[1]

    def blur(picture: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h-10 w-10"]:
        rows = F.conv2d(picture, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    x, y = image.float(), truth.float()
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    floor, contrast_floor = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + floor) / (mean_x**2 + mean_y**2 + floor)
    return luminance * (2 * covariance + contrast_floor) / (variance_x + variance_y + contrast_floor)


def box_mask(box: Float[Tensor, "b 4"], height: int, width: int) -> Float[Tensor, "b 1 h w"]:
    """1 where a pixel's centre lies in the box, 0 elsewhere.

    Args:
        box: left, top, right, bottom in pixels, pixel centres at half-integers.
        height: of the mask in pixels.
        width: of the mask in pixels.
    """
    x = torch.arange(width, device=box.device) + 0.5
    y = torch.arange(height, device=box.device) + 0.5
    left, top, right, bottom = (side[:, None] for side in box.unbind(1))
    across, down = (x >= left) & (x < right), (y >= top) & (y < bottom)
    return (down[:, None, :, None] & across[:, None, None, :]).float()
