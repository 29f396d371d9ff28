"""Tri-plane look-up and the 3D-aware roll-out of plane features."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from talk3d.types import PlaneAxes

_PLANE_COORDINATES: dict[PlaneAxes, tuple[tuple[int, int], ...]] = {"fixed": ((0, 1), (0, 2), (2, 1)), "released": ((0, 1), (0, 2), (2, 0))}
"""For each plane, the world axes along its columns and rows."""


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


def roll_out(planes: Float[Tensor, "b 3 c h w"]) -> Float[Tensor, "b 3 d h w"]:
    """Give every plane what the two others know along their shared axis: c becomes 3c channels.

    For planes A (row y, column x), B (row z, column x), C (row y, column z): the other planes are averaged over the axis that is not
    shared and the profile is spread over the shared one, A ← [A, B over z, C over z], B ← [A over y, B, C over y], C ← [A over x, B over x, C].

    Reference: Mimic3D (arXiv 2303.09036), 3D-aware convolution, with the axes of `PlaneAxes` "fixed".
    """
    a, b, c = planes.unbind(1)

    def along_columns(profile: Tensor) -> Tensor:
        return profile.unsqueeze(-2).expand_as(a)

    def along_rows(profile: Tensor) -> Tensor:
        return profile.unsqueeze(-1).expand_as(a)

    columns = {name: plane.mean(-2) for name, plane in (("a", a), ("b", b), ("c", c))}  # mean over rows, one value a column
    rows = {name: plane.mean(-1) for name, plane in (("a", a), ("b", b), ("c", c))}
    return torch.stack(
        [
            torch.cat([a, along_columns(columns["b"]), along_rows(rows["c"])], 1),
            torch.cat([along_columns(columns["a"]), b, along_rows(columns["c"])], 1),
            torch.cat([along_rows(rows["a"]), along_columns(rows["b"]), c], 1),
        ],
        1,
    )
