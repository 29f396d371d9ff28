"""From tri-planes to pictures: point decoder and volume rendering, then super-resolution.

`TriplaneRenderer` is all of the generator that is needed once planes exist, so it is what personalised avatars carry. `GuidedRenderer` renders one
person's volume for inference, with far fewer samples.

Reference: EG3D (arXiv 2112.07945), section 4.2 and 4.3.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.models.layers import EqualLinear
from talk3d.models.superresolution import Superresolution, SuperresolutionConfig
from talk3d.ops.geometry import Neck, move_camera, rotation_from_vector
from talk3d.ops.guided import EMPTY, Cells, RowLookup, SteppedRays, guided_bins, guided_weights, swept
from talk3d.ops.planes import project_points, sample_planes
from talk3d.ops.rays import camera_rays, limit_to_box, limit_to_occupied
from talk3d.ops.volume import composite, importance_distances, segment_weights, stratified_distances
from talk3d.types import Camera, PlaneAxes, Rays, Rendering, Triplane

POINTS_AT_ONCE = 32768
"""Samples that a CPU looks at in one go: what they take is neither mapped anew for each frame nor far from the cache."""


@dataclass(frozen=True, kw_only=True)
class RendererConfig:
    """Sizes of planes, decoder and rays; the defaults are the published ones."""

    w_dim: int = 512
    """Length of a style row."""
    plane_channels: int = 32
    """Feature channels of one plane."""
    plane_resolution: int = 256
    """Pixels a side of one plane."""
    plane_axes: PlaneAxes = "fixed"
    """Order of the planes' axes."""
    box_warp: float = 1.0
    """Side of the cube that the planes span, scene units."""
    decoder_hidden: int = 64
    """Width of the point decoder's hidden layer."""
    decoder_lr_mul: float = 1.0
    """The decoder's weights are multiplied by this."""
    feature_channels: int = 32
    """Features rendered for super-resolution; the first three are the raw picture."""
    neural_rendering_resolution: int = 128
    """Rays a side."""
    ray_start: float | Literal["auto"] = 2.25
    """Distance at which rays start to be sampled, scene units; "auto" (both or none) goes from where a ray enters the cube …"""
    ray_end: float | Literal["auto"] = 3.3
    """… to where it leaves it."""
    disparity_space_sampling: bool = False
    """Equal steps of inverse distance instead of distance."""
    depth_resolution: int = 48
    """Equally spaced samples on a ray."""
    depth_resolution_importance: int = 48
    """Further samples where the first ones found something."""
    white_back: bool = False
    """Empty space is white instead of black."""
    density_noise: float = 0.0
    """In training, standard deviation of the noise on raw density."""
    superresolution: SuperresolutionConfig = field(default_factory=SuperresolutionConfig)
    """Sizes of the super-resolution."""
    head_space: tuple[float, float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    """Where head space, in which cameras are given, lies in that of the planes: a scale, a rotation vector and a shift, in this order."""
    rest_pose: tuple[float, float, float] | None = None
    """Yaw, pitch and roll, radians, at which neck and shoulders are as the planes show them. None: shoulders turn with the head, as in priors."""
    throat_y: float = -0.2
    """Height in head space below which the neck bends, scene units."""

    def __post_init__(self) -> None:
        """Refuse one limit of the rays without the other."""
        if (self.ray_start == "auto") != (self.ray_end == "auto"):
            raise ConfigError(f"ray_start {self.ray_start!r} and ray_end {self.ray_end!r}: give two distances, or 'auto' for both")

    def in_planes(self, camera: Camera) -> Camera:
        """Move cameras from head space to that of the planes."""
        if self.head_space == RendererConfig.head_space:
            return camera
        turn, shift = camera.cam2world.new_tensor(self.head_space[1:]).split(3)
        return move_camera(camera, self.head_space[0], rotation_from_vector(turn), shift)

    def bent(self, triplane: Triplane, head_pose: Float[Tensor, "b 3"] | None) -> Triplane:
        """Return volumes with necks bent as their heads are held, so that shoulders keep still before the camera; None leaves them at rest."""
        if self.rest_pose is None or head_pose is None:
            return triplane
        swing = Neck.of(self.head_space, self.throat_y, head_pose.device).swing(head_pose, head_pose.new_tensor(self.rest_pose))
        return replace(triplane, swing=swing)


@functools.cache
def _cpu_lookup(axes: PlaneAxes, side: int, box_warp: float) -> RowLookup:
    return RowLookup.of(axes, side, box_warp, torch.device("cpu"))


class PointDecoder(nn.Module):
    """Mean plane features of a point to raw density and colour features: one hidden layer, softplus."""

    def __init__(self, in_channels: int, hidden: int, feature_channels: int, lr: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Sequential(EqualLinear(in_channels, hidden, lr=lr), nn.Softplus(), EqualLinear(hidden, 1 + feature_channels, lr=lr))

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n f"]]:
        """Return raw density (before softplus) and features in [0, 1]."""
        x = self.net(x)
        return x[..., :1], torch.sigmoid(x[..., 1:]) * 1.002 - 0.001


class TriplaneRenderer(nn.Module):
    """Decoder and super-resolution with the volume rendering between them."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        self.renderer_config = config
        self.decoder = PointDecoder(config.plane_channels, config.decoder_hidden, config.feature_channels, config.decoder_lr_mul)
        self.superresolution = Superresolution(config.superresolution, feature_channels=config.feature_channels, w_dim=config.w_dim)

    def query(self, triplane: Triplane, points: Float[Tensor, "b n 3"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n f"]]:
        """Return raw density and features of points given in scene units."""
        return self.decoder(self._look_up(triplane, points))

    def _look_up(self, triplane: Triplane, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n c"]:
        box_warp, planes = self.renderer_config.box_warp, triplane.planes
        if triplane.swing is not None:
            points = Neck.of(self.renderer_config.head_space, self.renderer_config.throat_y, points.device).straighten(points, triplane.swing)
        if planes.device.type == "cpu" and planes.dtype == torch.float32 and not points.requires_grad:  # in a quarter of the time
            lookup = _cpu_lookup(triplane.axes, planes.shape[-1], box_warp)
            volume = torch.arange(len(planes)).repeat_interleave(points.shape[1]) if len(planes) > 1 else None
            return lookup(lookup.rows(list(planes.unbind(1))), points.flatten(0, 1), volume).view(*points.shape[:2], -1) / 3
        return sample_planes(planes, project_points(points, triplane.axes, box_warp))

    def _density(self, triplane: Triplane, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 1"]:
        """Return the raw density alone, without gradients."""
        hidden = self.decoder.net[:2](self._look_up(triplane, points))
        weight, bias = _linear(self.decoder, 2)
        return F.linear(hidden, weight[:1], bias[:1])

    def occupancy(self, triplane: Triplane, side: int = 64, threshold: float = 0.3, dilation: int = 3) -> Bool[Tensor, "s s s"]:
        """Return the cells of the cube (indexed z, y, x) where one volume is not empty, grown by `dilation` cells.

        A cell counts as full when crossing it at its centre's density would absorb more than `threshold` percent of the light, with the neck bent
        in any usual way.
        """
        assert triplane.planes.shape[0] == 1, "occupancy is for one volume"
        centres = ((torch.arange(side, device=triplane.planes.device) + 0.5) / side - 0.5) * self.renderer_config.box_warp
        z, y, x = torch.meshgrid(centres, centres, centres, indexing="ij")
        with torch.no_grad():
            density = self.query(triplane, torch.stack([x, y, z], -1).reshape(1, -1, 3))[0]
        absorbed = 1 - torch.exp(-F.softplus(density - 1) * (self.renderer_config.box_warp / side))
        full = (absorbed > threshold / 100).view(side, side, side)
        if (config := self.renderer_config).rest_pose is not None:
            full = swept(full, config.box_warp, Neck.of(config.head_space, config.throat_y, full.device), config.rest_pose)
        return F.max_pool3d(full[None, None].float(), 2 * dilation + 1, stride=1, padding=dilation)[0, 0] > 0

    def rays(self, camera: Camera, side: int) -> Rays:
        """Return the rays of square pictures of `side` pixels, in the planes' space, with the configured limits."""
        config = self.renderer_config
        camera = config.in_planes(camera)
        if config.ray_start == "auto" or config.ray_end == "auto":
            return limit_to_box(camera_rays(camera, side, 0.0, 0.0), config.box_warp)
        return camera_rays(camera, side, config.head_space[0] * config.ray_start, config.head_space[0] * config.ray_end)

    def render_rays(
        self, triplane: Triplane, rays: Rays, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b r f"], Float[Tensor, "b r 1"], Float[Tensor, "b r 1"]]:
        """Return features, opacity and distance of each ray; `generator` jitters the samples (and adds density noise in training), None does not."""
        config = self.renderer_config
        distances = stratified_distances(rays, config.depth_resolution, generator, disparity=config.disparity_space_sampling)
        density, features = self._decode(triplane, rays, distances, generator)
        if config.depth_resolution_importance:
            weights = segment_weights(density.detach(), distances)
            fine = importance_distances(distances, weights, config.depth_resolution_importance, generator)
            fine_density, fine_features = self._decode(triplane, rays, fine, generator)
            distances, order = torch.cat([distances, fine], -1).sort(-1)
            density = torch.cat([density, fine_density], -1).gather(-1, order)
            features = torch.cat([features, fine_features], -2)
            features = features.gather(-2, order.unsqueeze(-1).expand_as(features))
        return composite(features, density, distances, white_back=config.white_back)

    def render_found(
        self, triplane: Triplane, rays: Rays, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b r f"], Float[Tensor, "b r 1"], Float[Tensor, "b r 1"]]:
        """Do what `render_rays` does, for training in half the time: few samples, where a look without gradients found something.

        `generator` draws where in its share each sample lies; None takes the middles.
        """
        config = self.renderer_config
        looks, kept = max(24, config.depth_resolution), -(-5 * config.depth_resolution_importance // 8)
        with torch.no_grad():
            equal = stratified_distances(rays, looks)
            density = self._density(triplane, rays.points(equal).flatten(1, 2)).view(equal.shape)
            bins = guided_bins(segment_weights(density, equal).flatten(0, 1), kept, generator)
            distances = rays.near + bins.view(*equal.shape[:2], -1) * ((rays.far - rays.near) / (looks - 1))
        density, features = self._decode(triplane, rays, distances, generator)
        shares = guided_weights(density.flatten(0, 1), distances.flatten(0, 1)).view(density.shape)
        rendered, opacity = (shares.unsqueeze(-2) @ features).squeeze(-2), shares.sum(-1, keepdim=True)
        if config.white_back:
            rendered = rendered + 1 - opacity
        depth = (shares * distances).sum(-1, keepdim=True) / opacity.clamp(min=1e-6)
        return rendered, opacity, depth

    def _decode(
        self, triplane: Triplane, rays: Rays, distances: Float[Tensor, "b r s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b r s"], Float[Tensor, "b r s f"]]:
        density, features = self.query(triplane, rays.points(distances).flatten(1, 2))
        if self.training and generator is not None and self.renderer_config.density_noise:
            density = density + self.renderer_config.density_noise * torch.randn(density.shape, device=density.device, generator=generator)
        return density.view(distances.shape), features.view(*distances.shape, -1)

    def render_triplane(
        self,
        triplane: Triplane,
        w: Float[Tensor, "#b d"],
        camera: Camera,
        *,
        generator: torch.Generator | None = None,
        occupied: Bool[Tensor, "s s s"] | None = None,
        neural_rendering_resolution: int | None = None,
    ) -> Rendering:
        """Render volumes as the cameras see them; jittered ones of known occupancy, which are trained, by `render_found`.

        Args:
            triplane: b volumes.
            w: the style row that drives super-resolution, of each volume or of all.
            camera: b cameras.
            generator: randomness of sample jitter; None renders deterministically.
            occupied: cells worth sampling, from `occupancy`; None samples the whole span of every ray.
            neural_rendering_resolution: rays a side; None takes the config's.
        """
        side = neural_rendering_resolution or self.renderer_config.neural_rendering_resolution
        features, alpha, depth = self.render_features(triplane, camera, side, generator=generator, occupied=occupied)
        image, full_alpha = self.superresolution(features, alpha, w)
        return Rendering(image=image, alpha=full_alpha, raw=features[:, :3], raw_alpha=alpha, features=features, depth=depth)

    def render_features(
        self,
        triplane: Triplane,
        camera: Camera,
        side: int,
        *,
        generator: torch.Generator | None = None,
        occupied: Bool[Tensor, "s s s"] | None = None,
    ) -> tuple[Float[Tensor, "b f p p"], Float[Tensor, "b 1 p p"], Float[Tensor, "b 1 p p"]]:
        """Return what `render_triplane` gives to super-resolution: features in [-1, 1], opacity and distance of `side` rays a side."""
        rays = self.rays(camera, side)
        pictures = self.render_rays(triplane, rays, generator) if occupied is None else self._render_occupied(triplane, rays, occupied, generator)
        features, alpha, depth = (x.transpose(1, 2).unflatten(2, (side, side)) for x in pictures)  # b c h w
        return 2 * features - 1, alpha, depth

    def _render_occupied(
        self, triplane: Triplane, rays: Rays, occupied: Bool[Tensor, "s s s"], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rays, hit = limit_to_occupied(rays, occupied, self.renderer_config.box_warp)
        # elsewhere than on a CPU, counting what is in sight would make the host wait, and so would launching the work of each volume
        return (self._render_all if generator is not None and hit.is_cuda else self._render_hit)(triplane, rays, hit, generator)

    def _render_all(
        self, triplane: Triplane, rays: Rays, hit: Bool[Tensor, "b r"], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render all rays of all volumes together, and forget what is not hit."""
        features, alpha, depth = self.render_found(triplane, rays, generator)
        seen = hit.unsqueeze(-1)
        return torch.where(seen, features, float(self.renderer_config.white_back)), alpha * seen, torch.where(seen, depth, rays.far)

    def _render_hit(
        self, triplane: Triplane, rays: Rays, hit: Bool[Tensor, "b r"], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render what is hit of one volume after the other."""
        config, batches = self.renderer_config, []
        for i in range(hit.shape[0]):
            index = hit[i].nonzero()[:, 0]
            empty = rays.far[i : i + 1].clone()
            shown = (
                torch.full((1, hit.shape[1], config.feature_channels), float(config.white_back), device=empty.device),
                torch.zeros_like(empty),
                empty,
            )
            if len(index):  # something of this volume is in sight
                one = Rays(**{name: getattr(rays, name)[i : i + 1, index] for name in ("origins", "directions", "near", "far")})
                volume = triplane[i : i + 1]
                found = self.render_rays(volume, one) if generator is None else self.render_found(volume, one, generator)
                shown = tuple(nothing.index_copy(1, index, part) for nothing, part in zip(shown, found, strict=True))
            batches.append(shown)
        features, alpha, depth = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return features, alpha, depth


class GuidedRenderer:
    """Volume rendering of one person: a coarse look at a quarter of the rays or fewer, and few samples where it found something.

    A CPU does it in parts and drops what cannot be seen; elsewhere counting what is left would make the host wait.
    """

    def __init__(self, renderer: TriplaneRenderer, occupied: Tensor, dtype: torch.dtype) -> None:
        config = renderer.renderer_config
        self.config, self.dtype = config, dtype
        self.lookup = RowLookup.of(config.plane_axes, config.plane_resolution, config.box_warp, occupied.device)
        self.neck = Neck.of(config.head_space, config.throat_y, occupied.device)
        self.rest_pose = None if config.rest_pose is None else torch.tensor(config.rest_pose, device=occupied.device)
        self.cells = Cells.of(occupied if bool(occupied.any()) else torch.ones_like(occupied), config.box_warp)
        hidden, out = _linear(renderer.decoder, 0), _linear(renderer.decoder, 2)
        self.hidden = hidden[0].div(3).to(dtype), hidden[1].to(dtype)  # the look-up sums where the plain one takes the mean
        self.density = out[0][:1].to(dtype), out[1][:1].to(dtype)
        self.colour = out[0][1:].to(dtype), out[1][1:].to(dtype)
        self.coarse_side = min(config.neural_rendering_resolution // 2, 48)
        self.num_coarse = max(24, config.depth_resolution // 2)
        self.num_fine = max(8, config.depth_resolution_importance // 4)
        self.compact = occupied.device.type == "cpu"

    def __call__(
        self, planes: list[Float[Tensor, "b c s s"]], camera: Camera, head_pose: Float[Tensor, "b 3"] | None = None
    ) -> tuple[Float[Tensor, "b f h w"], Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
        """Return features in [-1, 1], opacity and distance of each ray; `head_pose` as in `RendererConfig.bent`."""
        config, side, batch = self.config, self.config.neural_rendering_resolution, len(camera)
        camera = config.in_planes(camera)
        rows = self.lookup.rows([plane.to(self.dtype) for plane in planes])
        swing = None if head_pose is None or self.rest_pose is None else self.neck.swing(head_pose, self.rest_pose)
        near, far = self._span(camera)
        step = (far - near) / (self.num_coarse - 1)
        coarse, rays = (SteppedRays.of(camera_rays(camera, size, 0.0, 1.0), near, step, self.neck, swing) for size in (self.coarse_side, side))
        (weights,) = self._in_parts(self._look, self.num_coarse, rows, coarse)
        weights = weights.view(batch, self.coarse_side, self.coarse_side, -1).permute(0, 3, 1, 2)  # b m h w
        weights = F.interpolate(weights, size=(side, side), mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)  # r m
        empty = far.repeat_interleave(side**2)[:, None]
        if self.compact:
            kept = (weights.amax(1) > 1e-3).nonzero()[:, 0]
            background = [empty.new_full((len(empty), config.feature_channels), float(config.white_back)), torch.zeros_like(empty), empty]
            shown = self._in_parts(self._shade, self.num_fine, rows, rays[kept], weights[kept]) if len(kept) else background
            pictures = [x.index_copy(0, kept, y) for x, y in zip(background, shown, strict=True)] if len(kept) else background
        else:
            pictures = self._shade(rows, rays, weights)
        features, alpha, depth = (x.view(batch, side, side, -1).permute(0, 3, 1, 2) for x in pictures)  # b c h w
        return 2 * features - 1, alpha, depth

    def _span(self, camera: Camera) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        near, far = self.cells.span(camera.cam2world[:, :3, 3])
        if not isinstance(self.config.ray_start, str) and not isinstance(self.config.ray_end, str):
            scale = self.config.head_space[0]
            near, far = near.clamp(min=scale * self.config.ray_start), far.clamp(max=scale * self.config.ray_end)
        return near, far

    def _in_parts(self, work: Callable[..., list[Tensor]], samples: int, rows: Tensor, *of_rays: SteppedRays | Tensor) -> list[Tensor]:
        if not self.compact:
            return work(rows, *of_rays)
        parts = [work(rows, *part) for part in zip(*(x.split(max(1, POINTS_AT_ONCE // samples)) for x in of_rays), strict=True)]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _look(self, rows: Float[Tensor, "m c"], rays: SteppedRays) -> list[Float[Tensor, "r q"]]:
        """Return the weights of equal steps along rays."""
        distances = rays.near + rays.step * torch.arange(self.num_coarse, device=rays.near.device)  # r s
        points, volume = rays.points(distances), rays.volume.repeat_interleave(self.num_coarse)
        full, points = self.cells.occupied(points), rays.at_rest(points, distances, self.neck, compact=self.compact)
        if self.compact:
            index = full.nonzero()[:, 0]
            found = self._density(self._hidden(rows, points[index], volume[index]))
            density = torch.full_like(points[:, 0], EMPTY).index_copy_(0, index, found)
        else:
            density = torch.where(full, self._density(self._hidden(rows, points, volume)), EMPTY)
        return [segment_weights(density.view(1, *distances.shape), distances[None])[0]]

    def _shade(self, rows: Float[Tensor, "m c"], rays: SteppedRays, weights: Float[Tensor, "r q"]) -> list[Float[Tensor, "r _"]]:
        """Return features, opacity and distance of rays."""
        distances = rays.near + guided_bins(weights, self.num_fine) * rays.step
        points = rays.points(distances)
        full = self.cells.occupied(points)
        points = rays.at_rest(points, distances, self.neck, compact=self.compact)
        hidden = self._hidden(rows, points, rays.volume.repeat_interleave(self.num_fine))
        density = torch.where(full, self._density(hidden), EMPTY).view(distances.shape)
        shares = guided_weights(density, distances)
        colours = torch.sigmoid_(F.linear(hidden, *self.colour))
        index = torch.arange(len(points), device=points.device, dtype=torch.int32).view(distances.shape)
        mixed = F.embedding_bag(index, colours, per_sample_weights=shares.to(colours.dtype), mode="sum").float()
        opacity = shares.sum(1, keepdim=True)
        features = 1.002 * mixed - 0.001 * opacity  # the decoder's stretched sigmoid
        if self.config.white_back:
            features = features + 1 - opacity
        depth = (shares * distances).sum(1, keepdim=True) / opacity.clamp(min=1e-6)
        return [features, opacity, depth.maximum(distances[:, :1]).minimum(distances[:, -1:])]

    def _hidden(self, rows: Float[Tensor, "m c"], points: Float[Tensor, "n 3"], volume: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        several = len(rows) > self.lookup.rows_of_one
        hidden = F.linear(self.lookup(rows, points, volume if several else None), *self.hidden)
        return torch.ops.aten.softplus.out(hidden, out=hidden)

    def _density(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return F.linear(hidden, *self.density)[:, 0].float()


def _linear(decoder: PointDecoder, number: int) -> tuple[Tensor, Tensor]:
    layer = decoder.net[number]
    assert isinstance(layer, EqualLinear)
    return (layer.weight * (layer.lr / math.sqrt(layer.weight.shape[1]))).detach(), (layer.bias * layer.lr).detach()
