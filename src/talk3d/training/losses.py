"""Named losses on pictures, each a mean so that no weight depends on size or batch.

Pictures are premultiplied over black in [-1, 1] and mattes in [0, 1] unless a docstring says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.models.avatar import PersonalizedGenerator
from talk3d.models.conditioning import Conditioner, quadratic
from talk3d.models.renderer import TriplaneRenderer
from talk3d.models.stylegan2 import resize_to
from talk3d.ops.compositing import over, premultiply
from talk3d.ops.geometry import head_camera, view_angles
from talk3d.types import AudioFeatures, Camera, Rendering, Triplane, Waveform, spread_evenly

LOSS_WEIGHTS = {"image": 1.0, "detail": 2.0, "alpha": 0.5, "raw": 0.5}
"""Weights of `picture_losses` where a person is fitted."""


@dataclass(frozen=True, kw_only=True)
class PictureTarget:
    """What a rendering should look like."""

    image: Float[Tensor, "b 3 H W"]
    """[-1, 1], premultiplied over black."""
    alpha: Float[Tensor, "b 1 H W"]
    """[0, 1]."""


def target_from_rgba(rgba: Float[Tensor, "b 4 h w"]) -> PictureTarget:
    """Turn pictures and mattes in [0, 1], not premultiplied, into a target."""
    return PictureTarget(image=premultiply(2 * rgba[:, :3] - 1, rgba[:, 3:]), alpha=rgba[:, 3:])


def laplacian_pyramid(x: Float[Tensor, "b c h w"], levels: int) -> list[Float[Tensor, "b c _ _"]]:
    """Band-pass pictures from fine to coarse; the last level is the low-pass rest."""
    bands = []
    for _ in range(levels):
        smaller = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(smaller, scale_factor=2.0, mode="bilinear", align_corners=False))
        x = smaller
    return [*bands, x]


def laplacian_l1(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], levels: int = 4, weight: Float[Tensor, "b 1 h w"] | None = None
) -> Float[Tensor, ""]:
    """L1 between Laplacian pyramids, level k counted 2^k / 2^levels · sides: fine detail matters as much as colour.

    It is our offline stand-in for a perceptual loss. `weight` emphasises regions (mean 1 keeps the scale).

    Reference: Laplacian pyramid loss, Bojanowski et al. (arXiv 1707.05776).
    """
    total = x.new_zeros([])
    for band in laplacian_pyramid(x - y, levels):
        if weight is not None and weight.shape[-1] != band.shape[-1]:
            weight = F.avg_pool2d(weight, weight.shape[-1] // band.shape[-1])
        total = total + (band.abs() if weight is None else band.abs() * weight).mean()
    return total


def picture_losses(rendering: Rendering, target: PictureTarget, weight: Float[Tensor, "b 1 H W"] | None = None) -> dict[str, Float[Tensor, ""]]:
    """Compare a rendering with its target at full and raw size: `image`, `detail`, `alpha`, `raw`, each unweighted.

    Args:
        rendering: what was rendered.
        target: what it should be.
        weight: emphasis of regions, mean about 1.
    """
    emphasis = 1.0 if weight is None else weight
    side = rendering.raw.shape[-1]
    small, small_alpha = resize_to(target.image, side), resize_to(target.alpha, side)
    return {
        "image": ((rendering.image - target.image).abs() * emphasis).mean(),
        "detail": laplacian_l1(rendering.image, target.image, weight=weight),
        "alpha": (rendering.alpha - target.alpha).abs().mean() + (rendering.raw_alpha - small_alpha).abs().mean(),
        "raw": (rendering.raw - small).abs().mean(),
    }


def random_backgrounds(plate: Float[Tensor, "3 h w"], count: int, length: int, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Draw what frames are laid over, [-1, 1]: with even chances the plate, as the film shows it, or a colour, over which no outline hides.

    Args:
        plate: what is usually behind the person, as in the film.
        count: of the frames.
        length: so many in a row have the same behind them.
        generator: of the chances.
    """
    colour = 2 * torch.rand(count // length, 3, 1, 1, generator=generator) - 1
    chosen = torch.rand(count // length, 1, 1, 1, generator=generator) < 0.5
    colour, chosen = (few.repeat_interleave(length, 0).to(plate.device) for few in (colour, chosen))
    return torch.where(chosen, plate, colour)


def lay_over(rendering: Rendering, target: PictureTarget, behind: Float[Tensor, "b 3 H W"]) -> tuple[Rendering, PictureTarget]:
    """Lay both, and the rendering before super-resolution, over what is behind them: so an outline counts as it is seen.

    Over black, too much of a dark person costs little, and errors of colours and of opacity need not fit together.
    """
    small = resize_to(behind, rendering.raw.shape[-1])
    image, raw = over(rendering.image, rendering.alpha, behind), over(rendering.raw, rendering.raw_alpha, small)
    return replace(rendering, image=image, raw=raw), replace(target, image=over(target.image, target.alpha, behind))


def temporal_loss(
    image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"], weight: Float[Tensor, "b 1 h w"], length: int
) -> Float[Tensor, ""]:
    """Mean absolute difference of what changes from one frame to the next, rendered and filmed.

    Args:
        image: runs of consecutive frames, one run after the other.
        target: the same frames as they were filmed.
        weight: emphasis of regions, mean about 1; a change counts by the mean of its two frames'.
        length: of a run, at least 2.
    """
    off, emphasis = (x.unflatten(0, (-1, length)) for x in (image - target, weight))
    return (off.diff(dim=1).abs() * (emphasis[:, 1:] + emphasis[:, :-1]) / 2).mean()


UNSEEN_DEG = 12.0
"""A view is not filmed if no frame is within this of its yaw and pitch."""
SIDE_RAYS = 48
"""Rays a side of the views from the side."""
SIDE_STEP = 3
"""They are every so many-th row and column of a larger picture, others each time."""


class SideViews(nn.Module):
    """A person seen from where the film does not show them: what no frame corrects should stay as it was when the pictures were taken.

    Planes and decoder fit the filmed views ever better, and with nothing to hold them, cheeks and neck seen from the side become blotchy meanwhile.
    """

    pictures: Tensor

    def __init__(self, filmed: Camera) -> None:
        """Choose views that are not among those of the frames that will be learnt from; there are no pictures yet."""
        super().__init__()
        angles = torch.cartesian_prod(torch.arange(-50.0, 51.0, 10.0), torch.tensor([-20.0, 0.0, 20.0]))  # yaw, pitch
        seen = view_angles(filmed.cam2world[:, :3, :3])[:, :2].rad2deg()
        angles = angles[torch.cdist(angles, seen).amin(1) > UNSEEN_DEG]
        self.cameras = head_camera(F.pad(angles, (0, 1)).deg2rad())
        self.register_buffer("pictures", torch.zeros(len(angles), 4, SIDE_RAYS * SIDE_STEP, SIDE_RAYS * SIDE_STEP))

    def take(self, person: PersonalizedGenerator, planes: Triplane) -> None:
        """Take the pictures, of a person and its planes, batch 1, as they are now."""
        self.cameras = self.cameras.to(self.pictures.device)
        with torch.no_grad():
            for number, picture in enumerate(self.pictures):
                picture.copy_(self._look(person, planes, self.cameras[number : number + 1], self.pictures.shape[-1], None)[0])

    def _look(
        self, person: PersonalizedGenerator, planes: Triplane, camera: Camera, side: int, rays: torch.Generator | None
    ) -> Float[Tensor, "1 4 p p"]:
        features, alpha, _ = person.renderer.render_features(planes, camera, side, generator=rays, occupied=person.occupied)
        return torch.cat([features[:, :3], alpha], 1)

    def loss(self, person: PersonalizedGenerator, planes: Triplane, choice: torch.Generator, rays: torch.Generator) -> Float[Tensor, ""]:
        """Compare one view, drawn by `choice`, before super-resolution: mean absolute difference of colours and of opacity. Zero if all was filmed.

        Args:
            person: as trained so far.
            planes: its planes with the face at rest and the head as in a frame, batch 1.
            choice: which view, and which of its rows and columns.
            rays: jitters the samples.
        """
        if not len(self.pictures):
            return planes.planes.new_zeros([])
        number = int(torch.randint(len(self.pictures), (1,), generator=choice))
        row, column = torch.randint(SIDE_STEP, (2,), generator=choice).tolist()
        camera = self.cameras[number : number + 1].every(SIDE_STEP, row, column, SIDE_RAYS * SIDE_STEP)
        found = self._look(person, planes, camera, SIDE_RAYS, rays)
        different = (found[0] - self.pictures[number, :, row::SIDE_STEP, column::SIDE_STEP]).abs().mean((1, 2))
        return different[:3].mean() + different[3]


def unlikeness(found: Float[Tensor, "b d"], wanted: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return 1 - cosine of unit vectors that say who is seen."""
    return 1 - (found * wanted).sum(1).mean()


def depth_loss(rendering: Rendering, truth: Float[Tensor, "b 1 p p"]) -> Float[Tensor, ""]:
    """Mean absolute difference of distances, scene units, where the truth is known (above 0); finer truth is averaged to the rays."""
    cells = truth.shape[-1] // rendering.depth.shape[-1]
    known = 1 - F.max_pool2d((truth <= 0).float(), cells)
    return ((rendering.depth - F.avg_pool2d(truth, cells)).abs() * known).sum() / known.sum().clamp(min=1)


def density_variation(
    renderer: TriplaneRenderer, triplane: Triplane, generator: torch.Generator, num_points: int = 1000, distance: float = 0.004
) -> Float[Tensor, ""]:
    """Total variation of raw density between random points and neighbours at `distance`.

    Reference: EG3D (arXiv 2112.07945), supplement, density regularisation (L1).
    """
    planes = triplane.planes
    shape = (planes.shape[0], num_points, 3)
    points = torch.rand(shape, generator=generator, device=planes.device) - 0.5
    moved = points + distance * torch.randn(shape, generator=generator, device=planes.device)
    both = torch.cat([points, moved], 1) * renderer.renderer_config.box_warp
    density = renderer.query(triplane, both)[0].squeeze(-1)
    first, second = density.chunk(2, 1)
    return (first - second).abs().mean()


def weighted_sum(terms: dict[str, Float[Tensor, ""]], weights: dict[str, float]) -> Float[Tensor, ""]:
    """Add up the terms, each times its weight; a term without a weight is an error of ours."""
    return torch.stack([terms[name] * weights[name] for name in terms]).sum()


RIGID = (33, 133, 362, 263, 168, 6, 197, 195, 5, 1, 2, 98, 327, 151, 9)
"""Eye corners, bridge and base of the nose, forehead: points that speech does not move."""
MOUTH = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409, 78, 95, 88, 178)
MOUTH += (87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415, 152, 148, 377)
"""Outer and inner lips, and the chin."""


@dataclass(frozen=True, kw_only=True)
class MouthShapes:
    """The mouth in every frame, as standardised principal components."""

    values: Float[Tensor, "t k"]
    importance: Float[Tensor, " k"]
    """Share of each component in the mouth's motion; sums to 1."""


def mouth_shapes(
    looks: Float[Tensor, "t c"], head_pose: Float[Tensor, "t 3"], num_learnt: int, num_components: int = 8, most: int = 2000
) -> MouthShapes:
    """Describe the mouth of each frame by the principal components of its looks, with what the head's pose does to them taken out.

    What nods and turns do is what squares of the head's angles predict. The sound cannot tell how the head is held, so it must not be asked to.

    Args:
        looks: any numbers that tell mouths apart, such as `training.lips.mouth_looks`.
        head_pose: yaw, pitch, roll, radians.
        num_learnt: how many of the frames, the first ones, all this is found in; the others are told in the same terms.
        num_components: how many components; those that the frames do not have are zero.
        most: frames, spread over those, that the components are found in.
    """
    centred = _without_pose(looks, head_pose.float(), num_learnt)
    few = centred[spread_evenly(num_learnt, most)]
    _, spread, basis = torch.linalg.svd(few, full_matrices=False)
    basis = basis[:num_components][spread[:num_components] > 1e-5 * spread[0]]
    along = centred @ basis.mT
    weights = along[:num_learnt].square().mean(0).sqrt()
    room = (0, num_components - len(basis))
    values, weights = F.pad(along / weights, room), F.pad(weights, room)
    return MouthShapes(values=values, importance=weights / weights.sum().clamp(min=1e-9))


def unusual(values: Float[Tensor, "t k"], num_components: int = 3, neighbours: int = 20, most: int = 2000) -> Float[Tensor, " t"]:
    """Return chances of frames that are the greater the fewer mouths (or lids, brows and gazes) are like theirs; they sum to 1.

    Frames of a mouth that is one of many are drawn about as often in all as those of a mouth that is seldom seen: the chance goes by the area
    that holds a frame's nearest neighbours, among `most` frames at the most.

    Args:
        values: standardised components of the mouth, or lids, brows and gaze.
        num_components: the first ones, which are looked at.
        neighbours: how many neighbours.
        most: frames to look for neighbours in.
    """
    points = values[:, :num_components]
    others = points[spread_evenly(len(points), most)]
    distance = torch.cdist(points, others).kthvalue(min(neighbours, len(others)), 1).values
    area = distance.square() + 1e-6
    return area / area.sum()


def run_chances(chances: Float[Tensor, " t"], length: int, cuts: Sequence[int] = ()) -> Float[Tensor, " r"]:
    """Return chances of every run of `length` consecutive frames: the mean of its frames', and none where a new shot begins inside.

    Args:
        chances: of frames.
        length: of a run; runs of one frame have the frames' chances.
        cuts: frames at which a new shot begins.

    Raises:
        ConfigError: there is no such run.
    """
    runs = chances.unfold(0, length, 1).mean(1) if length <= len(chances) else chances[:0]
    for cut in cuts:
        runs[max(0, cut - length + 1) : cut] = 0
    if not runs.any():
        given = f"{len(chances)} frames to learn from and {len(cuts)} cuts"
        raise ConfigError(f"weights.sync and weights.temporal need {length} frames in a row, got {given}: give a longer film, or weights of 0")
    return runs


def _without_pose(values: Float[Tensor, "t c"], head_pose: Float[Tensor, "t 3"], num_learnt: int) -> Float[Tensor, "t c"]:
    """Take out of values their mean and what a quadratic in the head's angles predicts, as found in the first frames.

    A faint ridge copes with a head that is still.
    """
    learnt = slice(0, num_learnt)
    angles = (head_pose - head_pose[learnt].mean(0)) / head_pose[learnt].std(0, correction=0).clamp(min=1e-3)
    terms = quadratic(angles)
    terms, values = terms - terms[learnt].mean(0), values - values[learnt].mean(0)
    known, ridge = terms[learnt], 0.01 * torch.eye(terms.shape[1])
    return values - terms @ torch.linalg.solve(known.mT @ known + ridge, known.mT @ values[learnt])


def quiet_frames(waveform: Waveform, fps: float, count: int, threshold: float = 0.05) -> Bool[Tensor, " t"]:
    """Say which of the first `count` frames are silent: a quarter of a second round them stays under a share of the loud frames' RMS.

    Args:
        waveform: the sound.
        fps: frames a second.
        count: how many frames.
        threshold: share of the 90th percentile of the frames' RMS.
    """
    length = round(waveform.sample_rate_hz / fps)
    samples = F.pad(waveform.samples.float(), (0, max(0, count * length - len(waveform.samples))))[: count * length]
    loudness = samples.unflatten(0, (count, length)).square().mean(1).sqrt()
    reach = max(1, round(fps / 8))
    loudest = F.max_pool1d(loudness[None], 2 * reach + 1, stride=1, padding=reach)[0]
    return loudest < threshold * loudness.quantile(0.9)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the conditioner should hear in a clip."""

    audio: AudioFeatures
    shapes: MouthShapes
    """Of the clip's training part."""
    postures: Float[Tensor, "t 4"]
    """In it, see `conditioning.posture`."""
    quiet: Int[Tensor, " q"]
    """Silent frames that may be learnt from."""

    shut: Float[Tensor, " k"]
    """The mouth when it is shut."""


def shut_mouth(shapes: MouthShapes, opening: Float[Tensor, " t"]) -> Float[Tensor, " k"]:
    """Return the median shape of the tenth of the frames in which the mouth is open least.

    What the mouth does while nothing sounds would not do: speakers breathe in, and open before they begin.
    """
    return shapes.values[opening <= opening.quantile(0.1)].median(0).values


def hearing_losses(conditioner: Conditioner, heard: Heard, frames: Int[Tensor, " b"], noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Compare the mouth's components read off the audio tokens with the tracked ones: `hearing`, `velocity`, `silence`, weighted by importance.

    `hearing` is the mean square error, `velocity` that of the change from frame to frame, and `silence` the mean square distance from the
    shut mouth when the sound of one silent frame goes on and on. With noise, each sound is mixed with another one in a random share, and what
    should be heard likewise: half a minute of speech has few sounds, and between them the ear should go straight.

    Reference: mixup (arXiv 1710.09412).

    Args:
        conditioner: what listens.
        heard: features of the clip and what should be heard in them.
        frames: which frames; their successors are listened to as well.
        noise: standard deviation of the noise on the features; 0 takes the sounds as they are.
        generator: of noise and mixtures, and of which silent frames.
    """
    assert conditioner.mouth_head is not None, "this conditioner has no mouth shapes"
    weight, values, postures = conditioner.mouth_head.weight, heard.shapes.values, heard.postures
    frames = frames.clamp(max=len(values) - 2)
    pairs = torch.cat([frames, frames + 1])
    windows, wanted, held = heard.audio.around(pairs), values[pairs], postures[pairs]
    if noise:
        share = torch.rand(len(frames), 1, generator=generator).repeat(2, 1)
        other = torch.randperm(len(frames), generator=generator)
        other = torch.cat([other, other + len(frames)])
        windows = torch.lerp(windows[other], windows, share[..., None, None])
        wanted, held = (torch.lerp(x[other], x, share) for x in (wanted, held))
    if len(heard.quiet):
        silent = heard.quiet[torch.randint(len(heard.quiet), (max(1, len(frames) // 8),), generator=generator)]
        windows = torch.cat([windows, heard.audio.values[silent, None].expand(-1, windows.shape[1], -1, -1)])
        held = torch.cat([held, postures[silent]])
    sounds = windows.to(weight)
    hiss = torch.Generator(weight.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    sounds = sounds + noise * torch.randn(sounds.shape, generator=hiss, device=weight.device)
    found = conditioner.mouth(conditioner.audio_token(sounds), held.to(weight))
    importance = heard.shapes.importance.to(weight)

    def error(mouth: Float[Tensor, "n k"], wanted: Float[Tensor, "*n k"]) -> Float[Tensor, ""]:
        return ((mouth - wanted.to(weight)).square() * importance).sum(1).mean()

    both = found[: len(pairs)]
    first, second = both.chunk(2)
    before, after = wanted.chunk(2)
    terms = {"hearing": error(both, wanted), "velocity": error(second - first, after - before)}
    if len(heard.quiet):
        terms["silence"] = error(found[len(pairs) :], heard.shut)
    return terms
