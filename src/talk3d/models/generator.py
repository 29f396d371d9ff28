"""The tri-plane generator: a prior over 3D heads, from a latent to planes to pictures.

Reference: EG3D (arXiv 2112.07945), section 4.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.renderer import RendererConfig, TriplaneRenderer
from talk3d.models.stylegan2 import MappingNetwork, SynthesisNetwork
from talk3d.types import Camera, Rendering, Triplane


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Sizes of a generator; the defaults are the published ones (FFHQ, 512 pixels)."""

    z_dim: int = 512
    """Length of the latent."""
    c_dim: int = 25
    """Length of the conditioning camera label; 0 leaves conditioning out."""
    c_scale: float = 1.0
    """The label is multiplied by this first; 0 ignores it."""
    c_gen_conditioning_zero: bool = False
    """Whether the label is ignored: replaced by zeros."""
    mapping_layers: int = 2
    """Layers of the mapping network; 0 is one affine map."""
    channel_base: int = 32768
    """Channels of the backbone at a resolution are min(channel_base / resolution, channel_max)."""
    channel_max: int = 512
    """Most channels of the backbone."""
    conv_clamp: float | None = None
    """Largest magnitude that a layer of the backbone returns; None does not bound it, as in the published FFHQ networks."""
    renderer: RendererConfig = field(default_factory=RendererConfig)
    """Planes, rays, decoder and super-resolution."""


class TriplaneGenerator(TriplaneRenderer):
    """Mapping, plane synthesis and rendering."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config.renderer)
        self.config = config
        r = config.renderer
        synthesis = SynthesisNetwork(
            w_dim=r.w_dim,
            resolution=r.plane_resolution,
            image_channels=3 * r.plane_channels,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            clamp=config.conv_clamp,
        )
        mapping = MappingNetwork(z_dim=config.z_dim, c_dim=config.c_dim, w_dim=r.w_dim, num_ws=synthesis.num_ws, num_layers=config.mapping_layers)
        self.backbone = nn.ModuleDict({"mapping": mapping, "synthesis": synthesis})

    def with_renderer(self, **changes: Any) -> "TriplaneGenerator":
        """Return the same networks, shared, with other settings of the renderer."""
        result = copy.copy(self)
        result.renderer_config = replace(self.renderer_config, **changes)
        result.config = replace(self.config, renderer=result.renderer_config)
        return result

    @property
    def num_ws(self) -> int:
        """Number of style rows."""
        return 2 * (self.config.renderer.plane_resolution.bit_length() - 2)

    @property
    def mapping_network(self) -> MappingNetwork:
        """The network from latents to style rows, with the average row."""
        network = self.backbone["mapping"]
        assert isinstance(network, MappingNetwork)
        return network

    def mapping(
        self, z: Float[Tensor, "b z"], label: Float[Tensor, "b c"] | None = None, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Float[Tensor, "b n w"]:
        """Map latents (and a conditioning camera's label, if the generator takes one) to style rows; see `MappingNetwork.forward`."""
        if label is not None:
            label = torch.zeros_like(label) if self.config.c_gen_conditioning_zero else label * self.config.c_scale
        return self.mapping_network(z, label, truncation_psi, truncation_cutoff)

    def triplane(self, ws: Float[Tensor, "b n w"]) -> Triplane:
        """Paint the planes of these style rows, with the stored (constant) noise."""
        planes = self.backbone["synthesis"](ws).unflatten(1, (3, -1))
        return Triplane(planes=planes, axes=self.config.renderer.plane_axes)

    def render(
        self, ws: Float[Tensor, "b n w"], camera: Camera | Float[Tensor, "b 25"], jitter: bool = False, neural_rendering_resolution: int | None = None
    ) -> Rendering:
        """Paint and render in one go, each volume by its own camera.

        Args:
            ws: style rows.
            camera: cameras or EG3D labels.
            jitter: move the samples on the rays at random (seed 0); False is deterministic.
            neural_rendering_resolution: rays a side; None takes the config's.
        """
        camera = camera if isinstance(camera, Camera) else Camera.from_label(camera)
        generator = torch.Generator(ws.device).manual_seed(0) if jitter else None
        return self.render_triplane(
            self.triplane(ws), ws[:, -1], camera, generator=generator, neural_rendering_resolution=neural_rendering_resolution
        )
