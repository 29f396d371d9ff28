"""The audio-guided attention U-Net: identity planes and condition tokens to the deltaplane.

All that sees only the identity planes comes first and is split off as `prepare`, so that it is computed once for a person (or once in a
training step) and shared by all frames, exactly.

Reference: Talk3D (arXiv 2403.20153), section 3.3. Ours differs from the release where that has defects: the output is linear and starts at
zero, normalisation is by groups, the roll-out follows the renderer's axes, and linear bases (blendshapes of the planes) stand beside the U-Net:
they learn the large motions in hundreds of steps, and the U-Net what is not linear.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.ops.planes import roll_out
from talk3d.ops.resample import downsample2, upsample2
from talk3d.types import PlaneAxes, Triplane

SLOTS = ("xy", "yz", "zx")
"""The three planes, in the published names of their weights."""


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values without bias."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def attend(self, query: Float[Tensor, "a n d"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b n d"]:
        """Attend with ready queries, which may have batch 1 for any number of contexts."""
        batch = context.shape[0]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, self.to_k(context), self.to_v(context)))  # b h n e
        out = F.scaled_dot_product_attention(q.expand(batch, -1, -1, -1), k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def forward(self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"]) -> Float[Tensor, "b n d"]:
        """Attend from x to context."""
        return self.attend(self.to_q(x), context)


class GatedFeedForward(nn.Module):
    """Linear, gated GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Sequential(OrderedDict(proj=nn.Linear(width, 8 * width))), "2": nn.Linear(4 * width, width)})

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply it to every token."""
        value, gate = self.net["0"](x).chunk(2, -1)
        return self.net["2"](value * F.gelu(gate))


def per_slot(prefix: str, make: type[nn.Module], *arguments: int) -> nn.ModuleDict:
    """Three modules of one kind, named as published: prefix_xy, prefix_yz, prefix_zx."""
    return nn.ModuleDict({f"{prefix}_{slot}": make(*arguments) for slot in SLOTS})


def apply_per_slot(modules: nn.Module, x: Float[Tensor, "b 3 *rest"], *contexts: Float[Tensor, "b 3 *more"]) -> Float[Tensor, "b 3 *out"]:
    """Apply the slots' modules (made by `per_slot`) to the slots of x (and of further inputs)."""
    assert isinstance(modules, nn.ModuleDict)
    inputs = zip(x.unbind(1), *(c.unbind(1) for c in contexts), strict=True)
    return torch.stack([module(*parts) for module, parts in zip(modules.values(), inputs, strict=True)], 1)


class TransformerBlock(nn.Module):
    """Self-attention inside each plane, cross-attention of all planes to the condition tokens, feed-forward."""

    def __init__(self, width: int, token_width: int, head_width: int) -> None:
        super().__init__()
        self.attn1 = per_slot("att", Attention, width, width, head_width)
        self.attn2 = Attention(width, token_width, head_width)
        self.ff = per_slot("ff", GatedFeedForward, width)
        self.norm1, self.norm2, self.norm3 = (per_slot("norm", nn.LayerNorm, width) for _ in range(3))

    def look_at_self(self, x: Float[Tensor, "b 3 n d"]) -> tuple[Float[Tensor, "b 3 n d"], Float[Tensor, "b m d"]]:
        """First half, blind to the condition: self-attention, and the queries for the tokens (m = 3 n)."""
        normed = apply_per_slot(self.norm1, x)
        x = x + apply_per_slot(self.attn1, normed, normed)
        return x, self.attn2.to_q(apply_per_slot(self.norm2, x).flatten(1, 2))

    def look_at_tokens(self, x: Float[Tensor, "a 3 n d"], query: Float[Tensor, "a m d"], tokens: Float[Tensor, "b k e"]) -> Float[Tensor, "b 3 n d"]:
        """Second half; x and its queries may have batch 1 for any number of token sets."""
        x = x + self.attn2.attend(query, tokens).unflatten(1, (3, -1))
        return x + apply_per_slot(self.ff, apply_per_slot(self.norm3, x))


@dataclass(frozen=True, kw_only=True)
class DeltaplaneConfig:
    """Sizes of the U-Net; the defaults are the published ones."""

    plane_channels: int = 32
    """Feature channels of one plane."""
    plane_resolution: int = 256
    """Pixels a side of one plane; the transformer works at an eighth of it."""
    plane_axes: PlaneAxes = "fixed"
    """Order of the planes' axes; the roll-out knows only "fixed"."""
    widths: tuple[int, int, int] = (64, 128, 256)
    """Channels per plane after each of the three stages down."""
    head_width: int = 64
    """Width of an attention head."""
    token_width: int = 64
    """Width of a condition token."""
    num_blocks: int = 2
    """Transformer blocks."""
    num_bases: int = 0
    """Linear bases beside the U-Net, at half the planes' resolution; the published networks have none."""


@dataclass(frozen=True, kw_only=True)
class DeltaplanePrefix:
    """What depends on the identity planes alone (batch 1)."""

    skips: tuple[Float[Tensor, "1 3 _ _ _"], Float[Tensor, "1 3 _ _ _"]]
    bottom: Float[Tensor, "1 3 d h w"]
    hidden: Float[Tensor, "1 3 n d"]
    query: Float[Tensor, "1 m d"]


class Stage(nn.Module):
    """For one plane slot: two convolutions with norm and leaky ReLU, then half or double the sides."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm0, self.norm1 = (nn.GroupNorm(math.gcd(8, channels), channels) for _ in range(2))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """Apply the convolutions; resampling follows outside."""
        x = F.leaky_relu(self.norm0(self.conv0(x)), 0.01)
        return F.leaky_relu(self.norm1(self.conv1(x)), 0.01)


def _positions(width: int, side: int) -> Float[Tensor, "3 n d"]:
    """Sinusoidal code of every cell's (x, y, z), the collapsed axis at its middle; slots A (row y, col x), B (row z, col x), C (row y, col z)."""
    channels = 2 * math.ceil(width / 6)
    frequencies = 10000 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(side)[:, None] * frequencies
    code = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # n c
    middle = ((code[side // 2 - 1] + code[side // 2]) / 2).expand(side, side, -1)
    rows, columns = code[:, None].expand(side, side, -1), code[None].expand(side, side, -1)
    slots = [(columns, rows, middle), (columns, middle, rows), (middle, rows, columns)]
    return torch.stack([torch.cat(axes, -1)[..., :width].flatten(0, 1) for axes in slots])


class DeltaplanePredictor(nn.Module):
    """Three stages down, a transformer over the smallest planes, three stages up.

    The buffer `scale` is the standard deviation of the identity planes: the network works in units of it.
    """

    positions: Tensor
    scale: Tensor

    def __init__(self, config: DeltaplaneConfig) -> None:
        super().__init__()
        self.config = config
        c, (first, second, third) = config.plane_channels, config.widths
        self.down = nn.ModuleList([per_slot("stage", Stage, 3 * i, o) for i, o in ((c, first), (first, second), (second, third))])
        self.up = nn.ModuleList([per_slot("stage", Stage, 3 * i, o) for i, o in ((third, second), (second, first), (first, c))])
        self.norm_in = per_slot("norm", nn.GroupNorm, math.gcd(32, third), third)
        self.proj_in = per_slot("lin", nn.Linear, third, third)
        self.blocks = nn.ModuleList([TransformerBlock(third, config.token_width, config.head_width) for _ in range(config.num_blocks)])
        self.out = per_slot("conv", nn.Conv2d, c, c, 1)
        for layer in self.out.values():
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        side = config.plane_resolution // 2
        self.bases = nn.Parameter(torch.zeros(config.num_bases, 3, c, side, side))
        self.register_buffer("scale", torch.ones([]))
        self.register_buffer("positions", _positions(third, config.plane_resolution // 8), persistent=False)

    @property
    def _transformer(self) -> list[TransformerBlock]:
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]

    def prepare(self, identity: Triplane) -> DeltaplanePrefix:
        """Compute what the identity planes of one person decide."""
        assert identity.planes.shape[0] == 1, "one person at a time"
        x, skips = identity.planes / self.scale, []
        for stage in self.down:
            x = _resample(downsample2, apply_per_slot(stage, roll_out(x)))
            skips.append(x)
        hidden = apply_per_slot(self.norm_in, x).flatten(3).transpose(2, 3)  # 1 3 n d
        hidden = apply_per_slot(self.proj_in, hidden) + self.positions
        hidden, query = self._transformer[0].look_at_self(hidden)
        return DeltaplanePrefix(skips=(skips[0], skips[1]), bottom=x, hidden=hidden, query=query)

    def predict(self, prefix: DeltaplanePrefix, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"]) -> Triplane:
        """Return the deltaplane of each set of tokens and weights of the linear bases."""
        first, *others = self._transformer
        hidden = first.look_at_tokens(prefix.hidden, prefix.query, tokens)
        for block in others:
            hidden, query = block.look_at_self(hidden + self.positions)
            hidden = block.look_at_tokens(hidden, query, tokens)
        x = hidden.transpose(2, 3).unflatten(3, prefix.bottom.shape[-2:]) + prefix.bottom
        for stage, skip in zip(self.up, (prefix.skips[1], prefix.skips[0], None), strict=True):
            x = apply_per_slot(stage, roll_out(x))
            if skip is None:
                x = apply_per_slot(self.out, x)  # linear and before the upsampling, which is linear too
                if len(self.bases):
                    x = x + (coefficients @ self.bases.flatten(1)).view(x.shape)
            x = _resample(upsample2, x)
            if skip is not None:
                x = x + skip
        return Triplane(planes=x * self.scale, axes=self.config.plane_axes)

    def forward(self, identity: Triplane, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"]) -> Triplane:
        """Return the deltaplanes for one person's identity planes."""
        return self.predict(self.prepare(identity), tokens, coefficients)


def _resample(how: Callable[[Tensor], Tensor], x: Float[Tensor, "b 3 c h w"]) -> Float[Tensor, "b 3 c i j"]:
    return how(x.flatten(0, 1)).unflatten(0, (-1, 3))
