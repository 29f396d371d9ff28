"""Layers of StyleGAN2: equalised linear layers and modulated convolutions, in plain PyTorch on any device.

Reference: StyleGAN2 (arXiv 1912.04958), sections 2 and 4.1.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.ops.resample import fir, fir_filter

Activation = Literal["linear", "lrelu"]
_SQRT2 = math.sqrt(2)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: y = act((lr / sqrt(fan_in)) W x + lr b); lrelu means sqrt 2 · leaky ReLU 0.2."""

    def __init__(self, in_features: int, out_features: int, *, activation: Activation = "linear", lr: float = 1.0, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr))
        self.activation, self.lr = activation, lr

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Apply the layer to the last axis."""
        x = F.linear(x, self.weight * (self.lr / math.sqrt(self.weight.shape[1])), self.bias * self.lr)
        return x if self.activation == "linear" else F.leaky_relu(x, 0.2) * _SQRT2


def modulated_conv(
    x: Float[Tensor, "b i h w"], weight: Float[Tensor, "o i k k"], style: Float[Tensor, "#b i"], *, up: bool = False, demodulate: bool = True
) -> Float[Tensor, "b o p q"]:
    """Convolve with kernels scaled per sample by `style` on the input and, if `demodulate`, normalised per output channel.

    One kernel serves the batch: a style shared by all samples is multiplied into it, styles of their own multiply the inputs and the
    normalisation the outputs. `up` doubles the sides: a transposed convolution with stride 2, then the FIR filter.
    """
    norm = torch.rsqrt(style.square() @ weight.square().sum((2, 3)).T + 1e-8) if demodulate else None
    shared = style.shape[0] == 1
    if shared:
        weight = weight * style[0, :, None, None]
        weight = weight if norm is None else weight * norm[0, :, None, None, None]
    else:
        x = x * style[:, :, None, None]
    padding = weight.shape[-1] // 2
    x = fir(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1), gain=4) if up else F.conv2d(x, weight, padding=padding)
    return x if shared or norm is None else x * norm[:, :, None, None]


class SynthesisLayer(nn.Module):
    """Modulated 3×3 convolution, constant noise, bias, leaky ReLU, and a clamp if there is one."""

    noise_const: Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, *, up: bool = False, clamp: float | None = None) -> None:
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "#b d"], *, noise: bool = True) -> Float[Tensor, "b o p q"]:
        """Apply the layer; `noise` adds the stored noise map."""
        x = modulated_conv(x, self.weight, self.affine(w), up=self.up)
        if noise:
            x = x + self.noise_const * self.noise_strength
        x = F.leaky_relu(x + self.bias[:, None, None], 0.2) * _SQRT2
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToImage(nn.Module):
    """Modulated 1×1 convolution without demodulation, bias, and a clamp if there is one: features to image (or plane) channels."""

    def __init__(self, in_channels: int, image_channels: int, w_dim: int, *, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(image_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(image_channels))

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "#b d"]) -> Float[Tensor, "b o h w"]:
        """Return this resolution's contribution to the running image."""
        style = self.affine(w) / math.sqrt(x.shape[1])
        x = modulated_conv(x, self.weight, style, demodulate=False) + self.bias[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
