"""Mapping and synthesis networks of StyleGAN2, skip architecture, as EG3D uses them to paint tri-planes.

Reference: StyleGAN2 (arXiv 1912.04958), figure 7b; EG3D (arXiv 2112.07945), section 4.1.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import ConfigError
from talk3d.models.layers import EqualLinear, SynthesisLayer, ToImage
from talk3d.ops.resample import fir_filter, upsample2


def _normalise(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class MappingNetwork(nn.Module):
    """Latent z and, if `c_dim` > 0, a conditioning camera label to one w, repeated to `num_ws` rows.

    With no layers it is one affine map, so that w is normally distributed: what an auto-decoder's codes are fitted with.
    """

    w_avg: Tensor

    def __init__(self, *, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int = 2) -> None:
        super().__init__()
        self.num_ws, self.num_layers, self.c_dim = num_ws, num_layers, c_dim
        if c_dim:
            self.embed = EqualLinear(c_dim, w_dim)
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * num_layers
        if not num_layers:
            self.affine = EqualLinear(widths[0], w_dim)
        for i in range(num_layers):
            setattr(self, f"fc{i}", EqualLinear(widths[i], widths[i + 1], activation="lrelu", lr=0.01))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self, z: Float[Tensor, "b z"], label: Float[Tensor, "b c"] | None = None, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Float[Tensor, "b n w"]:
        """Map latents to style rows.

        Args:
            z: latents, standard normal.
            label: conditioning camera labels, usually frontal, already scaled; needed when the network was made with `c_dim` > 0.
            truncation_psi: 1 keeps w, 0 gives the average.
            truncation_cutoff: rows before this one are truncated; None truncates all.

        Raises:
            ConfigError: the network is conditioned and no label is given.
        """
        x = _normalise(z.float())
        if self.c_dim:
            if label is None:
                raise ConfigError(
                    f"this generator is conditioned on {self.c_dim} numbers of a camera and got none: give labels, usually of a front view"
                )
            x = torch.cat([x, _normalise(self.embed(label.float()))], 1)
        if not self.num_layers:
            x = self.affine(x)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        ws = x[:, None].repeat(1, self.num_ws, 1)  # b n w
        if truncation_psi != 1:
            rows = slice(truncation_cutoff)
            ws[:, rows] = self.w_avg.lerp(ws[:, rows], truncation_psi)
        return ws


class SynthesisBlock(nn.Module):
    """One resolution: one or two convolutions and a contribution to the running image."""

    def __init__(
        self, in_channels: int, channels: int, *, w_dim: int, resolution: int, image_channels: int, up: bool = True, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.up, self.is_first = up, in_channels == 0
        if self.is_first:
            self.const = nn.Parameter(torch.randn(channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, channels, w_dim, resolution, up=up, clamp=clamp)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, resolution, clamp=clamp)
        self.torgb = ToImage(channels, image_channels, w_dim, clamp=clamp)
        self.register_buffer("resample_filter", fir_filter())

    def forward(
        self, x: Float[Tensor, "b i h w"] | None, image: Float[Tensor, "b k h w"] | None, ws: Float[Tensor, "#b 3 d"], *, noise: bool = True
    ) -> tuple[Float[Tensor, "b o p q"], Float[Tensor, "b k p q"]]:
        """Return features and the running image; `ws` rows drive the first convolution, the second, and the image layer."""
        first = self.const.expand(ws.shape[0], -1, -1, -1) if self.is_first else self.conv0(x, ws[:, 0], noise=noise)
        out = self.conv1(first, ws[:, 1], noise=noise)
        contribution = self.torgb(out, ws[:, 2]).float()
        if image is None:
            return out, contribution
        return out, (upsample2(image) if self.up else image) + contribution


class SynthesisNetwork(nn.Module):
    """From style rows to a picture of `image_channels` at `resolution`, doubling from 4.

    Channels at a resolution are min(channel_base / resolution, channel_max); `clamp` bounds what every layer returns.
    """

    def __init__(self, *, w_dim: int, resolution: int, image_channels: int, channel_base: int, channel_max: int, clamp: float | None = None) -> None:
        super().__init__()
        self.resolutions = [2**k for k in range(2, int(math.log2(resolution)) + 1)]
        self.num_ws = 2 * len(self.resolutions)
        previous = 0
        for side in self.resolutions:
            channels = min(channel_base // side, channel_max)
            block = SynthesisBlock(previous, channels, w_dim=w_dim, resolution=side, image_channels=image_channels, clamp=clamp)
            setattr(self, f"b{side}", block)
            previous = channels

    def forward(self, ws: Float[Tensor, "b n d"], *, noise: bool = True) -> Float[Tensor, "b k s s"]:
        """Paint the picture; `noise` adds the stored noise maps."""
        x = image = None
        for i, side in enumerate(self.resolutions):
            rows = ws[:, [0, 0, 1]] if i == 0 else ws[:, 2 * i - 1 : 2 * i + 2]
            x, image = getattr(self, f"b{side}")(x, image, rows, noise=noise)
        assert image is not None
        return image


def resize_to(x: Float[Tensor, "b c h w"], side: int, *, antialias: bool = True) -> Float[Tensor, "b c s s"]:
    """Resize to `side` pixels with bilinear interpolation, antialiased unless told otherwise, if the size differs."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=antialias)
