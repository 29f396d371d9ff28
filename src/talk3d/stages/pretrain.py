"""Pretraining: a tri-plane generator learns what heads are from multi-view pictures with known cameras.

Every moment of every person has a code w of its own, learned beside the generator (an auto-decoder): the sum of an average, an offset of the
person, shared by all their moments, and an offset of the moment. Mirror images count as further people. Afterwards the mapping network is
fitted to the codes, so that random latents give random heads.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.io.clips import HeadDataset, load_heads
from talk3d.models.avatar import Prior
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.training.loop import Average, Loop, cosine_decay
from talk3d.training.losses import PictureTarget, density_variation, picture_losses, premultiply, weighted_sum
from talk3d.types import Camera, Progress, Triplane, silent


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How long and how hard to train."""

    steps: int = 20000
    """Optimisation steps."""
    samples_per_step: int = 12
    """Moments in a batch."""
    views_per_sample: int = 4
    """Pictures of each moment in a batch."""
    learning_rate: float = 2e-3
    """Of the generator at the start; falls to a hundredth along a half cosine."""
    code_learning_rate: float = 5e-3
    """Of the codes, with the same schedule."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is kept."""
    image_weight: float = 1.0
    """Of the L1 difference of full-size pictures."""
    detail_weight: float = 2.0
    """Of the Laplacian-pyramid difference."""
    alpha_weight: float = 1.0
    """Of the mattes' difference."""
    raw_weight: float = 0.5
    """Of the L1 difference of raw pictures."""
    density_weight: float = 0.002
    """Of the total variation of density."""
    code_weight: float = 1e-3
    """Of the mean square of the codes' offsets, which keeps people near each other."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if self.steps < 1 or self.samples_per_step < 1 or self.views_per_sample < 1:
            raise ConfigError("pretrain needs at least 1 step, sample and view: give positive numbers")


class _Codes(nn.Module):
    """Person and moment offsets in w; mirrored people follow the originals."""

    def __init__(self, num_people: int, num_samples: int, w_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.randn(w_dim, generator=generator))
        self.person = nn.Parameter(0.1 * torch.randn(2 * num_people, w_dim, generator=generator))
        self.moment = nn.Parameter(0.1 * torch.randn(2 * num_samples, w_dim, generator=generator))
        self.num_people, self.num_samples = num_people, num_samples

    def forward(self, sample: Int[Tensor, " b"], person: Int[Tensor, " b"], mirrored: Int[Tensor, " b"]) -> Float[Tensor, "b w"]:
        return self.average + self.person[person + mirrored * self.num_people] + self.moment[sample + mirrored * self.num_samples]


def mirror(images: Float[Tensor, "b c h w"], camera: Camera, mirrored: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Camera]:
    """Swap left and right where `mirrored` is 1: in the picture, and x in the world and the camera."""
    flip = mirrored.bool()
    sign = torch.where(flip, -1.0, 1.0).to(camera.cam2world)
    diagonal = torch.ones(len(sign), 4, device=sign.device)
    diagonal[:, 0] = sign
    cam2world = diagonal[:, :, None] * camera.cam2world * diagonal[:, None, :]
    intrinsics = camera.intrinsics.clone()
    intrinsics[:, 0, 2] = torch.where(flip, 1 - intrinsics[:, 0, 2], intrinsics[:, 0, 2])
    return torch.where(flip[:, None, None, None], images.flip(-1), images), Camera(cam2world=cam2world, intrinsics=intrinsics)


def pretrain(
    dataset: Path | str,
    config: PretrainConfig | None = None,
    *,
    sizes: GeneratorConfig,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> Prior:
    """Train a prior on multi-view pictures with mattes.

    Args:
        dataset: folder in EG3D's layout, see `load_heads`.
        config: how long and how hard.
        sizes: the generator's sizes, usually `presets.BUILTIN256`.
        device: where to train.
        seed: of all randomness.
        progress: hears every step's losses.
        checkpoint: kept here and resumed from.

    Raises:
        MediaError: the data set cannot be read.
        WeightsError: the checkpoint belongs to other settings.
    """
    config = config or PretrainConfig()
    side = sizes.renderer.superresolution.output_side
    heads = load_heads(Path(dataset), side, lambda done, total: progress("read pictures", done, total, {}))
    initial = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = TriplaneGenerator(sizes)
    generator = generator.to(device).train()
    codes = _Codes(int(heads.person.max()) + 1, int(heads.sample.max()) + 1, sizes.renderer.w_dim, initial).to(device)
    trainer = _Trainer(config, heads, generator, codes, device=device, seed=seed)
    loop = Loop(modules=trainer.modules, optimizers={"adam": trainer.optimizer}, generators=trainer.generators, checkpoint=checkpoint)
    loop.run("pretrain", config.steps, trainer.step, progress)
    return trainer.result(str(dataset), seed)


class _Trainer:
    """One step of supervised pretraining and what it needs."""

    def __init__(self, config: PretrainConfig, heads: HeadDataset, generator: TriplaneGenerator, codes: _Codes, *, device: str, seed: int) -> None:
        self.config, self.generator, self.codes, self.device = config, generator, codes, device
        self.images, self.cameras = heads.images.to(device), heads.cameras.to(device)
        self.average = Average(generator, config.average_decay)
        self.modules: dict[str, nn.Module] = {"generator": generator, "codes": codes, "average": self.average.module}
        parts = [
            {"params": [p for n, p in generator.named_parameters() if "mapping" not in n], "lr": config.learning_rate, "betas": (0.9, 0.99)},
            {"params": list(codes.parameters()), "lr": config.code_learning_rate, "betas": (0.0, 0.99)},
        ]
        self.optimizer = torch.optim.Adam(parts)
        self.generators = {"choice": torch.Generator().manual_seed(seed), "rays": torch.Generator(device).manual_seed(seed)}
        order = torch.argsort(heads.sample, stable=True)
        self.views = torch.split(order, torch.bincount(heads.sample).tolist())
        self.person_of_sample = torch.stack([heads.person[views[0]] for views in self.views])

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Draw moments and views, render, compare, descend."""
        config = self.config
        scale = cosine_decay(number / config.steps, 0.01)
        for group, rate in zip(self.optimizer.param_groups, (config.learning_rate, config.code_learning_rate), strict=True):
            group["lr"] = rate * scale
        w, target, camera = self._batch()
        triplane = self.generator.triplane(w[:, None].expand(-1, self.generator.num_ws, -1))
        repeated = Triplane(planes=triplane.planes.repeat_interleave(config.views_per_sample, 0), axes=triplane.axes)
        styles = w.repeat_interleave(config.views_per_sample, 0)
        rendering = self.generator.render_triplane(repeated, styles, camera, generator=self.generators["rays"])
        terms = picture_losses(rendering, target)
        terms["density"] = density_variation(self.generator, triplane, self.generators["rays"])
        terms["code"] = (w - self.codes.average).square().mean()
        loss = weighted_sum(terms, {name: getattr(config, f"{name}_weight") for name in terms})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.update(self.generator, number)
        return {name: term.detach() for name, term in terms.items()}

    def _batch(self) -> tuple[Float[Tensor, "s w"], PictureTarget, Camera]:
        config, choice = self.config, self.generators["choice"]
        samples = torch.randint(len(self.views), (config.samples_per_step,), generator=choice)
        mirrored = torch.randint(2, (config.samples_per_step,), generator=choice)
        picks = []
        for sample in samples.tolist():
            views = self.views[sample]
            order = torch.randperm(len(views), generator=choice)
            picks.append(views[order.repeat(-(-config.views_per_sample // len(views)))[: config.views_per_sample]])
        index = torch.cat(picks).to(self.device)
        person = self.person_of_sample[samples].to(self.device)
        samples, mirrored = samples.to(self.device), mirrored.to(self.device)
        rgba = self.images[index].permute(0, 3, 1, 2).float() / 255
        rgba, camera = mirror(rgba, self.cameras[index], mirrored.repeat_interleave(config.views_per_sample))
        alpha = rgba[:, 3:]
        target = PictureTarget(image=premultiply(2 * rgba[:, :3] - 1, alpha), alpha=alpha)
        return self.codes(samples, person, mirrored), target, camera

    def result(self, dataset: str, seed: int) -> Prior:
        """Return the averaged generator, its mapping network fitted to the codes by principal components."""
        generator, codes = self.average.module, self.codes
        assert isinstance(generator, TriplaneGenerator)
        moments = torch.arange(2 * codes.num_samples, device=self.device)
        sample = moments % codes.num_samples
        mirrored = (moments >= codes.num_samples).long()
        with torch.no_grad():
            w = codes(sample, self.person_of_sample.to(self.device)[sample], mirrored)
            mean = w.mean(0)
            _, spread, directions = torch.linalg.svd((w - mean) / math.sqrt(len(w)), full_matrices=False)
            mapping = generator.mapping_network
            count = min(len(spread), mapping.affine.weight.shape[1])
            mapping.affine.weight.zero_()
            mapping.affine.weight[:, :count] = (spread[:count, None] * directions[:count]).T * math.sqrt(mapping.affine.weight.shape[1])
            mapping.affine.bias.copy_(mean)
            mapping.w_avg.copy_(mean)
        provenance = {"dataset": Path(dataset).name, "pictures": len(self.images), "steps": self.config.steps, "seed": seed}
        return Prior(generator=generator.cpu(), w_std=float((w - mean).square().mean().sqrt()), provenance=provenance)
