"""Whose face it is: embeddings of ArcFace's squeeze-and-excitation ResNet with the crops that it expects, and an offline descriptor of faces.

ArcFace's weights come from `talk3d weights fetch arcface`. `Likeness` needs nothing but face points and ships with the package; the two are never
mixed up: what they measure has different names.

Reference: Deng et al., ArcFace (arXiv 1801.07698); Hu et al., Squeeze-and-Excitation Networks (arXiv 1709.01507); for the descriptor,
Belhumeur et al., Eigenfaces vs. Fisherfaces, PAMI 1997.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from talk3d.errors import WeightsError
from talk3d.io.catalogue import load_published
from talk3d.perception.facetemplate import ModelKind, load_template
from talk3d.perception.headpose import RIGID_POINTS

SIDE_PX = 112
FIVE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where eyes, nose tip and corners of the mouth lie in the crops that ArcFace learnt from, px; those on the picture's left come first."""
LIKENESS_PATH = Path(__file__).resolve().parents[1] / "assets" / "likeness.safetensors"
NUM_POINTS = 468
PATCH_SHARE = 0.03
"""Between the five samples across, whose weighted mean is a point's colour; shares of the distance of the outer eye corners."""
NUM_COMPONENTS, NUM_TRAITS = 120, 40
"""Of the principal components that are kept, and of the directions in which people differ most against how one person varies."""
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


def five_points(landmarks: Float[Tensor, "b n 2"]) -> Float[Tensor, "b 5 2"]:
    """Eyes, nose tip and corners of the mouth out of MediaPipe's face points, in the order of `FIVE_POINTS`."""
    eyes = [landmarks[:, list(corners)].mean(1) for corners in ((33, 133), (362, 263))]
    return torch.stack([*eyes, landmarks[:, 1], landmarks[:, 61], landmarks[:, 291]], 1)


class Likeness:
    """Describes a face by the colours at its points and by where they lie, pose and light taken out as far as a linear projection can.

    Learnt from invented people (assets/likeness.md says how well it tells others apart). Not ArcFace: on real people it is a hint, not a proof.
    """

    source = "likeness of talk3d, 40 traits"

    def __init__(self, kind: ModelKind, path: Path = LIKENESS_PATH) -> None:
        """Load the projection.

        Args:
            kind: of the face model whose points will be given.
            path: of the projection, in place of the shipped one.

        Raises:
            WeightsError: the file is missing or damaged.
        """
        self.template = load_template(kind).points[:NUM_POINTS]
        try:
            tensors = load_file(path)
            self.mean, self.projection = tensors["mean"].float(), tensors["projection"].float()
        except (OSError, KeyError, SafetensorError) as error:
            raise WeightsError(f"the face descriptor {path} cannot be read ({error}): install the package again") from error

    def __call__(self, pictures: Float[Tensor, "b 3 h w"], landmarks: Float[Tensor, "b n 2"]) -> Float[Tensor, "b d"]:
        """Return unit vectors whose inner product is high for faces of one person.

        Args:
            pictures: [0, 1].
            landmarks: MediaPipe's order, pixels.
        """
        return F.normalize((face_features(pictures, landmarks, self.template) - self.mean) @ self.projection, dim=1)


def compare_shots(looks: Mapping[int, Float[Tensor, " d"]], cuts: tuple[int, ...]) -> dict[int, float]:
    """How alike the face of every shot is to that of the shot looked at most: cosine of the means of their descriptors, by the shots' first frames.

    Args:
        looks: unit vectors of the face in some frames. Shots without one are left out.
        cuts: frames at which a new shot begins.
    """
    shots: dict[int, list[Tensor]] = {}
    for frame, look in sorted(looks.items()):
        shots.setdefault(max((cut for cut in (0, *cuts) if cut <= frame), default=0), []).append(look)
    if not shots:
        return {}
    means = {begin: F.normalize(torch.stack(seen).mean(0), dim=0) for begin, seen in shots.items()}
    main = means[max(shots, key=lambda begin: len(shots[begin]))]
    return {begin: float(mean @ main) for begin, mean in means.items()}


def face_features(pictures: Float[Tensor, "b 3 h w"], landmarks: Float[Tensor, "b n 2"], template: Float[Tensor, "p 3"]) -> Float[Tensor, "b f"]:
    """Return what `Likeness` projects: places of the points beyond the template, in the head's axes, and their colours over the face's mean colour.

    Args:
        pictures: [0, 1].
        landmarks: MediaPipe's order, pixels.
        template: the points on the mean head.
    """
    points, rigid = landmarks[:, :NUM_POINTS].double(), list(RIGID_POINTS)
    place = template.double() * template.new_tensor([1, -1, -1])
    centre, middle = points[:, rigid].mean(1, keepdim=True), place[rigid].mean(0)
    linear = (points[:, rigid] - centre).mT @ torch.linalg.pinv(place[rigid] - middle).mT  # b 2 3
    u, size, vt = torch.linalg.svd(linear, full_matrices=False)
    turn = u @ vt
    beyond = (points - centre) / size.mean(1)[:, None, None] - (place - middle) @ turn.mT
    colours = _colours(pictures, landmarks[:, :NUM_POINTS])
    colours = colours / colours.mean(1, keepdim=True).clamp_min(1e-3)
    return torch.cat([10 * (beyond @ turn).float().flatten(1), colours.flatten(1)], 1)


def _colours(pictures: Float[Tensor, "b 3 h w"], landmarks: Float[Tensor, "b p 2"]) -> Float[Tensor, "b p 3"]:
    """Colour round each point: Gaussian weights over five by five samples."""
    steps = torch.arange(-2, 3, dtype=torch.float32)
    offsets = torch.cartesian_prod(steps, steps)
    weight = (-0.5 * (offsets.square().sum(1) / 1.3**2)).exp()
    reach = PATCH_SHARE * (landmarks[:, 33] - landmarks[:, 263]).norm(dim=1)
    places = landmarks[:, :, None] + reach[:, None, None, None] * offsets
    size = landmarks.new_tensor([pictures.shape[3], pictures.shape[2]])
    sampled = F.grid_sample(pictures, 2 * places / size - 1, padding_mode="border", align_corners=False)  # b 3 p k
    return (sampled @ (weight / weight.sum())).mT


def fit_likeness(features: Float[Tensor, "n f"], person: Int[Tensor, " n"], path: Path = LIKENESS_PATH) -> None:
    """Learn the projection by linear discriminant analysis after principal components, and write it, as float16.

    Args:
        features: from `face_features`, several pictures of each person.
        person: who is who.
        path: where to.
    """
    x = features.double()
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False).Vh[:NUM_COMPONENTS]
    scores = (x - mean) @ components.mT
    people = torch.stack([scores[person == one].mean(0) for one in person.unique()])
    within = torch.cat([scores[person == one] - middle for one, middle in zip(person.unique(), people, strict=True)])
    spread = within.mT @ within / (len(within) - len(people))
    spread = spread + 0.02 * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(spread)
    whiten = vectors / values.sqrt()
    directions = torch.linalg.svd((people - people.mean(0)) @ whiten, full_matrices=False).Vh[:NUM_TRAITS]
    projection = components.mT @ whiten @ directions.mT
    save_file({"mean": mean.half().contiguous(), "projection": projection.half().contiguous()}, path)
