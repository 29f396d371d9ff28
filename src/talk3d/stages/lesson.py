"""One step of training an avatar: draw frames, predict their deltaplanes, render, compare, descend."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.metrics.image import structure_loss
from talk3d.models.avatar import Avatar
from talk3d.models.conditioning import posture
from talk3d.models.deltaplane import DeltaplaneTensors, bases_reach
from talk3d.ops.compositing import premultiply
from talk3d.perception.facetemplate import face_model_kind
from talk3d.perception.identity import SIDE_PX, Likeness, align_faces, five_points, load_identity
from talk3d.perception.landmarks import mouth_opening
from talk3d.perception.lipsync import NUM_FRAMES
from talk3d.perception.perceptual import load_lpips
from talk3d.stages.personalize import face_emphasis, foreground, where_steady
from talk3d.training.lips import LipReader, SyncLoss, mouth_looks, mouth_windows, teach, window_crops
from talk3d.training.loop import Average, cosine_decay
from talk3d.training.losses import (
    Heard,
    PictureTarget,
    SideViews,
    hearing_losses,
    lay_over,
    mouth_shapes,
    picture_losses,
    quiet_frames,
    random_backgrounds,
    run_chances,
    shut_mouth,
    temporal_loss,
    unlikeness,
    unusual,
    weighted_sum,
)
from talk3d.types import Clip, Driving, Progress, Rendering, Triplane, spread_evenly

logger = logging.getLogger(__name__)

NEGLIGIBLE, NEGLIGIBLE_NEAR = 1e-6, 1e-5
"""Size of gradients below which weights hardly move, and that for bases in the window over the face: cells that no frame shows would become noise."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of training; 0 leaves a term out."""

    image: float = 1.0
    """L1 of the full picture, laid over what the film shows behind the person or over a colour, as in all terms that compare it with the film."""
    detail: float = 2.0
    """L1 of its Laplacian pyramid."""
    alpha: float = 0.5
    """L1 of the matte."""
    raw: float = 0.5
    """L1 of the picture before super-resolution, laid over the same."""
    structure: float = 0.5
    """1 - SSIM of the full picture: our offline perceptual term."""
    lips: float = 0.0
    """Mean square difference of what a lip reader, taught on the clip, reads off rendered and filmed mouths: our offline lip-sync term."""
    sides: float = 1.0
    """Mean absolute difference of colours and opacity, before super-resolution, from the person as fitted, later as settled, in views that the film
    does not show."""
    hearing: float = 1.0
    """Mean square error of the mouth's components heard in the sound, in the lesson of listening, as are the next two."""
    velocity: float = 0.0
    """The same of their change from frame to frame."""
    silence: float = 0.0
    """The same of the distance from the shut mouth when nothing sounds."""
    perceptual: float = 0.0
    """LPIPS of the full picture; needs lpips-alex of `talk3d weights`."""
    identity: float = 0.0
    """1 - cosine of ArcFace's vectors of rendered and filmed face; needs arcface of `talk3d weights`."""
    likeness: float = 0.0
    """The same of the descriptors of `likeness`: our offline identity term. Face points are the film's in both, so that colours alone tell."""
    temporal: float = 0.0
    """Mean absolute difference of what changes from one frame to the next, rendered and filmed; frames are drawn in consecutive pairs then, and
    one of an odd number is left out."""
    sync: float = 0.0
    """-log of the probability that five consecutive frames and their sound belong together, by Wav2Lip's expert; needs sync-expert of
    `talk3d weights`. A step then draws five such frames, however many frames_per_step are."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if not all(0 <= weight < math.inf for weight in vars(self).values()):
            raise ConfigError("weights of losses are finite numbers and cannot be negative: give 0 to leave a term out")


@dataclass(frozen=True, kw_only=True)
class LessonConfig:
    """How hard to train, and on what."""

    steps: int = 1800
    """Optimisation steps."""
    settling_steps: int = 200
    """First steps, with a schedule of their own: later, sides are held as the person looks then. None in trainings of fewer than twice as many, and
    none where `weights.sides` is 0."""
    frames_per_step: int = 4
    """Frames rendered in one step."""
    listening_steps: int = 1200
    """Steps of the lesson before, in which the audio encoder learns to tell the shape of the mouth."""
    listening_frames: int = 64
    """Frames in one such step; nothing is rendered."""
    listening_rate: float = 4e-3
    """AdamW's rate in that lesson at the start; falls to zero."""
    listening_decay: float = 0.3
    """AdamW's weight decay in that lesson, so that it learns sounds rather than frames."""
    reading_steps: int = 300
    """Steps in which the lip reader is taught."""
    learning_rate: float = 2e-3
    """Adam's rate of U-Net and tokens at the start; falls to a twentieth along a half cosine, in the settling steps and again in the others."""
    mouth_rate: float = 1e-2
    """Adam's rate of the linear bases of mouth, lids, brows and gaze, with the same schedule."""
    renderer_rate: float = 1.5e-3
    """Adam's rate of decoder and super-resolution, with the same schedule; 0 leaves them as they are."""
    identity_rate: float = 8e-3
    """Adam's rate of the identity planes in units of their standard deviation, with the same schedule; 0 leaves them as they are."""
    mouth_emphasis: float = 20.0
    """How much more a pixel of the mouth counts than one of the background."""
    face_emphasis: float = 3.0
    """How much more a pixel of the face counts."""
    audio_noise: float = 0.3
    """Standard deviation of the noise on speech features, in their units."""
    unusual_frames: float = 0.5
    """Share of draws that prefer frames whose mouth, or whose lids, brows and gaze, are unlike those of most others: wide open mouths and shut
    eyes are few."""
    tracked_mouth: float = 0.7
    """Share of draws in which the linear bases see the tracked mouth instead of what is heard: errors of hearing would shrink the lips' motion."""
    average_decay: float = 0.99
    """Of the moving average of the weights, which is what is kept."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Of the losses."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.steps, self.frames_per_step, self.listening_frames) < 1:
            raise ConfigError("train needs at least 1 step and 1 frame a step: give positive numbers")
        rates = ("listening_rate", "listening_decay", "learning_rate", "mouth_rate", "renderer_rate", "identity_rate")
        for name in (*rates, "settling_steps", "listening_steps", "reading_steps", "mouth_emphasis", "face_emphasis", "audio_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} cannot be negative or endless, got {getattr(self, name)}: leave it out for a good one")
        if self.frames_per_step < 2 and self.weights.temporal and not self.weights.sync:
            raise ConfigError("weights.temporal compares consecutive frames and needs frames_per_step of 2 or more, got 1: give 2, or a weight of 0")
        for name in ("tracked_mouth", "unusual_frames", "average_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share, got {getattr(self, name)}: give a number from 0 to 1")


class Lesson:
    """One step of training and what it needs."""

    def __init__(self, avatar: Avatar, clip: Clip, config: LessonConfig, *, num_frames: int, device: str, seed: int) -> None:
        """Prepare to teach the avatar on the first `num_frames` frames of the clip."""
        self.avatar, self.clip, self.config, self.device, self.num_frames = avatar.train(), clip, config, device, num_frames
        track, used = clip.track, slice(0, clip.num_training_frames)
        looks = [mouth_looks(premultiply(*clip.images(part)), track.cameras[part]) for part in torch.arange(clip.num_training_frames).split(64)]
        shapes = mouth_shapes(torch.cat(looks), track.head_pose[used], num_frames, avatar.config.conditioning.mouth_shapes)
        quiet = quiet_frames(clip.waveform, clip.fps, num_frames).nonzero()[:, 0]
        shut = shut_mouth(shapes, mouth_opening(track.landmarks[used]))
        self.heard = Heard(audio=clip.audio, shapes=shapes, postures=posture(track)[used].float(), quiet=quiet, shut=shut)
        if avatar.conditioner.limits is not None:
            avatar.conditioner.limits.learn(track.head_pose[:num_frames], track.upper_face[:num_frames])
        self.windows = mouth_windows(track.landmarks[used], avatar.resolution)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reader = LipReader(shapes.values.shape[1]).to(device)
        self.perceptual = load_lpips(device=device) if config.weights.perceptual else None
        self.arcface = load_identity(device=device) if config.weights.identity else None
        self.likeness = Likeness(face_model_kind(clip.check)) if config.weights.likeness else None
        self.sync = SyncLoss(clip.waveform, track.landmarks[:num_frames], clip.fps, avatar.resolution, device) if config.weights.sync else None
        self.average = Average(avatar, config.average_decay)
        self.modules: dict[str, nn.Module] = {"avatar": avatar, "average": self.average.module, "reader": self.reader}
        eyes = lids_brows_gaze(track.blink[used], track.upper_face[used, :4])
        seldom = (unusual(shapes.values[:num_frames]) + unusual(eyes[:num_frames], num_components=5)) / 2
        chances = torch.lerp(torch.full((num_frames,), 1 / num_frames), seldom, config.unusual_frames)
        self.run_length = NUM_FRAMES if config.weights.sync else 2 if config.weights.temporal else 1
        self.chances = run_chances(chances, self.run_length, clip.check.get("cuts", ()))
        near, (lips, rolls) = avatar.predictor.near, bases_reach(avatar.config.deltaplane, avatar.config.conditioning.mouth_shapes)
        self.reach = lips.to(device), rolls.to(device)
        self.ear = avatar.conditioner.ear().requires_grad_(False)
        others = [part for part in [*avatar.conditioner.parameters(), *avatar.predictor.parameters()] if part.requires_grad and part is not near]
        identity_rate = config.identity_rate * float(avatar.predictor.scale)
        groups = [
            {"lr": config.learning_rate, "params": others},
            {"lr": config.renderer_rate, "params": list(avatar.personalized.renderer.parameters())},
            {"lr": identity_rate, "params": [avatar.personalized.identity]},
            *([] if near is None else [{"lr": config.mouth_rate, "params": [near], "eps": NEGLIGIBLE_NEAR}]),
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=NEGLIGIBLE, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [part for group in self.optimizer.param_groups for part in group["params"] if part.requires_grad]
        self.sides = SideViews(track.cameras[:num_frames]).to(device) if config.weights.sides else None
        if self.sides is not None:
            self.sides.take(avatar.personalized, avatar.personalized.triplane)
            self.modules["sides"] = self.sides
        index = spread_evenly(num_frames, 200)
        self.some = clip.driving(index).to(device)
        with torch.no_grad():  # the linear bases' weights of the face at rest
            self.rest = avatar.conditioner.coefficients(self.some, shapes.values[index].to(device)).mean(0, keepdim=True)
        self.predict = self._predictor()
        self.steady = where_steady(clip, avatar.background.cpu()).to(device)
        self.generators = {"choice": torch.Generator().manual_seed(seed)}

    def _predictor(self) -> Callable[..., Float[Tensor, "b 3 c p p"]]:
        """Return the deltaplane's network; on a GPU its many small steps are recorded once and replayed, since launching them takes longest."""
        avatar, tensors = self.avatar, DeltaplaneTensors(self.avatar.predictor)
        if not self.device.startswith("cuda"):
            return tensors
        frames = torch.arange(self.run_length).repeat(self._num_runs)
        with torch.no_grad():
            driving = self.clip.driving(frames).to(self.device)
            tokens = avatar.conditioner(driving)
            coefficients = avatar.conditioner.heard_coefficients(tokens, driving)
        sample = (avatar.personalized.identity.detach().clone().requires_grad_(), tokens.requires_grad_(), coefficients)
        try:
            return cast(Callable[..., Tensor], torch.cuda.make_graphed_callables(tensors, sample, allow_unused_input=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("no CUDA graph: %s", str(error).partition("\n")[0])
            return tensors

    def listen(self, progress: Progress) -> None:
        """Teach the audio encoder to tell the shape of the mouth, and the lip reader to read it.

        The encoder stays as it is then: with pictures to gain from it, it would learn this film's frames by heart.
        """
        config = self.config
        self.ear.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.ear.parameters(), lr=config.listening_rate, weight_decay=config.listening_decay, fused=True)
        weights = {name: getattr(config.weights, name) for name in ("hearing", "velocity", "silence")}
        for number in range(config.listening_steps):
            optimizer.param_groups[0]["lr"] = config.listening_rate * (1 - number / config.listening_steps)
            terms = self._hear(max(1, config.listening_frames // 2))
            loss = weighted_sum(terms, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if number % 20 == 19:
                progress("listen", number + 1, config.listening_steps, {name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad(set_to_none=True)
        self.ear.requires_grad_(False)
        self.average.module.load_state_dict(self.avatar.state_dict())
        if config.weights.lips:
            self._teach_reader()

    def _teach_reader(self) -> None:
        index = spread_evenly(self.num_frames, 3000)
        crops = torch.cat([window_crops(premultiply(*self.clip.images(part)), self.windows[part]) for part in index.split(64)])
        shapes = self.heard.shapes
        reader = self.reader.cpu().requires_grad_(True)
        teach(reader, crops, shapes.values[index], shapes.importance, self.config.reading_steps, self.generators["choice"])
        reader.to(self.device)

    def _hear(self, count: int) -> dict[str, Float[Tensor, ""]]:
        choice = self.generators["choice"]
        frames = torch.randint(max(1, self.num_frames - 1), (count,), generator=choice)
        return hearing_losses(self.avatar.conditioner, self.heard, frames, self.config.audio_noise, choice)

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Draw frames, predict their deltaplanes, render, compare, descend."""
        config = self.config
        settling = 0 if self.sides is None or config.steps < 2 * config.settling_steps else config.settling_steps
        if self.sides is not None and 0 < number == settling:
            self._hold_sides(self.sides)
        begin, end = (0, settling) if number < settling else (settling, config.steps)
        scale = cosine_decay((number - begin) / (end - begin), 0.05) * min(1.0, (number - begin + 1) / 50)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        terms = self._find_gradients(self._draw())
        self.avatar.predictor.confine_gradients(self.reach)
        nn.utils.clip_grad_norm_(self.avatar.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.avatar, number)
        return terms

    def _hold_sides(self, sides: SideViews) -> None:
        """Hold sides from now on as the average of the weights shows them, the face at rest."""
        average = cast(Avatar, self.average.module)
        with torch.no_grad():
            tokens, identity = average.conditioner(self.some).mean(0, keepdim=True), average.personalized.triplane
            sides.take(average.personalized, identity + average.predictor(identity, tokens, self.rest))

    def _find_gradients(self, index: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """Put the gradients into the parameters, and return the terms.

        On a CPU every thread takes frames of its own: together, threads wait for each other at each small step of one picture, and where another
        program runs they wait long. Each part draws from its own generator and parts are added in order: which is ready first makes no difference.
        """
        cores = torch.get_num_threads() if self.device == "cpu" else 1
        num_runs = len(index) // self.run_length
        parts = index.split(-(-num_runs // min(cores, num_runs)) * self.run_length)
        seeds = torch.randint(2**62, (len(parts),), generator=self.generators["choice"]).tolist()
        shares = [len(part) / len(index) for part in parts]
        if len(parts) == 1:
            results = [self._learn_from(index, seeds[0], 1.0)]
        else:
            with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(cores // len(parts),)) as pool:
                results = list(pool.map(self._learn_from, parts, seeds, shares))
            torch.set_num_threads(cores)  # what the pool set holds for threads to come, too
        for parameter, *gradients in zip(self.parameters, *(found for _, found in results), strict=True):
            known = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = functools.reduce(torch.add, known).contiguous() if known else None  # fused Adam takes them to lie as parameters do
        return {name: torch.stack([terms[name] for terms, _ in results]).sum(0) for name in results[0][0]}

    def _learn_from(self, index: Int[Tensor, " b"], seed: int, share: float) -> tuple[dict[str, Float[Tensor, ""]], tuple[Tensor | None, ...]]:
        """Predict deltaplanes of some of a step's frames, render, compare: their share in the terms and in the gradients."""
        choice, rays = torch.Generator().manual_seed(seed), torch.Generator(self.device).manual_seed(seed)
        rendering, planes, coefficients = self._render(index, choice, rays)
        terms = self._compare(rendering, index, choice)
        if self.sides is not None:
            terms["sides"] = self.sides.loss(self.avatar.personalized, self._at_rest(planes, coefficients), choice, rays)
        terms = {name: share * term for name, term in terms.items()}
        loss = weighted_sum(terms, vars(self.config.weights))
        return {name: term.detach() for name, term in terms.items()}, torch.autograd.grad(loss, self.parameters, allow_unused=True)

    @property
    def _num_runs(self) -> int:
        return 1 if self.config.weights.sync else self.config.frames_per_step // self.run_length

    def _draw(self) -> Int[Tensor, " b"]:
        """Frames of a step: single ones, or runs of consecutive ones where a term compares or hears these."""
        first = torch.multinomial(self.chances, self._num_runs, replacement=True, generator=self.generators["choice"])
        return (first[:, None] + torch.arange(self.run_length)).flatten()

    def _render(self, index: Int[Tensor, " b"], choice: torch.Generator, rays: torch.Generator) -> tuple[Rendering, Triplane, Float[Tensor, "b k"]]:
        """Render frames as they are driven; return their planes and the weights of the linear bases, too.

        What is drawn by chance is the same for all frames of a run, else it would jump between them.
        """
        avatar, driving = self.avatar, self._driving(index, choice)
        tokens = avatar.conditioner(driving, choice, self.run_length)
        heard = avatar.conditioner.heard(tokens, driving)
        tracked = torch.rand(len(index) // self.run_length, 1, generator=choice) < self.config.tracked_mouth
        mouth = torch.where(tracked.repeat_interleave(self.run_length, 0).to(heard.device), self.heard.shapes.values[index].to(heard), heard)
        person = avatar.personalized
        coefficients = avatar.conditioner.coefficients(driving, mouth)
        delta = Triplane(planes=self.predict(person.identity, tokens, coefficients), axes=person.triplane.axes)
        planes = person.triplane + delta
        return person.render(planes, self.clip.track.cameras[index].to(self.device), driving.head_pose, rays), planes, coefficients

    def _at_rest(self, planes: Triplane, coefficients: Float[Tensor, "b k"]) -> Triplane:
        """Return the first of the planes with mouth, lids, brows and gaze at rest; what head pose and place do is held from the side, too."""
        return planes[:1] + self.avatar.predictor.blend_near(self.rest - coefficients[:1])

    def _compare(self, rendering: Rendering, index: Int[Tensor, " b"], choice: torch.Generator) -> dict[str, Float[Tensor, ""]]:
        weights = self.config.weights
        target, emphasis = self._target(index)
        rendering, target = lay_over(rendering, target, random_backgrounds(self.avatar.background, len(index), self.run_length, choice))
        terms = picture_losses(rendering, target, emphasis)
        if weights.structure:
            terms["structure"] = structure_loss(rendering.image, target.image, emphasis)
        if weights.temporal:
            terms["temporal"] = temporal_loss(rendering.image, target.image, emphasis, self.run_length)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(rendering.image, target.image).mean()
        terms |= self._read_faces(rendering.image, target.image, index)
        return {name: term for name, term in terms.items() if getattr(weights, name)}

    def _read_faces(self, image: Float[Tensor, "b 3 h w"], filmed: Float[Tensor, "b 3 h w"], index: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Compare what is read off faces; the points of the filmed ones say where to look in both pictures."""
        terms, pictures, points = {}, (image, filmed), self.clip.track.landmarks[index].float()
        if self.config.weights.lips:
            mouths = [window_crops(picture, self.windows[index]) for picture in pictures]
            terms["lips"] = self.reader.loss(mouths[0], mouths[1], self.heard.shapes)
        if self.arcface is not None:
            places = five_points(points).to(image)
            terms["identity"] = unlikeness(*(self.arcface(align_faces(picture, places, 2 * SIDE_PX)) for picture in pictures))
        if self.likeness is not None:
            terms["likeness"] = unlikeness(*(self.likeness(0.5 * picture.cpu() + 0.5, points) for picture in pictures)).to(image)
        if self.sync is not None:
            terms["sync"] = self.sync(image, int(index[0]))
        return terms

    def _target(self, index: Int[Tensor, " b"]) -> tuple[PictureTarget, Float[Tensor, "b 1 h w"]]:
        target = foreground(self.clip, index, self.avatar.background, self.steady)
        points, side = self.clip.track.landmarks[index].float(), target.image.shape[-1]
        emphasis = face_emphasis(points, side, self.config.mouth_emphasis, self.config.face_emphasis)
        return target, (emphasis / emphasis.mean((1, 2, 3), keepdim=True)).to(self.device)

    def _driving(self, index: Int[Tensor, " b"], choice: torch.Generator) -> Driving:
        true = self.clip.driving(index)
        noise = torch.randn(len(index) // self.run_length, *true.audio.shape[1:], generator=choice).repeat_interleave(self.run_length, 0)
        return dataclasses.replace(true, audio=true.audio + self.config.audio_noise * noise).to(self.device)


def lids_brows_gaze(blink: Float[Tensor, "t 1"], upper_face: Float[Tensor, "t 4"]) -> Float[Tensor, "t 5"]:
    """Lids, brows and gaze of every frame, standardised."""
    values = torch.cat([blink, upper_face], 1).float()
    return (values - values.mean(0)) / values.std(0, correction=0).clamp(min=1e-6)
