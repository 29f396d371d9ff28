"""Whose face it is: embeddings of ArcFace's squeeze-and-excitation ResNet, and the crops that it expects.

The published weights come from `talk3d weights fetch arcface`; without them there is no identity measure, never a made-up one.

Reference: Deng et al., ArcFace (arXiv 1801.07698); Hu et al., Squeeze-and-Excitation Networks (arXiv 1709.01507).
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.io.catalogue import load_published

SIDE_PX = 112
FIVE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where eyes, nose tip and corners of the mouth lie in the crops that ArcFace learnt from, px; those on the picture's left come first."""
STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))
"""Channels and number of blocks; the first block of a stage halves the size."""


@runtime_checkable
class IdentityNetwork(Protocol):
    """Tells people apart."""

    source: str
    """Which network it is, to be recorded with what it measured."""

    def __call__(self, faces: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return unit vectors whose inner product is high for faces of the same person; differentiable."""
        ...


class _Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        weight = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * weight


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, depth: int, stride: int) -> None:
        super().__init__()
        if channels == depth:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, depth, 1, stride, bias=False), nn.BatchNorm2d(depth))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, depth, 3, 1, 1, bias=False),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, 3, stride, 1, bias=False),
            nn.BatchNorm2d(depth),
            _Excitation(depth),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.res_layer(x) + self.shortcut_layer(x)


class ArcFace(nn.Module):
    """IR-SE50 with the names of the published file (model_ir_se50.pth)."""

    source = "ArcFace IR-SE50"

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, channels = [], 64
        for depth, count in STAGES:
            for number in range(count):
                blocks.append(_Bottleneck(channels, depth, 1 if number else 2))
                channels = depth
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.6), nn.Flatten(), nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512))

    def forward(self, faces: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 512"]:
        """Embed RGB faces in [-1, 1]; other sizes than 112 px are averaged down or blown up to it."""
        if faces.shape[-2:] != (SIDE_PX, SIDE_PX):
            faces = F.adaptive_avg_pool2d(faces, SIDE_PX)
        return F.normalize(self.output_layer(self.body(self.input_layer(faces))), dim=-1)


def load_identity(path: Path | None = None, device: str = "cpu") -> ArcFace:
    """Return the published network, frozen.

    Args:
        path: of its weights, in place of those in the cache folder.
        device: where to compute.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = ArcFace()
    load_published("arcface", network, path)
    return network.eval().requires_grad_(False).to(device)


def align_faces(pictures: Float[Tensor, "b 3 h w"], points: Float[Tensor, "b 5 2"], side_px: int = SIDE_PX) -> Float[Tensor, "b 3 s s"]:
    """Cut out faces so that their five points come to lie, as well as a turn, a scale and a shift can, where ArcFace expects them.

    Differentiable in the pictures. What lies beyond a picture repeats its edge.

    Args:
        pictures: with faces of more than `side_px`, or of about it; smaller steps than a pixel are bilinear, larger ones are not averaged.
        points: eyes, nose tip and corners of the mouth in px, in the order of `FIVE_POINTS`; a pixel's centre is at a half.
        side_px: of the crops.
    """
    template = points.new_tensor(FIVE_POINTS) * (side_px / SIDE_PX)
    source, target = points - points.mean(1, keepdim=True), template - template.mean(0)
    # least squares over complex numbers: one factor turns and scales the template's points onto the picture's
    factor = (torch.view_as_complex(target.contiguous()).conj() * torch.view_as_complex(source.contiguous())).sum(-1) / target.square().sum()
    centres = torch.arange(side_px, device=points.device, dtype=points.dtype) + 0.5
    grid = torch.complex(*torch.meshgrid(centres, centres, indexing="xy")) - torch.complex(*template.mean(0).unbind())
    places = torch.view_as_real(grid * factor[:, None, None]) + points.mean(1)[:, None, None]
    size = points.new_tensor([pictures.shape[3], pictures.shape[2]])
    return F.grid_sample(pictures, 2 * places / size - 1, padding_mode="border", align_corners=False)
