"""Personalisation: find the person in the prior from several frames at once, then tune the prior to them.

Two steps. *Inversion* looks for one code w of the person and a small offset for the expression of each frame, the generator held fixed.
*Pivotal tuning* then adapts the generator to the frames, the codes held fixed, while heads near the person must stay what they were.

Reference: VIVE3D (arXiv 2303.15893), section 3.1; pivotal tuning (arXiv 2106.05744).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError, ShapeError, TrackingError
from talk3d.io.weights import load_prior
from talk3d.models.avatar import PersonalizedGenerator, Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.stylegan2 import MappingNetwork
from talk3d.ops.geometry import head_camera
from talk3d.perception.landmarks import mouth_opening
from talk3d.training.loop import Loop, cosine_decay
from talk3d.training.losses import PictureTarget, picture_losses, premultiply, weighted_sum
from talk3d.types import Camera, Clip, Progress, silent


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """How the person is found and the prior tuned."""

    num_frames: int = 8
    """Frames chosen from the training part, as different in pose, mouth and blink as can be."""
    frames_per_step: int = 2
    """Frames compared in one step."""
    inversion_steps: int = 150
    """Steps of the search for the codes."""
    inversion_rate: float = 0.05
    """Adam's learning rate of the codes."""
    tuning_steps: int = 250
    """Steps of tuning the generator."""
    tuning_rate: float = 1e-3
    """Adam's learning rate of the generator at the start of tuning."""
    offset_weight: float = 0.02
    """Of the mean square of the frames' offsets, in units of the prior's spread."""
    person_weight: float = 0.002
    """Of the mean square distance of the person's code from the average, in units of the prior's spread."""
    locality_weight: float = 1.0
    """Of the change of heads near the person while tuning."""
    locality_every: int = 3
    """Every which tuning step that change is measured."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.num_frames, self.frames_per_step, self.inversion_steps, self.tuning_steps, self.locality_every) < 1:
            raise ConfigError("personalize counts frames and steps from 1: give positive numbers")


LOSS_WEIGHTS = {"image": 1.0, "detail": 2.0, "alpha": 0.5, "raw": 0.5}
"""Weights of `picture_losses`, shared with training."""


def choose_frames(clip: Clip, count: int) -> Int[Tensor, " k"]:
    """Pick frames of the training part that differ most in head pose, mouth opening and blink; blurred and unsure ones are left out.

    Farthest-point choice, starting from the frame nearest to the median. Ten degrees, a tenth of the inter-ocular distance and half a blink
    count the same.

    Raises:
        TrackingError: fewer usable frames than asked for.
    """
    total = clip.num_training_frames
    track = clip.track
    features = torch.cat(
        [
            track.head_pose[:total] / math.radians(10),
            mouth_opening(track.landmarks[:total]).unsqueeze(1) / 0.1,
            track.blink[:total] / 0.5,
        ],
        1,
    ).float()
    sharpness = torch.stack([_sharpness(clip, i) for i in range(total)])
    usable = ((track.confidence[:total, 0] > 0.5) & (sharpness >= sharpness.quantile(0.2))).nonzero()[:, 0]
    if len(usable) < count:
        raise TrackingError(f"{len(usable)} usable training frames, {count} needed: give a longer or sharper video, or ask for fewer frames")
    features = features[usable]
    chosen = [int((features - features.median(0).values).norm(dim=1).argmin())]
    distance = (features - features[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1  # never again, even where all frames look the same
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).norm(dim=1))
    return usable[chosen]


def _sharpness(clip: Clip, frame: int) -> Float[Tensor, ""]:
    grey = torch.from_numpy(clip.frames[frame].copy()).float().mean(-1)
    return grey.diff(dim=0).square().mean() + grey.diff(dim=1).square().mean()


def face_emphasis(landmarks: Float[Tensor, "b n 2"], side: int, mouth: float, face: float) -> Float[Tensor, "b 1 s s"]:
    """Weight of each pixel: 1, plus smooth bumps of height `face` over the face and `mouth` over the mouth and eyes.

    Args:
        landmarks: MediaPipe's face points in pixels.
        side: of the picture, pixels.
        mouth: height of the bumps over mouth and eyes.
        face: height of the bump over the face.
    """
    grid = torch.arange(side) + 0.5
    weight = torch.ones(landmarks.shape[0], side, side)
    extent = (landmarks.amax(1) - landmarks.amin(1)).mean(1)  # b
    for points, height, radius in (
        ([61, 291, 13, 14], mouth, 0.22),
        ([33, 133], mouth / 2, 0.12),
        ([263, 362], mouth / 2, 0.12),
        ([5, 9], face, 0.6),
    ):
        centre = landmarks[:, points].mean(1)
        squared = (grid[None, None, :] - centre[:, 0, None, None]) ** 2 + (grid[None, :, None] - centre[:, 1, None, None]) ** 2
        weight = weight + height * torch.exp(-squared / (radius * extent[:, None, None]) ** 2)
    return weight.unsqueeze(1)


def personalize(
    clip: Clip,
    prior: Prior | None = None,
    config: PersonalizeConfig | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> PersonalizedGenerator:
    """Find a person in a prior and tune the prior to them.

    Args:
        clip: the tracked video; only its training part is looked at.
        prior: None takes the one that comes with the package.
        config: how.
        device: where to compute.
        seed: of all randomness.
        progress: hears every step's losses.
        checkpoint: kept here and resumed from.

    Raises:
        ShapeError: the clip has another size than the prior's pictures.
        TrackingError: the clip has too few usable frames.
        WeightsError: the prior cannot be read, or the checkpoint belongs to other settings.
    """
    config = config or PersonalizeConfig()
    prior = prior or load_prior()
    side = prior.generator.config.renderer.superresolution.output_side
    if clip.frames.shape[1] != side:
        raise ShapeError(f"the clip has {clip.frames.shape[1]} pixels a side, the prior paints {side}: track the video again with --size-px {side}")
    chosen = choose_frames(clip, config.num_frames)
    search = _Search(clip, prior, config, chosen, device=device, seed=seed)
    total = config.inversion_steps + config.tuning_steps
    loop = Loop(modules=search.modules, optimizers=search.optimizers, generators=search.generators, checkpoint=checkpoint)
    loop.run("personalize", total, search.step, progress)
    provenance = {"prior": prior.provenance, "source_sha256": clip.source_sha256, "frames": chosen.tolist(), "seed": seed}
    return PersonalizedGenerator.from_generator(search.generator.cpu(), search.codes.person_rows().detach().cpu(), provenance)


class _Codes(nn.Module):
    """The person's w and the offsets of the chosen frames, in units of the prior's spread."""

    average: Tensor

    def __init__(self, average: Float[Tensor, " w"], spread: float, num_frames: int, num_ws: int) -> None:
        super().__init__()
        self.register_buffer("average", average.clone())
        self.spread, self.num_ws = spread, num_ws
        self.person = nn.Parameter(torch.zeros_like(average))
        self.offsets = nn.Parameter(torch.zeros(num_frames, len(average)))

    def rows(self, index: Int[Tensor, " b"]) -> Float[Tensor, "b n w"]:
        w = self.average + self.spread * (self.person + self.offsets[index])
        return w[:, None].expand(-1, self.num_ws, -1)

    def person_rows(self) -> Float[Tensor, "1 n w"]:
        w = self.average + self.spread * (self.person + self.offsets.mean(0))
        return w.expand(1, self.num_ws, -1)


class _Search:
    """One step of inversion or tuning and what it needs."""

    def __init__(self, clip: Clip, prior: Prior, config: PersonalizeConfig, chosen: Int[Tensor, " k"], *, device: str, seed: int) -> None:
        self.config, self.device = config, device
        self.generator = copy.deepcopy(prior.generator).to(device).eval()
        self.reference = copy.deepcopy(self.generator).requires_grad_(False)
        mapping = self.generator.backbone["mapping"]
        assert isinstance(mapping, MappingNetwork)
        self.codes = _Codes(mapping.w_avg.detach(), prior.w_std, len(chosen), self.generator.num_ws).to(device)
        image, alpha = clip.images(chosen)
        self.image, self.alpha = premultiply(image, alpha).to(device), alpha.to(device)
        self.emphasis = face_emphasis(clip.track.landmarks[chosen].float(), image.shape[-1], 3.0, 2.0).to(device)
        self.cameras = clip.track.cameras[chosen].to(device)
        tuned = [p for name, p in self.generator.named_parameters() if "mapping" not in name]
        self.modules: dict[str, nn.Module] = {"generator": self.generator, "codes": self.codes}
        self.optimizers = {
            "codes": torch.optim.Adam(self.codes.parameters(), lr=config.inversion_rate, betas=(0.9, 0.99)),
            "generator": torch.optim.Adam(tuned, lr=config.tuning_rate, betas=(0.9, 0.99)),
        }
        self.generators = {"choice": torch.Generator().manual_seed(seed), "rays": torch.Generator(device).manual_seed(seed)}

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Invert while there are inversion steps, tune afterwards."""
        inverting = number < self.config.inversion_steps
        active = self.optimizers["codes" if inverting else "generator"]
        self.codes.requires_grad_(inverting)
        self.generator.requires_grad_(not inverting)
        self._set_rate(number, inverting)
        index = torch.randperm(len(self.cameras), generator=self.generators["choice"])[: self.config.frames_per_step].to(self.device)
        ws = self.codes.rows(index)
        rendering = self.generator.render_triplane(self.generator.triplane(ws), ws[:, -1], self.cameras[index], generator=self.generators["rays"])
        target = PictureTarget(image=self.image[index], alpha=self.alpha[index])
        terms = picture_losses(rendering, target, self.emphasis[index])
        weights = dict(LOSS_WEIGHTS)
        if inverting:
            terms |= {"person": self.codes.person.square().mean(), "offset": self.codes.offsets.square().mean()}
            weights |= {"person": self.config.person_weight, "offset": self.config.offset_weight}
        elif number % self.config.locality_every == 0:
            terms["locality"] = self._locality()
            weights["locality"] = self.config.locality_weight
        loss = weighted_sum(terms, weights)
        active.zero_grad(set_to_none=True)
        loss.backward()
        active.step()
        return {name: term.detach() for name, term in terms.items()}

    def _set_rate(self, number: int, inverting: bool) -> None:
        config = self.config
        if inverting:
            fraction, rate, name = number / config.inversion_steps, config.inversion_rate, "codes"
        else:
            fraction, rate, name = (number - config.inversion_steps) / config.tuning_steps, config.tuning_rate, "generator"
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate * cosine_decay(fraction, 0.1) * min(1.0, 0.1 + fraction / 0.05)

    def _locality(self) -> Float[Tensor, ""]:
        """Change of the raw picture of a head between the person and a random one, from a random side."""
        choice = self.generators["choice"]
        z = torch.randn(1, self.generator.config.z_dim, generator=choice).to(self.device)
        amount = 0.5 * torch.rand(1, generator=choice).item()
        with torch.no_grad():
            label = self.cameras[:1].to_label() if self.generator.config.c_dim else None
            ws = torch.lerp(self.codes.person_rows(), self.reference.mapping(z, label), amount)
        angles = (torch.rand(1, 3, generator=choice) * 2 - 1) * torch.tensor([0.9, 0.3, 0.0])
        camera = head_camera(angles).to(self.device)
        now, before = (self._raw(generator, ws, camera) for generator in (self.generator, self.reference))
        return F.l1_loss(now[0], before[0].detach()) + F.l1_loss(now[1], before[1].detach())

    def _raw(self, generator: TriplaneGenerator, ws: Float[Tensor, "1 n w"], camera: Camera) -> tuple[Tensor, Tensor]:
        rendering = generator.render_triplane(generator.triplane(ws), ws[:, -1], camera, neural_rendering_resolution=32)
        return rendering.raw, rendering.raw_alpha
