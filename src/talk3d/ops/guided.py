"""Volume rendering with few samples: planes as rows of features, and samples only where a coarse look found something.

The plain way looks coarsely along every ray, then finely, and keeps all samples. Here the coarse look wants the density alone (and at inference
a quarter of the rays), and the fine one starts from its weights. Shapes are static unless `Cells.occupied` is used to drop points. Must not
import models.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from talk3d.ops.geometry import Neck
from talk3d.ops.planes import plane_axes
from talk3d.ops.volume import segment_weights
from talk3d.types import PlaneAxes, Rays

EMPTY = -30.0
"""Raw density of empty space."""
BENDS = torch.cartesian_prod(torch.arange(-36.0, 37.0, 12.0), torch.arange(-18.0, 19.0, 18.0), torch.zeros(1)).deg2rad()
"""Yaw, pitch and roll from rest with which shoulders are looked for."""


@dataclass(frozen=True, kw_only=True)
class RowLookup:
    """Bilinear look-up in planes that lie in memory as rows of features, all channels of a cell side by side: one read for each corner.

    A point's twelve rows (three planes, four corners) and their weights are products of small matrices with the point's cell and its place there.
    """

    side: int
    """Pixels a side of the planes."""
    scale: float
    """Pixels to a scene unit."""
    to_rows: Float[Tensor, "3 12"]
    first: Float[Tensor, "12"]
    along: tuple[Float[Tensor, "3 12"], Float[Tensor, "3 12"]]
    base: tuple[Float[Tensor, "12"], Float[Tensor, "12"]]

    @classmethod
    def of(cls, axes: PlaneAxes, side: int, box_warp: float, device: torch.device) -> "RowLookup":
        """Prepare for planes of `side` pixels that span a cube of side `box_warp`."""
        padded = side + 2
        to_rows, first = torch.zeros(3, 12), torch.zeros(12)
        along, base = torch.zeros(2, 3, 12), torch.zeros(2, 12)
        for plane, (column, row) in enumerate(plane_axes(axes)):
            for corner in range(4):
                right, below, number = corner % 2, corner // 2, 4 * plane + corner
                to_rows[column, number], to_rows[row, number] = 1, padded
                first[number] = plane * padded**2 + right + below * padded
                for k, (axis, far) in enumerate(((column, right), (row, below))):
                    along[k, axis, number], base[k, number] = (1, 0) if far else (-1, 1)
        across, down = along.to(device)
        left, top = base.to(device)
        return cls(side=side, scale=side / box_warp, to_rows=to_rows.to(device), first=first.to(device), along=(across, down), base=(left, top))

    @property
    def rows_of_one(self) -> int:
        """How many rows one volume takes."""
        return 3 * (self.side + 2) ** 2

    def rows(self, planes: list[Float[Tensor, "b c s s"]]) -> Float[Tensor, "m c"]:
        """Lay three planes out as rows, with a border of zeros, which is what lies outside."""
        batch, channels, side, _ = planes[0].shape
        rows = planes[0].new_empty(batch, 3, side + 2, side + 2, channels)
        for axis in (2, 3):
            for end in (0, -1):
                rows.select(axis, end).zero_()
        for slot, plane in enumerate(planes):
            rows[:, slot, 1:-1, 1:-1] = plane.permute(0, 2, 3, 1)  # b h w c
        return rows.view(-1, channels)

    def __call__(self, rows: Float[Tensor, "m c"], points: Float[Tensor, "n 3"], volume: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n c"]:
        """Sum over the planes at points in scene units; `volume` says in which of several each lies."""
        place = (points * self.scale + (self.side / 2 + 0.5)).clamp_(0.0, self.side + 1 - 1e-3)
        cell = place.floor()
        inside = place.sub_(cell)
        index = torch.addmm(self.first, cell, self.to_rows).int()
        if volume is not None:
            index += (volume * self.rows_of_one).int().unsqueeze(1)
        weights = torch.addmm(self.base[0], inside, self.along[0]).mul_(torch.addmm(self.base[1], inside, self.along[1]))
        weights = weights.to(rows.dtype)
        return _SumOfRows.apply(rows, index, weights) if rows.requires_grad else F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")


class _SumOfRows(torch.autograd.Function):
    """Weighted sums of rows, `embedding_bag`, whose gradient is another one: over the points that looked at each row."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "m c"], index: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
        ctx.save_for_backward(index, weights)
        ctx.num_rows = len(rows)
        return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Float[Tensor, "n c"]) -> tuple[Float[Tensor, "m c"], None, None]:
        (gradient,), (index, weights) = grad_outputs, ctx.saved_tensors
        row, order = index.flatten().sort(stable=True)
        first = torch.searchsorted(row, torch.arange(ctx.num_rows, device=row.device, dtype=row.dtype))
        point, weights = order // index.shape[1], weights.flatten()[order]
        return F.embedding_bag(point, gradient.contiguous(), first, per_sample_weights=weights, mode="sum"), None, None


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells of the cube that may be full, and where they are."""

    full: Bool[Tensor, " m"]
    """Flattened, with one empty cell all round."""
    side: int
    """Cells a side, without those."""
    scale: float
    """Cells to a scene unit."""
    steps: Float[Tensor, "3"]
    """From a cell's (x, y, z) to its place in `full`."""
    centres: Float[Tensor, "k 3"]
    """Of full blocks of cells, scene units."""
    radius: float
    """Of a block."""

    @classmethod
    def of(cls, occupied: Bool[Tensor, "s s s"], box_warp: float, block: int = 4) -> "Cells":
        """Prepare cells that are indexed [z, y, x]; at least one is full."""
        side = occupied.shape[0]
        blocks = F.max_pool3d(occupied[None, None].float(), min(block, side), ceil_mode=True)[0, 0]
        width = min(block, side) / side
        centres = ((blocks.nonzero().flip(1) + 0.5) * width - 0.5) * box_warp  # k, x y z
        steps = torch.tensor([1.0, side + 2, (side + 2) ** 2], device=occupied.device)
        full = F.pad(occupied, (1,) * 6).flatten()
        return cls(full=full, side=side, scale=side / box_warp, steps=steps, centres=centres, radius=3**0.5 / 2 * box_warp * width)

    def occupied(self, points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
        """Say which points lie in full cells."""
        place = (points * self.scale + (self.side / 2 + 1)).clamp_(0.0, self.side + 1.0).floor_()
        return self.full[torch.mv(place, self.steps).long()]

    def span(self, eye: Float[Tensor, "b 3"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return the distances from `eye` between which all full cells lie."""
        distance = (self.centres - eye[:, None]).norm(dim=-1)  # b m
        return (distance.amin(1) - self.radius).clamp(min=0), distance.amax(1) + self.radius


def swept(full: Bool[Tensor, "s s s"], box_warp: float, neck: Neck, rest: tuple[float, float, float]) -> Bool[Tensor, "s s s"]:
    """Return the cells, indexed [z, y, x], that are full with the head held as at `rest`, or turned from there in any way that is usual."""
    cells, side, pose = Cells.of(full, box_warp), len(full), torch.tensor(rest, device=full.device)
    centres = ((torch.arange(side, device=full.device) + 0.5) / side - 0.5) * box_warp
    points = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")[::-1], -1).view(1, -1, 3)  # z y x to x y z
    swings = neck.swing(pose + BENDS.to(full.device), pose)
    return torch.stack([cells.occupied(neck.straighten(points, swing[None])[0]) for swing in swings]).any(0).view_as(full)


@dataclass(frozen=True, kw_only=True)
class SteppedRays:
    """Rays of all pictures in one list, each walked in equal steps."""

    origins: Float[Tensor, "r 3"]
    directions: Float[Tensor, "r 3"]
    volume: Int[Tensor, " r"]
    """In which of several volumes each ray looks."""
    near: Float[Tensor, "r 1"]
    """Distance of the first step."""
    step: Float[Tensor, "r 1"]
    swung: Float[Tensor, "r 2 3"] | None = None
    """Where necks are bent: what leads from the rays' origins, and along them, to where shoulders are at rest (`Neck.swing`)."""

    @classmethod
    def of(cls, rays: Rays, near: Float[Tensor, " b"], step: Float[Tensor, " b"], neck: Neck, swing: Float[Tensor, "b 3 3"] | None) -> "SteppedRays":
        """Put the rays of b pictures in one list, through necks that are bent by `swing`, if they are."""
        volume = torch.arange(len(near), device=near.device).repeat_interleave(rays.origins.shape[1])
        lines = None if swing is None else torch.stack([rays.origins - neck.pivot, rays.directions], 2).flatten(1, 2) @ swing.mT  # b 2r 3
        return cls(
            origins=rays.origins.flatten(0, 1),
            directions=rays.directions.flatten(0, 1),
            volume=volume,
            near=near[volume, None],
            step=step[volume, None],
            swung=None if lines is None else lines.reshape(-1, 2, 3),
        )

    def __getitem__(self, index: Int[Tensor, " k"] | slice) -> "SteppedRays":
        """Return some of the rays."""
        return replace(self, **{name: part[index] for name, part in vars(self).items() if part is not None})

    def split(self, size: int) -> list["SteppedRays"]:
        """Return lists of `size` rays, the last one shorter."""
        return [self[start : start + size] for start in range(0, len(self.near), size)]

    def points(self, distances: Float[Tensor, "r s"]) -> Float[Tensor, "r*s 3"]:
        """Return the places at these distances, ray by ray."""
        return torch.addcmul(self.origins[:, None], distances[:, :, None], self.directions[:, None]).flatten(0, 1)

    def at_rest(self, points: Float[Tensor, "n 3"], distances: Float[Tensor, "r s"], neck: Neck, *, compact: bool) -> Float[Tensor, "n 3"]:
        """Return where these places are when necks are not bent: `Neck.straighten`. `compact` looks whether any would move, which a GPU waits for."""
        if self.swung is None:
            return points
        share = neck.share(points)
        if compact and not bool(share.any()):
            return points
        way = torch.addcmul(self.swung[:, None, 0], distances[:, :, None], self.swung[:, None, 1]).flatten(0, 1)
        return torch.addcmul(points, share, way)


def guided_bins(weights: Float[Tensor, "r m"], num_samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "r s"]:
    """Place samples by coarse weights, in the middles of equal shares (with `generator` anywhere in them), in units of the m segments.

    Shares are of the weights' square roots: enough samples on the surface, and some on what is faint.
    """
    cdf = F.pad((weights + 1e-5).sqrt_().cumsum(1), (1, 0))
    cdf = cdf / cdf[:, -1:]
    shares = torch.arange(num_samples, device=cdf.device, dtype=cdf.dtype).expand(len(cdf), -1)
    jitter = 0.5 if generator is None else torch.rand(shares.shape, device=cdf.device, dtype=cdf.dtype, generator=generator)
    places = (shares + jitter) / num_samples
    above = torch.searchsorted(cdf, places, right=True).clamp_(1, weights.shape[1])
    low, high = cdf.gather(1, above - 1), cdf.gather(1, above)
    return above - 1 + ((places - low) / (high - low)).clamp_(0.0, 1.0)


def guided_weights(density: Float[Tensor, "r s"], distances: Float[Tensor, "r s"]) -> Float[Tensor, "r s"]:
    """Share of each sample in what its ray shows; the outermost samples reach out by half of their distance to the next."""
    near, far = (1.5 * distances[:, i] - 0.5 * distances[:, j] for i, j in ((0, 1), (-1, -2)))
    reached = torch.cat([near[:, None], distances, far[:, None]], 1)
    ends = torch.cat([density[:, :1], density, density[:, -1:]], 1)
    segments = segment_weights(ends[None], reached[None])[0]
    shares = (F.pad(segments, (1, 0)) + F.pad(segments, (0, 1))) / 2  # as in `volume.composite`
    shares[:, 1] += shares[:, 0]
    shares[:, -2] += shares[:, -1]
    return shares[:, 1:-1]
