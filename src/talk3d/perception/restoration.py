"""Restored faces: GFPGAN v1.3 in its 'clean' form, a U-Net that steers a StyleGAN2 decoder.

The weights come from `talk3d weights fetch gfpgan`. The stored noise is used, so that the same picture gives the same face in every frame.

Reference: Wang et al., GFP-GAN (arXiv 2101.04061); Karras et al., StyleGAN2 (arXiv 1912.04958).
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.io.catalogue import load_published

STYLE = 512
NUM_MAPPING = 8
"""Layers of the mapping network, which lie in the file and are not used: the U-Net makes the styles itself."""


@runtime_checkable
class Restoration(Protocol):
    """Makes a clean large face of a poor one."""

    source: str
    """Which network it is, to be recorded with what it made."""

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        """Restore faces that fill their pictures, in [-1, 1]."""
        ...


def widths(side_px: int, narrow: float = 1.0) -> dict[int, int]:
    """Return the decoder's channels at every size from 4 px to `side_px`."""
    sizes = [2**power for power in range(2, side_px.bit_length())]
    return {size: int(min(512, 32768 // size) * narrow) for size in sizes}


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class _Residual(nn.Module):
    """Two convolutions round a change of size."""

    def __init__(self, channels: int, depth: int, factor: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, depth, 3, padding=1)
        self.skip = nn.Conv2d(channels, depth, 1, bias=False)
        self.factor = factor

    def _scaled(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        inner = self._scaled(F.leaky_relu(self.conv1(x), 0.2))
        return F.leaky_relu(self.conv2(inner), 0.2) + self.skip(self._scaled(x))


class _Modulated(nn.Module):
    """A convolution whose input channels are scaled by a style."""

    def __init__(self, channels: int, depth: int, kernel: int, demodulate: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(STYLE, channels)
        self.weight = nn.Parameter(torch.randn(1, depth, channels, kernel, kernel) / (channels * kernel**2) ** 0.5)
        self.demodulate = demodulate

    def forward(self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b s"]) -> Float[Tensor, "b d h w"]:
        scale = self.modulation(style)
        x = F.conv2d(x * scale[:, :, None, None], self.weight[0], padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            power = scale.square() @ self.weight[0].square().sum((2, 3)).mT  # b d
            x = x * (power + 1e-8).rsqrt()[:, :, None, None]
        return x


class _StyleConv(nn.Module):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.modulated_conv = _Modulated(channels, depth, 3, demodulate=True)
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1, depth, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b s"], noise: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "b d h w"]:
        return F.leaky_relu(self.modulated_conv(x, style) * 2**0.5 + self.weight * noise + self.bias, 0.2)


class _ToRGB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.modulated_conv = _Modulated(channels, 3, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b s"]) -> Float[Tensor, "b 3 h w"]:
        return self.modulated_conv(x, style) + self.bias


class _ConstantInput(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, 4, 4))


class _Decoder(nn.Module):
    """StyleGAN2 whose features the U-Net scales and shifts, one half of the channels."""

    def __init__(self, channels: dict[int, int]) -> None:
        super().__init__()
        self.style_mlp = nn.Sequential(nn.Identity(), *(layer for _ in range(NUM_MAPPING) for layer in (nn.Linear(STYLE, STYLE), nn.LeakyReLU(0.2))))
        self.constant_input = _ConstantInput(channels[4])
        self.style_conv1 = _StyleConv(channels[4], channels[4])
        self.to_rgb1 = _ToRGB(channels[4])
        self.style_convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise0", torch.randn(1, 1, 4, 4))
        before, number = channels[4], 1
        for size, depth in list(channels.items())[1:]:
            self.style_convs.extend([_StyleConv(before, depth), _StyleConv(depth, depth)])
            self.to_rgbs.append(_ToRGB(depth))
            for _ in range(2):
                self.noises.register_buffer(f"noise{number}", torch.randn(1, 1, size, size))
                number += 1
            before = depth

    def forward(self, styles: Float[Tensor, "b n s"], conditions: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "b 3 h w"]:
        def noise(number: int) -> Tensor:
            return self.noises.get_buffer(f"noise{number}")

        x = self.style_conv1(self.constant_input.weight.expand(len(styles), -1, -1, -1), styles[:, 0], noise(0))
        picture = self.to_rgb1(x, styles[:, 1])
        for level, (scale, shift) in enumerate(conditions):
            place = 2 * level + 1
            x = self.style_convs[place - 1](_twice(x), styles[:, place], noise(place))
            kept, steered = x.chunk(2, 1)
            x = torch.cat([kept, steered * scale + shift], 1)
            x = self.style_convs[place](x, styles[:, place + 1], noise(place + 1))
            picture = _twice(picture) + self.to_rgbs[level](x, styles[:, place + 2])
        return picture


def _condition(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(channels, channels, 3, padding=1))


class GFPGAN(nn.Module):
    """The published restorer with the names of its file; other sizes than the published 512 px serve the tests."""

    source = "GFPGAN 1.3"

    def __init__(self, side_px: int = 512, narrow: float = 1.0) -> None:
        """Build it.

        Args:
            side_px: of the pictures, a power of two of at least 8.
            narrow: share of the published channels.
        """
        super().__init__()
        self.side_px = side_px
        channels = widths(side_px, narrow)
        half = {size: width // 2 for size, width in channels.items()}
        sizes = list(half)
        self.conv_body_first = nn.Conv2d(3, half[side_px], 1)
        self.conv_body_down = nn.ModuleList(_Residual(half[size], half[size // 2], 0.5) for size in reversed(sizes[1:]))
        self.final_conv = nn.Conv2d(half[4], half[4], 3, padding=1)
        self.conv_body_up = nn.ModuleList(_Residual(half[size // 2], half[size], 2) for size in sizes[1:])
        self.toRGB = nn.ModuleList(nn.Conv2d(half[size], 3, 1) for size in sizes[1:])  # helps training only; in the file
        self.num_styles = 2 * len(sizes)
        self.final_linear = nn.Linear(half[4] * 16, self.num_styles * STYLE)
        self.stylegan_decoder = _Decoder(channels)
        self.condition_scale = nn.ModuleList(_condition(half[size]) for size in sizes[1:])
        self.condition_shift = nn.ModuleList(_condition(half[size]) for size in sizes[1:])

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Restore faces that fill their pictures, RGB in [-1, 1]; other sizes are brought to the published one bilinearly."""
        if pictures.shape[-2:] != (self.side_px, self.side_px):
            pictures = F.interpolate(pictures, (self.side_px, self.side_px), mode="bilinear", align_corners=False, antialias=True)
        x = F.leaky_relu(self.conv_body_first(pictures), 0.2)
        skips = []
        for block in self.conv_body_down:
            x = block(x)
            skips.append(x)
        x = F.leaky_relu(self.final_conv(x), 0.2)
        styles = self.final_linear(x.flatten(1)).unflatten(1, (self.num_styles, STYLE))
        conditions = []
        for up, scale, shift in zip(self.conv_body_up, self.condition_scale, self.condition_shift, strict=True):
            x = up(x + skips.pop())
            conditions.append((scale(x), shift(x)))
        return self.stylegan_decoder(styles, conditions).clamp(-1, 1)


def load_restoration(path: Path | None = None, device: str = "cpu") -> GFPGAN:
    """Return the published network, frozen; `path` in place of the file in the cache folder.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = GFPGAN()
    load_published("gfpgan", network, path)
    return network.eval().requires_grad_(False).to(device)
