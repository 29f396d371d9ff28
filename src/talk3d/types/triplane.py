"""Tri-planes: three feature pictures that together describe a volume."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import ShapeError

PlaneAxes = Literal["fixed", "released"]
"""Which world axes run along the planes. Plane 0 is (column x, row y) and plane 1 (column x, row z) in both orders; plane 2 is
(column z, row y) in the corrected order `fixed`, and (column z, row x) in EG3D's first release, `released`."""


@dataclass(frozen=True, kw_only=True)
class Triplane:
    """Feature planes of a batch of volumes, with the order of their axes."""

    planes: Float[Tensor, "*b 3 c h w"]
    axes: PlaneAxes
    swing: Float[Tensor, "b 3 3"] | None = None
    """How necks are bent, see `ops.geometry.Neck`; None: as the planes show them."""

    def __add__(self, delta: "Triplane") -> "Triplane":
        """Add a deltaplane.

        Raises:
            ShapeError: the two have different plane axes.
        """
        if delta.axes != self.axes:
            raise ShapeError(f"planes with axes {self.axes!r} and {delta.axes!r} cannot be added: use models of one prior")
        return replace(self, planes=self.planes + delta.planes)

    def __getitem__(self, index: slice) -> "Triplane":
        """Return some of the volumes."""
        return replace(self, planes=self.planes[index], swing=None if self.swing is None else self.swing[index])

    def to(self, device: torch.device | str) -> "Triplane":
        """Return the same planes on another device."""
        return replace(self, planes=self.planes.to(device), swing=None if self.swing is None else self.swing.to(device))
