"""BiSeNet: parts of a face by a small network, after the names and shapes of the published file (79999_iter.pth).

Reference: Yu et al., BiSeNet (arXiv 1808.00897); the context path is a ResNet-18 (arXiv 1512.03385), whose stride 8 stands in for the spatial path.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.io.catalogue import load_published

NUM_CLASSES = 19
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels in [0, 1]."""


class _Block(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, channels: int, depth: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, depth, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(depth)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return self.bn(self.conv(x)).relu()


class _Residual(nn.Module):
    def __init__(self, channels: int, depth: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, depth, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(depth)
        self.conv2 = nn.Conv2d(depth, depth, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(depth)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, depth, 1, stride, bias=False), nn.BatchNorm2d(depth))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


class _Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1), _Residual(64, 64, 1))
        self.layer2 = nn.Sequential(_Residual(64, 128, 2), _Residual(128, 128, 1))
        self.layer3 = nn.Sequential(_Residual(128, 256, 2), _Residual(256, 256, 1))
        self.layer4 = nn.Sequential(_Residual(256, 512, 2), _Residual(512, 512, 1))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features at strides 8, 16 and 32."""
        eighth = self.layer2(self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu())))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class _Refinement(nn.Module):
    """Features weighed by what the whole picture says of their channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Block(channels, 128)
        self.conv_atten = nn.Conv2d(128, 128, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(128)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        features = self.conv(x)
        return features * self.bn_atten(self.conv_atten(features.mean((2, 3), keepdim=True))).sigmoid()


class _ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = _Resnet()
        self.arm16 = _Refinement(256)
        self.arm32 = _Refinement(512)
        self.conv_head32 = _Block(128, 128)
        self.conv_head16 = _Block(128, 128)
        self.conv_avg = _Block(512, 128, kernel=1)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Return two kinds of features at stride 8."""
        eighth, sixteenth, thirtysecond = self.resnet(x)
        whole = self.conv_avg(thirtysecond.mean((2, 3), keepdim=True))
        coarse = self.conv_head32(F.interpolate(self.arm32(thirtysecond) + whole, sixteenth.shape[-2:]))
        return eighth, self.conv_head16(F.interpolate(self.arm16(sixteenth) + coarse, eighth.shape[-2:]))


class _Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convblk = _Block(256, 256, kernel=1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, fine: Float[Tensor, "b c h w"], context: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        features = self.convblk(torch.cat([fine, context], 1))
        return features + features * self.conv2(self.conv1(features.mean((2, 3), keepdim=True)).relu()).sigmoid()


class _Output(nn.Module):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.conv = _Block(channels, depth)
        self.conv_out = nn.Conv2d(depth, NUM_CLASSES, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 19 h w"]:
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """The published face parser; its two outputs that only help training are kept, so that the file loads whole, and are not computed."""

    source = "BiSeNet 79999"

    def __init__(self) -> None:
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _Fusion()
        self.conv_out = _Output(256, 256)
        self.conv_out16 = _Output(128, 64)
        self.conv_out32 = _Output(128, 64)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 19 h w"]:
        """Return logits of the 19 classes for RGB pictures in [0, 1]; it learnt from 512 px."""
        mean, spread = (pictures.new_tensor(values)[:, None, None] for values in (MEAN, SPREAD))
        logits = self.conv_out(self.ffm(*self.cp((pictures - mean) / spread)))
        return F.interpolate(logits, pictures.shape[-2:], mode="bilinear", align_corners=True)


def load_bisenet(path: Path | None = None, device: str = "cpu") -> BiSeNet:
    """Return the published network, frozen; `path` in place of the file in the cache folder.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = BiSeNet()
    load_published("bisenet", network, path)
    return network.eval().requires_grad_(False).to(device)
