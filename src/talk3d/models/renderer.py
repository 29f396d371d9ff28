"""From tri-planes to pictures: point decoder, volume rendering, super-resolution.

`TriplaneRenderer` is all of the generator that is needed once planes exist, so it is what personalised avatars carry.

Reference: EG3D (arXiv 2112.07945), section 4.2 and 4.3.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from talk3d.models.layers import EqualLinear
from talk3d.models.stylegan2 import SynthesisBlock, resize_to
from talk3d.ops.planes import project_points, sample_planes
from talk3d.ops.rays import camera_rays, limit_to_occupied
from talk3d.ops.volume import composite, importance_distances, segment_weights, stratified_distances
from talk3d.types import Camera, PlaneAxes, Rays, Rendering, Triplane


@dataclass(frozen=True, kw_only=True)
class SuperresolutionConfig:
    """Sizes of the two blocks."""

    input_side: int = 128
    """Features are resized to this many pixels a side first."""
    channels: tuple[int, int] = (256, 128)
    """Channels of the first and second block."""
    up: tuple[bool, bool] = (True, True)
    """Whether each block doubles the sides."""
    matte: bool = False
    """Also refine the opacity: a fourth image channel. The published models lack it; ours have it."""

    @property
    def output_side(self) -> int:
        """Pixels a side of the picture that comes out."""
        return self.input_side * 2 ** sum(self.up)


class Superresolution(nn.Module):
    """Two synthesis blocks over the rendered features, adding to the upsampled raw picture."""

    def __init__(self, config: SuperresolutionConfig, *, feature_channels: int, w_dim: int) -> None:
        super().__init__()
        self.config = config
        previous, side = feature_channels, config.input_side
        for i, (channels, up) in enumerate(zip(config.channels, config.up, strict=True)):
            side *= 2 if up else 1
            block = SynthesisBlock(previous, channels, w_dim=w_dim, resolution=side, image_channels=4 if config.matte else 3, up=up)
            setattr(self, f"block{i}", block)
            previous = channels

    def forward(
        self, features: Float[Tensor, "b c h w"], alpha: Float[Tensor, "b 1 h w"], w: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"]]:
        """Return the picture in nominal [-1, 1] and the opacity in nominal [0, 1], both unclamped.

        Args:
            features: rendered features in [-1, 1]; the first three channels are the raw picture.
            alpha: rendered opacity in [0, 1].
            w: the last style row, which drives every layer; noise is off.
        """
        image = features[:, :3]
        if self.config.matte:
            image = torch.cat([image, 2 * alpha - 1], 1)
        x, image = resize_to(features, self.config.input_side), resize_to(image, self.config.input_side)
        ws = w[:, None].expand(-1, 3, -1)
        for name in ("block0", "block1"):
            x, image = getattr(self, name)(x, image, ws, noise=False)
        if self.config.matte:
            return image[:, :3], (image[:, 3:] + 1) / 2
        return image, resize_to(alpha, image.shape[-1])


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
    feature_channels: int = 32
    """Features rendered for super-resolution; the first three are the raw picture."""
    neural_rendering_resolution: int = 128
    """Rays a side."""
    ray_start: float = 2.25
    """Distance at which rays start to be sampled, scene units."""
    ray_end: float = 3.3
    """Distance at which they end."""
    depth_resolution: int = 48
    """Equally spaced samples on a ray."""
    depth_resolution_importance: int = 48
    """Further samples where the first ones found something."""
    superresolution: SuperresolutionConfig = field(default_factory=SuperresolutionConfig)
    """Sizes of the super-resolution."""


class PointDecoder(nn.Module):
    """Mean plane features of a point to raw density and colour features: one hidden layer, softplus."""

    def __init__(self, in_channels: int, hidden: int, feature_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(EqualLinear(in_channels, hidden), nn.Softplus(), EqualLinear(hidden, 1 + feature_channels))

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n f"]]:
        """Return raw density (before softplus) and features in [0, 1]."""
        x = self.net(x)
        return x[..., :1], torch.sigmoid(x[..., 1:]) * 1.002 - 0.001


class TriplaneRenderer(nn.Module):
    """Decoder and super-resolution with the volume rendering between them."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        self.renderer_config = config
        self.decoder = PointDecoder(config.plane_channels, config.decoder_hidden, config.feature_channels)
        self.superresolution = Superresolution(config.superresolution, feature_channels=config.feature_channels, w_dim=config.w_dim)

    def query(self, triplane: Triplane, points: Float[Tensor, "b n 3"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n f"]]:
        """Return raw density and features of points given in scene units."""
        coordinates = project_points(points, triplane.axes, self.renderer_config.box_warp)
        return self.decoder(sample_planes(triplane.planes, coordinates))

    def occupancy(self, triplane: Triplane, side: int = 64, threshold: float = 0.3, dilation: int = 3) -> Bool[Tensor, "s s s"]:
        """Return the cells of the cube (indexed z, y, x) where one volume is not empty, grown by `dilation` cells.

        A cell counts as full when crossing it at its centre's density would absorb more than `threshold` percent of the light.
        """
        assert triplane.planes.shape[0] == 1, "occupancy is for one volume"
        centres = ((torch.arange(side, device=triplane.planes.device) + 0.5) / side - 0.5) * self.renderer_config.box_warp
        z, y, x = torch.meshgrid(centres, centres, centres, indexing="ij")
        with torch.no_grad():
            density = self.query(triplane, torch.stack([x, y, z], -1).reshape(1, -1, 3))[0]
        absorbed = 1 - torch.exp(-F.softplus(density - 1) * (self.renderer_config.box_warp / side))
        full = (absorbed > threshold / 100).view(1, 1, side, side, side).float()
        return F.max_pool3d(full, 2 * dilation + 1, stride=1, padding=dilation)[0, 0] > 0

    def render_rays(
        self, triplane: Triplane, rays: Rays, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b r f"], Float[Tensor, "b r 1"], Float[Tensor, "b r 1"]]:
        """Return features over zero, opacity and distance of each ray; `generator` jitters the samples, None takes fixed ones."""
        config = self.renderer_config
        distances = stratified_distances(rays, config.depth_resolution, generator)
        density, features = self._decode(triplane, rays, distances)
        if config.depth_resolution_importance:
            weights = segment_weights(density.detach(), distances)
            fine = importance_distances(distances, weights, config.depth_resolution_importance, generator)
            fine_density, fine_features = self._decode(triplane, rays, fine)
            distances, order = torch.cat([distances, fine], -1).sort(-1)
            density = torch.cat([density, fine_density], -1).gather(-1, order)
            features = torch.cat([features, fine_features], -2)
            features = features.gather(-2, order.unsqueeze(-1).expand_as(features))
        return composite(features, density, distances)

    def _decode(self, triplane: Triplane, rays: Rays, distances: Float[Tensor, "b r s"]) -> tuple[Tensor, Tensor]:
        points = rays.origins.unsqueeze(-2) + distances.unsqueeze(-1) * rays.directions.unsqueeze(-2)  # b r s 3
        density, features = self.query(triplane, points.flatten(1, 2))
        return density.view(distances.shape), features.view(*distances.shape, -1)

    def render_triplane(
        self,
        triplane: Triplane,
        w: Float[Tensor, "b d"],
        camera: Camera,
        *,
        generator: torch.Generator | None = None,
        occupied: Bool[Tensor, "s s s"] | None = None,
        neural_rendering_resolution: int | None = None,
    ) -> Rendering:
        """Render volumes as the cameras see them.

        Args:
            triplane: b volumes.
            w: the style row that drives super-resolution.
            camera: b cameras.
            generator: randomness of sample jitter; None renders deterministically.
            occupied: cells worth sampling, from `occupancy`; None samples the whole span of every ray.
            neural_rendering_resolution: rays a side; None takes the config's.
        """
        config = self.renderer_config
        side = neural_rendering_resolution or config.neural_rendering_resolution
        rays = camera_rays(camera, side, config.ray_start, config.ray_end)
        if occupied is None:
            features, alpha, depth = self.render_rays(triplane, rays, generator)
        else:
            features, alpha, depth = self._render_occupied(triplane, rays, occupied, generator)
        features, alpha, depth = (x.transpose(1, 2).unflatten(2, (side, side)) for x in (features, alpha, depth))  # b c h w
        features = 2 * features - 1
        image, full_alpha = self.superresolution(features, alpha, w)
        return Rendering(image=image, alpha=full_alpha, raw=features[:, :3], raw_alpha=alpha, features=features, depth=depth)

    def _render_occupied(
        self, triplane: Triplane, rays: Rays, occupied: Bool[Tensor, "s s s"], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rays, hit = limit_to_occupied(rays, occupied, self.renderer_config.box_warp)
        batches = []
        for i in range(hit.shape[0]):
            index = hit[i].nonzero()[:, 0]
            empty = rays.far[i : i + 1].clone()
            black = torch.zeros(1, hit.shape[1], self.renderer_config.feature_channels, device=empty.device)
            if not len(index):  # nothing of this volume is in sight
                batches.append((black, torch.zeros_like(empty), empty))
                continue
            one = Rays(
                **{name: getattr(rays, name)[i : i + 1, index] for name in ("origins", "directions", "near", "far")},
            )
            volume = Triplane(planes=triplane.planes[i : i + 1], axes=triplane.axes)
            features, alpha, depth = self.render_rays(volume, one, generator)
            batches.append(
                (
                    black.index_copy(1, index, features),
                    torch.zeros_like(empty).index_copy(1, index, alpha),
                    empty.index_copy(1, index, depth),
                )
            )
        features, alpha, depth = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return features, alpha, depth
