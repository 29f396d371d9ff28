"""The encoder: from pictures of a moment of a person to its code, in one pass. Pretraining learns with it; inversion starts from it.

Reference: amortised inversion, as in the encoders of e4e (arXiv 2102.02766) and Live 3D Portrait (arXiv 2305.02310); the network is a plain ResNet.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.stylegan2 import resize_to
from talk3d.types import Camera

_NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of the encoder."""

    side: int = 128
    """Pictures are resized to this many pixels a side first; a multiple of 32."""
    width: int = 28
    """Channels of the first layer; they double at every halving, up to eight times as many."""


class _Block(nn.Module):
    """Two convolutions, the first halving the sides, beside a pooled shortcut."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm0 = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o p q"]:
        inner = self.norm1(self.conv1(F.silu(self.norm0(self.conv0(x)))))
        return F.silu(inner + self.shortcut(F.avg_pool2d(x, 2)))


class Encoder(nn.Module):
    """Sees a head from one or several sides and says how its code differs from the average w."""

    def __init__(self, config: EncoderConfig, w_dim: int) -> None:
        super().__init__()
        self.config = config
        width, last = config.width, 8 * config.width
        self.stem = nn.Conv2d(4, width, 3, stride=2, padding=1)
        channels = [min(width * 2**i, last) for i in range(_NUM_STAGES + 1)]
        self.blocks = nn.ModuleList(_Block(before, after) for before, after in itertools.pairwise(channels))
        self.squeeze = nn.Conv2d(last, last // 4, 1)
        num_features = last // 4 * (config.side // 2 ** (_NUM_STAGES + 1)) ** 2
        self.view = nn.Linear(num_features + 25, 2 * w_dim)
        self.inner = nn.Linear(2 * w_dim, w_dim)
        self.out = nn.Linear(w_dim, w_dim)
        for layer in (self.squeeze, self.view, self.inner, self.out):  # so that codes of different people differ from the start
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, image: Float[Tensor, "b v 3 h w"], alpha: Float[Tensor, "b v 1 h w"], camera: Camera) -> Float[Tensor, "b d"]:
        """Return the offset of each moment's code from the average w; the views' features are averaged, so any number will do.

        Args:
            image: [-1, 1], premultiplied over black.
            alpha: [0, 1].
            camera: b · v cameras, all views of the first moment first.
        """
        batch, views = image.shape[:2]
        x = torch.cat([image, 2 * alpha - 1], 2).flatten(0, 1)  # (b v) 4 h w
        x = F.silu(self.stem(resize_to(x, self.config.side)))
        for block in self.blocks:
            x = block(x)
        x = F.silu(self.squeeze(x)).flatten(1)
        x = F.silu(self.view(torch.cat([x, camera.to_label().to(x)], 1))).view(batch, views, -1).mean(1)
        return self.out(F.silu(self.inner(x)))
