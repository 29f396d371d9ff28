"""Super-resolution: rendered features to the full picture, in the sizes of the published generators and our own.

`BakedSuperresolution` is the same for one person: what the style decides is folded into plain convolutions.

Reference: EG3D (arXiv 2112.07945), section 4.3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.layers import SynthesisLayer, ToImage
from talk3d.models.stylegan2 import SynthesisBlock, resize_to
from talk3d.ops.resample import fir, fir_filter, upsample2


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


def baked_kernel(weight: Float[Tensor, "o i h w"], dtype: torch.dtype) -> Float[Tensor, "o i h w"]:
    """Return a kernel for inference: another precision, channels-last, without gradient."""
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class BakedConv:
    """A convolution with leaky ReLU and a clamp if there is one.

    One that doubles the sides is, on the CPU, a transposed convolution and the FIR filter, and elsewhere one convolution that makes the four
    pixels of each: four times the arithmetic, which a GPU has, and no filter that it is slow at.
    """

    weight: Float[Tensor, "_ _ k k"]
    bias: Float[Tensor, " o"]
    clamp: float | None
    fir: Float[Tensor, "o 1 4 4"] | None = None
    fourfold: bool = False

    @classmethod
    def of_layer(cls, layer: SynthesisLayer, w: Float[Tensor, "1 d"], dtype: torch.dtype, *, fourfold: bool) -> "BakedConv":
        """Fold style, demodulation and the gain of the leaky ReLU, which is homogeneous; `fourfold` chooses how sides are doubled."""
        style = layer.affine(w)[0]
        weight = layer.weight * style[:, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8) * math.sqrt(2)
        bias = (layer.bias * math.sqrt(2)).detach().to(dtype)
        if not layer.up:
            return cls(baked_kernel(weight, dtype), bias, layer.clamp)
        if fourfold:
            return cls(baked_kernel(four_pixels(weight), dtype), bias.repeat(4), layer.clamp, fourfold=True)
        taps = 4 * fir_filter().to(weight.device).expand(len(bias), 1, 4, 4)
        return cls(baked_kernel(weight.transpose(0, 1), dtype), bias, layer.clamp, baked_kernel(taps, dtype))

    def __call__(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o p q"]:
        """Apply it."""
        if self.fir is None:
            x = F.conv2d(x, self.weight, self.bias, padding=1)
        else:
            x = F.conv2d(F.conv_transpose2d(x, self.weight, stride=2), self.fir, self.bias, padding=1, groups=len(self.bias))
        x = _shuffled(x) if self.fourfold else F.leaky_relu_(x, 0.2)
        return x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)


def _shuffled(x: Float[Tensor, "b p h w"]) -> Float[Tensor, "b o i j"]:
    """Lay the four pixels of each out, through the leaky ReLU; channels-last. One kernel, where `reshape` would make two."""
    batch, _, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)).transpose(2, 3)  # b h 2 w 2 o
    if torch.compiler.is_compiling():  # it fuses them itself, and does not know the strides of `out`
        out = F.leaky_relu(pixels.contiguous(), 0.2)
    else:
        out = torch.ops.aten.leaky_relu.out(pixels, 0.2, out=torch.empty(pixels.shape, dtype=x.dtype, device=x.device))
    return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)  # b o i j


def four_pixels(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "p i 3 3"]:
    """Turn a kernel that is applied as transposed convolution with stride 2 and FIR filter into one that makes the four pixels of each input.

    Output channels are the o channels of the upper left pixel, the upper right, the lower left, the lower right. Along one axis, an even
    output sees the six taps of kernel and filter together at 4, 2, 0, an odd one at 5, 3, 1.
    """
    taps = fir(F.pad(weight, (3, 3, 3, 3)), (0, 0), gain=4)  # o i 6 6
    parts = ([4, 2, 0], [5, 3, 1])
    return torch.cat([taps[:, :, rows][..., columns] for rows in parts for columns in parts])


@dataclass(frozen=True)
class BakedToImage:
    """A 1×1 convolution without activation, as a product of matrices whose sides are multiples of eight, as GPUs like them."""

    weight: Float[Tensor, "p i"]
    bias: Float[Tensor, " p"]
    clamp: float | None
    channels: int

    @classmethod
    def of_layer(cls, layer: ToImage, w: Float[Tensor, "1 d"], dtype: torch.dtype) -> "BakedToImage":
        """Fold the style."""
        weight = layer.weight[:, :, 0, 0] * (layer.affine(w)[0] / math.sqrt(layer.weight.shape[1]))
        channels = len(weight)
        padding = -channels % 8
        weight, bias = F.pad(weight.detach(), (0, 0, 0, padding)), F.pad(layer.bias.detach(), (0, padding))
        return cls(weight.to(dtype), bias.to(dtype), layer.clamp, channels)

    def __call__(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b k h w"]:
        """Apply it."""
        image = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias)[..., : self.channels].permute(0, 3, 1, 2).float()  # b k h w
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class BakedSuperresolution:
    """Super-resolution of one person: plain convolutions."""

    def __init__(self, module: Superresolution, w: Float[Tensor, "1 d"], dtype: torch.dtype) -> None:
        self.config, self.dtype = module.config, dtype
        self.blocks: list[tuple[bool, BakedConv, BakedConv, BakedToImage]] = []
        for block in (module.get_submodule("block0"), module.get_submodule("block1")):
            assert isinstance(block, SynthesisBlock)
            first, second = (BakedConv.of_layer(layer, w, dtype, fourfold=w.device.type != "cpu") for layer in (block.conv0, block.conv1))
            self.blocks.append((block.up, first, second, BakedToImage.of_layer(block.torgb, w, dtype)))

    def __call__(
        self, features: Float[Tensor, "b c h w"], alpha: Float[Tensor, "b 1 h w"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"]]:
        """Do what `Superresolution.forward` does."""
        config, image = self.config, features[:, :3]
        if config.matte:
            image = torch.cat([image, 2 * alpha - 1], 1)
        x = features
        if config.shrink or features.shape[-1] < config.input_side:
            x, image = (resize_to(y, config.input_side, antialias=config.antialias) for y in (x, image))
        x, image = x.to(self.dtype, memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)
        for up, first, second, to_image in self.blocks:
            x = second(first(x))
            image = to_image(x).add_(upsample2(image) if up else image)
        if config.matte:
            return image[:, :3], (image[:, 3:] + 1) / 2
        return image, resize_to(alpha, image.shape[-1])
