"""Pretraining: a tri-plane generator learns what heads are from pictures with known cameras, in one of two ways.

*Supervised*, from several views of each moment: an encoder sees a moment of a person from one or several sides and guesses its code w; the
generator paints the planes of that code, which must look right from other sides too. So both learn what a person's unseen sides are like, from
thousands of people. Mirror images count as further people. A little noise on the codes keeps neighbours alike. Afterwards the mapping network is
fitted to the codes, so that random latents give random heads.

*Adversarial*, from single pictures: see `stages.adversarial`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.io.heads import HeadDataset, load_heads
from talk3d.models.avatar import Prior
from talk3d.models.encoder import Encoder, EncoderConfig
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.layers import EqualLinear
from talk3d.models.renderer import RendererConfig
from talk3d.ops.planes import gather_planes, project_points, sample_planes
from talk3d.stages.adversarial import AdversarialConfig, AdversarialTrainer, conditioned
from talk3d.stages.show import head_sheet
from talk3d.training.loop import Average, Loop, average_gradients, cosine_decay, processes
from talk3d.training.losses import (
    PictureTarget,
    density_variation,
    depth_loss,
    lay_over,
    picture_losses,
    random_backgrounds,
    target_from_rgba,
    weighted_sum,
)
from talk3d.types import Camera, Progress, Triplane, silent


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How long and how hard to train."""

    mode: Literal["supervised", "adversarial"] = "supervised"
    """From several views of each moment, or from single pictures against a discriminator."""
    steps: int = 20000
    """Optimisation steps."""
    samples_per_step: int = 16
    """Moments in a batch."""
    views_per_sample: int = 2
    """Pictures of each moment that are rendered and compared."""
    most_input_views: int = 4
    """The encoder sees from one to this many pictures of a moment, by chance."""
    learning_rate: float = 2e-3
    """Of the generator at the start; falls to a hundredth along a half cosine."""
    encoder_rate: float = 5e-4
    """Of the encoder, with the same schedule."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is kept."""
    coarse_part: float = 0.35
    """Share of the steps, at the beginning, in which half as many rays a side are rendered."""
    image_weight: float = 1.0
    """Of the L1 difference of full-size pictures, laid over black or a colour."""
    detail_weight: float = 2.0
    """Of the Laplacian-pyramid difference."""
    alpha_weight: float = 1.0
    """Of the mattes' difference."""
    raw_weight: float = 0.5
    """Of the L1 difference of raw pictures, laid over the same."""
    depth_weight: float = 4.0
    """Of the distances' mean absolute error, scene units, where the data set has distances."""
    density_weight: float = 0.002
    """Of the total variation of density."""
    code_weight: float = 1e-3
    """Of the codes' mean square, which keeps people near each other."""
    code_noise: float = 0.1
    """Standard deviation of the noise on the codes."""
    mixed_precision: bool = False
    """Compute in bfloat16 where it does no harm; for GPUs only."""
    compiled: bool = False
    """Compile what `mixed_precision` changes; for GPUs only."""
    sharpen: float = 1.0
    """A prior to go on from gets its raw density multiplied by this (about 1, where space begins to be solid) first: thinner surfaces."""
    sheet_every: int = 500
    """Every which step pictures are written, if there is a place for them."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Sizes of the encoder."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """How generator and discriminator play; of the settings above that way knows `steps`, `coarse_part` and `sheet_every`."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.steps, self.samples_per_step, self.views_per_sample, self.most_input_views, self.sheet_every) < 1:
            raise ConfigError("pretrain needs at least 1 step, sample and view: give positive numbers")


def pretrain(
    dataset: Path | str,
    config: PretrainConfig | None = None,
    *,
    start: GeneratorConfig | Prior,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    sheets: Path | None = None,
) -> Prior:
    """Train a prior on pictures with known cameras.

    Args:
        dataset: folder or zip in EG3D's layout, see `load_heads`.
        config: in which way, how long and how hard.
        start: the sizes of a new generator, usually `presets.BUILTIN256`, or a prior to go on from.
        device: where to train.
        seed: of all randomness.
        progress: hears every step's losses.
        checkpoint: kept here and resumed from.
        sheets: folder for pictures of heads, their depth and normals, written while training goes on.

    Raises:
        MediaError: the data set cannot be read.
        WeightsError: the checkpoint belongs to other settings.
    """
    config = config or PretrainConfig()
    sizes = start.generator.config if isinstance(start, Prior) else start
    side = sizes.renderer.superresolution.output_side
    if processes()[0]:
        progress, sheets = silent, None
    heads = _own_share(load_heads(Path(dataset), side, lambda done, total: progress("read pictures", done, total, {})), config)
    trainer = _make_trainer(config, heads, start, device, seed)
    loop = Loop(modules=trainer.modules, optimizers=trainer.optimizers, generators=trainer.generators, checkpoint=checkpoint, checkpoint_seconds=300)

    def step(number: int) -> dict[str, Float[Tensor, ""]]:
        if sheets is not None and number % config.sheet_every == 0:
            sheets.mkdir(parents=True, exist_ok=True)
            Image.fromarray(head_sheet(*trainer.heads_to_show())).save(sheets / f"{number:07d}.png")
        return trainer.step(number)

    loop.run("pretrain", config.steps, step, progress)
    facts = {"mode": config.mode, "dataset": Path(dataset).name, "pictures": len(heads.images), "people": int(heads.person.max()) + 1}
    before = {"start": start.provenance} if isinstance(start, Prior) else {}
    return trainer.result(facts | {"steps": config.steps, "seed": seed} | before)


def _own_share(heads: HeadDataset, config: PretrainConfig) -> HeadDataset:
    """Of several processes, each trains on people of its own."""
    number, count = processes()
    if count == 1:
        return heads
    if config.mode != "supervised":
        raise ConfigError(f"{config.mode} pretraining runs in one process, and this is one of {count}: start it without torchrun")
    index = (heads.person % count == number).nonzero()[:, 0]
    if not len(index):
        raise ConfigError(f"there are fewer people than processes ({count}): start fewer")
    renumbered = {name: torch.unique(getattr(heads, name)[index], return_inverse=True)[1] for name in ("sample", "person")}
    depth = None if heads.depth is None else heads.depth[index]
    return HeadDataset(images=heads.images[index], cameras=heads.cameras[index], depth=depth, **renumbered)


def _make_trainer(
    config: PretrainConfig, heads: HeadDataset, start: GeneratorConfig | Prior, device: str, seed: int
) -> "SupervisedTrainer | AdversarialTrainer":
    sizes = start.generator.config if isinstance(start, Prior) else start
    sizes = replace(sizes, renderer=replace(sizes.renderer, head_space=RendererConfig.head_space))  # the data set's cameras are in the planes' space
    fitted = conditioned(sizes) if config.mode == "adversarial" else replace(sizes, c_dim=0, mapping_layers=0)
    if isinstance(start, Prior) and fitted != sizes:
        raise ConfigError(f"this prior was not made in the {config.mode} way and cannot go on in it: give one that was, or start anew")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.mode == "adversarial":
            lengths = {"steps": config.steps, "coarse_part": config.coarse_part}
            trainer = AdversarialTrainer(config.adversarial, heads, fitted, device=device, **lengths)
        else:
            trainer = SupervisedTrainer(config, heads, fitted, device=device)
    if isinstance(start, Prior):
        trainer.take_over(start)
    trainer.seed(seed)
    return trainer


def _quicken(generator: TriplaneGenerator, compiled: bool) -> None:
    """Let a generator paint planes, decode points and sharpen pictures in bfloat16, compiled if wished; rays, densities and sums stay in float32."""
    config, device = generator.renderer_config, next(generator.parameters()).device.type
    synthesis, superresolution, look_up = generator.backbone["synthesis"], generator.superresolution, gather_planes if compiled else sample_planes

    def decode(planes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            coordinates = project_points(points, config.plane_axes, config.box_warp)
            density, features = generator.decoder(look_up(planes, coordinates))
        return density.float(), features

    def halved(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **settings: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return forward(*given, **settings)

        return torch.compile(run, dynamic=False) if compiled else run

    decode_planes = torch.compile(decode, dynamic=False) if compiled else decode

    def query(triplane: Triplane, points: Tensor) -> tuple[Tensor, Tensor]:
        return decode_planes(triplane.planes, points)

    generator.query = query
    for module in (synthesis, superresolution):
        module.forward = halved(module.forward)


class SupervisedTrainer:
    """One step of supervised pretraining and what it needs."""

    def __init__(self, config: PretrainConfig, heads: HeadDataset, sizes: GeneratorConfig, *, device: str) -> None:
        """Make the networks, with torch's global randomness.

        Args:
            config: how long and how hard.
            heads: several views of each moment.
            sizes: of the generator.
            device: where to train.
        """
        generator, encoder = TriplaneGenerator(sizes), Encoder(config.encoder, sizes.renderer.w_dim)
        networks = nn.ModuleDict({"generator": generator, "encoder": encoder}).to(device).train()
        self.config, self.generator, self.encoder, self.device = config, generator, encoder, device
        self.heads = heads.to(device)
        self.networks, self.average = networks, Average(networks, config.average_decay)
        self.modules: dict[str, nn.Module] = {"networks": networks, "average": self.average.module}
        if config.mixed_precision:
            _quicken(generator, config.compiled)
        parts = [
            {"params": [p for n, p in generator.named_parameters() if "mapping" not in n], "lr": config.learning_rate},
            {"params": list(encoder.parameters()), "lr": config.encoder_rate},
        ]
        self.optimizers = {"adam": torch.optim.Adam(parts, betas=(0.9, 0.99), fused=torch.device(device).type == "cuda")}
        self.generators = {"choice": torch.Generator(), "rays": torch.Generator(device)}
        order = torch.argsort(heads.sample, stable=True)
        self.views = torch.split(order, torch.bincount(heads.sample).tolist())

    def seed(self, seed: int) -> None:
        """Start all randomness of the steps from a seed."""
        for generator in self.generators.values():
            generator.manual_seed(seed)

    def take_over(self, prior: Prior) -> None:
        """Go on from a prior; where it has no encoder, the new one's guesses are at first spread as the prior's people are."""
        self.generator.load_state_dict(prior.generator.state_dict())
        decode = self.generator.decoder.net[-1]
        assert isinstance(decode, EqualLinear)
        mapping = self.generator.mapping_network
        with torch.no_grad():
            decode.weight[0] *= self.config.sharpen
            decode.bias[0] = self.config.sharpen * decode.bias[0] + (1 - self.config.sharpen) / decode.lr
            if prior.encoder is not None:
                self.encoder.load_state_dict(prior.encoder.state_dict())
                self.encoder.out.bias.add_(mapping.w_avg)
            else:
                spread = mapping.affine.weight / math.sqrt(mapping.affine.weight.shape[1])
                mixed = torch.randn(spread.shape[1], self.encoder.out.in_features, generator=torch.Generator().manual_seed(0)).to(spread)
                self.encoder.out.weight.copy_(spread @ mixed / math.sqrt(mixed.shape[1]))
                self.encoder.out.bias.copy_(mapping.w_avg)
        self.average.module.load_state_dict(self.networks.state_dict())

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Draw moments and views, guess codes, render, compare, descend."""
        config, optimizer = self.config, self.optimizers["adam"]
        scale = cosine_decay(number / config.steps, 0.01) * min(1.0, (1 + number) / 100)
        for group, rate in zip(optimizer.param_groups, (config.learning_rate, config.encoder_rate), strict=True):
            group["lr"] = rate * scale
        w, target, camera, depth = self._batch()
        noise = torch.randn(w.shape, generator=self.generators["rays"], device=w.device)
        terms = self._terms(w + config.code_noise * noise, target, camera, depth, coarse=number < config.coarse_part * config.steps)
        terms["code"] = w.square().mean()
        loss = weighted_sum(terms, {name: getattr(config, f"{name}_weight") for name in terms})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()
        self.average.update(self.networks, number)
        return {name: term.detach() for name, term in terms.items()}

    def _terms(
        self, w: Float[Tensor, "s w"], target: PictureTarget, camera: Camera, depth: Float[Tensor, "b 1 p p"] | None, coarse: bool
    ) -> dict[str, Float[Tensor, ""]]:
        views, generator = self.config.views_per_sample, self.generator
        triplane = generator.triplane(w[:, None].expand(-1, generator.num_ws, -1))
        repeated = Triplane(planes=triplane.planes.repeat_interleave(views, 0), axes=triplane.axes)
        rays = generator.renderer_config.neural_rendering_resolution // (2 if coarse else 1)
        rendering = generator.render_triplane(
            repeated, w.repeat_interleave(views, 0), camera, generator=self.generators["rays"], neural_rendering_resolution=rays
        )
        known = {} if depth is None else {"depth": depth_loss(rendering, depth)}
        black = torch.full((3, *target.image.shape[-2:]), -1.0, device=w.device)
        laid = lay_over(rendering, target, random_backgrounds(black, len(target.image), 1, self.generators["choice"]))
        return picture_losses(*laid) | known | {"density": density_variation(generator, triplane, self.generators["rays"])}

    def _batch(self) -> tuple[Float[Tensor, "s w"], PictureTarget, Camera, Float[Tensor, "b 1 p p"] | None]:
        config, choice = self.config, self.generators["choice"]
        samples = torch.randint(len(self.views), (config.samples_per_step,), generator=choice)
        mirrored = torch.randint(2, (config.samples_per_step,), generator=choice)
        num_inputs = int(torch.randint(1, config.most_input_views + 1, (1,), generator=choice))
        seen, camera = self._look(self._pick(samples, num_inputs), mirrored.repeat_interleave(num_inputs))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=config.mixed_precision):
            w = self.encoder(seen.image.unflatten(0, (-1, num_inputs)), seen.alpha.unflatten(0, (-1, num_inputs)), camera).float()
        shown, flipped = self._pick(samples, config.views_per_sample), mirrored.repeat_interleave(config.views_per_sample)
        return w, *self._look(shown, flipped), self.heads.look_deep(shown, flipped)

    def _pick(self, samples: Int[Tensor, " s"], count: int) -> Int[Tensor, " b"]:
        """`count` random pictures of each of these moments, as different as there are."""
        picks = []
        for sample in samples.tolist():
            views = self.views[sample]
            order = torch.randperm(len(views), generator=self.generators["choice"])
            picks.append(views[order.repeat(-(-count // len(views)))[:count]])
        return torch.cat(picks)

    def _look(self, index: Int[Tensor, " b"], mirrored: Int[Tensor, " b"]) -> tuple[PictureTarget, Camera]:
        rgba, camera = self.heads.look(index, mirrored)
        return target_from_rgba(rgba), camera

    def codes(self, encoder: Encoder) -> Float[Tensor, "m w"]:
        """The encoder's code of every moment, as it is and mirrored, from all its pictures (at most eight); in no particular order."""
        alike: dict[int, list[Int[Tensor, " v"]]] = {}
        for views in self.views:
            alike.setdefault(min(len(views), 8), []).append(views[:8])
        found = []
        with torch.no_grad():
            for count, group in alike.items():
                for chunk in torch.stack(group).split(64):
                    for flip in (0, 1):
                        target, camera = self._look(chunk.flatten(), torch.full((chunk.numel(),), flip))
                        found.append(encoder(target.image.unflatten(0, (-1, count)), target.alpha.unflatten(0, (-1, count)), camera))
        return torch.cat(found)

    def _averaged(self) -> tuple[TriplaneGenerator, Encoder]:
        generator, encoder = self.average.module.get_submodule("generator"), self.average.module.get_submodule("encoder")
        assert isinstance(generator, TriplaneGenerator) and isinstance(encoder, Encoder)
        return generator, encoder

    def heads_to_show(self) -> tuple[TriplaneGenerator, Float[Tensor, "b n w"]]:
        """The averaged generator and the style rows that the averaged encoder guesses from one picture each of the first four moments."""
        generator, encoder = self._averaged()
        target, camera = self._look(torch.stack([views[0] for views in self.views[:4]]), torch.zeros(len(self.views[:4]), dtype=torch.long))
        with torch.no_grad():
            w = encoder(target.image[:, None], target.alpha[:, None], camera)
        return generator, w[:, None].expand(-1, generator.num_ws, -1)

    def result(self, provenance: Mapping[str, object]) -> Prior:
        """Return the averaged networks, the mapping network fitted to the codes by principal components."""
        generator, encoder = self._averaged()
        w = self.codes(encoder)
        mean = w.mean(0)
        with torch.no_grad():
            _, spread, directions = torch.linalg.svd((w - mean) / math.sqrt(len(w)), full_matrices=False)
            mapping = generator.mapping_network
            count = min(len(spread), mapping.affine.weight.shape[1])
            mapping.affine.weight.zero_()
            mapping.affine.weight[:, :count] = (spread[:count, None] * directions[:count]).T * math.sqrt(mapping.affine.weight.shape[1])
            mapping.affine.bias.copy_(mean)
            mapping.w_avg.copy_(mean)
            encoder.out.bias.sub_(mean)  # a prior's encoder speaks of offsets from the average
        w_std = float((w - mean).square().mean().sqrt())
        return Prior(generator=generator.cpu(), encoder=encoder.cpu(), w_std=w_std, provenance=provenance)
