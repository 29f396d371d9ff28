"""Cameras and rays: where a picture is seen from. OpenCV axes, EG3D scene units."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A batch of pinhole cameras in the head's space.

    World: right-handed, y up, the face at the origin looks along +z. Camera: x right, y down, z forward (OpenCV).
    Intrinsics are divided by the image side, so they hold at every resolution.

    Reference: EG3D (arXiv 2112.07945), camera labels of 25 numbers.
    """

    cam2world: Float[Tensor, "*b 4 4"]
    """Camera-to-world matrices; the last column is the camera's centre in scene units."""
    intrinsics: Float[Tensor, "*b 3 3"]
    """Focal lengths and principal point in image sides."""

    @classmethod
    def from_label(cls, label: Float[Tensor, "*b 25"]) -> "Camera":
        """Read EG3D labels: 16 numbers of cam2world, row-major, then 9 of the intrinsics.

        Raises:
            ShapeError: the last axis is not 25 long.
        """
        if label.shape[-1] != 25:
            raise ShapeError(f"a camera label has 25 numbers, got {label.shape[-1]}: give 16 of cam2world and 9 of the intrinsics")
        return cls(cam2world=label[..., :16].unflatten(-1, (4, 4)), intrinsics=label[..., 16:].unflatten(-1, (3, 3)))

    def to_label(self) -> Float[Tensor, "*b 25"]:
        """Write EG3D labels, the inverse of `from_label`."""
        return torch.cat([self.cam2world.flatten(-2), self.intrinsics.flatten(-2)], -1)

    def __len__(self) -> int:
        """Number of cameras along the first batch axis."""
        return self.cam2world.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "Camera":
        """Pick cameras along the first batch axis."""
        return Camera(cam2world=self.cam2world[index], intrinsics=self.intrinsics[index])

    def every(self, step: int, row: int, column: int, side: int) -> "Camera":
        """Return the cameras whose pictures are every `step`-th row and column, from these on, of these cameras' pictures of `side` pixels a side.

        Rays that always went through the same few places would leave what lies between them to chance.
        """
        intrinsics = self.intrinsics.clone()
        intrinsics[..., 0, 2] += ((step - 1) / 2 - column) / side
        intrinsics[..., 1, 2] += ((step - 1) / 2 - row) / side
        return Camera(cam2world=self.cam2world, intrinsics=intrinsics)

    def to(self, device: torch.device | str) -> "Camera":
        """Return the same cameras on another device."""
        return Camera(cam2world=self.cam2world.to(device), intrinsics=self.intrinsics.to(device))


@dataclass(frozen=True, kw_only=True)
class Rays:
    """Rays through pixel centres, row-major, and the span of distances worth sampling."""

    origins: Float[Tensor, "*b r 3"]
    """Scene units."""
    directions: Float[Tensor, "*b r 3"]
    """Unit length."""
    near: Float[Tensor, "*b r 1"]
    """Euclidean distance from the origin at which sampling starts."""
    far: Float[Tensor, "*b r 1"]
    """Distance at which sampling ends."""

    def points(self, distances: Float[Tensor, "*b r s"]) -> Float[Tensor, "*b r s 3"]:
        """Return the places at these distances along each ray, scene units."""
        return self.origins.unsqueeze(-2) + distances.unsqueeze(-1) * self.directions.unsqueeze(-2)
