"""Features for the Fréchet distance (FID): Inception v3 as TensorFlow's FID has it, with the names of the published PyTorch file.

Give `load_inception()` to torchmetrics: `FrechetInceptionDistance(feature=load_inception())`, and feed it uint8 pictures.

Reference: Szegedy et al., Rethinking the Inception architecture (arXiv 1512.00567); Heusel et al., Two time-scale update rule (arXiv 1706.08500).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from talk3d.io.catalogue import load_published

SIDE_PX = 299
NUM_FEATURES = 2048


class _Block(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, channels: int, depth: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, depth, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(depth, eps=1e-3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.bn(self.conv(x)).relu()


def _strip(channels: int, depth: int, height: int, width: int) -> _Block:
    """A block that keeps the size, with a kernel of one row or one column."""
    return _Block(channels, depth, (height, width), padding=(height // 2, width // 2))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # TensorFlow leaves the padding out


class _Fine(nn.Module):
    """Branches of 1×1, 5×5 and twice 3×3."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Block(channels, 64)
        self.branch5x5_1 = _Block(channels, 48)
        self.branch5x5_2 = _Block(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Block(channels, 64)
        self.branch3x3dbl_2 = _Block(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Block(96, 96, 3, padding=1)
        self.branch_pool = _Block(channels, pooled)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean(x))], 1)


class _ShrinkFine(nn.Module):
    """Half the size, once."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Block(288, 384, 3, 2)
        self.branch3x3dbl_1 = _Block(288, 64)
        self.branch3x3dbl_2 = _Block(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Block(96, 96, 3, 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _Middle(nn.Module):
    """Branches of 7×7, in strips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Block(768, 192)
        self.branch7x7_1 = _Block(768, width)
        self.branch7x7_2 = _strip(width, width, 1, 7)
        self.branch7x7_3 = _strip(width, 192, 7, 1)
        self.branch7x7dbl_1 = _Block(768, width)
        self.branch7x7dbl_2 = _strip(width, width, 7, 1)
        self.branch7x7dbl_3 = _strip(width, width, 1, 7)
        self.branch7x7dbl_4 = _strip(width, width, 7, 1)
        self.branch7x7dbl_5 = _strip(width, 192, 1, 7)
        self.branch_pool = _Block(768, 192)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_mean(x))], 1)


class _ShrinkMiddle(nn.Module):
    """Half the size, a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Block(768, 192)
        self.branch3x3_2 = _Block(192, 320, 3, 2)
        self.branch7x7x3_1 = _Block(768, 192)
        self.branch7x7x3_2 = _strip(192, 192, 1, 7)
        self.branch7x7x3_3 = _strip(192, 192, 7, 1)
        self.branch7x7x3_4 = _Block(192, 192, 3, 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        large = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), large, F.max_pool2d(x, 3, 2)], 1)


class _Coarse(nn.Module):
    """Branches of 3×3 that fork; the last block of the published network pools by maximum."""

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = _Block(channels, 320)
        self.branch3x3_1 = _Block(channels, 384)
        self.branch3x3_2a = _strip(384, 384, 1, 3)
        self.branch3x3_2b = _strip(384, 384, 3, 1)
        self.branch3x3dbl_1 = _Block(channels, 448)
        self.branch3x3dbl_2 = _Block(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _strip(384, 384, 1, 3)
        self.branch3x3dbl_3b = _strip(384, 384, 3, 1)
        self.branch_pool = _Block(channels, 192)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else _mean(x)
        forks = [self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Inception v3 of 2015-12-05; its classifier is kept so that the file loads whole, and is not computed."""

    source = "Inception 2015-12-05"
    num_features = NUM_FEATURES
    """Read by torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Block(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Block(32, 32, 3)
        self.Conv2d_2b_3x3 = _Block(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Block(64, 80)
        self.Conv2d_4a_3x3 = _Block(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _Fine(192, 32), _Fine(256, 64), _Fine(288, 64)
        self.Mixed_6a = _ShrinkFine()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _Middle(128), _Middle(160), _Middle(160), _Middle(192)
        self.Mixed_7a = _ShrinkMiddle()
        self.Mixed_7b, self.Mixed_7c = _Coarse(1280, maximum=False), _Coarse(2048, maximum=True)
        self.fc = nn.Linear(NUM_FEATURES, 1008)

    def forward(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        """Return the features of RGB pictures, brought to 299 px bilinearly without averaging, as FID has always done."""
        x = F.interpolate(pictures.float() / 255, (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False) * 2 - 1
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load_inception(path: Path | None = None, device: str = "cpu") -> Inception:
    """Return the published network, frozen; `path` in place of the file in the cache folder.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = Inception()
    load_published("inception", network, path)
    return network.eval().requires_grad_(False).to(device)
