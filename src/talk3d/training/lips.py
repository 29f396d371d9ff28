"""A lip reader of one person, taught on their clip: which shape a picture of their mouth shows.

It is our offline stand-in for a lip-sync expert: where an expert asks whether lips and sound belong together, this one asks whether the rendered
mouth reads like the filmed one.

Reference: the idea of a frozen expert of lips is Wav2Lip's (arXiv 2008.10010).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.ops.geometry import fit_similarity
from talk3d.training.losses import MOUTH, RIGID, MouthShapes

CROP_SIDE = 32
"""Pixels a side of what the reader sees."""
CROP_EXTENT = 1.3
"""Side of the square round the mouth, in units of the mouth's median extent."""


class LipReader(nn.Module):
    """A small convolutional network from a picture of the mouth to the components of its shape."""

    def __init__(self, num_shapes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * (CROP_SIDE // 8) ** 2, num_shapes))

    def forward(self, crops: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k"]:
        """Read shapes off pictures in [-1, 1]."""
        return self.layers(crops)

    def loss(self, crops: Float[Tensor, "b 3 s s"], filmed: Float[Tensor, "b 3 s s"], shapes: MouthShapes) -> Float[Tensor, ""]:
        """Mean square difference of what is read off rendered and filmed mouths, weighted by importance."""
        with torch.no_grad():
            wanted = self(filmed)
        return ((self(crops) - wanted).square() * shapes.importance.to(wanted)).sum(1).mean()


def mouth_windows(landmarks: Float[Tensor, "t n 2"], side: int) -> Float[Tensor, "t 2 3"]:
    """Return where each frame's mouth is, as the affine map from a square of -1…1 to the picture's -1…1, steady on the skull.

    Args:
        landmarks: face points in pixels; only the rigid ones place the window, so that it does not follow the lips.
        side: of the picture, pixels.
    """
    points = landmarks.float()
    middle = points.median(0).values
    rigid = list(RIGID)
    scale, rotation, shift = fit_similarity(points[:, rigid], middle[rigid].expand(len(points), -1, -1))
    mouth = middle[list(MOUTH)]
    centre, extent = (mouth.amax(0) + mouth.amin(0)) / 2, (mouth.amax(0) - mouth.amin(0)).amax()
    linear = (0.5 * CROP_EXTENT * extent / scale)[:, None, None] * rotation.mT  # middle pose to frame: p = Rᵀ (q - shift) / scale
    place = ((centre - shift)[:, None] @ rotation)[:, 0] / scale[:, None]
    return torch.cat([linear * (2 / side), (place * (2 / side) - 1)[:, :, None]], 2)


def mouth_crops(pictures: Float[Tensor, "b 3 h w"], windows: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 3 s s"]:
    """Cut the mouths out, at twice the size first so that nothing aliases."""
    grid = F.affine_grid(windows.to(pictures), [len(pictures), 3, 2 * CROP_SIDE, 2 * CROP_SIDE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(pictures, grid, padding_mode="border", align_corners=False), 2)


def teach(
    reader: LipReader,
    crops: Float[Tensor, "t 3 s s"],
    values: Float[Tensor, "t k"],
    importance: Float[Tensor, " k"],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Teach the reader on filmed mouths: brightness, blur and noise vary, so that it reads shapes and not the film; it is frozen afterwards."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - number / steps)
        index: Int[Tensor, " b"] = torch.randint(len(crops), (32,), generator=generator)
        light, soft = torch.randn(2, 32, 1, 1, 1, generator=generator)
        seen = crops[index]
        seen = torch.lerp(seen, F.avg_pool2d(seen, 3, stride=1, padding=1, count_include_pad=False), soft.sigmoid())
        seen = seen + 0.1 * light + 0.03 * torch.randn(seen.shape, generator=generator)
        loss = ((reader(seen) - values[index]).square() * importance).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    reader.requires_grad_(False)
