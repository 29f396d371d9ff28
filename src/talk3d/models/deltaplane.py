"""The audio-guided attention U-Net: identity planes and condition tokens to the deltaplane.

All that sees only the identity planes comes first and is split off as `prepare`, so that it is computed once for a person (or once in a
training step) and shared by all frames, exactly.

Reference: Talk3D (arXiv 2403.20153), section 3.3, whose released networks are `DeltaplaneConfig(released=True)`; attribute names are those of
their weights. Ours differs where the release has defects: the output is linear and starts at zero, normalisation is by groups, roll-out and
positions follow the renderer's axes, and linear bases (blendshapes of the planes) stand beside the U-Net: they learn the large motions in
hundreds of steps, and the U-Net what is not linear.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.attention import SLOTS, TransformerBlock, apply_per_slot, per_slot
from talk3d.ops.planes import RollOut, convolve_rolled_out, plane_axes
from talk3d.ops.resample import downsample2, fir_filter, upsample2
from talk3d.types import PlaneAxes, Triplane


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
    num_near: int = 0
    """Further bases, whose weights come first, at full resolution in a window over the face, of half the planes' sides."""
    released: bool = False
    """The released network to the letter: batch norm, output through the last leaky ReLU, roll-out and positions on the axes it was trained with."""


WINDOW_CENTRE = (0.0, -0.05, 0.15)
"""Of the window over the face, in sides of the cube from its middle: it holds all from the forehead to below the chin."""


def face_window(axes: PlaneAxes, resolution: int) -> tuple[tuple[slice, slice], ...]:
    """Return, for each plane, the rows and columns of the window over the face, of half the sides."""
    first = [round((centre + 0.25) * resolution) for centre in WINDOW_CENTRE]
    spans = [slice(low, low + resolution // 2) for low in first]
    return tuple((spans[row], spans[column]) for column, row in plane_axes(axes))


MOUTH = ((-0.12, 0.12), (-0.2, -0.03), (0.06, 0.6))
"""Between which x, y, z lips move, in sides of the cube from its middle: down to below the chin, up to under the nose."""
LIDS = 0.045
"""Height below which mouths move anything, up to the lower lids, in the same unit."""
CHIN = -0.18
"""Height below which a head's roll moves anything, in the same unit."""
RAMP = 0.02
"""Within which such shares rise from 0 to 1, in the same unit."""
ROLL = 2
"""Which of the bases that are not near is the head's roll."""


def bases_reach(config: DeltaplaneConfig, mouth_shapes: int) -> tuple[Float[Tensor, "n 3 1 s s"], Float[Tensor, "m 3 1 s s"]]:
    """Return shares of the cells in which near and other bases may learn.

    What mouths do ends at the lower lids, what lids, brows and gaze do leaves the mouth alone, and what a head's roll does begins below the chin: the
    camera turns the head itself. Near bases are without the plane that does not tell heights, where it is one of three: what it holds shows at
    every height, up to the hair. Elsewhere such planes may learn anywhere.
    """
    side, axes = config.plane_resolution // 2, plane_axes(config.plane_axes)
    cells = torch.arange(side) + 0.5
    in_window = [(cells + round((centre + 0.25) * config.plane_resolution)) / config.plane_resolution - 0.5 for centre in WINDOW_CENTRE]
    mouth = [((x - low) / RAMP).clamp(0, 1) * ((high - x) / RAMP).clamp(0, 1) for x, (low, high) in zip(in_window, MOUTH, strict=True)]
    every = torch.ones(side)
    lower_face = [every, ((LIDS - in_window[1]) / RAMP).clamp(0, 1), every]  # by x, y, z
    low = [every, ((CHIN - (cells / side - 0.5)) / RAMP).clamp(0, 1), every]
    near, others = (torch.ones(count, 3, 1, side, side) for count in (config.num_near, config.num_bases))
    for plane, (column, row) in enumerate(axes):
        if 1 in (column, row):
            near[:mouth_shapes, plane] = lower_face[row][:, None] * lower_face[column]
            near[mouth_shapes:, plane] = 1 - mouth[row][:, None] * mouth[column]
            others[ROLL : ROLL + 1, plane] = low[row][:, None] * low[column]
        elif config.plane_axes == "fixed":
            near[:, plane] = 0
    return near, others


@dataclass(frozen=True, kw_only=True)
class DeltaplanePrefix:
    """What depends on the identity planes alone; batch a is 1."""

    skips: tuple[Float[Tensor, "a 3 _ _ _"], Float[Tensor, "a 3 _ _ _"]]
    bottom: Float[Tensor, "a 3 d h w"]
    hidden: Float[Tensor, "a 3 n d"]
    query: Float[Tensor, "a m d"]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of one sample that stands for `copies` of it: the same result, and the running variance that so many would have left."""

    copies: int = 1

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise; the mean and (biased) variance of copies are those of the one."""
        if not self.training or self.copies == 1:
            return super().forward(input)
        assert self.running_var is not None and self.momentum is not None and self.num_batches_tracked is not None
        alone = self.running_var.clone()
        out = F.batch_norm(input, self.running_mean, alone, self.weight, self.bias, True, self.momentum, self.eps)
        one = input[:, 0].numel()
        many = self.copies * one
        with torch.no_grad():  # the unbiased variance divides by one pixel less than there are
            kept = (1 - self.momentum) * self.running_var
            self.running_var.copy_(kept + (alone - kept) * ((one - 1) / one * many / (many - 1)))
            self.num_batches_tracked.add_(1)
        return out


class Stage(nn.Module):
    """For one plane: two convolutions, each with norm and leaky ReLU; resampling follows outside."""

    def __init__(self, in_channels: int, channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn0, self.bn1 = (BatchNorm(channels) if batch_norm else nn.GroupNorm(math.gcd(8, channels), channels) for _ in range(2))
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Float[Tensor, "b o h w"]) -> Float[Tensor, "b o h w"]:
        """Apply all that follows the first convolution, which sees the other planes too."""
        x = F.leaky_relu(self.bn0(x), 0.01)
        return F.leaky_relu(self.bn1(self.conv1(x)), 0.01)


class StageSequence(nn.ModuleDict):
    """The three stages of one direction, with weights of their own for each plane."""

    def __init__(self, name: str, widths: tuple[int, int, int, int], released: bool) -> None:
        sizes = enumerate(pairwise(widths), 1)
        super().__init__({f"{name}{k}_{slot}": Stage(3 * i, o, released) for k, (i, o) in sizes for slot in SLOTS})
        self.name = name
        self.order: RollOut = "released" if released else "consistent"

    def slots(self, number: int) -> list[Stage]:
        """Return the modules of stage 1, 2 or 3 for the three planes."""
        stages = [self[f"{self.name}{number}_{slot}"] for slot in SLOTS]
        return [stage for stage in stages if isinstance(stage, Stage)]

    def apply_stage(self, number: int, planes: Float[Tensor, "b 3 i h w"]) -> Float[Tensor, "b 3 o h w"]:
        """Roll the planes out, convolve, normalise."""
        stages = self.slots(number)
        biases = [stage.conv0.bias for stage in stages if stage.conv0.bias is not None]
        convolved = convolve_rolled_out(planes, [stage.conv0.weight for stage in stages], biases, self.order)
        return torch.stack([stage(x) for stage, x in zip(stages, convolved, strict=True)], 1)


def positions(width: int, side: int, order: RollOut = "consistent") -> Float[Tensor, "1 n e"]:
    """Sinusoidal code of every cell's (x, y, z), the collapsed axis at its middle; the thirds of the channels are the planes'.

    "consistent" follows the planes' axes: (row y, column x), (row z, column x), (row y, column z). "released" is what the released networks
    were made with: (row x, column y), (row y, column z), (row x, column z).
    """
    channels = 2 * math.ceil(width / 6)
    frequencies = 10000 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(side)[:, None] * frequencies
    code = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # n c
    middle = ((code[side // 2 - 1] + code[side // 2]) / 2).expand(side, side, -1)
    rows, columns = code[:, None].expand(side, side, -1), code[None].expand(side, side, -1)
    if order == "consistent":
        slots = [(columns, rows, middle), (columns, middle, rows), (middle, rows, columns)]
    else:
        slots = [(rows, columns, middle), (middle, rows, columns), (rows, middle, columns)]
    return torch.cat([torch.cat(axes, -1)[..., :width].flatten(0, 1) for axes in slots], -1)[None]


class PlaneTransformer(nn.Module):
    """Transformer blocks over the cells of the smallest planes."""

    def __init__(self, config: DeltaplaneConfig) -> None:
        super().__init__()
        width = config.widths[2]
        code = positions(width, config.plane_resolution // 8, "released" if config.released else "consistent")
        self.pos_emb = nn.Parameter(code)
        self.norm = per_slot("GN", nn.GroupNorm, math.gcd(32, width), width)
        self.proj_in = per_slot("lin", nn.Linear, width, width)
        blocks = [TransformerBlock(width, config.token_width, config.head_width) for _ in range(config.num_blocks)]
        self.transformer_blocks = nn.ModuleList(blocks)

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks in order."""
        return [block for block in self.transformer_blocks if isinstance(block, TransformerBlock)]

    def prepare(self, planes: Float[Tensor, "b 3 d h w"]) -> tuple[Float[Tensor, "b 3 n d"], Float[Tensor, "b m d"]]:
        """Return hidden cells and queries just before the first look at the tokens."""
        hidden = apply_per_slot(self.norm, planes).flatten(3).transpose(2, 3)  # b 3 n d
        return self.blocks[0].look_at_self(self._placed(apply_per_slot(self.proj_in, hidden)))

    def attend(
        self, hidden: Float[Tensor, "#b 3 n d"], query: Float[Tensor, "#b m d"], tokens: Float[Tensor, "b k e"]
    ) -> tuple[Float[Tensor, "b 3 n d"], list[Float[Tensor, "_ m d"]]]:
        """Do the rest; return hidden cells, and the queries with which each block looked at the tokens."""
        first, *others = self.blocks
        queries = [query]
        hidden = first.look_at_tokens(hidden, query, tokens)
        for block in others:
            hidden, query = block.look_at_self(self._placed(hidden))
            hidden = block.look_at_tokens(hidden, query, tokens)
            queries.append(query)
        return hidden, queries

    def _placed(self, hidden: Float[Tensor, "b 3 n d"]) -> Float[Tensor, "b 3 n d"]:
        return hidden + self.pos_emb.unflatten(2, (3, -1)).transpose(1, 2)  # 1 3 n d


class DeltaplanePredictor(nn.Module):
    """Three stages down, a transformer over the smallest planes, three stages up.

    The buffer `scale` is the standard deviation of the identity planes: the network works in units of it. The released one knows no units.
    """

    scale: Tensor
    bases: nn.Parameter | None
    near: nn.Parameter | None

    def __init__(self, config: DeltaplaneConfig) -> None:
        super().__init__()
        self.config = config
        c, (first, second, third) = config.plane_channels, config.widths
        self.Downnet = StageSequence("Downnet", (c, first, second, third), config.released)
        self.Upnet = StageSequence("Upnet", (third, second, first, c), config.released)
        self.transformer = nn.ModuleList([PlaneTransformer(config)])
        self.register_buffer("scale", torch.ones([]), persistent=not config.released)
        if config.released:
            last = [stage.conv1 for stage in self.Upnet.slots(3)]
        else:
            self.out = out = per_slot("conv", nn.Conv2d, c, c, 1)
            last = list(out.values())
        for layer in last:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        side = config.plane_resolution // 2
        for name, count in (("bases", config.num_bases), ("near", config.num_near)):
            self.register_parameter(name, nn.Parameter(torch.zeros(count, 3, c, side, side)) if count else None)

    @property
    def _attention(self) -> PlaneTransformer:
        transformer = self.transformer[0]
        assert isinstance(transformer, PlaneTransformer)
        return transformer

    def prepare(self, identity: Triplane, copies: int = 1) -> DeltaplanePrefix:
        """Compute what the identity planes of one person decide.

        Args:
            identity: one volume.
            copies: in training, how many samples will share this: only batch norm's running variance depends on it.
        """
        assert identity.planes.shape[0] == 1, "one person at a time"
        for module in self.Downnet.modules():
            if isinstance(module, BatchNorm):
                module.copies = copies
        x, skips = identity.planes / self.scale, []
        for number in (1, 2, 3):
            x = _resample(downsample2, self.Downnet.apply_stage(number, x))
            skips.append(x)
        hidden, query = self._attention.prepare(x)
        return DeltaplanePrefix(skips=(skips[0], skips[1]), bottom=x, hidden=hidden, query=query)

    def predict(self, prefix: DeltaplanePrefix, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"] | None = None) -> Triplane:
        """Return the deltaplane of each set of tokens and weights of the linear bases (which networks without bases do not take)."""
        hidden, _ = self._attention.attend(prefix.hidden, prefix.query, tokens)
        x = hidden.transpose(2, 3).unflatten(3, prefix.bottom.shape[-2:]) + prefix.bottom
        for number, skip in ((1, prefix.skips[1]), (2, prefix.skips[0])):
            x = _resample(upsample2, self.Upnet.apply_stage(number, x)) + skip
        x = self.Upnet.apply_stage(3, x)
        if not self.config.released:
            x = apply_per_slot(self.out, x)  # linear and before the upsampling, which is linear too
        return self._with_bases(x, coefficients)

    def blend_near(self, coefficients: Float[Tensor, "b m"]) -> Triplane:
        """Return the part of the deltaplane that the bases in the window over the face make with these weights, of which the first are theirs."""
        side = self.config.plane_resolution
        zero = self.scale.new_zeros(len(coefficients), 3, self.config.plane_channels, side, side)
        planes = zero if self.near is None else self._in_window(_blend(self.near, coefficients, 0)) * self.scale
        return Triplane(planes=planes, axes=self.config.plane_axes)

    def confine_gradients(self, reach: tuple[Float[Tensor, "n 3 1 s s"], Float[Tensor, "m 3 1 s s"]]) -> None:
        """Leave near and other bases gradients only where they may learn, see `bases_reach`."""
        for bases, share in zip((self.near, self.bases), reach, strict=True):
            if bases is not None and bases.grad is not None:
                bases.grad *= share

    def _with_bases(self, x: Float[Tensor, "b 3 c h w"], coefficients: Float[Tensor, "b m"] | None) -> Triplane:
        """Add the linear bases to what is painted at half the planes' resolution, in units of the identity planes."""
        if self.bases is not None:
            x = x + _blend(self.bases, coefficients, self.config.num_near)
        planes = _resample(upsample2, x)
        if self.near is not None:
            planes = planes + self._in_window(_blend(self.near, coefficients, 0))
        return Triplane(planes=planes * self.scale, axes=self.config.plane_axes)

    def _in_window(self, near: Float[Tensor, "b 3 c h w"]) -> Float[Tensor, "b 3 c p p"]:
        """Put pieces into the window over the face of planes that are zero elsewhere."""
        side = self.config.plane_resolution
        windows = face_window(self.config.plane_axes, side)
        borders = [(columns.start, side - columns.stop, rows.start, side - rows.stop) for rows, columns in windows]
        return torch.stack([F.pad(piece, border) for piece, border in zip(near.unbind(1), borders, strict=True)], 1)

    def score_maps(self, prefix: DeltaplanePrefix, tokens: Float[Tensor, "b k e"]) -> Float[Tensor, "l b h m k"]:
        """Return where each block (l) and head looks: how much every cell of the three planes, row-major, attends to each of the k tokens."""
        with torch.no_grad():
            _, queries = self._attention.attend(prefix.hidden, prefix.query, tokens)
            return torch.stack([block.attn2.weights(q, tokens) for block, q in zip(self._attention.blocks, queries, strict=True)])

    def forward(self, identity: Triplane, tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"] | None = None) -> Triplane:
        """Return the deltaplanes for one person's identity planes."""
        return self.predict(self.prepare(identity, len(tokens)), tokens, coefficients)


def _blend(bases: Float[Tensor, "n 3 c h w"], coefficients: Float[Tensor, "b m"] | None, first: int) -> Float[Tensor, "b 3 c h w"]:
    """Sum bases by their weights, which begin at `first`."""
    assert coefficients is not None, "this network has linear bases: give their weights"
    return (coefficients[:, first : first + len(bases)] @ bases.flatten(1)).unflatten(1, bases.shape[1:])


def _resample(how: Callable[[Tensor], Tensor], x: Float[Tensor, "b 3 c h w"]) -> Float[Tensor, "b 3 c i j"]:
    return how(x.flatten(0, 1)).unflatten(0, (-1, 3))


class DeltaplaneTensors(nn.Module):
    """`DeltaplanePredictor` between tensors alone, which CUDA graphs want."""

    def __init__(self, predictor: DeltaplanePredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, identity: Float[Tensor, "1 3 c p p"], tokens: Float[Tensor, "b k e"], coefficients: Float[Tensor, "b m"]) -> Tensor:
        """Return the deltaplanes, b 3 c p p."""
        return self.predictor(Triplane(planes=identity, axes=self.predictor.config.plane_axes), tokens, coefficients).planes
