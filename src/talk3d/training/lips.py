"""What lips show: a lip reader of one person, taught on their clip, and the published expert that hears as well.

The reader is our offline stand-in for a lip-sync expert: where the expert of Wav2Lip asks whether lips and sound belong together, the reader asks
whether the rendered mouth reads like the filmed one.

Reference: the frozen expert of lips is Wav2Lip's (arXiv 2008.10010).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.ops.geometry import fit_similarity, project
from talk3d.perception.lipsync import MEL_STEPS, NUM_FRAMES, SYNC_FPS, expert_mel, load_sync_expert
from talk3d.training.losses import MOUTH, RIGID, MouthShapes
from talk3d.types import Camera, Waveform

CROP_SIDE = 32
"""Pixels a side of what the reader sees."""
CROP_EXTENT = 1.3
"""Side of the square round the mouth, in units of the mouth's median extent."""
FACE = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 234, 454, 152)
"""Brows, ears and chin: round them lies what the expert sees."""
FACE_EXTENT = 1.1
"""Its width and height, in units of theirs: a chin falls when the mouth opens."""
FACE_SIDE = 96
"""Pixels a side of it."""
LOOK_SIDE = 24
"""Pixels a side of what mouths are described by."""
LOOK_SPAN = ((-0.125, 0.125), (-0.025, -0.245))
"""From left to right and from the nose to the chin, scene units."""


def mouth_looks(pictures: Float[Tensor, "b 3 h w"], cameras: Camera) -> Float[Tensor, "b c"]:
    """Show the lower face as a camera that follows the head sees it: what a curved piece of head space looks like that holds mouth and chin.

    Colours tell more than face points do: on bearded people a face network may miss half of the lips' motion. Each picture's mean colour is taken
    away, which light changes and lips hardly, and its border counts less.

    Args:
        pictures: of the head, in [-1, 1].
        cameras: that took them.
    """
    (left, right), (top, bottom) = LOOK_SPAN
    y, x = torch.meshgrid(torch.linspace(top, bottom, LOOK_SIDE), torch.linspace(left, right, LOOK_SIDE), indexing="ij")
    surface = torch.stack([x, y, 0.175 - 2.2 * x.square() - 2.4 * (y + 0.1).clamp(max=0).square()], -1).view(1, -1, 3)
    seen = project(surface.expand(len(pictures), -1, -1), cameras).unflatten(1, (LOOK_SIDE, LOOK_SIDE))
    small = F.avg_pool2d(pictures, max(1, pictures.shape[-1] // 128))
    mouth = F.grid_sample(small, 2 * seen - 1, padding_mode="border", align_corners=False)
    window = torch.hann_window(LOOK_SIDE + 2, periodic=False)[1:-1].sqrt()
    return ((mouth - mouth.mean((2, 3), keepdim=True)) * window[:, None] * window).flatten(1)


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
    """Return where each frame's mouth is, as `steady_windows` does: a square with some room round it."""
    mouth = landmarks.float().median(0).values[list(MOUTH)]
    extent = CROP_EXTENT * (mouth.amax(0) - mouth.amin(0)).amax()
    return steady_windows(landmarks, (mouth.amax(0) + mouth.amin(0)) / 2, extent.expand(2), side)


def face_windows(landmarks: Float[Tensor, "t n 2"], side: int) -> Float[Tensor, "t 2 3"]:
    """Return where each frame's face is, from brow to chin and ear to ear, as `steady_windows` does: a box with a little room round it."""
    face = landmarks.float().median(0).values[list(FACE)]
    return steady_windows(landmarks, (face.amax(0) + face.amin(0)) / 2, FACE_EXTENT * (face.amax(0) - face.amin(0)), side)


def steady_windows(landmarks: Float[Tensor, "t n 2"], centre: Float[Tensor, " 2"], extent: Float[Tensor, " 2"], side: int) -> Float[Tensor, "t 2 3"]:
    """Return where a box round the median face is in each frame, as the affine map from a square of -1…1 to the picture's -1…1.

    Args:
        landmarks: face points in pixels; only the rigid ones place the box, so that it does not follow lips and chin.
        centre: of the box on the median face, pixels.
        extent: its width and height there, pixels.
        side: of the picture, pixels.
    """
    points = landmarks.float()
    rigid = list(RIGID)
    middle = points.median(0).values[rigid]
    scale, rotation, shift = fit_similarity(points[:, rigid], middle.expand(len(points), -1, -1))
    linear = rotation.mT * (0.5 * extent / scale[:, None])[:, None]  # median face to frame: p = Rᵀ (q - shift) / scale
    place = ((centre - shift)[:, None] @ rotation)[:, 0] / scale[:, None]
    return torch.cat([linear * (2 / side), (place * (2 / side) - 1)[:, :, None]], 2)


def window_crops(pictures: Float[Tensor, "b 3 h w"], windows: Float[Tensor, "b 2 3"], crop_side: int = CROP_SIDE) -> Float[Tensor, "b 3 s s"]:
    """Cut the windows out, at twice the size first so that nothing aliases."""
    grid = F.affine_grid(windows.to(pictures), [len(pictures), 3, 2 * crop_side, 2 * crop_side], align_corners=False)
    return F.avg_pool2d(F.grid_sample(pictures, grid, padding_mode="border", align_corners=False), 2)


class SyncLoss:
    """Wav2Lip's expert before one clip: whether five consecutive pictures show what is heard with them."""

    def __init__(self, waveform: Waveform, landmarks: Float[Tensor, "t n 2"], fps: float, side: int, device: str = "cpu") -> None:
        """Load the expert.

        Args:
            waveform: of the clip; what comes after the frames of `landmarks` is not heard.
            landmarks: face points of the frames that may be looked at, pixels.
            fps: frames a second.
            side: of the pictures, pixels.
            device: where to compute.

        Raises:
            ConfigError: the clip has another rate than the films that the expert learnt from.
            WeightsError: the expert's weights are not there.
        """
        if abs(fps - SYNC_FPS) > 0.01:
            raise ConfigError(f"weights.sync needs {SYNC_FPS:g} frames a second, got {fps:g}: track the video at {SYNC_FPS:g}, or give a weight of 0")
        self.expert = load_sync_expert(device=device)
        self.mel = expert_mel(waveform.cut(0.0, len(landmarks) / fps)).to(device)
        self.windows = face_windows(landmarks, side)

    def __call__(self, pictures: Float[Tensor, "5 3 h w"], first: int) -> Float[Tensor, ""]:
        """Return -log of the cosine of what is seen and what is heard, which is taken for the probability that they belong together.

        Args:
            pictures: frames `first` to `first` + 4, in [-1, 1].
            first: number of the first one.
        """
        seen = self.expert.see(window_crops(pictures, self.windows[first : first + NUM_FRAMES], FACE_SIDE))
        start = first * MEL_STEPS // NUM_FRAMES
        heard = self.expert.sound(self.mel[None, None, :, start : start + MEL_STEPS])
        return -(seen * heard).sum().clamp(1e-3, 1).log()


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
