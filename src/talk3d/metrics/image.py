"""Picture measures, one number per frame, so that a mean over frames is a mean of frames; parts of pictures; distances of sets of pictures."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw
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


def structure_loss(image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"], weight: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Return 1 - SSIM of pictures in [-1, 1], weighted at the windows' centres."""
    border = SSIM_WINDOW // 2
    different = 1 - ssim_map(0.5 * (image + 1), 0.5 * (target + 1))
    return (different * weight[..., border:-border, border:-border]).mean()


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


def box_around(points: Float[Tensor, "t n 2"], margin: float) -> Float[Tensor, "t 4"]:
    """Left, top, right, bottom of points, widened on each side by `margin` of the larger side."""
    low, high = points.amin(1), points.amax(1)
    border = margin * (high - low).amax(1, keepdim=True)
    return torch.cat([low - border, high + border], 1)


def outline_mask(landmarks: Float[Tensor, "n 2"], outline: tuple[int, ...], height: int, width: int) -> Float[Tensor, "1 h w"]:
    """1 inside a closed line of points, 0 elsewhere.

    Args:
        landmarks: in pixels, pixel centres at half-integers.
        outline: numbers of the points, in order.
        height: of the mask in pixels.
        width: of the mask in pixels.
    """
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon([(float(x) - 0.5, float(y) - 0.5) for x, y in landmarks[list(outline)]], fill=1)
    return torch.from_numpy(np.array(canvas, np.float32))[None]


def floats(pictures: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255  # b 3 h w


def flicker(pictures: UInt8[np.ndarray, "2 h w 3"], real: UInt8[np.ndarray, "2 h w 3"] | None, inside: Bool[np.ndarray, "h w"]) -> float:
    """Mean square, over some pixels, of the change from one frame to the next, less the real film's change; levels of 255; nan without pixels."""
    change = pictures[1].astype(np.float32) - pictures[0]
    if real is not None:
        change -= real[1].astype(np.float32) - real[0]
    return float(np.square(change[inside]).mean()) if inside.any() else float("nan")


def root_mean(squares: list[float]) -> float:
    """Square root of the mean of those that are numbers; nan if none is."""
    finite = [value for value in squares if np.isfinite(value)]
    return float(np.sqrt(np.mean(finite))) if finite else float("nan")


class _Ready(torch.nn.Module):
    """Hands on features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return features


def distribution_distances(
    network: torch.nn.Module, real: UInt8[np.ndarray, "t h w 3"], ours: UInt8[np.ndarray, "u h w 3"], device: str = "cpu"
) -> tuple[float, float]:
    """Fréchet and kernel distance between the features of two sets of pictures.

    Args:
        network: uint8 pictures to vectors.
        real: one set.
        ours: the other.
        device: where to compute the features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds, which training would wait for, too
    from torchmetrics.image.kid import KernelInceptionDistance

    features = [_features(network, pictures, device) for pictures in (real, ours)]
    ready = _Ready(features[0].shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept, which they are anyway
        metrics = [
            FrechetInceptionDistance(feature=ready),
            KernelInceptionDistance(feature=ready, subsets=50, subset_size=max(2, min(len(real), len(ours)) // 2)),
        ]
    for metric in metrics:
        for vectors, are_real in zip(features, (True, False), strict=True):
            metric.update(vectors, real=are_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torchmetrics draws the subsets
        mean, _ = metrics[1].compute()
    return float(metrics[0].compute()), float(mean)


def _features(network: torch.nn.Module, pictures: UInt8[np.ndarray, "t h w 3"], device: str) -> Float[Tensor, "t d"]:
    batches = (torch.from_numpy(np.ascontiguousarray(pictures[start : start + 8])) for start in range(0, len(pictures), 8))
    with torch.no_grad():
        return torch.cat([network(batch.permute(0, 3, 1, 2).to(device)).float().cpu() for batch in batches])  # b 3 h w
