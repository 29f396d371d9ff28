"""Training: the person's planes learn to move with the sound.

The conditioner and the deltaplane U-Net learn from the clip's training part; identity planes, decoder and super-resolution follow, so that the
picture becomes as sharp as the video.

Reference: Talk3D (arXiv 2403.20153), section 3.4.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import ConfigError, WeightsError
from talk3d.models.avatar import Avatar, AvatarConfig, Performance, PersonalizedGenerator
from talk3d.models.conditioning import ConditioningConfig
from talk3d.models.deltaplane import DeltaplaneConfig
from talk3d.models.renderer import RendererConfig
from talk3d.stages.personalize import face_emphasis
from talk3d.stages.viewpoints import trained_views
from talk3d.training.loop import Average, Loop, cosine_decay
from talk3d.training.losses import LOSS_WEIGHTS, PictureTarget, hearing_loss, mouth_shapes, picture_losses, premultiply, weighted_sum
from talk3d.types import Clip, Driving, Progress, silent


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how hard to train."""

    steps: int = 1200
    """Optimisation steps."""
    frames_per_step: int = 2
    """Frames rendered in one step."""
    listening_steps: int = 600
    """Steps of the lesson before, in which the audio encoder learns to tell the shape of the mouth."""
    listening_frames: int = 64
    """Frames in one such step; nothing is rendered."""
    listening_rate: float = 2e-3
    """AdamW's rate in that lesson at the start; falls to zero."""
    listening_decay: float = 0.3
    """AdamW's weight decay in that lesson, so that it learns sounds rather than frames."""
    listening_weight: float = 0.05
    """Of that lesson's error while training."""
    learning_rate: float = 2e-3
    """Adam's rate of conditioner, U-Net and linear bases at the start; falls to a twentieth along a half cosine."""
    renderer_rate: float = 4e-4
    """Adam's rate of decoder and super-resolution, with the same schedule; 0 leaves them as they are."""
    identity_rate: float = 2e-3
    """Adam's rate of the identity planes in units of their standard deviation, with the same schedule; 0 leaves them as they are."""
    mouth_emphasis: float = 20.0
    """How much more a pixel of the mouth counts than one of the background."""
    face_emphasis: float = 3.0
    """How much more a pixel of the face counts."""
    audio_noise: float = 0.3
    """Standard deviation of the noise on speech features, in their units."""
    average_decay: float = 0.99
    """Of the moving average of the weights, which is what is kept."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.steps, self.frames_per_step) < 1:
            raise ConfigError("train needs at least 1 step and 1 frame a step: give positive numbers")


def avatar_sizes(renderer: RendererConfig, audio_channels: int = ConditioningConfig.audio_channels) -> AvatarConfig:
    """Sizes of the talking part that go with a person's planes and a clip's speech features: a U-Net as wide as the planes, and twice that inside."""
    channels = renderer.plane_channels
    head = 8 * max(1, channels // 6)
    conditioning = ConditioningConfig(audio_channels=audio_channels)
    deltaplane = DeltaplaneConfig(
        plane_channels=channels,
        plane_resolution=renderer.plane_resolution,
        plane_axes=renderer.plane_axes,
        widths=(channels, 2 * channels, 2 * head),
        head_width=head,
        num_bases=conditioning.num_coefficients,
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
        WeightsError: the person was made from another video, or the checkpoint belongs to other settings.
    """
    config = config or TrainConfig()
    origin = person.provenance.get("source_sha256")
    if origin != clip.source_sha256:
        raise WeightsError("the person was made from another video than the clip: personalize this clip first")
    avatar = _new_avatar(person, clip, config, seed).to(device)
    lesson = _Lesson(avatar, clip, config, device=device, seed=seed)
    loop = Loop(modules=lesson.modules, optimizers={"adam": lesson.optimizer}, generators=lesson.generators, checkpoint=checkpoint)
    if loop.step == 0:
        lesson.listen(progress)
    loop.run("train", config.steps, lesson.step, progress)
    result = lesson.average.module
    assert isinstance(result, Avatar)
    return result.cpu().eval()


def _new_avatar(person: PersonalizedGenerator, clip: Clip, config: TrainConfig, seed: int) -> Avatar:
    used = slice(0, clip.num_training_frames)
    track = clip.track
    performance = Performance(
        cameras=track.cameras[used], blink=track.blink[used].float(), head_pose=track.head_pose[used].float(), anchors=track.anchors[used].float()
    )
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
            personalized=copy.deepcopy(person),
            config=avatar_sizes(person.renderer.renderer_config, clip.audio.values.shape[-1]),
            performance=performance,
            background=background_plate(clip),
            audio_source=clip.audio.source,
            fps=clip.fps,
            provenance=provenance,
        )
    avatar.predictor.scale.copy_(person.identity.detach().std())
    return avatar


def background_plate(clip: Clip, num_frames: int = 64) -> Float[Tensor, "3 h w"]:
    """What is behind the person, in [-1, 1]: the mean of what was uncovered, smoothly continued where nothing ever was."""
    index = torch.linspace(0, clip.num_training_frames - 1, min(num_frames, clip.num_training_frames)).long()
    total = torch.zeros(1, 3, *clip.frames.shape[1:3])
    weight = torch.zeros(1, 1, *clip.frames.shape[1:3])
    for one in index.split(8):
        image, alpha = clip.images(one)
        free = (F.max_pool2d(alpha, 9, stride=1, padding=4) < 0.02).float()
        total += (image * free).sum(0, keepdim=True)
        weight += free.sum(0, keepdim=True)
    known, plate = weight > 0, _fill(total, weight)
    for _ in range(300):  # let the guess run smoothly into what was seen, so that no seam shows
        plate = torch.where(known, plate, F.avg_pool2d(F.pad(plate, (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    return plate[0]


def _fill(total: Float[Tensor, "1 c h w"], weight: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "1 c h w"]:
    """Divide, taking what has no weight from the same picture at half the size, and so on (pull and push)."""
    known = weight > 0
    here = total / weight.clamp(min=1e-6)
    if bool(known.all()) or min(total.shape[-2:]) <= 1:
        return torch.where(known, here, torch.zeros_like(here))
    capped = known.float()
    coarse = _fill(F.avg_pool2d(here * capped, 2, ceil_mode=True), F.avg_pool2d(capped, 2, ceil_mode=True))
    return torch.where(known, here, F.interpolate(coarse, size=here.shape[-2:], mode="bilinear", align_corners=False))


class _Lesson:
    """One step of training and what it needs."""

    def __init__(self, avatar: Avatar, clip: Clip, config: TrainConfig, *, device: str, seed: int) -> None:
        self.avatar, self.clip, self.config, self.device = avatar.train(), clip, config, device
        track, used = clip.track, slice(0, clip.num_training_frames)
        self.shapes = mouth_shapes(track.landmarks[used], track.head_pose[used], avatar.config.conditioning.mouth_shapes)
        self.average = Average(avatar, config.average_decay)
        self.modules: dict[str, nn.Module] = {"avatar": avatar, "average": self.average.module}
        self.rates = (config.learning_rate, config.renderer_rate, config.identity_rate * float(avatar.predictor.scale))
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*avatar.conditioner.parameters(), *avatar.predictor.parameters()]},
                {"params": list(avatar.personalized.renderer.parameters())},
                {"params": [avatar.personalized.identity]},
            ],
            betas=(0.9, 0.99),
        )
        self.generators = {"choice": torch.Generator().manual_seed(seed), "rays": torch.Generator(device).manual_seed(seed)}

    def listen(self, progress: Progress) -> None:
        """Teach the audio encoder to tell the shape of the mouth."""
        config = self.config
        optimizer = torch.optim.AdamW(self.avatar.conditioner.parameters(), lr=config.listening_rate, weight_decay=config.listening_decay)
        for number in range(config.listening_steps):
            optimizer.param_groups[0]["lr"] = config.listening_rate * (1 - number / config.listening_steps)
            loss = self._hear(config.listening_frames)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if number % 20 == 19:
                progress("listen", number + 1, config.listening_steps, {"mouth": float(loss.detach())})
        self.average.module.load_state_dict(self.avatar.state_dict())

    def _hear(self, count: int) -> Float[Tensor, ""]:
        choice = self.generators["choice"]
        frames = torch.randint(self.clip.num_training_frames, (count,), generator=choice)
        shape = (count, *self.clip.audio.around(frames[:1]).shape[1:])
        noise = self.config.audio_noise * torch.randn(shape, generator=choice)
        return hearing_loss(self.avatar.conditioner, self.clip.audio, self.shapes, frames, noise)

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Draw frames, predict their deltaplanes, render, compare, descend."""
        config, clip, choice = self.config, self.clip, self.generators["choice"]
        scale = cosine_decay(number / config.steps, 0.05) * min(1.0, (number + 1) / 50)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        index = torch.randint(clip.num_training_frames, (config.frames_per_step,), generator=choice)
        target, emphasis = self._target(index)
        delta = self.avatar.deltaplane(self._driving(index), choice)
        person = self.avatar.personalized
        rendering = person.render(person.triplane + delta, clip.track.cameras[index].to(self.device), self.generators["rays"])
        terms = picture_losses(rendering, target, emphasis) | {"mouth": self._hear(16)}
        loss = weighted_sum(terms, LOSS_WEIGHTS | {"mouth": config.listening_weight})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.avatar.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.avatar, number)
        return {name: term.detach() for name, term in terms.items()}

    def _target(self, index: Tensor) -> tuple[PictureTarget, Float[Tensor, "b 1 h w"]]:
        image, alpha = self.clip.images(index)
        emphasis = face_emphasis(self.clip.track.landmarks[index].float(), image.shape[-1], self.config.mouth_emphasis, self.config.face_emphasis)
        target = PictureTarget(image=premultiply(image, alpha).to(self.device), alpha=alpha.to(self.device))
        return target, (emphasis / emphasis.mean((1, 2, 3), keepdim=True)).to(self.device)

    def _driving(self, index: Tensor) -> Driving:
        true = self.clip.driving(index)
        noise = torch.randn(true.audio.shape, generator=self.generators["choice"])
        return Driving(
            audio=(true.audio + self.config.audio_noise * noise).to(self.device),
            blink=true.blink.float().to(self.device),
            head_pose=true.head_pose.float().to(self.device),
            anchors=true.anchors.float().to(self.device),
        )
