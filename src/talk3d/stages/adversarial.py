"""Adversarial pretraining, as EG3D does it: the generator learns to paint heads that a discriminator takes for pictures of the data set.

It needs one picture of each person and its camera, so photo collections will do. Called by `pretrain`.

Reference: EG3D (arXiv 2112.07945), section 4 and supplement; StyleGAN2 (arXiv 1912.04958); R1, Mescheder et al. (arXiv 1801.04406);
StyleGAN2-ADA (arXiv 2006.06676).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.io.heads import HeadDataset
from talk3d.models.avatar import Prior
from talk3d.models.discriminator import DiscriminatorConfig, DualDiscriminator, dual
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.stylegan2 import resize_to
from talk3d.training.loop import Average
from talk3d.training.losses import density_variation, target_from_rgba
from talk3d.types import Camera, Rendering, Triplane

SIGN_TARGET = 0.6
"""Share of the sign of real pictures' scores that the augmentation aims at: above it the discriminator has begun to learn pictures by heart."""
ADAPTATION_PICTURES = 500_000
"""Pictures after which the probability can have gone from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """How generator and discriminator play."""

    pictures_per_step: int = 32
    """Pictures in a batch."""
    generator_rate: float = 2.5e-3
    """Adam's rate of the generator."""
    discriminator_rate: float = 2e-3
    """Adam's rate of the discriminator."""
    gamma: float = 1.0
    """Weight of the R1 penalty."""
    penalty_every: int = 16
    """Every which step the penalty is taken, that many times as strong."""
    density_weight: float = 0.25
    """Of the total variation of density."""
    density_every: int = 4
    """Every which step that is taken, that many times as strong."""
    swap_rate: float = 0.5
    """How often the generator is told another picture's camera than it is looked at from, so that faces do not turn towards the viewer."""
    augmented: bool = True
    """Augment pictures before they are judged, as strongly as it takes."""
    average_decay: float = 0.998
    """Of the moving average of the weights, which is what is kept."""


def conditioned(sizes: GeneratorConfig) -> GeneratorConfig:
    """Sizes with a real mapping network that is told the camera, where they have none: what an adversary needs to map noise to people."""
    return replace(sizes, c_dim=sizes.c_dim or 25, mapping_layers=sizes.mapping_layers or 2)


class AdversarialTrainer:
    """One step of both players and what they need."""

    def __init__(self, config: AdversarialConfig, heads: HeadDataset, sizes: GeneratorConfig, *, steps: int, coarse_part: float, device: str) -> None:
        """Make the networks, with torch's global randomness.

        Args:
            config: how they play.
            heads: real pictures.
            sizes: of the generator, see `conditioned`.
            steps: of the whole training.
            coarse_part: share of the steps in which the number of rays a side grows from half to whole.
            device: where to train.
        """
        side = sizes.renderer.superresolution.output_side
        self.config, self.steps, self.coarse_part, self.device = config, steps, coarse_part, device
        self.heads = heads.to(device)
        self.generator = TriplaneGenerator(sizes).to(device).train()
        widths = {"channel_base": sizes.channel_base, "channel_max": sizes.channel_max}
        self.discriminator = DualDiscriminator(DiscriminatorConfig(side=side, c_dim=sizes.c_dim, **widths)).to(device)
        self.augmentation = Augmentation().to(device)
        self.average = Average(self.generator, config.average_decay)
        self.modules: dict[str, nn.Module] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "augmentation": self.augmentation,
            "average": self.average.module,
        }
        self.optimizers = {
            "generator": torch.optim.Adam(self.generator.parameters(), lr=config.generator_rate, betas=(0.0, 0.99)),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), lr=config.discriminator_rate, betas=(0.0, 0.99)),
        }
        self.generators = {name: torch.Generator(where) for name, where in (("choice", "cpu"), ("rays", device), ("latents", device))}

    def seed(self, seed: int) -> None:
        """Start all randomness of the steps from a seed."""
        for generator in self.generators.values():
            generator.manual_seed(seed)

    def take_over(self, prior: Prior) -> None:
        """Go on from a prior; the discriminator starts anew."""
        self.generator.load_state_dict(prior.generator.state_dict())
        self.average.module.load_state_dict(prior.generator.state_dict())

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Let the generator move, then the discriminator."""
        side = self._rays_a_side(number)
        return self._move_generator(number, side) | self._move_discriminator(number, side)

    def _rays_a_side(self, number: int) -> int:
        """Rays a side: from half of the config's to all of them while the coarse part lasts; even."""
        whole = self.generator.renderer_config.neural_rendering_resolution
        grown = min(1.0, number / max(1.0, self.coarse_part * self.steps))
        return 2 * round((0.5 + 0.5 * grown) * whole / 2)

    def _move_generator(self, number: int, side: int) -> dict[str, Float[Tensor, ""]]:
        self.discriminator.requires_grad_(False)
        _, label = self._real()
        rendering, triplane = self._paint(label, side)
        score = self.discriminator(self.augmentation(dual(rendering.image, rendering.raw), self.generators["latents"]), label)
        terms = {"generator": generator_loss(score)}
        loss = terms["generator"]
        if number % self.config.density_every == 0:
            terms["density"] = density_variation(self.generator, triplane, self.generators["rays"])
            loss = loss + self.config.density_weight * self.config.density_every * terms["density"]
        self._descend("generator", loss)
        self.average.update(self.generator, number)
        return {name: term.detach() for name, term in terms.items()}

    def _move_discriminator(self, number: int, side: int) -> dict[str, Float[Tensor, ""]]:
        self.discriminator.requires_grad_(True)
        real, label = self._real()
        with torch.no_grad():
            rendering, _ = self._paint(label, side)
            fake = self.augmentation(dual(rendering.image, rendering.raw), self.generators["latents"])
            real = self.augmentation(dual(real, resize_to(real, side)), self.generators["latents"])
        score = self.discriminator(real, label)
        terms = {"discriminator": discriminator_loss(score, self.discriminator(fake, label))}
        loss = terms["discriminator"]
        if number % self.config.penalty_every == 0:
            terms["penalty"] = gradient_penalty(self.discriminator, real, label)
            loss = loss + self.config.gamma / 2 * self.config.penalty_every * terms["penalty"]
        self._descend("discriminator", loss)
        if self.config.augmented:
            self.augmentation.adapt(score)
        return {name: term.detach() for name, term in terms.items()} | {"augmentation": self.augmentation.probability.clone()}

    def _descend(self, name: str, loss: Float[Tensor, ""]) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[name].step()

    def _real(self) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 25"]]:
        """Random pictures over black, half of them mirrored, and their labels."""
        choice, count = self.generators["choice"], self.config.pictures_per_step
        index = torch.randint(len(self.heads.images), (count,), generator=choice)
        rgba, camera = self.heads.look(index, torch.randint(2, (count,), generator=choice))
        return target_from_rgba(rgba).image, camera.to_label()

    def _paint(self, label: Float[Tensor, "b 25"], side: int) -> tuple[Rendering, Triplane]:
        """Render random heads from these cameras."""
        latents, count = self.generators["latents"], len(label)
        z = torch.randn(count, self.generator.config.z_dim, generator=latents, device=self.device)
        swapped = torch.rand(count, 1, generator=latents, device=self.device) < self.config.swap_rate
        told = torch.where(swapped, label.roll(1, 0), label)
        ws = self.generator.mapping(z, told)
        with torch.no_grad():
            self.generator.mapping_network.w_avg.lerp_(ws[:, 0].mean(0), 0.002)
        triplane = self.generator.triplane(ws)
        camera = Camera.from_label(label)
        rendering = self.generator.render_triplane(triplane, ws[:, -1], camera, generator=self.generators["rays"], neural_rendering_resolution=side)
        return rendering, triplane

    def heads_to_show(self) -> tuple[TriplaneGenerator, Float[Tensor, "b n w"]]:
        """The averaged generator and the style rows of four random heads, always the same latents."""
        generator = self.average.module
        assert isinstance(generator, TriplaneGenerator)
        z = torch.randn(4, generator.config.z_dim, generator=torch.Generator().manual_seed(0)).to(self.device)
        label = self.heads.cameras[:1].to_label().expand(4, -1)
        with torch.no_grad():
            return generator, generator.mapping(z, label)

    def result(self, provenance: Mapping[str, object]) -> Prior:
        """Return the averaged generator, and how far its heads are from its average."""
        generator = self.average.module
        assert isinstance(generator, TriplaneGenerator)
        latents = torch.Generator().manual_seed(0)
        z = torch.randn(1000, generator.config.z_dim, generator=latents).to(self.device)
        index = torch.randint(len(self.heads.images), (1000,), generator=latents)
        with torch.no_grad():
            w = generator.mapping(z, self.heads.cameras[index.to(self.device)].to_label())[:, 0]
            w_std = float((w - generator.mapping_network.w_avg).square().mean().sqrt())
        return Prior(generator=generator.cpu(), w_std=w_std, provenance=provenance)


def generator_loss(fake: Float[Tensor, "b 1"]) -> Float[Tensor, ""]:
    """Non-saturating loss of the generator, from the scores of its pictures."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Float[Tensor, "b 1"], fake: Float[Tensor, "b 1"]) -> Float[Tensor, ""]:
    """Logistic loss of the discriminator, from the scores of real and painted pictures."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gradient_penalty(discriminator: DualDiscriminator, real: Float[Tensor, "b 6 h h"], label: Float[Tensor, "b c"] | None) -> Float[Tensor, ""]:
    """R1: mean squared norm of the score's gradient at real pictures; times half of gamma it is the penalty."""
    real = real.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(real, label).sum(), real, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


class Augmentation(nn.Module):
    """Moves, turns, scales and recolours pictures before the discriminator sees them, each kind with one probability for all, which adapts.

    Both halves of a pair (full and raw) are treated alike. At probability 0 pictures pass unchanged.
    """

    probability: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("probability", torch.zeros([]))

    def adapt(self, real: Float[Tensor, "b 1"]) -> None:
        """Raise or lower the probability by what the scores of these real pictures say."""
        direction = torch.sign(real.detach().sign().mean() - SIGN_TARGET)
        self.probability.copy_((self.probability + direction * len(real) / ADAPTATION_PICTURES).clamp(0, 1))

    def forward(self, pictures: Float[Tensor, "b 6 h h"], generator: torch.Generator) -> Float[Tensor, "b 6 h h"]:
        """Treat pictures in [-1, 1]; what comes into sight from outside is their border, mirrored."""
        if self.probability == 0:
            return pictures
        moved = _move(pictures, _placement(len(pictures), float(self.probability), generator, pictures.device))
        matrix, shift = _colours(len(pictures), float(self.probability), generator, pictures.device)
        both = moved.unflatten(1, (2, 3))  # b two c h w
        return (torch.einsum("bij,bkjhw->bkihw", matrix, both) + shift[:, None, :, None, None]).flatten(1, 2)


def _chosen(count: int, probability: float, generator: torch.Generator, device: torch.device) -> Float[Tensor, " b"]:
    """1 with this probability, else 0."""
    return (torch.rand(count, generator=generator, device=device) < probability).float()


def _placement(count: int, probability: float, generator: torch.Generator, device: torch.device) -> Float[Tensor, "b 2 3"]:
    """Random similarity with scale 2^(0.2 n), any small turn, and shift up to an eighth: where each pixel comes from."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, device=device)

    def chosen() -> Tensor:
        return _chosen(count, probability, generator, device)

    scale = 2 ** (0.2 * normal() * chosen())
    angle = 0.15 * normal() * chosen()
    shift = 0.25 * (torch.rand(count, 2, generator=generator, device=device) * 2 - 1) * chosen()[:, None]
    rows = torch.stack([scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], -1).unflatten(-1, (2, 2))
    return torch.cat([rows, shift[..., None]], -1)


def _move(pictures: Float[Tensor, "b c h w"], placement: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b c h w"]:
    grid = F.affine_grid(placement, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colours(count: int, probability: float, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random brightness, contrast, hue and saturation as one matrix (b 3 3) and shift (b 3)."""

    def strength(spread: float) -> Tensor:
        return spread * torch.randn(count, generator=generator, device=device) * _chosen(count, probability, generator, device)

    brightness, contrast = strength(0.2), 2 ** strength(0.5)
    angle = strength(0.3 * math.pi)
    saturation = 2 ** strength(1.0)
    grey = torch.full((3, 3), 1 / 3, device=device)  # projection on the grey axis
    r = 1 / math.sqrt(3)
    cross = torch.tensor([[0.0, -r, r], [r, 0.0, -r], [-r, r, 0.0]], device=device)
    colour = torch.eye(3, device=device) - grey
    turned = angle.cos()[:, None, None] * colour + angle.sin()[:, None, None] * cross
    matrix = contrast[:, None, None] * (grey + saturation[:, None, None] * turned)
    return matrix, brightness[:, None].expand(-1, 3)
