"""Training: the person's planes learn to move with the sound.

The conditioner and the deltaplane U-Net learn from the clip's training part; identity planes, decoder and super-resolution follow, so that the
picture becomes as sharp as the video.

Reference: Talk3D (arXiv 2403.20153), section 3.4.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError, WeightsError
from talk3d.models.avatar import Avatar, AvatarConfig, Performance, PersonalizedGenerator
from talk3d.models.conditioning import ConditioningConfig
from talk3d.models.deltaplane import DeltaplaneConfig
from talk3d.models.renderer import RendererConfig
from talk3d.ops.compositing import over
from talk3d.stages.lesson import Lesson, LessonConfig
from talk3d.stages.personalize import background_plate, face_emphasis
from talk3d.stages.viewpoints import trained_views
from talk3d.training.loop import Best, Loop
from talk3d.types import Clip, Progress, silent, spread_evenly

MAX_VALIDATION = 50
"""Most frames of the training part that are not learnt from."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LessonConfig):
    """How long and how hard to train, and which avatar of the training is kept."""

    rays: int | None = None
    """Rays a side of the person's pictures; None takes as many as super-resolution takes as they are."""
    samples: int | None = None
    """Samples on each ray, at even distances, and as many more where those found something; None takes the prior's."""
    validation_share: float = 0.06
    """Of the training part, its last frames (50 at most): not learnt from; they choose what is kept."""
    validation_every: int = 200
    """Every how many steps they are looked at."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        super().__post_init__()
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share is a share below 1, got {self.validation_share}: give a number such as 0.06, or 0")
        if min(self.validation_every, self.rays or 1, self.samples or 1) < 1:
            raise ConfigError("train counts rays, samples and steps between validations from 1: give positive numbers")


def avatar_sizes(renderer: RendererConfig, audio_channels: int = ConditioningConfig.audio_channels) -> AvatarConfig:
    """Sizes of the talking part that go with a person's planes and a clip's speech features: a U-Net as wide as the planes, and twice that inside."""
    channels = renderer.plane_channels
    head = 8 * max(1, channels // 6)
    conditioning = ConditioningConfig(audio_channels=audio_channels, limits=True, cheeks=True)
    near = conditioning.mouth_shapes + 5  # and blink, brows, gaze
    deltaplane = DeltaplaneConfig(
        plane_channels=channels,
        plane_resolution=renderer.plane_resolution,
        plane_axes=renderer.plane_axes,
        widths=(channels, 2 * channels, 2 * head),
        head_width=head,
        num_bases=conditioning.num_coefficients - near,
        num_near=near,
    )
    return AvatarConfig(conditioning=conditioning, deltaplane=deltaplane)


def train(
    person: PersonalizedGenerator,
    clip: Clip,
    config: TrainConfig | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> Avatar:
    """Teach a person to talk.

    Args:
        person: made from this clip by `personalize`.
        clip: the tracked video; only its training part is looked at.
        config: how long and how hard.
        device: where to train.
        seed: of all randomness.
        progress: hears the losses.
        checkpoint: kept here and resumed from.

    Raises:
        WeightsError: the person was made from another video, the checkpoint belongs to other settings, or the network of a loss is not there.
    """
    config = config or TrainConfig()
    origin = person.provenance.get("source_sha256")
    if origin != clip.source_sha256:
        raise WeightsError("the person was made from another video than the clip: personalize this clip first")
    avatar = _new_avatar(person, clip, config, seed).to(device)
    num_validation = min(MAX_VALIDATION, int(config.validation_share * clip.num_training_frames))
    lesson = Lesson(avatar, clip, config, num_frames=clip.num_training_frames - num_validation, device=device, seed=seed)
    best = Best(lesson.average.module)
    validation = torch.arange(lesson.num_frames, clip.num_training_frames)
    modules = lesson.modules | {"best": best}
    loop = Loop(modules=modules, optimizers={"adam": lesson.optimizer}, generators=lesson.generators, checkpoint=checkpoint)
    if loop.step == 0:
        lesson.listen(progress)

    def step(number: int) -> dict[str, Float[Tensor, ""]]:
        terms = lesson.step(number)
        last = number + 1 == config.steps
        if last or (number + 1) % config.validation_every == 0:
            error = picture_error(lesson.average.module, clip, validation, device) if len(validation) else None
            best.consider(lesson.average.module, error)
            terms |= {} if error is None else {"validation": error}
        return terms

    loop.run("train", config.steps, step, progress)
    result = best.module
    assert isinstance(result, Avatar)
    return result.cpu().eval()


def picture_error(avatar: nn.Module, clip: Clip, frames: Int[Tensor, " v"], device: str, count: int = 8) -> Float[Tensor, ""]:
    """Mean absolute error of the picture over the face in up to `count` of these frames, as they are driven by their sound."""
    assert isinstance(avatar, Avatar)
    chosen = frames[spread_evenly(len(frames), count)]
    errors = []
    for index in chosen.split(4):
        driving = clip.driving(index).to(device)
        with torch.no_grad():
            rendering = avatar.render(driving, clip.track.cameras[index].to(device))
            image = over(rendering.image, rendering.alpha, avatar.background[None]).cpu()
        weight = face_emphasis(clip.track.landmarks[index].float(), image.shape[-1], 10.0, 10.0)
        error = (image - clip.images(index)[0]).abs().mean(1, keepdim=True)
        errors.append((error * weight).mean((1, 2, 3)) / weight.mean((1, 2, 3)))
    return torch.cat(errors).mean()


def _new_avatar(person: PersonalizedGenerator, clip: Clip, config: TrainConfig, seed: int) -> Avatar:
    used = slice(0, clip.num_training_frames)
    track, prior = clip.track, person.renderer.renderer_config
    rays = config.rays or max(prior.neural_rendering_resolution, prior.superresolution.input_side)
    provenance = {
        "source_sha256": clip.source_sha256,
        "frames": clip.num_training_frames,
        "seed": seed,
        "train": dataclasses.asdict(config),
        "views": trained_views(track.cameras[used]),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        avatar = Avatar(
            personalized=with_rays(person, rays, config.samples),
            config=avatar_sizes(prior, clip.audio.values.shape[-1]),
            performance=Performance.of(track, used),
            background=background_plate(clip),
            audio_source=clip.audio.source,
            fps=clip.fps,
            provenance=provenance,
        )
    avatar.predictor.scale.copy_(person.identity.detach().std())
    return avatar


def with_rays(person: PersonalizedGenerator, rays: int | None, samples: int | None) -> PersonalizedGenerator:
    """Return a copy of the person that is rendered with so many rays a side and samples on each; None leaves a number as it is."""
    config = person.renderer.renderer_config
    config = dataclasses.replace(
        config,
        neural_rendering_resolution=rays or config.neural_rendering_resolution,
        depth_resolution=samples or config.depth_resolution,
        depth_resolution_importance=samples or config.depth_resolution_importance,
    )
    result = PersonalizedGenerator(config, person.provenance)
    result.load_state_dict(person.state_dict())
    return result.to(person.identity.device).eval()
