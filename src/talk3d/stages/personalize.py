"""Personalisation: choose the frames of a clip that say most about the person, find neck and person in the prior, and tune the prior to them.

Reference: VIVE3D (arXiv 2303.15893), section 3.1; pivotal tuning (arXiv 2106.05744).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from talk3d.errors import ConfigError, ShapeError, TrackingError
from talk3d.io.weights import load_prior
from talk3d.models.avatar import PersonalizedGenerator, Prior
from talk3d.ops.compositing import premultiply, unmix
from talk3d.ops.geometry import farthest_points
from talk3d.perception.landmarks import mouth_opening
from talk3d.perception.nod import choose_views, find_throat
from talk3d.stages.invert import InversionConfig, Views, finer_rays, invert
from talk3d.training.losses import PictureTarget
from talk3d.types import Clip, Progress, silent, spread_evenly

NUM_LOOKED_AT = 64
"""Frames of the training part that tell what is behind the person."""
LEAST_SEEN = 4
"""Frames, of those, that must show what is behind the person somewhere."""
NECK_VIEWS = 16
"""Frames that tell where the neck bends."""
UNSTEADY = 0.06
"""What is behind the person changes where it differs by more than this in them, root mean square, of pictures in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig(InversionConfig):
    """How the person is found and the prior tuned: less long and less finely than where nothing follows, since training goes on from there."""

    tuning_steps: int = 160
    """Steps of tuning the generator."""
    own_rate: float = 0.03
    """Adam's learning rate of the planes' own part at the start of tuning, in units of the planes' standard deviation."""
    rays: int | None = None
    """Rays a side of the pictures that are compared; None takes half as many again as the prior, fewer than `train`."""
    num_frames: int = 8
    """Frames chosen from the training part, as different in pose, mouth and blink as can be; one more is kept for validation."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        super().__post_init__()
        if self.num_frames < 1:
            raise ConfigError("personalize counts frames from 1: give positive numbers")


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
    return usable[farthest_points(features[usable], count)]


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
    config = dataclasses.replace(config, rays=config.rays or finer_rays(prior.generator.renderer_config))
    side = prior.generator.config.renderer.superresolution.output_side
    if clip.frames.shape[1] != side:
        raise ShapeError(f"the clip has {clip.frames.shape[1]} pixels a side, the prior paints {side}: track the video again with --size-px {side}")
    chosen = choose_frames(clip, config.num_frames + 1)
    chosen, validation = chosen[:-1], chosen[-1:]
    plate = background_plate(clip)
    steady = where_steady(clip, plate)
    learnt, kept = (_views(clip, frames, plate, steady) for frames in (chosen, validation))
    views = dataclasses.replace(learnt, validation=kept, wide=_wide_views(clip))
    bending = with_neck(prior, clip)
    inversion = invert(bending, views, config, device=device, seed=seed, progress=progress, checkpoint=checkpoint, stage="personalize")
    provenance = {
        "prior": prior.provenance,
        "source_sha256": clip.source_sha256,
        "frames": chosen.tolist(),
        "validation_frames": validation.tolist(),
        "drift": inversion.drift,
        "seed": seed,
    }
    return inversion.personalized(provenance)


def with_neck(prior: Prior, clip: Clip) -> Prior:
    """Return the prior, its networks shared, with heads that bend their necks where this person does, straight as they are held on average."""
    head_pose = clip.track.head_pose[: clip.num_training_frames].float()
    resting = prior.with_renderer(rest_pose=tuple(head_pose.mean(0).tolist()))
    sure = (clip.track.confidence[: len(head_pose), 0] > 0.5).nonzero()[:, 0]
    frames = sure[choose_views(head_pose[sure], NECK_VIEWS)]
    throat_y = find_throat(resting, *clip.images(frames), clip.track.cameras[frames], head_pose[frames])
    return resting.with_renderer(throat_y=throat_y)


def _views(clip: Clip, frames: Int[Tensor, " k"], plate: Float[Tensor, "3 h w"], steady: Float[Tensor, "1 h w"]) -> Views:
    """Frames of the clip, each a moment of its own."""
    target = foreground(clip, frames, plate, steady)
    return Views(
        target=target,
        cameras=clip.track.cameras[frames],
        moment=torch.arange(len(frames)),
        head_pose=clip.track.head_pose[frames].float(),
        emphasis=face_emphasis(clip.track.landmarks[frames].float(), target.image.shape[-1], 3.0, 2.0),
    )


def _wide_views(clip: Clip) -> Views | None:
    """What lies round the crops, and counts there alone: the mean of the person's looks has no face of any one moment."""
    if clip.wide is None:
        return None
    image = torch.from_numpy(clip.wide.pictures).permute(0, 3, 1, 2) / 127.5 - 1  # k c h w
    alpha = torch.from_numpy(clip.wide.mattes)[:, None] / 255
    return Views(
        target=PictureTarget(image=premultiply(image, alpha), alpha=alpha),
        cameras=clip.wide_cameras(),
        moment=torch.arange(len(image)),
        head_pose=clip.track.head_pose[clip.wide.frames].float(),
        emphasis=torch.from_numpy(clip.wide.beyond)[:, None].float(),
    )


def background_plate(clip: Clip) -> Float[Tensor, "3 h w"]:
    """What is behind the person, in [-1, 1]: the mean of what was uncovered, smoothly continued where little or nothing ever was.

    A pixel that was uncovered in half of the frames is taken as it is. One that was seldom uncovered, where the head's outline comes and goes, is
    taken less the fewer frames show it, so that the outline leaves no seam.
    """
    total = torch.zeros(1, 3, *clip.frames.shape[1:3])
    weight = torch.zeros(1, 1, *clip.frames.shape[1:3])
    count = 0
    for image, free in _uncovered(clip):
        count += len(image)
        total += (image * free).sum(0, keepdim=True)
        weight += free.sum(0, keepdim=True)
    seen, certain = total / weight.clamp(min=1e-6), (2 * weight / count).clamp(max=1).square()
    plate = _fill(seen, certain)
    for _ in range(300):  # let what is guessed run smoothly into what was seen
        plate = torch.lerp(F.avg_pool2d(F.pad(plate, (1, 1, 1, 1), mode="replicate"), 3, stride=1), seen, certain)
    return plate[0]


def _fill(colour: Float[Tensor, "1 c h w"], certain: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "1 c h w"]:
    """Take what is not certain from the same picture at half the size, and so on (pull and push)."""
    if min(colour.shape[-2:]) <= 1:
        return colour
    share = F.avg_pool2d(certain, 2, ceil_mode=True)
    coarse = _fill(F.avg_pool2d(colour * certain, 2, ceil_mode=True) / share.clamp(min=1e-6), (4 * share).clamp(max=1))
    return torch.lerp(F.interpolate(coarse, size=colour.shape[-2:], mode="bilinear", align_corners=False), colour, certain)


def where_steady(clip: Clip, plate: Float[Tensor, "3 h w"]) -> Float[Tensor, "1 h w"]:
    """Say where the plate is what is behind the person in all frames: 1 where some were uncovered and looked like it, 0 elsewhere."""
    total, weight = torch.zeros_like(plate[:1]), torch.zeros_like(plate[:1])
    for image, free in _uncovered(clip):
        total += ((image - plate).square().mean(1, keepdim=True) * free).sum(0)
        weight += free.sum(0)
    return ((weight >= LEAST_SEEN) & ((total / weight.clamp(min=1)).sqrt() < UNSTEADY)).float()


def _uncovered(clip: Clip) -> Iterator[tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]]:
    """Yield pictures spread over the training part, a few at a time, and 1 where nothing of the person is near, 0 elsewhere."""
    index = spread_evenly(clip.num_training_frames, NUM_LOOKED_AT)
    for one in index.split(8):
        image, alpha = clip.images(one)
        yield image, (F.max_pool2d(alpha, 9, stride=1, padding=4) < 0.02).float()


def foreground(clip: Clip, frames: Int[Tensor, " b"], plate: Float[Tensor, "3 h w"], steady: Float[Tensor, "1 h w"]) -> PictureTarget:
    """Return what should be rendered of these frames, where the plate is: the person without what shines through, hair and all."""
    pictures, mattes = clip.images(frames)
    image, alpha = unmix(pictures.to(plate.device), mattes.to(plate.device), plate, steady)
    return PictureTarget(image=image, alpha=alpha)
