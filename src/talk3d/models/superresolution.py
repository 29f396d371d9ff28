"""Super-resolution: rendered features to the full picture, in the sizes of the published generators and our own.

Reference: EG3D (arXiv 2112.07945), section 4.3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.stylegan2 import SynthesisBlock, resize_to
from talk3d.ops.resample import fir_filter


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

    antialias: bool = True
    """Whether that resizing is antialiased."""
    shrink: bool = True
    """Whether larger features are resized too; the published fourfold modules only enlarge."""
    conv_clamp: float | None = None
    """Largest magnitude that a layer returns; the published networks take 256 where they were trained in half precision."""
    own_filter: bool = False
    """Whether the module itself stores the constant filter, as most of the published ones do beside their blocks."""

    @property
    def output_side(self) -> int:
        """Pixels a side of the picture that comes out."""
        return self.input_side * 2 ** sum(self.up)


PUBLISHED = {
    "SuperresolutionHybrid8XDC": SuperresolutionConfig(),
    "SuperresolutionHybrid8X": SuperresolutionConfig(channels=(128, 64), own_filter=True),
    "SuperresolutionHybrid4X": SuperresolutionConfig(channels=(128, 64), up=(False, True), shrink=False, own_filter=True),
    "SuperresolutionHybridDeepfp32": SuperresolutionConfig(channels=(128, 64), up=(False, True), antialias=False, shrink=False, own_filter=True),
    "SuperresolutionHybrid2X": SuperresolutionConfig(input_side=64, channels=(128, 64), up=(False, True), own_filter=True),
}
"""The modules of released generators, by the class names in their files, without clamp."""


class Superresolution(nn.Module):
    """Two synthesis blocks over the rendered features, adding to the upsampled raw picture."""

    def __init__(self, config: SuperresolutionConfig, *, feature_channels: int, w_dim: int) -> None:
        super().__init__()
        self.config = config
        previous, side = feature_channels, config.input_side
        for i, (channels, up) in enumerate(zip(config.channels, config.up, strict=True)):
            side *= 2 if up else 1
            block = SynthesisBlock(
                previous, channels, w_dim=w_dim, resolution=side, image_channels=4 if config.matte else 3, up=up, clamp=config.conv_clamp
            )
            setattr(self, f"block{i}", block)
            previous = channels
        if config.own_filter:
            self.register_buffer("resample_filter", fir_filter())

    def forward(
        self, features: Float[Tensor, "b c h w"], alpha: Float[Tensor, "b 1 h w"], w: Float[Tensor, "#b d"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"]]:
        """Return the picture in nominal [-1, 1] and the opacity in nominal [0, 1], both unclamped.

        Args:
            features: rendered features in [-1, 1]; the first three channels are the raw picture.
            alpha: rendered opacity in [0, 1].
            w: the last style row, which drives every layer, or one for all samples; noise is off.
        """
        config = self.config
        image = features[:, :3]
        if config.matte:
            image = torch.cat([image, 2 * alpha - 1], 1)
        x = features
        if config.shrink or features.shape[-1] < config.input_side:
            x, image = (resize_to(y, config.input_side, antialias=config.antialias) for y in (x, image))
        ws = w[:, None].expand(-1, 3, -1)
        for name in ("block0", "block1"):
            x, image = getattr(self, name)(x, image, ws, noise=False)
        if config.matte:
            return image[:, :3], (image[:, 3:] + 1) / 2
        return image, resize_to(alpha, image.shape[-1])
