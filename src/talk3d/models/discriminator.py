"""The discriminator of adversarial pretraining: it sees the full picture and the raw one together, and knows the camera.

Reference: StyleGAN2 (arXiv 1912.04958), residual discriminator with minibatch deviation; EG3D (arXiv 2112.07945), section 4.3, dual
discrimination and camera conditioning by projection.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.layers import EqualLinear
from talk3d.models.stylegan2 import MappingNetwork, resize_to
from talk3d.ops.resample import downsample2, fir

_SQRT2 = math.sqrt(2)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes of the discriminator."""

    side: int = 256
    """Pixels a side of the pictures it judges."""
    channel_base: int = 8192
    """Channels at a resolution are min(channel_base / resolution, channel_max)."""
    channel_max: int = 256
    """Most channels."""
    c_dim: int = 25
    """Length of the camera label that it is told; 0 tells nothing."""
    mapping_layers: int = 2
    """Layers of the label's mapping network."""
    group_size: int = 4
    """Pictures among which the minibatch deviation is taken."""


class EqualConv(nn.Module):
    """Convolution with equalised learning rate, optionally halving the sides after the FIR filter, and sqrt 2 · leaky ReLU 0.2 if activated."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, down: bool = False, activated: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activated else None
        self.scale, self.kernel, self.down = 1 / math.sqrt(in_channels * kernel * kernel), kernel, down

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o p q"]:
        """Apply the layer."""
        weight = self.weight * self.scale
        if not self.down:
            x = F.conv2d(x, weight, padding=self.kernel // 2)
        elif self.kernel == 1:
            x = F.conv2d(downsample2(x), weight)
        else:
            x = F.conv2d(fir(x, (2, 2)), weight, stride=2)
        return x if self.bias is None else F.leaky_relu(x + self.bias[:, None, None], 0.2) * _SQRT2


class _Block(nn.Module):
    """Two convolutions, the second halving the sides, beside a linear shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = EqualConv(in_channels, in_channels, 3)
        self.conv1 = EqualConv(in_channels, out_channels, 3, down=True)
        self.shortcut = EqualConv(in_channels, out_channels, 1, down=True, activated=False)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o p q"]:
        return (self.conv1(self.conv0(x)) + self.shortcut(x)) / _SQRT2


def minibatch_deviation(x: Float[Tensor, "b c h w"], group_size: int) -> Float[Tensor, "b 1 h w"]:
    """One map with the mean standard deviation of features among `group_size` pictures, so that sameness shows.

    Reference: Progressive GAN (arXiv 1710.10196), section 3.
    """
    batch, _, height, width = x.shape
    size = math.gcd(batch, group_size)
    grouped = x.view(size, batch // size, *x.shape[1:])
    deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat(size)[:, None, None, None].expand(batch, 1, height, width)


class DualDiscriminator(nn.Module):
    """Scores pictures: high for real ones."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config

        def channels(side: int) -> int:
            return min(config.channel_base // side, config.channel_max)

        sides = [config.side // 2**k for k in range(int(math.log2(config.side)) - 1)]  # down to 4
        last = channels(4)
        self.from_pictures = EqualConv(6, channels(config.side), 1)
        self.blocks = nn.Sequential(*(_Block(channels(side), channels(side // 2)) for side in sides[:-1]))
        self.conv = EqualConv(last + 1, last, 3)
        self.fc = EqualLinear(16 * last, last, activation="lrelu")
        self.out = EqualLinear(last, last if config.c_dim else 1)
        if config.c_dim:
            self.mapping = MappingNetwork(z_dim=0, c_dim=config.c_dim, w_dim=last, num_ws=1, num_layers=config.mapping_layers)

    def forward(self, pictures: Float[Tensor, "b 6 h h"], label: Float[Tensor, "b c"] | None = None) -> Float[Tensor, "b 1"]:
        """Score pictures.

        Args:
            pictures: from `dual`.
            label: camera labels; needed when the discriminator was made with `c_dim` > 0.
        """
        x = self.blocks(self.from_pictures(pictures))
        x = self.conv(torch.cat([x, minibatch_deviation(x, self.config.group_size)], 1))
        x = self.out(self.fc(x.flatten(1)))
        if not self.config.c_dim:
            return x
        assert label is not None, "this discriminator is conditioned: give a label"
        condition = self.mapping(x.new_zeros(len(x), 0), label)[:, 0]
        return (x * condition).sum(1, keepdim=True) / math.sqrt(x.shape[1])


def dual(image: Float[Tensor, "b 3 H H"], raw: Float[Tensor, "b 3 h h"]) -> Float[Tensor, "b 6 H H"]:
    """Stack a picture and its raw version, resized to the same side: they must agree to look real."""
    return torch.cat([image, resize_to(raw, image.shape[-1])], 1)
