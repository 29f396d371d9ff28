"""Inversion: find a head in the prior from pictures with known cameras, then tune the prior to it. Personalisation does this with a clip's frames.

Two steps. *Inversion* looks for a code w of the person and a small offset for each moment, starting from the encoder's guess where the prior has
one, the generator held fixed. *Pivotal tuning* then adapts the generator to the pictures, the codes held fixed, while heads near the person must
stay what they were, from all sides. Tuning also adds to the planes what is this person's alone: a backbone that has learnt thousands of heads needs
hundreds of steps for an eye that the planes themselves learn in tens.

Reference: VIVE3D (arXiv 2303.15893), section 3.1; pivotal tuning (arXiv 2106.05744).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.models.avatar import PersonalizedGenerator, Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.renderer import RendererConfig
from talk3d.ops.geometry import head_camera
from talk3d.training.loop import Best, Loop, cosine_decay
from talk3d.training.losses import LOSS_WEIGHTS, PictureTarget, picture_losses, weighted_sum
from talk3d.types import Camera, Progress, Rendering, Triplane, silent

WIDE_RAYS = 64
"""Rays a side of wide views; they go through every so many-th row and column of the picture, others each time."""


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """How a head is found and the prior tuned to it."""

    frames_per_step: int = 2
    """Pictures compared in one step."""
    inversion_steps: int = 80
    """Steps of the search for the codes."""
    inversion_rate: float = 0.05
    """Adam's learning rate of the codes."""
    tuning_steps: int = 320
    """Steps of tuning the generator."""
    tuning_rate: float = 1e-3
    """Adam's learning rate of the generator at the start of tuning."""
    own_rate: float = 0.01
    """Adam's learning rate of the planes' own part at the start of tuning, in units of the planes' standard deviation."""
    own_sides: float = 0.3
    """The same for the two planes that a front view does not look on to, as a share: what they learn from it shows as streaks from the side."""
    rays: int | None = None
    """Rays a side of the pictures that are compared; None takes as many as super-resolution takes as they are."""
    offset_weight: float = 0.02
    """Of the mean square of the moments' offsets, in units of the prior's spread."""
    person_weight: float = 0.002
    """Of the mean square distance of the person's code from where the search started, in units of the prior's spread."""
    locality_weight: float = 1.0
    """Of the change of heads near the person while tuning."""
    shape_weight: float = 1.0
    """Of the change of the person's own shape while tuning, seen from a random side: what the pictures do not show must stay plausible."""
    wide_weight: float = 1.0
    """Of the error of wide views while tuning."""
    locality_every: int = 3
    """Every which tuning step these changes are measured and a wide view is looked at, in turn."""
    validation_every: int = 25
    """Every which tuning step the views kept for validation are looked at, where there are any."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.frames_per_step, self.inversion_steps, self.tuning_steps, self.locality_every, self.validation_every) < 1:
            raise ConfigError("inversion counts frames and steps from 1: give positive numbers")


@dataclass(frozen=True, kw_only=True)
class Views:
    """Pictures of one person."""

    target: PictureTarget
    """The pictures, k of them, and their mattes, of the size that the prior renders."""
    cameras: Camera
    """Where they were taken from."""
    moment: Int[Tensor, " k"]
    """Pictures of one number, counted from 0, show the same moment."""
    emphasis: Float[Tensor, "k 1 h w"] | None = None
    """How much each pixel counts, mean about 1; None means all the same."""
    head_pose: Float[Tensor, "k 3"] | None = None
    """How the head is held on its neck; None: as at rest."""
    validation: "Views | None" = None
    """Further pictures, not learnt from: the tuned generator that shows them best is kept. None keeps the last."""
    wide: "Views | None" = None
    """Pictures that show more than those from which the person is told: tuning learns from them, before super-resolution, where they count."""


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """A head found in a prior."""

    generator: TriplaneGenerator
    """The prior's generator, tuned to the person."""
    own: Float[Tensor, "1 3 c p p"]
    """What the person's planes have beyond what this generator paints."""
    person: Float[Tensor, "1 n w"]
    """Style rows of the person at the mean of the moments."""
    moments: Float[Tensor, "m n w"]
    """Style rows of every moment."""
    drift: float
    """How far tuning moved heads of others: mean absolute change of random heads' raw pictures and mattes, in [-1, 1] and [0, 1]."""

    def personalized(self, provenance: Mapping[str, object]) -> PersonalizedGenerator:
        """Freeze the generator at the person's style rows."""
        return PersonalizedGenerator.from_generator(self.generator, self.person, provenance, self.own)


def finer_rays(sizes: RendererConfig) -> int:
    """Rays a side for one person: half as many again as the prior learnt with, as far as super-resolution takes them as they are."""
    usual = sizes.neural_rendering_resolution
    return max(usual, min(3 * usual // 2, sizes.superresolution.input_side))


def guess_codes(prior: Prior, views: Views) -> Float[Tensor, "m w"]:
    """Return the code from which each moment's search starts: the encoder's guess, or the average where the prior has no encoder."""
    average = prior.generator.mapping_network.w_avg.detach()
    num_moments = int(views.moment.max()) + 1
    if prior.encoder is None:
        return average.expand(num_moments, -1).clone()
    guesses, cameras = [], prior.generator.renderer_config.in_planes(views.cameras)
    for moment in range(num_moments):
        index = (views.moment == moment).nonzero()[:, 0]
        with torch.no_grad():
            guesses.append(prior.encoder(views.target.image[index][None], views.target.alpha[index][None], cameras[index])[0])
    return average + torch.stack(guesses)


def invert(
    prior: Prior,
    views: Views,
    config: InversionConfig | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    stage: str = "invert",
) -> Inversion:
    """Find a person in a prior from pictures and tune the prior to them; the prior itself stays as it is.

    Args:
        prior: where to look.
        views: what the person looks like.
        config: how.
        device: where to compute; the result is on the CPU.
        seed: of all randomness.
        progress: hears every step's losses.
        checkpoint: kept here and resumed from.
        stage: under which name progress is told.

    Raises:
        WeightsError: the checkpoint belongs to other settings.
    """
    config = config or InversionConfig()
    search = _Search(prior, views, config, device=device, seed=seed)
    best = Best(search.tuned)
    total = config.inversion_steps + config.tuning_steps

    def step(number: int) -> dict[str, Float[Tensor, ""]]:
        terms = search.step(number)
        tuned = number + 1 - config.inversion_steps
        if number + 1 == total or (tuned > 0 and tuned % config.validation_every == 0):
            error = None if views.validation is None else search.error(views.validation)
            best.consider(search.tuned, error)
            terms |= {} if error is None else {"validation": error}
        return terms

    modules = search.modules | {"best": best}
    loop = Loop(modules=modules, optimizers=search.optimizers, generators=search.generators, checkpoint=checkpoint)
    loop.run(stage, total, step, progress)
    tuned = best.module.requires_grad_(True)
    assert isinstance(tuned, _Tuned)
    with torch.no_grad():
        moments = search.codes.rows(torch.arange(len(search.codes.start), device=device))
        person = search.codes.person_rows()
    drift = search.drift(tuned.generator)
    progress(stage, total, total, {"drift": drift})
    return Inversion(
        generator=tuned.generator.cpu(), own=(tuned.own * tuned.share).detach().cpu(), person=person.cpu(), moments=moments.cpu(), drift=drift
    )


class _Codes(nn.Module):
    """The moments' codes: where the search started, and the person's and the moments' offsets from there in units of the prior's spread."""

    start: Tensor

    def __init__(self, start: Float[Tensor, "m w"], spread: float, num_ws: int) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.spread, self.num_ws = spread, num_ws
        self.person = nn.Parameter(torch.zeros_like(start[0]))
        self.offsets = nn.Parameter(torch.zeros_like(start))

    def rows(self, moment: Int[Tensor, " b"]) -> Float[Tensor, "b n w"]:
        w = self.start[moment] + self.spread * (self.person + self.offsets[moment])
        return w[:, None].expand(-1, self.num_ws, -1)

    def person_rows(self) -> Float[Tensor, "1 n w"]:
        w = self.start.mean(0) + self.spread * (self.person + self.offsets.mean(0))
        return w.expand(1, self.num_ws, -1)


class _Tuned(nn.Module):
    """The generator that is tuned, and what is added to the planes it paints."""

    share: Tensor

    def __init__(self, generator: TriplaneGenerator, config: InversionConfig) -> None:
        super().__init__()
        sizes = generator.renderer_config
        self.generator, self.rays = generator, config.rays or sizes.superresolution.input_side
        self.own = nn.Parameter(torch.zeros(1, 3, sizes.plane_channels, sizes.plane_resolution, sizes.plane_resolution))
        self.register_buffer("share", torch.tensor([1.0, config.own_sides, config.own_sides]).view(1, 3, 1, 1, 1))

    def triplane(self, ws: Float[Tensor, "b n w"]) -> Triplane:
        painted = self.generator.triplane(ws)
        return Triplane(planes=painted.planes + self.own * self.share, axes=painted.axes)

    def render(
        self, ws: Float[Tensor, "b n w"], camera: Camera, head_pose: Float[Tensor, "b 3"] | None, rays: torch.Generator | None = None
    ) -> Rendering:
        seen = self.generator.renderer_config.bent(self.triplane(ws), head_pose)
        return self.generator.render_triplane(seen, ws[:, -1], camera, generator=rays, neural_rendering_resolution=self.rays)


class _Search:
    """One step of inversion or tuning and what it needs."""

    def __init__(self, prior: Prior, views: Views, config: InversionConfig, *, device: str, seed: int) -> None:
        self.config, self.device = config, device
        self.reference = copy.deepcopy(prior.generator).to(device).eval().requires_grad_(False)
        self.tuned = _Tuned(copy.deepcopy(prior.generator), config).to(device).eval()
        self.generator = self.tuned.generator
        self.codes = _Codes(guess_codes(prior, views), prior.w_std, self.generator.num_ws).to(device)
        self.image, self.alpha = views.target.image.to(device), views.target.alpha.to(device)
        self.cameras, self.moment = views.cameras.to(device), views.moment.to(device)
        self.head_pose = None if views.head_pose is None else views.head_pose.to(device)
        self.emphasis = None if views.emphasis is None else views.emphasis.to(device)
        self.wide = views.wide if config.wide_weight else None
        with torch.no_grad():
            spread = float(self.generator.triplane(self.codes.person_rows()).planes.std())
        backbone = [p for name, p in self.generator.named_parameters() if "mapping" not in name]
        self.rates = {"codes": (config.inversion_rate,), "tuned": (config.tuning_rate, config.own_rate * spread)}
        self.modules: dict[str, nn.Module] = {"tuned": self.tuned, "codes": self.codes}
        self.optimizers = {
            "codes": torch.optim.Adam(self.codes.parameters(), lr=config.inversion_rate, betas=(0.9, 0.99), fused=True),
            "tuned": torch.optim.Adam([{"params": backbone}, {"params": [self.tuned.own]}], betas=(0.9, 0.99), fused=True),
        }
        self.generators = {"choice": torch.Generator().manual_seed(seed), "rays": torch.Generator(device).manual_seed(seed)}

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Invert while there are inversion steps, tune afterwards."""
        inverting = number < self.config.inversion_steps
        active = self.optimizers["codes" if inverting else "tuned"]
        self.codes.requires_grad_(inverting)
        self.tuned.requires_grad_(not inverting)
        self._set_rate(number, inverting)
        index = torch.randperm(len(self.cameras), generator=self.generators["choice"])[: self.config.frames_per_step].to(self.device)
        ws = self.codes.rows(self.moment[index])
        head_pose = None if self.head_pose is None else self.head_pose[index]
        rendering = self.tuned.render(ws, self.cameras[index], head_pose, self.generators["rays"])
        target = PictureTarget(image=self.image[index], alpha=self.alpha[index])
        terms = picture_losses(rendering, target, None if self.emphasis is None else self.emphasis[index])
        weights = dict(LOSS_WEIGHTS)
        if inverting:
            terms |= {"person": self.codes.person.square().mean(), "offset": self.codes.offsets.square().mean()}
            weights |= {"person": self.config.person_weight, "offset": self.config.offset_weight}
        elif number % self.config.locality_every == 0:
            terms["locality"] = self._locality()
            weights["locality"] = self.config.locality_weight
        if not inverting and self.config.shape_weight and number % self.config.locality_every == 1 % self.config.locality_every:
            terms["shape"] = self._shape()
            weights["shape"] = self.config.shape_weight
        if not inverting and self.wide is not None and number % self.config.locality_every == 2 % self.config.locality_every:
            terms["wide"] = self._look_wide(self.wide)
            weights["wide"] = self.config.wide_weight
        loss = weighted_sum(terms, weights)
        active.zero_grad(set_to_none=True)
        loss.backward()
        active.step()
        return {name: term.detach() for name, term in terms.items()}

    def _set_rate(self, number: int, inverting: bool) -> None:
        config = self.config
        if inverting:
            fraction, name = number / config.inversion_steps, "codes"
        else:
            fraction, name = (number - config.inversion_steps) / config.tuning_steps, "tuned"
        for group, rate in zip(self.optimizers[name].param_groups, self.rates[name], strict=True):
            group["lr"] = rate * cosine_decay(fraction, 0.1) * min(1.0, 0.1 + fraction / 0.05)

    def error(self, views: Views) -> Float[Tensor, ""]:
        """Mean absolute error of pictures of the person at the mean of the moments."""
        rows = self.codes.person_rows().expand(len(views.cameras), -1, -1)
        emphasis = 1.0 if views.emphasis is None else views.emphasis.to(self.device)
        with torch.no_grad():
            head_pose = None if views.head_pose is None else views.head_pose.to(self.device)
            image = self.tuned.render(rows, views.cameras.to(self.device), head_pose).image
        return ((image - views.target.image.to(self.device)).abs() * emphasis).mean()

    def drift(self, generator: TriplaneGenerator, count: int = 8) -> float:
        """Change of random heads, each from a random side, between this generator and the prior's."""
        choice = torch.Generator().manual_seed(0)
        z = torch.randn(count, generator.config.z_dim, generator=choice).to(self.device)
        camera = head_camera((torch.rand(count, 3, generator=choice) * 2 - 1) * torch.tensor([0.5, 0.2, 0.0])).to(self.device)
        with torch.no_grad():
            ws = self.reference.mapping(z, camera.to_label() if generator.config.c_dim else None)
            now, before = (_look(one, one.triplane(ws), camera) for one in (generator, self.reference))
        return float(F.l1_loss(now[0], before[0]) + F.l1_loss(now[1], before[1]))

    def _locality(self) -> Float[Tensor, ""]:
        """Change of the raw picture of a head between the person and a random one, from a random side."""
        choice = self.generators["choice"]
        z = torch.randn(1, self.generator.config.z_dim, generator=choice).to(self.device)
        amount = 0.5 * torch.rand(1, generator=choice).item()
        camera = self._random_side()
        with torch.no_grad():
            label = self.cameras[:1].to_label() if self.generator.config.c_dim else None
            ws = torch.lerp(self.codes.person_rows(), self.reference.mapping(z, label), amount)
            before = _look(self.reference, self.reference.triplane(ws), camera)
        now = _look(self.generator, self.generator.triplane(ws), camera)
        return F.l1_loss(now[0], before[0]) + F.l1_loss(now[1], before[1])

    def _shape(self) -> Float[Tensor, ""]:
        """Change of the person's matte and distance, from a random side."""
        rows, camera = self.codes.person_rows().detach(), self._random_side()
        with torch.no_grad():
            _, matte, distance = _look(self.reference, self.reference.triplane(rows), camera)
        _, now, here = _look(self.generator, self.tuned.triplane(rows), camera)
        return F.l1_loss(now, matte) + ((here - distance).abs() * matte).mean()

    def _look_wide(self, wide: Views) -> Float[Tensor, ""]:
        """Error of colours and matte of one wide view of the person at the mean of the moments, where it counts."""
        index = torch.randint(len(wide.cameras), (1,), generator=self.generators["choice"])
        counts = torch.ones_like(wide.target.alpha[index]) if wide.emphasis is None else wide.emphasis[index]
        wanted = torch.cat([wide.target.image[index], wide.target.alpha[index], counts], 1)
        side = wanted.shape[-1]
        step = max(step for step in range(1, max(1, side // WIDE_RAYS) + 1) if side % step == 0)
        row, column = torch.randint(step, (2,), generator=self.generators["choice"]).tolist()
        *wanted, counts = wanted[..., row::step, column::step].flatten(2).mT.to(self.device).split([3, 1, 1], -1)  # b r c
        camera = wide.cameras[index].every(step, row, column, side).to(self.device)
        rows = self.codes.person_rows().detach()
        head_pose = None if wide.head_pose is None else wide.head_pose[index].to(self.device)
        found = _look(self.generator, self.generator.renderer_config.bent(self.tuned.triplane(rows), head_pose), camera, side // step)
        different = sum((now - then).abs().mean(-1, keepdim=True) for now, then in zip(found, wanted, strict=False))
        return (different * counts).mean()

    def _random_side(self) -> Camera:
        angles = (torch.rand(1, 3, generator=self.generators["choice"]) * 2 - 1) * torch.tensor([0.9, 0.3, 0.0])
        return head_camera(angles).to(self.device)


def _look(generator: TriplaneGenerator, triplane: Triplane, camera: Camera, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Render few rays; return their colours in [-1, 1], opacities and distances."""
    features, alpha, depth = generator.render_rays(triplane, generator.rays(camera, side))
    return 2 * features[..., :3] - 1, alpha, depth
