"""Tri-plane look-up and the 3D-aware roll-out of plane features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from talk3d.types import PlaneAxes

_PLANE_COORDINATES: dict[PlaneAxes, tuple[tuple[int, int], ...]] = {"fixed": ((0, 1), (0, 2), (2, 1)), "released": ((0, 1), (0, 2), (2, 0))}
"""For each plane, the world axes along its columns and rows."""

RollOut = Literal["consistent", "released"]
"""Where a plane's profile is spread on another: along the axis they share in the order "fixed", or as Talk3D's released networks do it,
which puts four of the six on the wrong axis."""

_PROFILES: dict[RollOut, tuple[tuple[tuple[int, int, int], ...], ...]] = {
    "consistent": (((1, -2, -2), (2, -1, -1)), ((0, -2, -2), (2, -2, -1)), ((0, -1, -1), (1, -1, -2))),
    "released": (((1, -2, -1), (2, -1, -2)), ((0, -1, -2), (2, -2, -1)), ((0, -2, -1), (1, -1, -2))),
}
"""For each plane, what it gets of the two others: which, the axis they are averaged over, the axis along which that is constant."""


def plane_axes(axes: PlaneAxes) -> tuple[tuple[int, int], ...]:
    """Return, for each plane, the world axes along its columns and rows."""
    return _PLANE_COORDINATES[axes]


def project_points(points: Float[Tensor, "b n 3"], axes: PlaneAxes, box_warp: float) -> Float[Tensor, "b 3 n 2"]:
    """Map points of the cube of side `box_warp` to plane coordinates (column, row) in [-1, 1].

    Reference: EG3D (arXiv 2112.07945), section 4; plane orders in `PlaneAxes`.
    """
    scaled = points * (2 / box_warp)
    return torch.stack([scaled[..., list(pair)] for pair in _PLANE_COORDINATES[axes]], 1)


def sample_planes(planes: Float[Tensor, "b 3 c h w"], coordinates: Float[Tensor, "b 3 n 2"]) -> Float[Tensor, "b n c"]:
    """Mean over the planes of bilinear features at `coordinates`; zero outside the planes."""
    batch, _, channels = planes.shape[:3]
    grid = coordinates.flatten(0, 1).unsqueeze(1)  # (b 3) 1 n 2
    found = F.grid_sample(planes.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (b 3) c 1 n
    return found.view(batch, 3, channels, -1).mean(1).transpose(1, 2)  # b n c


def gather_planes(planes: Float[Tensor, "b 3 c h w"], coordinates: Float[Tensor, "b 3 n 2"]) -> Float[Tensor, "b n c"]:
    """Do what `sample_planes` does, corner by corner: compiled for a GPU, looking up and learning take a quarter of its time."""
    batch, _, channels, height, width = planes.shape
    rows = planes.permute(0, 1, 3, 4, 2).reshape(-1, channels)
    first = torch.arange(3 * batch, device=planes.device).view(batch, 3, 1) * (height * width)
    side = torch.tensor([width, height], device=planes.device)
    position = (coordinates + 1) * (side / 2) - 0.5  # in pixels, of their centres
    corner = position.floor()
    part = position - corner
    total = torch.zeros_like(part[..., :1])
    for right in (0, 1):
        for below in (0, 1):
            step = torch.tensor([right, below], device=planes.device)
            column, row = (corner + step).unbind(-1)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = (part * step + (1 - part) * (1 - step)).prod(-1) * inside  # b 3 n
            index = first + row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            total = total + rows[index] * weight.unsqueeze(-1).to(rows.dtype)
    return total.mean(1)


def roll_out(planes: Float[Tensor, "b 3 c h w"], order: RollOut = "consistent") -> Float[Tensor, "b 3 d h w"]:
    """Give every plane what the two others know along their shared axis: c becomes 3c channels, c of each plane in their order.

    For planes A (row y, column x), B (row z, column x), C (row y, column z): the other planes are averaged over the axis that is not
    shared and the profile is spread over the shared one, A ← [A, B over z, C over z], B ← [A over y, B, C over y], C ← [A over x, B over x, C].

    Reference: Mimic3D (arXiv 2303.09036), 3D-aware convolution, with the axes of `PlaneAxes` "fixed".
    """
    rolled = []
    for target, sources in enumerate(_PROFILES[order]):
        parts = {source: planes[:, source].mean(over).unsqueeze(along).expand_as(planes[:, 0]) for source, over, along in sources}
        parts[target] = planes[:, target]
        rolled.append(torch.cat([parts[source] for source in range(3)], 1))
    return torch.stack(rolled, 1)


@dataclass(frozen=True, kw_only=True)
class RolledOutKernels:
    """Kernels over three rolled-out planes, split into what each plane meets."""

    own: tuple[Float[Tensor, "o c 3 3"], ...]
    """Over each plane itself."""
    lines: Float[Tensor, "6 d p"]
    """Over the means of the two others, of each plane: 1-D kernels of 3 taps and c channels, three for each of o channels: what is added
    everywhere, and what of it is too much at the two ends."""
    order: RollOut

    def to(self, dtype: torch.dtype) -> "RolledOutKernels":
        """Return them in another precision and channels-last."""
        own = tuple(kernel.to(dtype).contiguous(memory_format=torch.channels_last) for kernel in self.own)
        return RolledOutKernels(own=own, lines=self.lines.to(dtype), order=self.order)


def split_rolled_out(weights: Sequence[Float[Tensor, "o d 3 3"]], order: RollOut) -> RolledOutKernels:
    """Split a kernel for each plane over the 3c channels of `roll_out`."""
    lines, own = [], []
    for target, (sources, weight) in enumerate(zip(_PROFILES[order], weights, strict=True)):
        parts = weight.chunk(3, 1)
        own.append(parts[target])
        for source, _, along in sources:
            first, _, last = parts[source].unbind(along)
            lines.append(torch.cat([parts[source].sum(along), first, last]).flatten(1).T)  # p c 3 to (c 3) p
    return RolledOutKernels(own=tuple(own), lines=torch.stack(lines), order=order)


def convolve_split(
    planes: Sequence[Float[Tensor, "b c h w"]], kernels: RolledOutKernels, biases: Sequence[Float[Tensor, " o"]]
) -> list[Float[Tensor, "b o h w"]]:
    """Roll three square planes out and convolve each (3×3, zero border), without ever making the rolled-out planes.

    What comes from another plane is constant along one axis, so it takes a 1-D convolution with the kernel summed over that axis; at the two
    ends of the axis, where a tap falls outside, that tap's part is taken back.
    """
    profiles = [(source, over, along) for sources in _PROFILES[kernels.order] for source, over, along in sources]
    means = torch.stack([planes[source].mean(over).transpose(1, 2) for source, over, _ in profiles])  # 6 b n c
    batch, side, channels = means.shape[1:]
    taps = F.pad(means, (0, 0, 1, 1)).unfold(2, 3, 1).reshape(6, batch * side, 3 * channels)
    lines = torch.bmm(taps, kernels.lines).view(6, batch, side, -1).transpose(2, 3)  # 6 b p n
    convolved = [F.conv2d(plane, own, bias, padding=1) for plane, own, bias in zip(planes, kernels.own, biases, strict=True)]
    for number, (line, (_, _, along)) in enumerate(zip(lines, profiles, strict=True)):
        everywhere, low, high = line.chunk(3, 1)
        out = convolved[number // 2]
        out += everywhere.unsqueeze(along)
        out.select(along, 0).sub_(low)
        out.select(along, -1).sub_(high)
    return convolved


def convolve_rolled_out(
    planes: Float[Tensor, "b 3 c h w"], weights: Sequence[Float[Tensor, "o d 3 3"]], biases: Sequence[Float[Tensor, " o"]], order: RollOut
) -> list[Float[Tensor, "b o h w"]]:
    """Roll out and convolve each plane with a kernel of its own over the 3c channels of `roll_out`; see `convolve_split`."""
    return convolve_split(planes.unbind(1), split_rolled_out(weights, order), biases)
